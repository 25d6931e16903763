"""Compute the order of the data: a hash, and the permutation of an epoch that is made from it.

Both are implemented here, so that the order never changes with the version of a library.
"""

import numpy as np

ROUNDS = 6  # of the Feistel network


def window_starts(
    sample_ids: np.ndarray, *, num_tokens: int, block_size: int, seed: int, stream: int
) -> np.ndarray:
    """Return where the windows of these samples start, int64.

    An epoch is a permutation of windows that tile the tokens, all shifted by one random offset.
    Every window is therefore used once before any token repeats. Permutation and offset depend on
    (seed, stream, epoch) alone, so a resumed run needs no state but the number of the sample.
    """
    tiles = (num_tokens - 1) // block_size
    windows = max(1, tiles - 1)  # one fewer leaves room to shift by any offset
    num_offsets = num_tokens - windows * block_size  # the largest one reaches the last token
    epochs, positions = np.divmod(sample_ids.astype(np.uint64), np.uint64(windows))
    keys = epoch_keys(epochs, seed, stream)
    offsets = splitmix64(keys) % np.uint64(num_offsets)
    return (offsets + permute(positions, windows, keys) * np.uint64(block_size)).astype(np.int64)


def epoch_keys(epochs: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Return the random key of each epoch of a stream, uint64 like `epochs`."""
    seeds = splitmix64(np.full_like(epochs, seed))
    return splitmix64(splitmix64(seeds + np.uint64(stream)) + epochs)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Map each `index` by the pseudo-random permutation of range(size) that its key selects.

    A Feistel network (Luby & Rackoff 1988) permutes the next power of four. Following its cycle
    until the value is below `size` permutes the range itself (Black & Rogaway 2002).
    """
    bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)

    def shuffle(value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = value >> bits, value & mask
        for round in range(ROUNDS):
            hashed = splitmix64(right + splitmix64(keys + np.uint64(round)))
            left, right = right, left ^ (hashed & mask)
        return left << bits | right

    position = shuffle(index.astype(np.uint64), keys)
    outside = position >= size
    while outside.any():
        position[outside] = shuffle(position[outside], keys[outside])
        outside = position >= size
    return position


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash each number to 64 bits with the finaliser of splitmix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
