"""Stage 2c: low-dose variants of prepared scans, for other programs.

Reads:   <data>/splits.json and the series of --split
Writes:  --format npz      <out>/<split>/<series>/<slice>/{image,mask,low_0.25,...}.npz
         --format pairs    <out>/<split>/sample_00000/{NDCT_hu,LDCT_25_hu,...}.npy and preview.png
         --format lodopab  <out>/{ground_truth,observation_0.25,...}_<split>_000.hdf5
         <out>/export.json: what was asked for; <out>/samples_<split>.csv: which slice a sample is
Example: python export_low_dose.py --format npz --doses 0.5 0.25 0.1 --out low_dose
         python export_low_dose.py --format pairs --doses 0.1 --artifact motion --severity 0.5 --out moved
         python export_low_dose.py --format lodopab --doses 1 --split train --out lodopab

A sample appears only when it is complete, and the same command goes on where it was stopped. The noise is
that of the study: fixed by --seed, series, slice, dose model and dose."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import stage
from array_sets import LODOPAB_FIELD_MM, LODOPAB_ROWS, MU_AIR_PER_M, MU_MAX_PER_M, MU_WATER_PER_M
from artifacts import ARTIFACTS, check_severity, scan_seed
from batches import to_tensor
from checkpoints import versions
from dataset import BRAIN_WINDOW, SPLITS, read_metadata, read_slices, read_splits, series_folders
from display import difference_rgb, radiological, to_grey
from dose import DOSE_MODELS, LODOPAB_SCAN, SCANNERS
from low_dose import check_doses, evaluation_seed, scan_flux
from slice_files import write_npz
from tomography import Geometry, project
from volumes import AIR_HU

SLICES_AT_ONCE = 8  # simulated together
INT16 = np.iinfo(np.int16)


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which series (default: test)")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="the layout to write")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write to; the splits may share one"
    )
    parser.add_argument(
        "--dose-model",
        choices=sorted(DOSE_MODELS),
        help=f"default: projection; --format lodopab has {LODOPAB_MODEL} and no other",
    )
    parser.add_argument(
        "--doses", type=float, nargs="+", required=True, help="fractions of the full dose, or lambda"
    )
    parser.add_argument("--artifact", choices=sorted(ARTIFACTS), help="add one to the low-dose images")
    parser.add_argument("--severity", type=float, help="of --artifact, in (0, 1]")
    parser.add_argument(
        "--seed", type=stage.natural_int, default=0, help="of noise and artifact (default: 0)"
    )
    parser.add_argument("--workers", type=stage.positive_int, default=2, help="processes (default: 2)")
    return parser


class Options(NamedTuple):
    """What decides the values of an export."""

    format: str
    dose_model: str
    doses: tuple[float, ...]
    seed: int
    artifact: str | None
    severity: float | None


class Series(NamedTuple):
    """A prepared series."""

    folder: Path
    series_uid: str
    patient_id: str
    shape: tuple[int, int, int]


class Piece(NamedTuple):
    """What one worker writes: some slices, of one series or of several."""

    number: int  # of the sample that the first slice becomes
    slices: tuple[tuple[Series, int], ...]  # series, slice index


def checked_options(args) -> Options:
    """The options of the command line. Raises InputError, or ValueError, for what cannot be exported."""
    model = args.dose_model or FORMATS[args.format].dose_model
    doses = tuple(dict.fromkeys(check_doses(model, args.doses)))
    if (args.artifact is None) != (args.severity is None):
        raise stage.InputError("--artifact, --severity: neither works alone (give both, or none)")
    if args.severity is not None:
        check_severity(args.severity)
    options = Options(args.format, model, doses, args.seed, args.artifact, args.severity)
    FORMATS[args.format].check(options)
    return options


def dose_name(options: Options, dose: float) -> str:
    """A dose in a file name: 0.25, or lambda5."""
    return f"{'' if DOSE_MODELS[options.dose_model].unit == 'fraction' else 'lambda'}{dose:g}"


# ---------------------------------------------------------------- simulating


def simulate(series: Series, options: Options) -> Iterator[tuple[int, np.ndarray, list[np.ndarray]]]:
    """A few slices at a time: index of the first, (n, H, W) int16 HU, for each dose (n, H, W) float32 HU."""
    metadata = read_metadata(series.folder)
    count = series.shape[0]
    hu = read_slices(series.folder, "image", count)
    noise = math.nan if metadata["noise_hu"] is None else metadata["noise_hu"]
    flux = scan_flux(hu, metadata["spacing_mm"], noise, options.dose_model)
    pixel_mm = math.sqrt(metadata["spacing_mm"][1] * metadata["spacing_mm"][2])
    model = DOSE_MODELS[options.dose_model]
    for start in range(0, count, SLICES_AT_ONCE):
        full = hu[start : start + SLICES_AT_ONCE]
        indices = range(start, start + len(full))
        tensor = to_tensor(full)
        added = torch.zeros_like(tensor)
        if options.artifact is not None:  # a difference image, the same at every dose
            seeds = [scan_seed(options.seed, series.series_uid)] * len(full)
            added = ARTIFACTS[options.artifact](tensor, options.severity, seeds, pixel_mm) - tensor
        low = []
        for dose in options.doses:
            if options.dose_model == "measured":
                stored = "image" if dose == 1 else f"low_{dose:g}"
                images = to_tensor(read_slices(series.folder, stored, len(full), start))
            else:
                seeds = [
                    evaluation_seed(options.seed, series.series_uid, index, options.dose_model, dose)
                    for index in indices
                ]
                images = model.simulate(tensor, [dose] * len(full), seeds, pixel_mm, flux)
            low.append((images + added)[:, 0].numpy())
        yield start, full, low


# ---------------------------------------------------------------- npz: the layout of the earlier system


def write_npz_series(piece: Piece, options: Options, out: Path) -> None:
    """One series: whole HU, and the lesions of its mask as 1."""
    series = piece.slices[0][0]
    metadata = read_metadata(series.folder)
    with stage.atomic_folder(out / series.series_uid) as partial:
        for start, full, low in simulate(series, options):
            for place in range(len(full)):
                folder = partial / f"{start + place:05d}"
                folder.mkdir()
                write_npz(folder / "image.npz", full[place])
                for dose, images in zip(options.doses, low, strict=True):
                    whole = np.rint(images[place]).clip(INT16.min, INT16.max).astype(np.int16)
                    write_npz(folder / f"low_{dose_name(options, dose)}.npz", whole)
            if metadata["has_mask"]:
                for place, mask in enumerate(read_slices(series.folder, "mask", len(full), start)):
                    write_npz(partial / f"{start + place:05d}" / "mask.npz", (mask > 0).astype(np.uint8))
        _write_facts(partial, metadata, options, slices=[entry["labels"] for entry in metadata["slices"]])


def _write_facts(folder: Path, metadata: dict, options: Options, **more) -> None:
    """metadata.json beside exported slices: whose they are, their geometry, labels, and the options."""
    names = ("patient_id", "study_uid", "series_uid", "source", "spacing_mm", "affine", "labels")
    facts = {name: metadata[name] for name in names} | more | {"export": options._asdict()}
    text = json.dumps(stage.plain(facts), indent=1, allow_nan=False)
    (folder / "metadata.json").write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------- pairs: full and low dose as npy

PREVIEW_RANGE_HU = 40.0  # ends of the colours of the difference: half the brain window


def check_pairs(options: Options) -> None:
    """Raise InputError for a fraction that has no name in this layout."""
    if DOSE_MODELS[options.dose_model].unit == "fraction":
        for dose in options.doses:
            if not 1 <= 100 * dose <= 99 or abs(100 * dose - round(100 * dose)) > 1e-9:
                raise stage.InputError(
                    f"--doses {dose:g}: --format pairs names doses in whole per cents from 1 to 99 "
                    "(choose such a dose, or --format npz)"
                )


def write_pairs(piece: Piece, options: Options, out: Path) -> None:
    """The samples of one series that are not there yet."""
    series = piece.slices[0][0]
    metadata = read_metadata(series.folder)
    fraction = DOSE_MODELS[options.dose_model].unit == "fraction"
    names = [round(100 * dose) if fraction else dose_name(options, dose) for dose in options.doses]
    for start, full, low in simulate(series, options):
        for place, image in enumerate(full):
            index = start + place
            final = sample_folder(out, piece.number + index)
            if final.exists():
                continue
            with stage.atomic_folder(final) as partial:
                np.save(partial / "NDCT_hu.npy", image.astype(np.float32))
                for name, images in zip(names, low, strict=True):
                    np.save(partial / f"LDCT_{name}_hu.npy", images[place])
                preview = _preview(image, [images[place] for images in low], metadata["affine"])
                Image.fromarray(preview).save(partial / "preview.png")
                labels = metadata["slices"][index]["labels"]
                _write_facts(partial, metadata, options, slice_index=index, slice_labels=labels)


def sample_folder(out: Path, number: int) -> Path:
    return out / f"sample_{number:05d}"


def _preview(full: np.ndarray, low: list[np.ndarray], affine: list) -> np.ndarray:
    """Low | full | difference of (H, W) HU, a row for each dose, brain window, radiological: RGB uint8."""
    rows = []
    for image in low:
        grey = [np.repeat(to_grey(hu, *BRAIN_WINDOW)[..., None], 3, 2) for hu in (image, full)]
        tiles = [*grey, difference_rgb(image - full, PREVIEW_RANGE_HU)]
        rows.append(np.concatenate([radiological(tile, affine) for tile in tiles], 1))
    return np.concatenate(rows)


# ---------------------------------------------------------------- lodopab: as LoDoPaB-CT has it

# Leuschner et al. 2021, Scientific Data 8:109, and the set's own script
LODOPAB_MODEL = "reprojection-lodopab"
LODOPAB_PARTS = {"train": "train", "val": "validation", "test": "test"}
LODOPAB_SIDE = 362  # pixels
LEAST_PHOTONS = 0.1  # stand for none


class LodopabViews(Geometry):
    """LODOPAB_SCAN at the set's angles, the middles of 1000 parts of half a turn: half a step later."""

    def angles(self) -> torch.Tensor:
        return super().angles() + math.pi / (2 * self.views)


def check_lodopab(options: Options) -> None:
    """Raise InputError for what a set of measurements cannot hold."""
    if options.dose_model != LODOPAB_MODEL:
        raise stage.InputError(
            f"--dose-model {options.dose_model}: --format lodopab holds what that set's scanner measures "
            f"(leave it out, or {LODOPAB_MODEL})"
        )
    if options.artifact is not None:
        raise stage.InputError(
            "--artifact: --format lodopab holds measurements, artifacts are made for images (leave it out)"
        )


def lodopab_files(piece: Piece, options: Options, out: Path) -> dict[float | None, Path]:
    """The files of 128 slices: the observation of each dose, and under None the ground truth.

    Dose 1 is 4096 photons, and its file is named as in the set."""
    ending = f"{LODOPAB_PARTS[out.name]}_{piece.number // LODOPAB_ROWS:03d}.hdf5"
    names = {dose: "observation" if dose == 1 else f"observation_{dose:g}" for dose in options.doses}
    return {key: out.parent / f"{name}_{ending}" for key, name in {**names, None: "ground_truth"}.items()}


def write_lodopab(piece: Piece, options: Options, out: Path) -> None:
    """One ground truth and its observations, 128 slices or zeros each."""
    finals = lodopab_files(piece, options, out)
    partials = {key: path.with_name(f".{path.name}.partial") for key, path in finals.items()}
    scan = LodopabViews(*LODOPAB_SCAN)
    shapes = {key: (scan.views, scan.detectors) for key in options.doses} | {None: (LODOPAB_SIDE,) * 2}
    files = {key: h5py.File(path, "w") for key, path in partials.items()}
    try:
        data = {
            key: files[key].create_dataset(
                "data", (LODOPAB_ROWS, *shapes[key]), np.float32, track_times=False
            )
            for key in files
        }
        for start in range(0, len(piece.slices), SLICES_AT_ONCE):
            some = piece.slices[start : start + SLICES_AT_ONCE]
            truth = np.stack([_ground_truth(*one) for one in some])
            data[None][start : start + len(some)] = truth.transpose(0, 2, 1)  # the set is transposed
            mu_per_mm = torch.from_numpy(truth) * (MU_MAX_PER_M / 1000)
            lines = _lodopab_lines(mu_per_mm, scan)
            for dose in options.doses:
                for place, (series, index) in enumerate(some):
                    seed = evaluation_seed(options.seed, series.series_uid, index, options.dose_model, dose)
                    data[dose][start + place] = _observation(lines[place], dose, seed)
        for key in files:
            for row in range(len(piece.slices), LODOPAB_ROWS):
                data[key][row] = np.zeros(shapes[key], np.float32)
    finally:
        for file in files.values():
            file.close()
    for key, path in finals.items():  # the ground truth is the last
        partials[key].rename(path)
    stage.sync_folder(out.parent)


def _ground_truth(series: Series, index: int) -> np.ndarray:
    """A slice on 362 x 362 pixels of 260 / 362 mm, middle on middle: attenuation / mu_max, float32 0..1."""
    metadata = read_metadata(series.folder)
    hu = read_slices(series.folder, "image", 1, index)
    pixel_mm = LODOPAB_FIELD_MM / LODOPAB_SIDE
    sides = [round(n * mm / pixel_mm) for n, mm in zip(hu.shape[1:], metadata["spacing_mm"][1:], strict=True)]
    resampled = F.interpolate(to_tensor(hu), sides, mode="bilinear", antialias=True)[0, 0].round()
    before = [(LODOPAB_SIDE - side) // 2 for side in sides]
    after = [LODOPAB_SIDE - side - first for side, first in zip(sides, before, strict=True)]
    square = F.pad(resampled, (before[1], after[1], before[0], after[0]), value=AIR_HU).double()
    mu_per_m = MU_WATER_PER_M + square * (MU_WATER_PER_M - MU_AIR_PER_M) / 1000
    return (mu_per_m / MU_MAX_PER_M).clamp(0, 1).float().numpy()


def _lodopab_lines(mu_per_mm: torch.Tensor, scan: Geometry) -> torch.Tensor:
    """Line integrals in the set's order of angles, which begins where detectors lie along x."""
    lines = project(mu_per_mm, LODOPAB_FIELD_MM / LODOPAB_SIDE, scan)
    eighth = scan.views // 4
    return torch.cat([lines[:, eighth:], lines[:, :eighth].flip(2)], 1)  # half a turn on: from the other side


def _observation(lines: torch.Tensor, dose: float, seed: int) -> np.ndarray:
    """(views, detectors) line integrals as measured with dose x 4096 photons a ray, / mu_max."""
    photons = dose * SCANNERS["lodopab"].photons
    counts = torch.poisson(photons * torch.exp(-lines), torch.Generator().manual_seed(seed))
    return (-torch.log(counts.clamp_min(LEAST_PHOTONS) / photons) / MU_MAX_PER_M).numpy()


def write_patients(pieces: list[Piece], out: Path) -> None:
    """The set's own table of patients: a number for each slice, by their place in the split."""
    numbers: dict[str, int] = {}
    with stage.atomic_write(out.parent / f"patient_ids_rand_{LODOPAB_PARTS[out.name]}.csv") as file:
        for series, _ in (one for piece in pieces for one in piece.slices):
            file.write(f"{numbers.setdefault(series.patient_id, len(numbers))}\n")


# ---------------------------------------------------------------- every layout by its name


class Format(NamedTuple):
    """A layout on disk. out is the folder of the split."""

    dose_model: str  # by default
    check: Callable[[Options], None]  # raises InputError for options that it has no place for
    rows: int | None  # slices of a piece; None for those of a series
    write: Callable[[Piece, Options, Path], None]
    written: Callable[[Piece, Options, Path], list[Path]]  # what is there when a piece is done
    finish: Callable[[list[Piece], Path], None]
    bytes_per_slice: Callable[[int, int], int]  # (pixels, doses), at most
    sample: Callable[[int, Series, int], str]  # (number, series, slice index) -> its name in samples.csv


FORMATS = {
    "npz": Format(
        dose_model="projection",
        check=lambda _options: None,
        rows=None,
        write=write_npz_series,
        written=lambda piece, _options, out: [out / piece.slices[0][0].series_uid],
        finish=lambda _pieces, _out: None,
        bytes_per_slice=lambda pixels, doses: pixels * (2 * (1 + doses) + 1),
        sample=lambda _number, series, index: f"{series.series_uid}/{index:05d}",
    ),
    "pairs": Format(
        dose_model="projection",
        check=check_pairs,
        rows=None,
        write=write_pairs,
        written=lambda piece, _options, out: [
            sample_folder(out, piece.number + place) for place in range(len(piece.slices))
        ],
        finish=lambda _pieces, _out: None,
        bytes_per_slice=lambda pixels, doses: pixels * (4 * (1 + doses) + 5 * doses),  # 5: of a preview
        sample=lambda number, _series, _index: sample_folder(Path(), number).name,
    ),
    "lodopab": Format(
        dose_model=LODOPAB_MODEL,
        check=check_lodopab,
        rows=LODOPAB_ROWS,
        write=write_lodopab,
        written=lambda piece, options, out: list(lodopab_files(piece, options, out).values()),
        finish=write_patients,
        bytes_per_slice=lambda _pixels, doses: 4 * (LODOPAB_SIDE**2 + doses * math.prod((1000, 513))),
        sample=lambda number, _series, _index: f"{number // LODOPAB_ROWS:03d}/{number % LODOPAB_ROWS}",
    ),
}


# ---------------------------------------------------------------- the export


def find_series(data: Path, split: str, options: Options) -> tuple[list[Series], str]:
    """The series of a split, and a hash that changes with whatever they hold.

    Raises InputError where there are none, or where they lack what is asked for."""
    folders = series_folders(data, split)
    if not folders:
        raise stage.InputError(f"{data / split}: no series (run prepare_dataset.py, then split_dataset.py)")
    found, contents = [], hashlib.sha256()
    for folder in stage.progress(folders, desc="look", unit="series"):
        metadata = read_metadata(folder)
        if metadata["intensity"] != "hu":
            raise stage.InputError(f"{folder}: windowed 8-bit images have no HU (prepare a source with HU)")
        if options.dose_model == "measured":
            low_doses = metadata["low_doses"]
            for dose in options.doses:
                if dose < 1 and f"{dose:g}" not in low_doses:
                    raise stage.InputError(
                        f"--doses {dose:g}: {folder} has no real low dose of {dose:g}, only "
                        f"{' '.join(low_doses) or 'none'} (choose one, or another --dose-model)"
                    )
        contents.update(json.dumps(metadata, sort_keys=True).encode())
        shape = tuple(metadata["shape"])
        found.append(Series(folder, metadata["series_uid"], metadata["patient_id"], shape))
    return found, contents.hexdigest()


def cut(series: list[Series], rows: int | None) -> list[Piece]:
    """Pieces of all slices: of rows slices, or of a series each."""
    slices = [(one, index) for one in series for index in range(one.shape[0])]
    counts = [one.shape[0] for one in series] if rows is None else [rows] * math.ceil(len(slices) / rows)
    starts = np.cumsum([0, *counts]).tolist()
    return [
        Piece(start, tuple(slices[start : start + count]))
        for start, count in zip(starts, counts, strict=False)
    ]


def _start_worker() -> None:
    stage.die_with_parent()
    torch.set_num_threads(1)  # the processes are the parallelism


def export(pieces: list[Piece], options: Options, out: Path, workers: int) -> list[str]:
    """Write every piece below out; returns what went wrong with those whose files are damaged.

    Raises StageError if a worker dies."""
    failed = []
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
        stage.progress(
            (), desc="export", total=sum(len(piece.slices) for piece in pieces), unit="slice"
        ) as bar,
    ):
        futures = {pool.submit(FORMATS[options.format].write, piece, options, out): piece for piece in pieces}
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except stage.InputError as error:
                    stage.log.warning("left out: %s", error)
                    failed.append(str(error))
                bar.update(len(futures[future].slices))
        except BrokenProcessPool:
            raise stage.StageError("a worker process died (out of memory? try --workers 1)") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return failed


def write_samples(path: Path, pieces: list[Piece], name: Callable[[int, Series, int], str]) -> None:
    """samples_<split>.csv: which slice of whom every sample is."""
    with stage.atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(("sample", "series_uid", "slice_index", "patient_id"))
        for piece in pieces:
            for number, (series, index) in enumerate(piece.slices, start=piece.number):
                writer.writerow((name(number, series, index), series.series_uid, index, series.patient_id))


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    options = checked_options(args)
    layout = FORMATS[args.format]
    split_hash = read_splits(args.data)["hash"]
    series, contents = find_series(args.data, args.split, options)
    pieces = cut(series, layout.rows)
    slices = sum(one.shape[0] for one in series)
    facts = {"contents": contents, "series": len(series), "slices": slices}
    folder = args.out / args.split
    args.out.mkdir(parents=True, exist_ok=True)
    with stage.lock(args.out / ".lock"):
        asked = options._asdict() | {"split_hash": split_hash}
        manifest = stage.claim_export(args.out, asked, args.split, facts, versions())
        for leftover in [
            *args.out.glob(".*.partial"),
            *folder.glob(".*.partial"),
        ]:  # of a run that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        waiting = [
            piece for piece in pieces if not all(p.exists() for p in layout.written(piece, options, folder))
        ]
        needed = sum(
            (layout.rows or len(piece.slices))
            * layout.bytes_per_slice(math.prod(piece.slices[0][0].shape[1:]), len(options.doses))
            for piece in waiting
        )
        stage.require_space(args.out, needed)
        failed = export(waiting, options, folder, min(args.workers, len(waiting))) if waiting else []
        if failed:
            raise stage.StageError(
                f"{len(failed)} of {len(waiting)} parts could not be read, e.g. {failed[0]}",
                stage.EXIT_REJECTED,
            )
        layout.finish(pieces, folder)
        write_samples(args.out / f"samples_{args.split}.csv", pieces, layout.sample)
        manifest["splits"][args.split]["complete"] = True
        stage.write_json(args.out / "export.json", manifest)
    doses = " ".join(f"{dose:g}" for dose in options.doses)
    stage.say(
        f"{args.out}: {slices} slices of {len(series)} series, {args.split}, {options.dose_model} {doses}"
    )
    stage.say(f"  {len(waiting)} of {len(pieces)} parts new")


if __name__ == "__main__":
    stage.run(main)
