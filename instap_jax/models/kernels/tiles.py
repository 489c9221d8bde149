"""How a TPU lays arrays out, and how kernels cut them."""

LANES = 128  # of a register: the last axis
TILE = 16  # rows of a bfloat16 tile: the axis before it, of which kernels take multiples


def whole_tiles(rows: int) -> int:
    """The next multiple of `TILE`."""
    return -(-rows // TILE) * TILE


def block(rows: int, at_most: int) -> int:
    """Rows that a program takes: many, but so that the last block has few to fill up."""
    most = max(TILE, min(whole_tiles(rows), at_most // TILE * TILE))
    return min(range(most, most // 2, -TILE), key=lambda size: -rows % size)
