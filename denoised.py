"""What a denoiser makes of a split: its figures and pictures, and its slices as data for others."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import anatomy
import checkpoints
import detectability
import metrics
import stage
import training
from dataset import (
    BRAIN_WINDOW,
    Pack,
    load_pack,
    native_size,
    read_metadata,
    read_slices,
    read_splits,
    series_folders,
    write_scan,
)
from display import NOTICE, enlarge, radiological, to_grey
from dose import DOSE_MODELS
from inference import ROUTINE_NOISE_HU, Network, check_patients, denoise, load_denoiser
from low_dose import LowDose, check_doses, evaluation_seed, noise_level, simulate_scan
from models import CLASSICAL, build_model
from slice_files import write_npz
from volumes import AIR_HU, MAX_HU, measured_scan


def load(which: str, device: torch.device | str = "cpu") -> Network:
    """A denoiser by its checkpoint, or a classical one by its name in CLASSICAL, which knows no patients.

    Raises InputError as checkpoints.load does."""
    if which in CLASSICAL:
        return Network(Path(which), build_model(which), {"dose_model": training.DOSE_MODEL, "trained_on": []})
    return Network(Path(which), *load_denoiser(which, device))


def sha256(denoiser: Network) -> str | None:
    """The hash of its checkpoint; None for a classical one, which has none."""
    return checkpoints.file_sha256(denoiser.path) if "format" in denoiser.facts else None


# ---------------------------------------------------------------- figures

BIAS_TISSUES = ("brain", "csf", "bone")  # of detectability.tissue_errors
FIGURES = (*("rmse_hu", "psnr", "ssim", "mse"), *(f"bias_{tissue}_hu" for tissue in BIAS_TISSUES))
COLUMNS = (
    *("denoiser", "split", "dose_model", "dose", "dose_fraction", "sigma_hu", "noise_seed"),
    *("image", "n_patients", "n_slices", *FIGURES, "range_hu", "mask", "reference"),
)
PICTURES = 8  # scans of which the middle slice is shown


def score(
    pack: Pack, denoiser: Network, dose_model: str, doses: Sequence[float], seed: int
) -> tuple[list[dict], dict[str, bytes]]:
    """(rows of figures, pictures): for each dose a row of the noisy and one of the denoised slices.

    Figures are of a patient, then means over patients, against the noise-free truth where there is one, else
    against the slice before simulation. The noise is that of the study with the same seed. pictures: path
    below the results -> PNG of the middle slice of the first PICTURES scans at every dose."""
    source = LowDose(pack, dose_model, doses)
    reference, kind = (pack.image, "image") if pack.truth is None else (pack.truth, "truth")
    inside, classes = pack.masks(anatomy.MASKS[anatomy.DEFAULT_MASK]), pack.masks(anatomy.tissue_classes)
    patients = pack.patient_ids()
    middles = {
        int(np.median(np.flatnonzero(pack.series_of == n))) for n in range(len(pack.series))[:PICTURES]
    }
    found: dict[tuple[float, str], list[dict[str, float]]] = {}
    pictures = {}
    for patient in stage.progress(np.unique(patients), desc="evaluate", unit="patient"):
        rows = np.flatnonzero(patients == patient)
        target = reference[rows]
        for dose in doses:
            same = [dose] * len(rows)
            noisy = source.evaluation(rows, same, seed)
            levels = source.levels(rows, same)
            output = denoise(denoiser.network, noisy, levels, pack.series_of[rows])
            for name, images in (("noisy", noisy), ("denoised", output)):
                quality = metrics.image_quality(images, target, inside[rows], patients[rows])
                own = quality | detectability.tissue_errors(images, target, classes[rows])
                found.setdefault((dose, name), []).append(own)
            for place in (place for place, row in enumerate(rows) if row in middles):
                row = rows[place]
                series = pack.series[pack.series_of[row]]
                notes = [
                    f"{title}\n{_figures(image, target[place], inside[row])}"
                    for title, image in (
                        (f"low dose: {dose_model} {dose:g}", noisy[place]),
                        (f"output of {denoiser.path.stem}", output[place]),
                    )
                ]
                notes.append(f"{'noise-free truth' if kind == 'truth' else 'before simulation'}\n{NOTICE}")
                file = f"dose_{dose:g}/{series['series_uid']}_{pack.slice_of[row]:05d}.png"
                images = (noisy[place], output[place], target[place])
                pictures[file] = triplet(images, notes, series["affine"])
    low, high = metrics.RANGE_HU
    table = [
        {
            "denoiser": denoiser.path.name,
            "dose_model": dose_model,
            "dose": dose,
            "dose_fraction": DOSE_MODELS[dose_model].fraction(dose),
            "sigma_hu": DOSE_MODELS[dose_model].sigma_hu(dose),
            "noise_seed": seed,
            "image": name,
            "n_patients": len(own),
            "n_slices": len(pack),
            **{figure: _mean([entry[figure] for entry in own]) for figure in FIGURES},
            "range_hu": f"{low:g}..{high:g}",
            "mask": anatomy.DEFAULT_MASK,
            "reference": kind,
        }
        for (dose, name), own in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return table, pictures


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _figures(image: np.ndarray, target: np.ndarray, inside: np.ndarray) -> str:
    """The figures of one slice (H, W), as they stand under it."""
    found = metrics.image_quality(image[None], target[None], inside[None], np.zeros(1))
    rmse, psnr, ssim = (
        metrics.shown(found[name], digits) for name, digits in (("rmse_hu", 2), ("psnr", 2), ("ssim", 3))
    )
    return f"RMSE {rmse} HU  PSNR {psnr} dB  SSIM {ssim}"


TILE_PX = 320  # wide enough for the line of figures under it
LETTERS_PX = 13
NOTE_PX = 3 * LETTERS_PX  # two lines and their margins


def triplet(images: Sequence[np.ndarray], notes: Sequence[str], affine: Sequence) -> bytes:
    """PNG of slices (H, W) HU side by side in the brain window, radiological, each with a note of two lines
    under it. affine: see display.radiological."""
    tiles = [enlarge(radiological(to_grey(hu, *BRAIN_WINDOW), affine), TILE_PX) for hu in images]
    height, width = tiles[0].shape
    canvas = Image.new("L", (width * len(tiles), height + NOTE_PX))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTERS_PX)
    for place, (tile, note) in enumerate(zip(tiles, notes, strict=True)):
        canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (place * width, 0))
        draw.text((place * width + 4, height + 2), note, 255, font)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def evaluate(
    which: str,
    *,
    data: Path,
    split: str,
    results: Path,
    size: int | None,
    dose_model: str | None,
    doses: Sequence[float] | None,
    seed: int,
    device: torch.device,
    command: str,
) -> None:
    """Score a denoiser alone, write <results>/denoiser/<name>/ and print the table. None: as trained.

    Raises InputError for a denoiser that was trained on a test patient."""
    denoiser = load(which, device)
    facts = denoiser.facts
    chosen = dose_model or facts["dose_model"]
    if doses is None and chosen == facts["dose_model"]:
        doses = facts.get("doses")
    doses = sorted(set(check_doses(chosen, doses)))
    pack = load_pack(data, split, size or facts.get("size") or native_size(data, split))
    patients = set(pack.patient_ids().tolist())
    if split == "test":
        check_patients(patients, [denoiser])
    seen = len(patients & set(facts["trained_on"]))
    folder = results / "denoiser" / denoiser.path.stem
    with stage.lock(folder / ".lock"):
        rows, pictures = score(pack, denoiser, chosen, doses, seed)
        rows = [{column: (row | {"split": split})[column] for column in COLUMNS} for row in rows]
        manifest = {
            "data": str(data),
            "split": split,
            "split_hash": pack.split_hash,
            "size": pack.size,
            "checkpoint": {"path": str(denoiser.path), "sha256": sha256(denoiser)},
            "patients_seen_in_training_or_validation": seen,
            "noise_seed": seed,
            "versions": checkpoints.versions(),
            "command": command,
        }
        for old in folder.glob("dose_*/*.png"):  # of an earlier run: they would pass for this one's
            old.unlink()
        for name, content in pictures.items():
            with stage.atomic_write(folder / name, "wb") as file:
                file.write(content)
        plain = stage.plain(rows)
        with stage.atomic_write(folder / "metrics_summary.csv") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(plain)
        stage.write_json(folder / "metrics_summary.json", {"manifest": manifest, "rows": plain})
    reference = "the noise-free truth" if rows[0]["reference"] == "truth" else "the slice before simulation"
    stage.say(
        f"{denoiser.path}: {rows[0]['n_patients']} {split} patients, {len(pack)} slices of {pack.size} x "
        f"{pack.size}, dose model {chosen}, noise seed {seed}. Inside the {anatomy.DEFAULT_MASK} against "
        f"{reference}, PSNR and SSIM over {rows[0]['range_hu']} HU, means over patients."
    )
    if seen:
        stage.say(f"  {seen} of these patients were seen in its training or validation: no fair test")
    for row in rows:
        quality = (
            f"RMSE {metrics.shown(row['rmse_hu'], 2):>6} HU | PSNR {metrics.shown(row['psnr'], 2):>5} dB | "
            f"SSIM {metrics.shown(row['ssim'])} | MSE {metrics.shown(row['mse'], 1):>6} HU2"
        )
        bias = ", ".join(f"{tissue} {metrics.shown(row[f'bias_{tissue}_hu'], 2)}" for tissue in BIAS_TISSUES)
        stage.say(f"dose {row['dose']:<5g} {row['image']:<8} | {quality} | bias {bias} HU")
    stage.say(f"Wrote {folder / 'metrics_summary.csv'}, .json and {len(pictures)} pictures")


# ---------------------------------------------------------------- slices for other programs


class Export(NamedTuple):
    """What decides the values of an export. dose_model, dose, noise_seed: None where nothing is simulated."""

    layout: str
    denoiser: str
    sha256: str | None
    dose_model: str | None
    dose: float | None
    noise_seed: int | None


class Series(NamedTuple):
    """A prepared series; number: of its first slice, counted over the split."""

    folder: Path
    series_uid: str
    shape: tuple[int, int, int]
    number: int


def find_series(data: Path, split: str, options: Export) -> tuple[list[Series], str]:
    """The series of a split, and a hash that changes with whatever they hold.

    Raises InputError where there are none, or where they lack what is asked for."""
    folders = series_folders(data, split)
    if not folders:
        raise stage.InputError(f"{data / split}: no series (run prepare_dataset.py, then split_dataset.py)")
    found, contents, number = [], hashlib.sha256(), 0
    for folder in folders:
        metadata = read_metadata(folder)
        if metadata["intensity"] != "hu":
            raise stage.InputError(f"{folder}: windowed 8-bit images have no HU (prepare a source with HU)")
        if options.dose_model == "measured" and options.dose < 1:
            low_doses = metadata["low_doses"]
            if f"{options.dose:g}" not in low_doses:
                raise stage.InputError(
                    f"--doses {options.dose:g}: {folder} has no real low dose of {options.dose:g}, only "
                    f"{' '.join(low_doses) or 'none'} (choose one, or another --dose-model)"
                )
        contents.update(json.dumps(metadata, sort_keys=True).encode())
        found.append(Series(folder, metadata["series_uid"], tuple(metadata["shape"]), number))
        number += metadata["shape"][0]
    return found, contents.hexdigest()


def denoise_series(network: torch.nn.Module, folder: Path, metadata: dict, options: Export) -> np.ndarray:
    """A prepared series at its own matrix, at the dose asked for, denoised: (S, H, W) int16 HU.

    What was never measured stays -1024."""
    count = metadata["shape"][0]
    hu = read_slices(folder, "image", count)
    noise_hu = math.nan if metadata["noise_hu"] is None else metadata["noise_hu"]
    given, level = hu, noise_hu if math.isfinite(noise_hu) else ROUTINE_NOISE_HU
    if options.dose is not None:
        level = noise_level(options.dose_model, options.dose, noise_hu)
        if options.dose_model != "measured":
            seeds = [
                evaluation_seed(
                    options.noise_seed, metadata["series_uid"], index, options.dose_model, options.dose
                )
                for index in range(count)
            ]
            given = simulate_scan(
                hu,
                options.dose_model,
                [options.dose] * count,
                seeds,
                spacing_mm=metadata["spacing_mm"],
                noise_hu=noise_hu,
            )
        elif options.dose < 1:
            given = read_slices(folder, f"low_{options.dose:g}", count)
    output = denoise(network, given, level).round().clip(AIR_HU, MAX_HU).astype(np.int16)
    output[hu == AIR_HU] = AIR_HU
    return output


def write_dataset(out: Path, series: Series, hu: np.ndarray, metadata: dict, options: Export) -> None:
    """The series in the layout of prepared data, with labels, mask and truth as they were."""
    kinds = {kind: metadata[f"has_{kind}"] for kind in ("mask", "truth")}
    stored = {kind: read_slices(series.folder, kind, len(hu)) for kind, there in kinds.items() if there}
    slices = metadata["slices"]
    scan = measured_scan(
        hu=hu,
        affine=np.array(metadata["affine"]),
        positions_mm=tuple(entry["position_mm"] for entry in slices),
        spacing_mm=tuple(metadata["spacing_mm"]),
        slice_labels=[entry["labels"] for entry in slices],
        repairs=[[*entry["repairs"], f"denoised by {options.denoiser}"] for entry in slices],
        **{
            name: metadata[name]
            for name in (
                *("source", "patient_id", "study_uid", "series_uid", "labels", "split"),
                *("gantry_tilt_deg", "intensity", "padding_count"),
            )
        },
        **stored,
    )
    write_scan(scan, out, {"denoised": options._asdict()})


def write_samples(out: Path, series: Series, hu: np.ndarray, metadata: dict, options: Export) -> None:
    """The slices of a series that are not there yet, each a sample of its own; lesions are 1."""
    mask = read_slices(series.folder, "mask", len(hu)) if metadata["has_mask"] else None
    names = ("patient_id", "study_uid", "series_uid", "source", "spacing_mm", "affine", "labels")
    facts = {name: metadata[name] for name in names} | {"denoised": options._asdict()}
    for index, final in enumerate(_samples(out, series)):
        if final.exists():
            continue
        with stage.atomic_folder(final) as partial:
            write_npz(partial / "image.npz", hu[index])
            if mask is not None:
                write_npz(partial / "mask.npz", (mask[index] > 0).astype(np.uint8))
            own = {"slice_index": index, "slice_labels": metadata["slices"][index]["labels"]}
            stage.write_json(partial / "metadata.json", facts | own)


def _samples(out: Path, series: Series) -> list[Path]:
    return [out / f"sample_{series.number + index:05d}" for index in range(series.shape[0])]


class Layout(NamedTuple):
    """A layout on disk. out is the folder of the split."""

    write: Callable[[Path, Series, np.ndarray, dict, Export], None]  # what appears is complete
    written: Callable[[Path, Series], list[Path]]  # what is there when the series is done


LAYOUTS = {
    "dataset": Layout(write_dataset, lambda out, series: [out / series.series_uid / "metadata.json"]),
    "samples": Layout(write_samples, _samples),
}


def export(
    which: str,
    *,
    data: Path,
    split: str,
    out: Path,
    layout: str,
    dose_model: str | None,
    dose: float | None,
    seed: int,
    device: torch.device,
) -> None:
    """Write a split denoised, <out>/<split>/, at its own matrix. dose: simulated first; None: as it is.

    Goes on where it was stopped. Raises InputError if out is another export's, or for test patients that the
    denoiser was trained on."""
    denoiser = load(which, device)
    simulated = (None, None, None)
    if dose is not None:
        simulated = (dose_model or denoiser.facts["dose_model"], dose, seed)
        check_doses(simulated[0], [dose])
    elif dose_model is not None:
        raise stage.InputError("--dose-model: says how --doses is simulated (give --doses, or leave it out)")
    options = Export(layout, denoiser.path.name, sha256(denoiser), *simulated)
    splits = read_splits(data)
    series, contents = find_series(data, split, options)
    if split == "test":
        check_patients([read_metadata(one.folder)["patient_id"] for one in series], [denoiser])
    slices = sum(one.shape[0] for one in series)
    facts = {"contents": contents, "series": len(series), "slices": slices}
    out.mkdir(parents=True, exist_ok=True)
    with stage.lock(out / ".lock"):
        asked = options._asdict() | {"split_hash": splits["hash"]}
        manifest = stage.claim_export(out, asked, split, facts, checkpoints.versions())
        if layout == "dataset":  # so that the next stage can read it as --data
            stage.write_json(out / "splits.json", splits)
        write, written = LAYOUTS[layout]
        waiting = [one for one in series if not all(path.exists() for path in written(out / split, one))]
        # image and truth of 2 bytes a pixel, mask of 1, before compression
        stage.require_space(out, 5 * sum(math.prod(one.shape) for one in waiting))
        with stage.progress((), desc="denoise", total=slices, unit="slice") as bar:
            bar.update(slices - sum(one.shape[0] for one in waiting))
            for one in waiting:
                metadata = read_metadata(one.folder)
                hu = denoise_series(denoiser.network, one.folder, metadata, options)
                write(out / split, one, hu, metadata, options)
                bar.update(len(hu))
        manifest["splits"][split]["complete"] = True
        stage.write_json(out / "export.json", manifest)
    what = "as they are" if dose is None else f"at {options.dose_model} {dose:g}"
    stage.say(f"{out / split}: {slices} slices of {len(series)} series {what}, denoised by {denoiser.path}")
    stage.say(f"  {len(waiting)} of {len(series)} series new")
