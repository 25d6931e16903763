"""Which sequence is the n-th: a hash, and an order without replacement made of it.

They are written out here, so that the order of the data never changes with a library's version.
"""

import numpy as np

ROUNDS = 6  # of the Feistel network


def window_starts(
    samples: np.ndarray, *, num_tokens: int, block_size: int, seed: int, stream: int
) -> np.ndarray:
    """Where the windows of the samples with these running numbers start, int64.

    A window is `block_size` tokens and one more for the last target. An epoch is a permutation
    of windows that tile the tokens, all shifted by one random offset, so no token is trained on
    twice before every window has been. Both are drawn from (seed, stream, epoch): the place of a
    sample is a pure function of its number, and a resumed run needs to remember nothing.
    """
    tiles = (num_tokens - 1) // block_size
    windows = max(1, tiles - 1)  # one fewer leaves room to shift by any offset
    room = num_tokens - windows * block_size  # offsets: the last one reaches the last token
    epochs, positions = np.divmod(samples.astype(np.uint64), np.uint64(windows))
    keys = splitmix64(
        splitmix64(splitmix64(np.full_like(epochs, seed)) + np.uint64(stream)) + epochs
    )
    offsets = splitmix64(keys) % np.uint64(room)
    return (offsets + permute(positions, windows, keys) * np.uint64(block_size)).astype(np.int64)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The place of each `index` in a pseudo-random permutation of range(size), one a key.

    A Feistel network (Luby & Rackoff 1988) permutes the next power of four; walking its cycle
    until the value falls below `size` permutes the range itself (Black & Rogaway 2002).
    """
    bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)

    def shuffle(value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = value >> bits, value & mask
        for round in range(ROUNDS):
            left, right = (
                right,
                left ^ (splitmix64(right + splitmix64(keys + np.uint64(round))) & mask),
            )
        return left << bits | right

    place = shuffle(index.astype(np.uint64), keys)
    while (outside := place >= size).any():
        place[outside] = shuffle(place[outside], keys[outside])
    return place


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A good 64-bit hash of each number: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
