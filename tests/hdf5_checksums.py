"""Blocks of metadata of an HDF5 file, and their checksums made right again after a change, as an attacker would."""

import random
import re

from tristill.cache.hdf5.blocks import checksum

_LARGEST = 4096


def metadata_blocks(image: bytes) -> list[tuple[int, int]]:
    """(offset, bytes without the checksum) of every block whose checksum follows it."""
    starts = [(0, 44), *((m.start(), None) for m in re.finditer(rb"OHDR|OCHK|FAHD|FADB|FRHP|BTHD|BTLF|FSHD", image))]
    blocks = []
    for start, known in starts:
        for size in [known] if known else range(12, min(_LARGEST, len(image) - start - 4)):
            if checksum(image[start : start + size]) == int.from_bytes(
                image[start + size : start + size + 4], "little"
            ):
                blocks.append((start, size))
                break
    return blocks


def forged(image: bytes, blocks: list[tuple[int, int]], seed: int) -> bytes:
    """The image with one to three places of a block changed, and the block's checksum made to fit."""
    generator = random.Random(seed)
    start, size = generator.choice(blocks)
    block = bytearray(image[start : start + size])
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        at, width = generator.randrange(size), generator.choice([1, 1, 2, 4, 8])
        other, other_size = generator.choice(blocks)
        source = other + generator.randrange(other_size)
        new = generator.choice(
            [
                bytes([block[at] ^ 1 << generator.randrange(8)]),
                b"\xff" * width,
                bytes(width),
                generator.randbytes(width),
                (1 << 8 * width - 1).to_bytes(width, "little"),
                generator.randrange(len(image)).to_bytes(8, "little"),
                image[source : source + generator.randrange(1, 20)],
            ]
        )
        block[at : at + len(new)] = new
    block = block[:size]
    return image[:start] + bytes(block) + checksum(bytes(block)).to_bytes(4, "little") + image[start + size + 4 :]
