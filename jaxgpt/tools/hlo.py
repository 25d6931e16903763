"""Read an optimised XLA program: its kernels, memory traffic and collectives.

A program is the text of `compiled.as_text()`. It has computations, and a computation has
instructions. An instruction outside a fusion is a kernel, a library call, a copy or a collective.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all",
    "collective-permute", "collective-broadcast", "ragged-all-to-all",
}  # fmt: skip
CONTROL = {"while", "call", "conditional", "async-start"}  # these run other computations
FREE = CONTROL | {  # these do no work of their own
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "async-update",
}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}  # TPU annotations
SLICES = {"dynamic-slice", "gather", "slice"}
PRODUCTS = ("dot", "convolution")
FORWARD, BACKWARD = "attention, forward", "attention, backward"
# Flash kernels: words of the kernel's target, name or scope; its kind; its FLOPs / (B N T T H); and
# T's axis in its queries. Causal attention computes half of the T x T scores.
FLASH_KERNELS = [
    (r"__cudnn\$fmhaSoftmaxBackward", BACKWARD, 5.0, 2),
    (r"__cudnn\$fmhaSoftmax", FORWARD, 2.0, 2),
    (r"/flash/pallas_call", FORWARD, 2.0, 1),
    (r"/flash_dq/pallas_call", BACKWARD, 3.0, 1),
    (r"/flash_dkv/pallas_call", BACKWARD, 4.0, 1),
    (r"\bsplash_mha_fwd", FORWARD, 2.0, 2),
    (r"\bsplash_mha_dq", BACKWARD, 3.0, 2),
    (r"\bsplash_mha_dkv", BACKWARD, 4.0, 2),
]
CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")  # products by NVIDIA's library

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_FAST = re.compile(r"\b[a-z]\w*\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.-]+)")

Shape = tuple[str, tuple[int, ...]]  # an array's element type and dimensions


@dataclass(frozen=True)
class Op:
    """One instruction: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def shapes(self) -> list[Shape]:
        """Return the shapes of the result: one array, or those of a tuple."""
        return _parse_shapes(self.type)

    @cached_property
    def bytes(self) -> int:
        """Return the size of the result."""
        return sum(map(array_bytes, self.shapes))

    @cached_property
    def main_bytes(self) -> int:
        """Return the size of the result without arrays in a TPU's on-chip memory, as in S(1)."""
        return sum(map(array_bytes, _parse_shapes(_FAST.sub("", self.type))))

    @cached_property
    def called(self) -> list[str]:
        """Return the names of the computations that this instruction runs."""
        branches = _search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
        return _CALLED.findall(self.attributes) + re.findall(r"[\w.-]+", branches)

    @cached_property
    def target(self) -> str:
        """Return the target of a custom call, or an empty string."""
        return _search(r'custom_call_target="([^"]*)"', self.attributes)

    @property
    def workspace(self) -> int:
        """Return the bytes of scratch memory, which cuBLAS and cuDNN return last."""
        is_library = self.target.startswith("__cu") and len(self.shapes) > 1
        is_bytes = is_library and self.shapes[-1][0] in ("s8", "u8")
        return array_bytes(self.shapes[-1]) if is_bytes else 0

    @property
    def is_kernel(self) -> bool:
        """Return whether the device launches it; asynchronous operations count at their start."""
        is_end = self.opcode.endswith("-done")
        return not (is_end or self.opcode in FREE or self.target in FREE_CALLS)


@dataclass
class KernelGroup:
    """All kernels of one kind in one call: their number, and the work of all of them together."""

    kernels: int = 0
    bytes: int = 0
    flops: float = 0
    seconds: float = 0


@dataclass(frozen=True)
class Collective:
    """A collective that runs `times` per call; each time a device sends `bytes` to its group."""

    kind: str
    times: int
    bytes: int
    group: tuple[int, ...]


@dataclass
class Overlap:
    """All collectives of one kind in one call; seconds are estimates.

    `hidden` is the part of `seconds` in which the device computes at the same time.
    """

    calls: int = 0
    asynchronous: int = 0  # calls that return before the data has arrived
    seconds: float = 0
    hidden: float = 0


class Program:
    """A parsed program: its computations by name, and the name of its entry."""

    def __init__(self, text: str):
        """Parse the text of a compiled program. Raises `ValueError` for unknown syntax."""
        self.header = text.split("\n", 1)[0]
        self.devices = int(_search(r"num_partitions=(\d+)", self.header) or 1)
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry, ops = "", {}
        for line in text.splitlines():
            if name := _NAME.match(line):
                ops[name[1]] = _parse(name[1], line[name.end() :])
            elif header := _HEADER.match(line):
                ops = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry

    @cached_property
    def execution_counts(self) -> Counter[str]:
        """Count how often one call runs each computation that is not a fusion.

        A loop with an unknown trip count counts once. All branches of a conditional count.
        """
        counts: Counter[str] = Counter()

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for op in self.computations[name].values():
                if op.opcode in CONTROL:
                    for called in op.called:
                        visit(called, times * self._trip_count(op))

        visit(self.entry, 1)
        return counts

    def _trip_count(self, op: Op) -> int:
        """Return a loop's trip count, from XLA's annotation or the bound in its condition."""
        known = _search(r'"known_trip_count":\{"n":"(\d+)"', op.attributes)
        condition = _search(r"\bcondition=%?([\w.-]+)", op.attributes)
        if known or not condition:
            return int(known or 1)
        ops = self.computations[condition]
        last = list(ops.values())[-1]
        bounds = [ops[name] for name in last.operands if ops[name].opcode == "constant"]
        if last.opcode == "compare" and "direction=LT" in last.attributes and bounds:
            return int(bounds[0].operands[0])
        return 1

    def executed(self) -> Iterator[tuple[Op, int]]:
        """Yield every instruction outside fusions with how often one call runs it."""
        for name, times in self.execution_counts.items():
            for op in self.computations[name].values():
                yield op, times

    def kernels(self) -> Counter[str]:
        """Count the kernels that one call launches, by opcode."""
        counts: Counter[str] = Counter()
        for op, times in self.executed():
            if op.is_kernel:
                counts[op.opcode] += times
        return counts

    def arrays(self) -> set[Shape]:
        """Return the shapes of all arrays in memory, without those inside fusions."""
        return {shape for op, _ in self.executed() for shape in op.shapes}

    def traffic(self) -> int:
        """Return the bytes that the kernels of one call read and write."""
        total = 0
        for name, times in self.execution_counts.items():
            ops = self.computations[name]
            total += times * sum(self._traffic(ops, op) for op in ops.values() if op.is_kernel)
        return total

    def _traffic(self, ops: dict[str, Op], op: Op) -> int:
        """Return the bytes that one kernel of a computation reads and writes.

        Of an array that a kernel only slices or updates in place, only that part counts.
        """
        if op.opcode == "fusion":
            inside = self.computations[op.called[0]]
            body = list(inside.values())
            parameters = [o for o in body if o.opcode == "parameter"]
            arguments = {o.name: op.operands[int(o.operands[0])] for o in parameters}
        else:
            inside, body, arguments = ops, [op], {name: name for name in op.operands}
        read, written = 0, op.main_bytes - op.workspace
        if op.opcode.endswith("-start") and len(op.shapes) > len(op.operands):
            written -= sum(ops[name].main_bytes for name in op.operands)  # returned, not written
        for name, outer in arguments.items():
            size = ops[outer].main_bytes if outer in ops else 0
            users = [o for o in body if name in o.operands]
            while len(users) == 1 and users[0].opcode == "bitcast":
                name = users[0].name
                users = [o for o in body if name in o.operands]
            opcodes = [o.opcode for o in users] if all(o.operands[0] == name for o in users) else []
            if size and opcodes == ["dynamic-update-slice"]:
                part = inside[users[0].operands[1]].bytes
                written += part - size
            elif opcodes and SLICES.issuperset(opcodes):
                read += min(size, sum(o.bytes for o in users))
            else:
                read += size
        return read + max(0, written)

    def breakdown(self, seconds_of: Callable[[str, float, int], float]) -> dict[str, KernelGroup]:
        """Group the kernels of one call by kind: attention, matmuls, collectives, or memory.

        A kernel of kind "memory" computes no product. `seconds_of(kind, flops, bytes)` estimates
        the time of one kernel.
        """
        groups: dict[str, KernelGroup] = {}
        for name, times in self.execution_counts.items():
            ops = self.computations[name]
            for op in ops.values():
                if not op.is_kernel:
                    continue
                kind, flops = self._work(ops, op)
                traffic = self._traffic(ops, op)
                group = groups.setdefault(kind, KernelGroup())
                group.kernels += times
                group.bytes += times * traffic
                group.flops += times * flops
                group.seconds += times * seconds_of(kind, flops, traffic)
        return groups

    def kinds(self) -> dict[str, str]:
        """Return the kind of every kernel by its name: those of `breakdown`, and copies apart."""
        found = {}
        for name in self.execution_counts:
            ops = self.computations[name]
            for op in filter(lambda op: op.is_kernel, ops.values()):
                kind = self._work(ops, op)[0]
                is_copy = kind == "memory" and ("copy" in op.name or "transpose" in op.name)
                found[op.name] = "copies" if is_copy else kind
        return found

    def _work(self, ops: dict[str, Op], op: Op) -> tuple[str, float]:
        """Return the kind of a kernel, and its floating-point operations in products."""
        if op.opcode.removesuffix("-start") in COLLECTIVES:
            return "collectives", 0
        if attention := attention_work(op, ops):
            return attention
        body = [op]
        if op.opcode == "fusion":
            ops = self.computations[op.called[0]]
            body = list(ops.values())
        products = [o for o in body if o.opcode in PRODUCTS or o.target.startswith(CUBLAS)]
        flops = sum(product_flops(o, ops) for o in products)
        return ("matmuls" if products else "memory"), flops

    def collectives(self) -> list[Collective]:
        """Return the collectives of one call, with the bytes that a device sends in each.

        Ring algorithms are assumed, which send the fewest bytes possible. In a group of n, an
        all-reduce of S bytes sends 2 S (n - 1) / n. An all-gather, a reduce-scatter and an
        all-to-all of a whole array of S bytes send S (n - 1) / n, and a permutation sends S.
        """
        found: dict[str, Collective] = {}
        for name, times in (self.execution_counts + self._fusion_counts).items():
            for op in self.computations[name].values():
                if collective := self._collective(name, op, times):
                    # On a TPU, several fusions continue one collective, which has one channel.
                    channel = _search(r"\b(channel_id=\d+)", op.attributes)
                    is_shared = channel and name in self._fusion_counts
                    found[channel if is_shared else f"{name} {op.name}"] = collective
        return list(found.values())

    @cached_property
    def _fusion_counts(self) -> Counter[str]:
        """Count how often one call runs the computation of each fusion."""
        counts: Counter[str] = Counter()
        for op, times in self.executed():
            if op.opcode == "fusion":
                counts[op.called[0]] += times
        return counts

    def _collective(self, name: str, op: Op, times: int) -> Collective | None:
        """Return the collective that an instruction of computation `name` starts, if any."""
        kind = op.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        ops = self.computations[name].values()
        if name in self._fusion_counts and any(o.opcode == "dynamic-slice" for o in ops):
            kind = kind.replace("all-reduce", "reduce-scatter")  # each device keeps a part
        group = tuple(replica_groups(op.attributes, self.devices)[0])
        sent = bytes_sent(kind, op, len(group))
        return Collective(kind, times, sent, group) if len(group) > 1 else None

    def overlap(
        self,
        seconds_of: Callable[[str, float, int], float],
        seconds_to_send: Callable[[Collective], float],
    ) -> dict[str, Overlap]:
        """Estimate by kind of collective how much of its time one call hides behind compute.

        The device is modelled as two queues that run in the order of the program. One has the
        kernels; it waits where the program needs the result of a collective. The other has the
        asynchronous collectives. `seconds_of` is as in `breakdown`.
        """
        found: dict[str, Overlap] = {}

        def run(name: str, times: int) -> float:
            """Add the collectives of `times` runs of a computation; return the time of one run."""
            ops = self.computations[name]
            now = links_free = 0.0
            ends: dict[str, float] = {}  # when each asynchronous collective ends
            sent: list[tuple[float, float, Overlap]] = []  # when each collective begins and ends
            for op in ops.values():
                waits_until = now
                if op.opcode in CONTROL:
                    count = self._trip_count(op)
                    now += count * sum(run(called, times * count) for called in op.called)
                elif collective := self._collective(name, op, times):
                    seconds = seconds_to_send(collective)
                    begin = max(now, links_free)
                    links_free = begin + seconds
                    group = found.setdefault(collective.kind, Overlap())
                    group.calls += times
                    group.seconds += times * seconds
                    group.hidden += times * seconds
                    sent.append((begin, links_free, group))
                    if op.opcode.endswith("-start"):
                        group.asynchronous += times
                        ends[op.name] = links_free
                    else:
                        waits_until = links_free
                elif op.opcode.endswith("-done"):
                    waits_until = max(now, ends.pop(op.operands[0], now))
                elif op.is_kernel:
                    kind, flops = self._work(ops, op)
                    now += seconds_of(kind, flops, self._traffic(ops, op))
                if waits_until > now:
                    for begin, end, group in sent:
                        group.hidden -= times * max(0.0, min(end, waits_until) - max(begin, now))
                    now = waits_until
            return now

        run(self.entry, 1)
        return found


def attention_work(op: Op, ops: dict[str, Op]) -> tuple[str, float] | None:
    """Return the kind of a flash attention kernel, and its FLOPs if attention is causal.

    The FLOPs follow from the shape of the queries. These are the kernel's largest array whose last
    axis is the head dim.
    """
    if op.opcode != "custom-call":
        return None
    scope = _search(r'op_name="([^"]*)"', op.attributes)
    text = f"{op.target} {op.name} {scope}"
    outputs = [dims for _, dims in op.shapes if len(dims) == 4]
    for words, kind, operations, axis in FLASH_KERNELS if outputs else ():
        if re.search(words, text):
            inputs = [dims for name in op.operands for _, dims in ops[name].shapes]
            shapes = [dims for dims in inputs if len(dims) == 4 and dims[-1] == outputs[0][-1]]
            queries = max(outputs[:1] + shapes, key=math.prod)
            return kind, operations * math.prod(queries) * queries[axis]
    return None


def product_flops(op: Op, ops: dict[str, Op]) -> float:
    """Return the operations of a product: two per element of the output and summed index."""
    if op.opcode == "convolution":
        return 2 * _convolution_terms(op, ops)
    summed = _ints(
        _search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        or _search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', op.attributes)
    )
    lhs = ops[op.operands[0]].shapes[0][1]
    return 2 * math.prod(op.shapes[0][1]) * math.prod(lhs[i] for i in summed)


def _convolution_terms(op: Op, ops: dict[str, Op]) -> int:
    """Return the multiplications of a convolution, which is a TPU's product.

    dim_labels=bf0_io0->bf0 names batch, feature, input, output and the axes of the window. Along
    such an axis, terms in the padding do not count.
    """
    labels = _search(r"dim_labels=(\w+->\w+)", op.attributes).replace("->", "_").split("_")
    shapes = (*(ops[name].shapes[0][1] for name in op.operands[:2]), op.shapes[0][1])
    lhs, kernel, out = (dict(zip(*pair, strict=True)) for pair in zip(labels, shapes, strict=True))
    windows = [min(lhs[axis], out[axis]) * kernel[axis] for axis in out if axis.isdigit()]
    return out["b"] * out["f"] * kernel["i"] * math.prod(windows)


def bytes_sent(kind: str, op: Op, n: int) -> int:
    """Return the bytes that a device in a group of n sends; see `Program.collectives`."""
    if kind == "collective-permute":  # its start returns (operand, result, ...)
        return array_bytes(op.shapes[0])
    size = op.bytes
    if kind in ("all-gather", "reduce-scatter") and op.opcode.endswith("-start"):
        size = size * n // (n + 1)  # the start returns the whole array and a device's part
    elif op.opcode.endswith("-start") and op.type.startswith("(("):
        size //= 2  # of operands, and of results of the same size
    elif op.opcode == "reduce-scatter":  # it returns a device's part
        size *= n
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) // n


def array_bytes(shape: Shape) -> int:
    """Return the size of an array, rounded up to whole bytes."""
    kind, dims = shape
    bits = int(_search(r"(\d+)", kind) or (8 if kind == "pred" else 0))
    return math.ceil(math.prod(dims) * bits / 8)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Return which devices communicate, [groups, members]; XLA has four notations for it.

    Raises `ValueError` for another notation.
    """
    if pair := _search(r"source_target_pairs=\{\{([\d,]*)\}", attributes):
        return np.array([_ints(pair)])
    text = attributes.partition("replica_groups=")[2]
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text):
        names = re.findall(r"'(\w+)'", mesh[1])
        sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
        inside = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        outside = [axis for axis in range(len(names)) if axis not in inside]
        ids = _iota(mesh[2] or f"[{devices}]").reshape(sizes)
        return ids.transpose(outside + inside).reshape(-1, math.prod(sizes[i] for i in inside))
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(_ints(iota[1]))
    if listed := re.match(r"\{\{([\d,{}]*)\}\}", text):
        return np.array([_ints(group) for group in listed[1].split("},{")])
    if text and not text.startswith("{}"):
        raise ValueError(f"unknown form of device groups: {text[:80]}")
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    """Return the numbers from 0 in a shape and order of axes, as in `[8,4]T(1,0)`; or a list."""
    if not text.startswith("["):
        return np.array(_ints(text))
    dims, _, order = text.partition("]")
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _search(pattern: str, text: str) -> str:
    """Return the first group of a pattern's first match, or an empty string."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _parse_shapes(text: str) -> list[Shape]:
    return [(kind, _ints(dims)) for kind, dims in _SHAPE.findall(text)]


def _parse(name: str, text: str) -> Op:
    """Parse `type opcode(operands), attributes`."""
    # The opcode is the first word between a space and `(`; a type has no such word.
    opcode = re.search(r" ([a-z][\w-]*)\(", text)
    if not opcode:
        raise ValueError(f"unknown form of instruction: {text[:80]}")
    kind, rest = text[: opcode.start()], text[opcode.end() :]
    depth, end = 1, 0
    while depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inside = rest[: end - 1]
    operands = re.findall(r"%([\w.-]+)", inside) or [inside.strip()]
    return Op(name, kind, opcode[1], tuple(operands), rest[end:])
