"""Read a trace of jax.profiler: the milliseconds of the device by kind of kernel."""

import re
from collections import defaultdict

from jaxgpt.runtime.profile import find_kernels

# Kinds of kernels whose instruction a trace does not name, by words in the kernel's name.
KINDS = {
    "attention, backward": r"(sdpa|fmha|flash).*(bprop|backward)",
    "attention, forward": r"sdpa|fmha|flash",
    "matmuls": r"gemm|cutlass|nvjet|xmma|cublas|splitk",
    "copies": r"memcpy|memset|copy|transpose",
}


def read_trace(events: list[dict], kinds: dict[str, str]) -> tuple[dict, dict]:
    """Return the milliseconds by kind, and by kernel; `gaps`, where no kernel runs, is a kind.

    `events` are of a Chrome trace, and `kinds` has the kind of each instruction. Kernels are the
    events on a device's streams; a CPU has no stream, and its kernels are instructions in `kinds`.
    """
    by_kind: dict[str, float] = defaultdict(float)
    by_kernel: dict[str, float] = defaultdict(float)
    end = None
    for event in find_kernels(events, kinds):
        start, ms = event["ts"], event["dur"] / 1000
        op = event.get("args", {}).get("hlo_op", "")
        by_kind[kinds.get(op) or kind_of_kernel(event["name"])] += ms
        by_kernel[op if op in kinds else event["name"]] += ms  # a CUDA graph has no instruction
        if end is None:
            end = start
        by_kind["gaps"] += max(0, start - end) / 1000
        end = max(end, start + event["dur"])
    return dict(by_kind), dict(by_kernel)


def kind_of_kernel(name: str) -> str:
    """Guess a kernel's kind from its name; "memory" computes neither products nor attention."""
    found = (kind for kind, words in KINDS.items() if re.search(words, name.lower()))
    return next(found, "memory")
