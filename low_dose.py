"""Low dose at load time: any dose of any prepared slice; in evaluation the same for every arm.

Image-domain models are drawn as batches come. The projection model reconstructs noise alone: as batches come,
or once, as noise images beside the packed cache, from which any dose costs a multiply and an add. Real images
of a low dose are used as they are (dose model "measured")."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import stage
from anatomy import brain_mask
from batches import Batch, neighbours, to_tensor
from dataset import Pack
from dose import DOSE_MODELS, NOISE_RANGE_HU, NoiseImages, add_noise, noise_images, series_flux

FEWEST_STORED_COUNTS = (
    10.0  # in training: of the most starved ray; evaluation draws photons from dose's own on
)
FLUX_SLICES = 3  # of a series, from its middle: the flux of all is one number
CACHE_FORMAT = 1
SLICES_AT_ONCE = 8  # share the places where rays meet pixels
# int16 steps of the stored noise images, in HU: the lowest dose multiplies them by 6, 40 and 40
STEPS_HU = {"quantum": 1 / 256, "electronic": 1 / 1024, "bias": 1 / 4096}


def check_doses(dose_model: str, doses: Sequence[float] | None) -> list[float]:
    """The doses to use: the given ones, or all of the model's. Raises ValueError for one out of range."""
    model = DOSE_MODELS[dose_model]
    chosen = list(doses or model.doses)
    for dose in chosen:
        model.check(dose)
    return chosen


def random_doses(seeds: Sequence[int], doses: Sequence[float]) -> list[float]:
    """One of doses for each seed, uniformly."""
    return [doses[stage.stable_seed("dose", seed) % len(doses)] for seed in seeds]


def evaluation_seed(noise_seed: int, series_uid: str, slice_index: int, dose_model: str, dose: float) -> int:
    """The seed of a slice's noise in evaluation: the same for every arm, run and machine."""
    return stage.stable_seed("evaluation", noise_seed, series_uid, int(slice_index), dose_model, float(dose))


def noise_level(dose_model: str, dose: float, noise_hu: float) -> float:
    """Noise SD in HU of a scan at a dose: what networks are told that know the dose.

    noise_hu: the scan's own at full dose; where the model scales its photons to that, or the low dose is a
    real one, the level follows it. Elsewhere, and where it is NaN, the level is the dose model's alone."""
    model = DOSE_MODELS[dose_model]
    level = model.sigma_hu(dose)
    follows = model.simulate is None or (model.scanner is not None and model.scanner.per_series)
    if follows and math.isfinite(noise_hu):
        level *= float(np.clip(noise_hu, *NOISE_RANGE_HU)) / model.sigma_hu(1.0)
    return level


# ---------------------------------------------------------------- one scan


def simulate_scan(
    hu: np.ndarray,
    dose_model: str,
    doses: Sequence[float],
    seeds: Sequence[int],
    *,
    spacing_mm: Sequence[float],
    noise_hu: float = math.nan,
    own_pixel_mm: float | None = None,
) -> np.ndarray:
    """Slices of one series at a dose each. hu: (S, H, W) HU; a dose and a seed each. Returns float32 HU.

    spacing_mm: (slice, row, column). noise_hu: what the series was measured to have, in pixels of
    own_pixel_mm (default: these), NaN if unknown. Of pixels that are not square the mean side is used. Raises
    ValueError for a bad dose or pixel."""
    pixel_mm = math.sqrt(spacing_mm[1] * spacing_mm[2])
    flux = scan_flux(hu, spacing_mm, noise_hu, dose_model, own_pixel_mm)
    simulate = DOSE_MODELS[dose_model].simulate
    return simulate(to_tensor(hu), list(doses), list(seeds), pixel_mm, flux)[:, 0].numpy()


def scan_flux(
    hu: np.ndarray,
    spacing_mm: Sequence[float],
    noise_hu: float,
    dose_model: str,
    own_pixel_mm: float | None = None,
) -> float:
    """dose.series_flux of a whole series, from its middle slices. hu: (S, H, W).

    own_pixel_mm: of the pixels in which noise_hu was measured, if others than these."""
    scanner = DOSE_MODELS[dose_model].scanner
    if scanner is None or not scanner.per_series or not math.isfinite(noise_hu):
        return 1.0
    middle = np.linspace(0.3, 0.7, FLUX_SLICES) * (len(hu) - 1)
    some = np.asarray(hu[np.unique(middle.round().astype(int))])
    inside = torch.from_numpy(brain_mask(some, spacing_mm))
    pixel_mm = math.sqrt(spacing_mm[1] * spacing_mm[2])
    return series_flux(to_tensor(some)[:, 0], inside, pixel_mm, noise_hu, scanner, own_pixel_mm)


# ---------------------------------------------------------------- a pack


class LowDose:
    """Low dose for the slices of a pack under one dose model.

    realisations: how many quantum noise images a slice has in the cache, which are mixed at random; 0 for
    noise made anew for every batch. Raises InputError for the model "measured" without real low doses."""

    def __init__(self, pack: Pack, dose_model: str, doses: Sequence[float], realisations: int = 0):
        self.pack, self.name, self.doses = pack, dose_model, list(doses)
        self.model = DOSE_MODELS[dose_model]
        self.noise = None
        if dose_model == "measured":
            for dose in self.doses:
                if dose < 1 and _stored(pack, dose) is None:
                    raise stage.InputError(
                        f"--doses {dose:g}: these data have no real low dose of {dose:g}, only "
                        f"{' '.join(pack.low) or 'none'} (choose one, or another --dose-model)"
                    )
        elif realisations and self.model.scanner is not None:
            self.noise = load_noise(pack, dose_model, realisations)

    def pair(
        self,
        batch: Batch,
        transform: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
        slices: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        """A batch at full dose, (B, 1, H, W) HU on its device, at low dose with its neighbours in the series,
        (B, slices, H, W), and the dose of each slice, which is its neighbours' too.

        transform(images, seeds) moves the anatomy; noise is added after it and keeps its texture. Stored
        noise is that of the slice before it, which is right as far as noise is alike in the whole brain."""
        doses = random_doses(batch.moves, self.doses)
        full = transform(batch.hu, batch.moves)
        around = neighbours(self.pack.series_of, slices)[batch.rows]
        parts = []
        for place, rows in enumerate(around.T):
            if self.name == "measured":
                low = to_tensor(self._measured(rows, doses), full.device)
                parts.append(transform(low, batch.moves))
                continue
            middle = place == slices // 2
            hu = full if middle else transform(to_tensor(self.pack.image[rows], full.device), batch.moves)
            seeds = batch.seeds if middle else [stage.stable_seed(seed, place) for seed in batch.seeds]
            parts.append(self.simulate(hu, rows, doses, seeds))
        return full, torch.cat(parts, dim=1), doses

    def levels(self, rows: Sequence[int], doses: Sequence[float]) -> np.ndarray:
        """(B,) noise SD in HU of some rows at a dose each, as noise_level has it."""
        series = self.pack.series
        noise = [series[number]["noise_hu"] for number in self.pack.series_of[list(rows)]]
        return np.array(
            [
                noise_level(self.name, dose, math.nan if own is None else own)
                for dose, own in zip(doses, noise, strict=True)
            ]
        )

    def simulate(
        self, hu: torch.Tensor, rows: Sequence[int], doses: Sequence[float], seeds: Sequence[int]
    ) -> torch.Tensor:
        """A dose for each of some slices. hu: (B, 1, H, W) HU, rows of the pack, transformed or not."""
        if self.noise is None:
            return self._fresh(hu, rows, doses, seeds)
        images = self.noise.images(rows, hu.device)
        low = add_noise(hu, images, doses, seeds)
        starved = [
            place
            for place, (counts, dose) in enumerate(zip(images.counts.tolist(), doses, strict=True))
            if dose < 1 and counts * dose < FEWEST_STORED_COUNTS
        ]
        if starved:
            low[starved] = self._fresh(
                hu[starved],
                [rows[place] for place in starved],
                [doses[place] for place in starved],
                [seeds[place] for place in starved],
            )
        return low

    def evaluation(self, rows: Sequence[int], doses: Sequence[float], noise_seed: int) -> np.ndarray:
        """Slices at a dose each, with the noise that every arm sees. Returns (B, H, W) float32 HU.

        Never from stored noise, and drawn on the CPU, so that every machine sees the same."""
        if self.name == "measured":
            return self._measured(rows, doses).astype(np.float32)
        series = self.pack.series
        seeds = [
            evaluation_seed(
                noise_seed,
                series[self.pack.series_of[row]]["series_uid"],
                self.pack.slice_of[row],
                self.name,
                dose,
            )
            for row, dose in zip(rows, doses, strict=True)
        ]
        return self._fresh(to_tensor(self.pack.image[rows]), rows, doses, seeds)[:, 0].numpy()

    def _measured(self, rows: Sequence[int], doses: Sequence[float]) -> np.ndarray:
        chosen = [self.pack.image if dose == 1 else _stored(self.pack, dose) for dose in doses]
        return np.stack([images[row] for images, row in zip(chosen, rows, strict=True)])

    def _fresh(
        self, hu: torch.Tensor, rows: Sequence[int], doses: Sequence[float], seeds: Sequence[int]
    ) -> torch.Tensor:
        """Simulate slices, those of equal pixels and flux together."""
        if self.model.scanner is None:
            pixel_mm, flux = self.pack.pixel_mm[list(rows)], np.ones(len(rows))
        else:
            pixel_mm = self.pack.pixel_mm[list(rows)]
            flux = pack_flux(self.pack, self.name)[self.pack.series_of[list(rows)]]
        out = torch.empty_like(hu)
        alike = np.stack([pixel_mm, flux], 1)
        for pixel, factor in np.unique(alike, axis=0):
            places = np.flatnonzero((alike == (pixel, factor)).all(1)).tolist()
            out[places] = self.model.simulate(
                hu[places],
                [doses[place] for place in places],
                [seeds[place] for place in places],
                float(pixel),
                float(factor),
            )
        return out


def _stored(pack: Pack, dose: float) -> np.ndarray | None:
    """The real low-dose slices of a pack at a dose fraction, or None."""
    return next((images for fraction, images in pack.low.items() if float(fraction) == dose), None)


# ---------------------------------------------------------------- what is worked out once


def pack_flux(pack: Pack, dose_model: str) -> np.ndarray:
    """(series,) scan_flux of every series of a pack; worked out once, kept beside it."""
    path = pack.folder / f"flux-{dose_model}.json"
    known = stage.read_json(path, f"delete {path}") if path.exists() else {}
    if known.get("key") != pack.key:
        flux = []
        numbers = stage.progress(range(len(pack.series)), desc=f"flux {pack.folder.name}", unit="series")
        for number in numbers:
            metadata, rows = pack.series[number], np.flatnonzero(pack.series_of == number)
            gap, row_mm, column_mm = metadata["spacing_mm"]
            pixel = float(pack.pixel_mm[rows[0]])
            noise = metadata["noise_hu"] if metadata["noise_hu"] is not None else math.nan
            flux.append(
                scan_flux(
                    pack.image[rows], (gap, pixel, pixel), noise, dose_model, math.sqrt(row_mm * column_mm)
                )
            )
        known = {"key": pack.key, "flux": flux}
        stage.write_json(path, known)
    return np.array(known["flux"])


class StoredNoise:
    """Noise images of every slice of a pack, memory-mapped int16. See dose.NoiseImages."""

    def __init__(self, folder: Path):
        self.parts = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in STEPS_HU}
        self.counts = np.load(folder / "counts.npy")

    def images(self, rows: Sequence[int], device: torch.device | str = "cpu") -> NoiseImages:
        """The noise of some rows, in HU on device."""
        rows = np.asarray(rows)
        parts = [
            torch.from_numpy(self.parts[name][rows]).to(device).float() * step
            for name, step in STEPS_HU.items()
        ]
        return NoiseImages(*parts, torch.from_numpy(self.counts[rows]))


def load_noise(pack: Pack, dose_model: str, realisations: int) -> StoredNoise:
    """The stored noise of a pack, made where there is none: realisations + 2 int16 images a slice.

    Raises OSError if the disk is too small."""
    content = json.dumps(
        [CACHE_FORMAT, pack.key, dose_model, realisations, str(DOSE_MODELS[dose_model].scanner)]
    )
    key = hashlib.sha256(content.encode()).hexdigest()
    final = pack.folder.with_name(f"{pack.folder.name}-noise-{dose_model}-{realisations}")
    with stage.lock(final.with_name(f".{final.name}.lock"), wait=True):
        index = final / "index.json"
        if not index.exists() or stage.read_json(index, f"delete {final} and run again").get("key") != key:
            _make_noise(pack, dose_model, realisations, final)
            stage.write_json(index, {"key": key})
    return StoredNoise(final)


def _make_noise(pack: Pack, dose_model: str, realisations: int, final: Path) -> None:
    shapes = {"quantum": realisations, "electronic": 1, "bias": 1}
    stage.require_space(final, len(pack) * pack.size**2 * 2 * sum(shapes.values()))
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = {
        name: np.lib.format.open_memmap(
            partial / f"{name}.npy", "w+", np.int16, (len(pack), count, pack.size, pack.size)
        )
        for name, count in shapes.items()
    }
    counts = np.empty(len(pack), np.float32)
    flux = pack_flux(pack, dose_model)
    scanner = DOSE_MODELS[dose_model].scanner
    numbers = stage.progress(range(len(pack.series)), desc=f"noise {pack.folder.name}", unit="series")
    for number in numbers:
        rows = np.flatnonzero(pack.series_of == number)
        for some in np.array_split(rows, math.ceil(len(rows) / SLICES_AT_ONCE)):
            seeds = [
                stage.stable_seed("noise images", pack.series[number]["series_uid"], int(pack.slice_of[row]))
                for row in some
            ]
            images = noise_images(
                to_tensor(pack.image[some]),
                seeds,
                float(pack.pixel_mm[some[0]]),
                scanner,
                float(flux[number]),
                realisations,
            )
            counts[some] = images.counts.numpy()
            for name, step in STEPS_HU.items():
                whole = (getattr(images, name) / step).round().clamp(-(2**15), 2**15 - 1)
                arrays[name][some] = whole.to(torch.int16).numpy()
    for array in arrays.values():
        array.flush()
    np.save(partial / "counts.npy", counts)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
