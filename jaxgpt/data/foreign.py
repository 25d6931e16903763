"""Check token files without a meta.json, which are read as uint16: do their bytes fit that?"""

from pathlib import Path

import numpy as np

from jaxgpt.config import UserError

SAMPLE_IDS = 1 << 16  # at the start of a file
ENOUGH = 64  # ids; fewer have any pattern by chance
MOST, NEARLY_ALL = 0.9, 0.99


def check_dtype(file: Path, ids: np.ndarray) -> None:
    """Raise `UserError` if ids, uint16 [n], have the byte pattern of another dtype."""
    found = likely_dtype(ids)
    if found is None:
        return
    dtype, pattern = found
    convert = "try to write the ids as uint16"
    by_meta = f', or a meta.json with "dtype": "{dtype}"' if dtype in ("uint32", "int32") else ""
    raise UserError(
        f"{file}: looks like {dtype} ids ({pattern}), but token files without a meta.json are read "
        f"as uint16; expected uint16 ids; {convert}{by_meta}"
    )


def likely_dtype(ids: np.ndarray) -> tuple[str, str] | None:
    """Return the dtype that ids, uint16 [n], were probably written as, and why; None is uint16."""
    ids = ids[: len(ids) // 4 * 4]
    if len(ids) < ENOUGH or not ids.any():
        return None
    low, high, bytes_ = ids[::2], ids[1::2], ids.view(np.uint8)
    if np.mean(ids.reshape(-1, 4)[:, 1:] == 0) > NEARLY_ALL:
        return "int64", "three of four 16-bit numbers are 0"
    is_masked = high == 0xFFFF  # the upper half of a negative number
    is_upper_half = np.mean((high < 16) | is_masked) > NEARLY_ALL
    is_lower_half = np.mean(low >= 16) > 1 - MOST  # one id of 16 may be there by chance
    if is_upper_half and (is_lower_half or not high.any()):
        dtype = "int32" if is_masked.any() else "uint32"
        shown = "0" if not high.any() else f"below 16{' or 65535' if is_masked.any() else ''}"
        return dtype, f"every second 16-bit number is {shown}"
    if np.mean(bytes_ < 128) > MOST and np.mean(bytes_[1::2] > 0) > MOST:
        return "uint8", "the bytes at even and at odd positions have the same range"
    return None


def check_same_range(a_file: Path, a: np.ndarray, b_file: Path, b: np.ndarray) -> None:
    """Raise `UserError` if most ids of one split are above all ids of the other split."""
    if min(len(a), len(b)) < ENOUGH:
        return
    for file, ids, other_file, others in (a_file, a, b_file, b), (b_file, b, a_file, a):
        above = np.mean(ids > others.max())
        if above > 0.5:
            problem = f"{above:.0%} of its ids are above {others.max()}, the largest in"
            raise UserError(
                f"{file}: {problem} {other_file.name}; expected two splits of one vocabulary; "
                "try to write both with the same tokenizer and dtype"
            )
