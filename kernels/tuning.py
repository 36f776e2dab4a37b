"""Block sizes and warps: every number here that the owner of a GPU may want to change, and why it is what it is.

None was tuned on a GPU. They follow from counting bytes and registers, and `python -m dgfast.kernels.resources` shows
what that comes to.
"""

from dataclasses import dataclass

import triton

_ROW_BYTES = 64  # what DRAM reads at once: one pixel's channels in a tile should fill it
_MAX_WARPS = 16


@dataclass(frozen=True)
class Limits:
    """How much of a tensor one pass of group normalisation holds in registers, in elements.

    Attributes:
        resident: the largest share of a program that is held whole, and so read once.
        looped: what is held at a time of a larger share, which is read twice.
        per_thread: elements a thread.
    """

    resident: int
    looped: int
    per_thread: int


# At least two programs fit into a multiprocessor's registers, so that one loads while the other computes.
FORWARD = Limits(resident=8192, looped=4096, per_thread=16)
BACKWARD = Limits(resident=4096, looped=2048, per_thread=8)  # holds two tensors and their two sums


@dataclass(frozen=True)
class GroupTile:
    """What one program of group normalisation holds in registers: some pixels of some whole groups.

    Attributes:
        channels: of whole groups; block_channels: the power of two that holds them.
        block_pixels: pixels held at once; if the image has more, the program loops over them.
    """

    channels: int
    block_channels: int
    block_pixels: int
    num_warps: int


def group_tile(channels: int, num_groups: int, pixels: int, itemsize: int, limits: Limits) -> GroupTile:
    """The tile for x [B, channels, pixels] with `itemsize` bytes an element."""
    per_group = channels // num_groups
    groups = 1
    while groups < num_groups and groups * per_group * itemsize < _ROW_BYTES:
        groups *= 2
    tile = min(groups, num_groups) * per_group
    block_channels = triton.next_power_of_2(tile)
    block_pixels = triton.next_power_of_2(pixels)
    if block_channels * block_pixels > limits.resident:
        block_pixels = max(1, limits.looped // block_channels)
    warps = block_channels * block_pixels // (32 * limits.per_thread)
    return GroupTile(tile, block_channels, block_pixels, min(max(warps, 1), _MAX_WARPS))


@dataclass(frozen=True)
class TokenTiles:
    """How attention cuts its scores [N, N] up.

    Attributes:
        rows: of a program, which holds their channels in registers; columns: of a pass of its loop.
        num_warps: 16 rows each, what the tensor cores of all generations multiply at once.
        num_stages: passes whose loads are under way at a time.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# By the most channels a head. From sm_90 on two programs fit into a multiprocessor's registers: one takes exponentials
# while the other multiplies. The gradient holds two sums and two tiles of scores: more columns spill on sm_80.
ATTENTION = {64: TokenTiles(128, 64, num_warps=8, num_stages=3), 128: TokenTiles(64, 64, num_warps=4, num_stages=2)}
ATTENTION_BACKWARD = {128: TokenTiles(64, 32, num_warps=4, num_stages=2)}
