"""Reads an optimised XLA program: what runs, how often, and what crosses the links.

A program is text, as `compiled.as_text()` has it: computations, each a list of instructions. Those
outside fusions are a kernel, a library call, a copy or a collective each.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
CONTROL = ("while", "call", "conditional", "async-start")  # run other computations
FREE = {  # no work of their own
    *CONTROL,
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "async-update"),
}
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}  # notes on a TPU
SLICES = ("dynamic-slice", "gather", "slice")

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_FAST = re.compile(r"\b[a-z]\w*\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}")
_CHANNEL = re.compile(r"\bchannel_id=\d+")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Op:
    """One instruction: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(element type, dimensions) of what it returns; several for a tuple."""
        found = _SHAPE.findall(self.type)
        return tuple(
            (kind, tuple(map(int, dims.split(","))) if dims else ()) for kind, dims in found
        )

    @cached_property
    def bytes(self) -> int:
        """Of what it returns."""
        return sum(map(array_bytes, self.shapes))

    @cached_property
    def main_bytes(self) -> int:
        """Of what it returns in main memory, and not in memory beside the cores, as TPUs have."""
        fast = [_SHAPE.findall(array)[0] for array in _FAST.findall(self.type)]
        return self.bytes - sum(array_bytes((kind, _sizes(dims))) for kind, dims in fast)

    @cached_property
    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = _BRANCHES.search(self.attributes)
        more = re.findall(r"[\w.-]+", branches[1]) if branches else []
        return _CALLED.findall(self.attributes) + more

    @cached_property
    def target(self) -> str:
        """What a custom call calls."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    @property
    def is_kernel(self) -> bool:
        """Whether it is launched; the end of an asynchronous operation was counted at its start."""
        done = self.opcode.endswith("-done")
        return not (done or self.opcode in FREE or self.target in FREE_CALLS)


@dataclass(frozen=True)
class Collective:
    """`times` collectives of one `kind`, for each of which a device sends `bytes` to its group."""

    kind: str
    times: int
    bytes: int
    group: tuple[int, ...]


def _sizes(dims: str) -> tuple[int, ...]:
    return tuple(map(int, dims.split(","))) if dims else ()


def array_bytes(shape: tuple[str, tuple[int, ...]]) -> int:
    kind, dims = shape
    digits = re.search(r"\d+", kind)
    bits = int(digits[0]) if digits else {"pred": 8}.get(kind, 0)
    return -(-math.prod(dims) * bits // 8)


class Program:
    """The computations of a program by name, and which one is its entry."""

    def __init__(self, text: str):
        self.header = text.split("\n", 1)[0]
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry, ops = "", {}
        for line in text.splitlines():
            if name := _NAME.match(line):
                ops[name[1]] = _parse(name[1], line[name.end() :])
            elif header := _HEADER.match(line):
                ops = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry

    @cached_property
    def runs(self) -> Counter[str]:
        """How often a call runs each computation that is not a fusion.

        A loop whose trip count is not in the program counts once, a conditional's branches all.
        """
        runs: Counter[str] = Counter()

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for op in self.computations[name].values():
                if op.opcode in CONTROL:
                    for called in op.called:
                        visit(called, times * self._trips(op))

        visit(self.entry, 1)
        return runs

    def _trips(self, op: Op) -> int:
        """How often a loop runs its body: XLA's note, or the bound that its condition compares."""
        if known := _TRIPS.search(op.attributes):
            return int(known[1])
        if not (condition := _CONDITION.search(op.attributes)):
            return 1
        ops = self.computations[condition[1]]
        last = list(ops.values())[-1]
        bounds = [ops[name] for name in last.operands if ops[name].opcode == "constant"]
        if last.opcode == "compare" and "direction=LT" in last.attributes and bounds:
            return int(bounds[0].operands[0])
        return 1

    def executed(self) -> Iterator[tuple[Op, int]]:
        """Every instruction outside fusions, and how often a call runs it."""
        for name, times in self.runs.items():
            for op in self.computations[name].values():
                yield op, times

    def kernels(self) -> Counter[str]:
        """Kernels, library calls, copies and collectives that a call launches, by opcode."""
        counts: Counter[str] = Counter()
        for op, times in self.executed():
            if op.is_kernel:
                counts[op.opcode] += times
        return counts

    def custom_calls(self) -> Counter[str]:
        """How often a call runs each custom call, by target."""
        counts: Counter[str] = Counter()
        for op, times in self.executed():
            if op.opcode == "custom-call":
                counts[op.target] += times
        return counts

    def arrays(self) -> set[tuple[str, tuple[int, ...]]]:
        """(element type, dimensions) of every array held in memory, so not inside a fusion."""
        return {shape for op, _ in self.executed() for shape in op.shapes}

    def traffic(self) -> int:
        """Bytes that a call's kernels read and write; of an operand they slice, the slice."""
        total = 0
        for name, times in self.runs.items():
            ops = self.computations[name]
            total += times * sum(self._traffic(ops, op) for op in ops.values() if op.is_kernel)
        return total

    def _traffic(self, ops: dict[str, Op], op: Op) -> int:
        if op.opcode != "fusion":
            inside, arguments = {**ops, op.name: op}, {name: name for name in op.operands}
            body = [op]
        else:
            inside = self.computations[op.called[0]]
            body = list(inside.values())
            numbers = {o.name: o.operands for o in body if o.opcode == "parameter"}
            arguments = {name: op.operands[int(n)] for name, (n,) in numbers.items()}
        moved, written = 0, op.main_bytes
        for name, outer in arguments.items():
            size = ops[outer].main_bytes if outer in ops else 0
            if not size:
                continue
            users = [o for o in body if name in o.operands]
            while len(users) == 1 and users[0].opcode == "bitcast":
                name = users[0].name
                users = [o for o in body if name in o.operands]
            updates = [o for o in users if o.opcode == "dynamic-update-slice"]
            if users and all(o.opcode in SLICES and o.operands[0] == name for o in users):
                size = min(size, sum(o.bytes for o in users))
            elif len(users) == len(updates) == 1 and updates[0].operands[0] == name:
                part = inside[updates[0].operands[1]].bytes  # the rest stays where it is
                written += part - size
                size = 0
            moved += size
        return moved + max(0, written)

    def collectives(self) -> list[Collective]:
        """What crosses the links: by ring algorithms, which send the least a device can.

        In a group of n, an all-reduce of S bytes sends 2 S (n - 1) / n; an all-gather, a
        reduce-scatter and an all-to-all S (n - 1) / n, S being the whole array; a permutation S.
        """
        fused: Counter[str] = Counter()
        for op, times in self.executed():
            if op.opcode == "fusion":
                fused[op.called[0]] += times
        found: dict[str, Collective] = {}
        for name, times in (self.runs + fused).items():
            ops = self.computations[name].values()
            for op in ops:
                kind = op.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                if name in fused and any(o.opcode == "dynamic-slice" for o in ops):
                    kind = kind.replace("all-reduce", "reduce-scatter")  # of which a part is kept
                group = tuple(groups(op.attributes, self.devices)[0])
                channel = _CHANNEL.search(op.attributes)  # a TPU's fusions share one between them
                key = channel[0] if channel and name in fused else f"{name} {op.name}"
                found[key] = Collective(kind, times, _sent(kind, op, len(group)), group)
        return [c for c in found.values() if len(c.group) > 1]

    @cached_property
    def devices(self) -> int:
        """How many devices run the program."""
        found = re.search(r"num_partitions=(\d+)", self.header)
        return int(found[1]) if found else 1


def _sent(kind: str, op: Op, n: int) -> int:
    sizes = [array_bytes(shape) for shape in op.shapes]
    if kind == "collective-permute":  # started: (operand, result, notes)
        return sizes[0]
    size = sum(sizes)
    if kind in ("all-gather", "reduce-scatter") and op.opcode.endswith("-start"):
        size = size * n // (n + 1)  # (parts, wholes) or (wholes, parts)
    elif op.opcode == "reduce-scatter":  # it returns a part
        size *= n
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) // n


def groups(attributes: str, devices: int) -> np.ndarray:
    """The devices that talk to one another, [groups, members]; XLA has four ways to write them."""
    if pairs := re.search(r"source_target_pairs=\{\{([\d,{}]*)\}\}", attributes):
        return np.array([pairs[1].split("},{")[0].split(",")], int)
    text = attributes.partition("replica_groups=")[2]
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        inside = re.findall(r"'(\w+)'", mesh[3])
        order = [list(sizes).index(n) for n in [n for n in sizes if n not in inside] + inside]
        ids = _iota(mesh[2] or f"[{devices}]").reshape(list(sizes.values()))
        return ids.transpose(order).reshape(-1, math.prod(sizes[n] for n in inside))
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape([int(size) for size in iota[1].split(",")])
    if listed := re.match(r"\{\{([\d,{}]*)\}\}", text):
        return np.array([group.split(",") for group in listed[1].split("},{")], int)
    if text and not text.startswith("{}"):
        raise ValueError(f"unknown form of device groups: {text[:80]}")
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    """`[8,4]T(1,0)`: the numbers from 0 in this shape, with these axes in turn; or a plain list."""
    if not text.startswith("["):
        return np.array(text.split(","), int)
    dims, order = (re.findall(r"\d+", part) for part in text.partition("]")[::2])
    ids = np.arange(math.prod(map(int, dims))).reshape([int(size) for size in dims])
    return ids.transpose([int(axis) for axis in order]) if order else ids


def _parse(name: str, text: str) -> Op:
    """`type opcode(operands), attributes`; types hold brackets, and tuples parentheses."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, paren, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest) if paren else len(rest)
    inside = rest[1 : end - 1]
    operands = re.findall(r"%([\w.-]+)", inside) or [inside.strip()]
    return Op(name, kind, opcode, tuple(operands), rest[end:])


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the one `text` begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)
