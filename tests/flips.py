"""Files with one bit turned."""

from collections.abc import Iterator

import numpy as np


def flipped(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`content` with one bit turned, `count` times, at random places."""
    generator = np.random.default_rng(seed)
    for place in generator.integers(0, len(content), count):
        yield turned(content, int(place), int(generator.integers(8)))


def turned(content: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)
