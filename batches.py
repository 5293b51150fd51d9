"""What a training step is given: slices of a pack in shuffled batches, moved at random.

Images are HU, float32, (B, 1, H, W)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import stage
from dataset import BRAIN_WINDOW, Pack
from slice_files import PackedSlices
from volumes import AIR_HU


class Batch(NamedTuple):
    """Slices on the training device. hu: (B, 1, H, W) HU; rows: (B,) places in the pack.

    Of whole scans the slices come one scan after the other, and moves are equal within a scan."""

    rows: np.ndarray
    seeds: list[int]  # one for each slice, fresh in every epoch: of its noise
    hu: torch.Tensor
    mask: torch.Tensor | None  # (B, 1, H, W) uint8 lesion classes
    targets: torch.Tensor | None  # (B, classes)
    moves: list[int]  # seeds of its augmentation and its dose
    present: torch.Tensor | None = None  # (scans, longest) bool: the slices of each scan, then padding
    scan_targets: torch.Tensor | None = None  # (scans, classes)


class Batches:
    """Shuffled batches of a pack, the same for the same (seed, epoch) however often they are drawn.

    Each of world_size processes takes its share of every batch of batch_size. An incomplete last batch is
    left out. rows: those to draw from. weights: of these, then they are drawn with replacement. targets: (N,
    classes), of all slices.
    resident: move images and masks to the device once and draw from them there (default: on a GPU with
    room for them). The values are the same."""

    def __init__(
        self,
        pack: Pack,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rows: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        targets: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        resident: bool | None = None,
    ):
        self.seed, self.device = seed, device
        self.image, self.mask = pack.image, pack.mask
        if _fits(device, self.image, self.mask) if resident is None else resident:
            self.image, self.mask = _moved(self.image, device), _moved(self.mask, device)
        self.rows = np.arange(len(pack)) if rows is None else np.asarray(rows)
        self.weights = None if weights is None else weights / weights.sum()
        self.targets = targets
        self.batch_size = min(batch_size, len(self.rows))
        if self.batch_size % world_size or self.batch_size == 0:
            raise stage.InputError(
                f"--batch-size {self.batch_size}: must be a multiple of the {world_size} processes, "
                f"with {len(self.rows)} slices to draw from"
            )
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step start on."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            order = rng.permutation(self.rows)
        else:
            order = rng.choice(self.rows, len(self.rows), p=self.weights)
        share = self.batch_size // self.world_size
        for step in range(start, len(self)):
            first = step * self.batch_size + self.rank * share
            rows = order[first : first + share]
            # by place in the epoch, not by row: a row drawn twice must not get the same noise twice
            seeds = [stage.stable_seed(self.seed, epoch, first + place) for place in range(share)]
            yield self._batch(rows, seeds)

    def _batch(self, rows: np.ndarray, seeds: list[int]) -> Batch:
        mask = None if self.mask is None else self._drawn(self.mask, rows)
        targets = None if self.targets is None else torch.from_numpy(self.targets[rows]).to(self.device)
        return Batch(rows, seeds, self._drawn(self.image, rows).float(), mask, targets, seeds)

    def _drawn(self, slices: np.ndarray | PackedSlices | torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """(B, 1, H, W) on the device, of slices (N, H, W) that lie on disk, or there already."""
        if isinstance(slices, torch.Tensor):
            return slices[torch.from_numpy(rows).to(slices.device)][:, None]
        return torch.from_numpy(slices[rows]).to(self.device)[:, None]


class ScanBatches(Batches):
    """Batches of whole scans, as Batches has slices: rows, weights and batch_size are of scans (series).

    length: at most so many slices of a scan, in uniform steps; None: all of them. scan_targets: (series,
    classes)."""

    def __init__(self, pack: Pack, *, scan_targets: np.ndarray, length: int | None = None, **options: Any):
        options.setdefault("rows", np.arange(len(pack.series)))
        super().__init__(pack, **options)
        self.scan_targets = scan_targets
        ends = np.cumsum(np.bincount(pack.series_of))
        self.slices_of = [
            uniform_steps(range(end - count, end), length)
            for end, count in zip(ends.tolist(), np.bincount(pack.series_of), strict=True)
        ]

    def _batch(self, rows: np.ndarray, seeds: list[int]) -> Batch:
        parts = [self.slices_of[scan] for scan in rows]
        counts = torch.tensor([len(part) for part in parts])
        own = [
            stage.stable_seed(seed, place)
            for seed, part in zip(seeds, parts, strict=True)
            for place in range(len(part))
        ]
        moves = [seed for seed, part in zip(seeds, parts, strict=True) for _ in part]
        present = torch.arange(int(counts.max())) < counts[:, None]
        return (
            super()
            ._batch(np.concatenate(parts), own)
            ._replace(
                moves=moves,
                present=present.to(self.device),
                scan_targets=torch.from_numpy(self.scan_targets[rows]).to(self.device),
            )
        )


def uniform_steps(rows: Sequence[int], length: int | None) -> np.ndarray:
    """At most length of rows, the first and the last among them, in steps as equal as can be; None: all."""
    rows = np.asarray(rows)
    if length is None or len(rows) <= length:
        return rows
    return rows[np.linspace(0, len(rows) - 1, length).round().astype(int)]


def padded(flat: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Slices of scans one after the other, (N, ...), as (scans, longest, ...), zeros where present is not."""
    out = flat.new_zeros(*present.shape, *flat.shape[1:])
    out[present] = flat
    return out


RESIDENT_SHARE = 0.5  # of a GPU's free memory; the other half is for the network and its activations


def _fits(device: torch.device, *slices: np.ndarray | PackedSlices | None) -> bool:
    """Whether a GPU has room for (N, H, W) slices; the CPU has them in its page cache anyway."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(math.prod(one.shape) * one.dtype.itemsize for one in slices if one is not None)
    return needed <= RESIDENT_SHARE * free


def _moved(slices: np.ndarray | PackedSlices | None, device: torch.device) -> torch.Tensor | None:
    """(N, H, W) on the device, moved in pieces: all of it may be more than the host's memory."""
    if slices is None:
        return None
    out = torch.empty(slices.shape, dtype=getattr(torch, slices.dtype.name), device=device)
    for start in range(0, len(slices), 1024):
        out[start : start + 1024] = torch.from_numpy(np.array(slices[start : start + 1024]))
    return out


def to_tensor(slices: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, H, W) HU of any type -> (B, 1, H, W) float32 on device."""
    return torch.from_numpy(np.array(slices)).to(device).float()[:, None]


def mirror(images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Mirror left and right the slices whose seed is odd. images: (B, ...) of any type."""
    odd = torch.tensor([seed % 2 == 1 for seed in seeds], device=images.device)
    return torch.where(odd[:, None, None, None], images.flip(-1), images)


def crop(images: torch.Tensor, seeds: Sequence[int], side: int) -> torch.Tensor:
    """A square of side x side pixels from each image, at the same place for the same seed.

    images: (B, C, H, W) of any type, with sides of at least `side`."""
    spare = images.shape[-2] - side + 1, images.shape[-1] - side + 1
    places = [np.random.default_rng([seed, 1]).integers(spare) for seed in seeds]
    parts = [
        image[:, top : top + side, left : left + side]
        for image, (top, left) in zip(images, places, strict=True)
    ]
    return torch.stack(parts)


def neighbours(series_of: np.ndarray, count: int) -> np.ndarray:
    """Rows of each slice and its neighbours, in order: (N, count), count odd.

    series_of: (N,) ascending. At the ends of a series its last slice repeats."""
    first, after = (np.searchsorted(series_of, series_of, side) for side in ("left", "right"))
    rows = np.arange(len(series_of))[:, None] + np.arange(count) - count // 2
    return rows.clip(first[:, None], after[:, None] - 1)


def views(
    pack: Pack,
    batch: Batch,
    transform: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    slices: int = 1,
) -> torch.Tensor:
    """A batch with its neighbours in the series, moved alike: (B, slices, H, W) HU on its device."""
    around = neighbours(pack.series_of, slices)[batch.rows].T
    parts = [
        transform(
            batch.hu if place == slices // 2 else to_tensor(pack.image[rows], batch.hu.device), batch.moves
        )
        for place, rows in enumerate(around)
    ]
    return torch.cat(parts, dim=1)


MAX_SHIFT = 0.06  # of the image side: heads are centred to within that
MAX_ROTATION_DEG = 10.0  # as far as a head is tilted in its holder


def augment(hu: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Random mirror, shift and rotation of each slice, before any noise or window, filled with air.

    hu: (B, 1, H, W). Half of the slices are rotated, with interpolation; the others only move by whole
    pixels, so that the texture of their noise stays as it is in test scans."""
    return _augmented(hu, seeds, AIR_HU, "bilinear")


def augment_mask(mask: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """What augment does to the slices of the same seeds. mask: (B, 1, H, W) uint8 classes, none made up."""
    return _augmented(mask.float(), seeds, 0, "nearest").to(mask.dtype)


def _augmented(images: torch.Tensor, seeds: Sequence[int], fill: float, mode: str) -> torch.Tensor:
    out = torch.empty_like(images)
    reach = int(MAX_SHIFT * images.shape[-1])
    for place, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        image = images[place].flip(-1) if rng.random() < 0.5 else images[place]
        down, right = rng.integers(-reach, reach + 1, 2).tolist()
        angle = math.radians(rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG))
        rotate = rng.random() < 0.5
        image = _shift(image, down, right, fill)
        out[place] = _rotate(image, angle, fill, mode) if rotate else image
    return out


def jitter_window(hu: torch.Tensor, seeds: Sequence[int], amount: float) -> torch.Tensor:
    """HU as they look through windows a little off: centre and width by up to the share `amount`.

    hu: (B, C, H, W). The network's own window is fixed, so the image is moved and stretched instead."""
    if amount == 0:
        return hu
    draws = [np.random.default_rng([seed, 2]).uniform(-amount, amount, 2) for seed in seeds]
    shift, stretch = torch.tensor(np.array(draws), dtype=hu.dtype, device=hu.device).T[:, :, None, None, None]
    center, width = BRAIN_WINDOW
    return (hu - center) * (1 + stretch) + center + shift * width


def _shift(image: torch.Tensor, down: int, right: int, fill: float) -> torch.Tensor:
    """(1, H, W) moved by whole pixels; what comes in is fill."""
    padded = F.pad(image, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), value=float(fill))
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, top : top + image.shape[-2], left : left + image.shape[-1]]


def _rotate(image: torch.Tensor, angle: float, fill: float, mode: str) -> torch.Tensor:
    """(1, H, W) turned about its centre by angle in radians; what comes in is fill."""
    cosine, sine = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], device=image.device)[None]
    with torch.autocast(image.device.type, enabled=False):  # half precision would move pixels by half a pixel
        grid = F.affine_grid(theta, (1, *image.shape), align_corners=False)
        # grid_sample fills with zeros: make the fill the zero while it works
        return F.grid_sample((image - fill)[None], grid, mode, align_corners=False)[0] + fill
