"""A denoiser applied in tiles, where memory is short."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import nn

import stage

OVERLAP = (
    4  # as a share, one in so many: of tiles of 256 pixels 64, of which 21 on each side count for nothing
)
TILE_GRID = 16  # tiles begin at multiples of the coarsest level's step, so that all see the same grid


def tiled(
    model: nn.Module,
    hu: torch.Tensor,
    sigma_hu: torch.Tensor | None = None,
    *,
    tile: int = 256,
    overlap: int | None = None,
) -> torch.Tensor:
    """Denoise (B, C, H, W) HU in tiles of tile x tile pixels: (B, 1, H, W), memory as for one tile.

    Neighbours overlap by at least `overlap` pixels (default: a quarter of a tile). Of these the outer third
    counts for nothing, as it is near a border that the slice does not have, and the middle third leads
    smoothly from one to the other: but for rounding the result is that of the whole slice, where the network
    reaches no further than overlap / 3 pixels. A slice that fits in one tile is not cut. The attention of
    NAFNet and CBAM looks at pool_size pixels around each: smaller tiles change what it sees.
    Raises ValueError unless tile and overlap are multiples of TILE_GRID, and tile at least twice overlap."""
    overlap = tile // OVERLAP if overlap is None else overlap
    if overlap <= 0 or tile < 2 * overlap or tile % TILE_GRID or overlap % TILE_GRID:
        raise ValueError(
            f"tile {tile}, overlap {overlap}: must be positive multiples of {TILE_GRID}, "
            "and tile at least twice overlap"
        )
    rows, columns = (_tile_starts(side, tile, overlap) for side in hu.shape[-2:])
    strips = []
    for row in rows:
        parts = [
            model(hu[..., row : row + tile, column : column + tile], sigma_hu).float() for column in columns
        ]
        strips.append(_joined(parts, columns, overlap, dim=3))
    return _joined(strips, rows, overlap, dim=2)


def tile_side(text: str) -> int:
    """A side of tiles on a command line, in pixels. Raises ArgumentTypeError unless tiled takes it."""
    side = stage.positive_int(text)
    if side % (OVERLAP * TILE_GRID):
        raise argparse.ArgumentTypeError(f"{side}: must be a multiple of {OVERLAP * TILE_GRID}")
    return side


def _tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: the last one ends with the slice, at most TILE_GRID - 1 pixels shorter than tile."""
    last = max(math.ceil((side - tile) / TILE_GRID), 0) * TILE_GRID
    return [*range(0, last, tile - overlap), last]


def _joined(parts: Sequence[torch.Tensor], starts: Sequence[int], overlap: int, dim: int) -> torch.Tensor:
    """Lay parts that begin at starts along dim over each other, each fading in over its first pixels."""
    whole = parts[0]
    third = overlap // 3
    ramp = (torch.arange(overlap, device=whole.device) - third + 0.5) / (overlap - 2 * third)
    fade = ramp.clamp(0, 1).view(-1, *[1] * (3 - dim))
    fade = fade * fade * (3 - 2 * fade)  # no kink at either end
    for start, part in zip(starts[1:], parts[1:], strict=True):
        end = whole.shape[dim]
        # where the last tile lies deeper in the one before it, the fade lies at the end of that one
        begin = end - overlap
        old, new = whole.narrow(dim, begin, overlap), part.narrow(dim, begin - start, overlap)
        both = torch.lerp(old, new, fade)
        rest = part.narrow(dim, end - start, part.shape[dim] - (end - start))
        whole = torch.cat([whole.narrow(dim, 0, begin), both, rest], dim)
    return whole
