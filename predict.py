"""Stage 7: denoise and read a new scan.

Reads:   --input, a folder with one or more DICOM head CT series; <models>/denoiser.pt and classifier.pt
Writes:  <out>/<series_uid>/denoised.nii.gz, prediction.json, contact_sheet.png
Example: python predict.py --input /data/one_patient --out predictions
         python predict.py --input /data/one_patient --out predictions --dose 5

The classifier sees the scan as it learned to: at its own matrix, and denoised first if it was trained on
denoised slices. Research use only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

import anatomy
import checkpoints
import metrics
import stage
import training
from dataset import BRAIN_WINDOW, TASKS, fit_to_square, square_pixel_mm
from display import NOTICE, radiological
from dose import DOSE_MODELS, SIMULATED
from inference import (
    ROUTINE_NOISE_HU,
    denoise,
    fits_denoiser,
    load_classifier,
    load_denoiser,
    read,
)
from low_dose import evaluation_seed, noise_level, simulate_scan
from scans import READERS, read_scan
from tiling import tile_side
from volumes import AIR_HU, Scan, ScanError, write_nifti

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 the backend has to be chosen first

NOISE_SEED = 42  # as in the study
SHEET_COLUMNS = 7  # four rows for a routine scan of 28 slices
SHEET_SLICES = 42  # of a longer scan evenly spaced ones are shown


class Dose(NamedTuple):
    """A dose to simulate, and the seed of its noise."""

    model: str
    value: float
    seed: int


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with DICOM files, any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--models", type=Path, default=Path("saved_models"), help="checkpoints (default: saved_models)"
    )
    parser.add_argument("--denoiser", type=Path, help="checkpoint (default: denoiser.pt in --models)")
    parser.add_argument("--classifier", type=Path, help="checkpoint (default: classifier.pt in --models)")
    parser.add_argument(
        "--dose", type=float, help="first simulate this dose, and measure what the denoiser gives back"
    )
    parser.add_argument(
        "--dose-model", choices=sorted(SIMULATED), help="for --dose (default: as the denoiser was trained)"
    )
    parser.add_argument("--seed", type=stage.natural_int, help="of the noise of --dose (default: 42)")
    parser.add_argument("--tile", type=tile_side, help="denoise in tiles of this side where memory is short")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def contact_sheet(path: Path, result: Reading, scan: Scan) -> None:
    """PNG of the input above its denoised version, brain window, each slice with number and probability, the
    patient's right at the left edge."""
    name, scores = result.facts["class"], [entry["probability"] for entry in result.facts["slices"]]
    row_mm, column_mm = scan.spacing_mm[1:]
    turned = abs(scan.affine[1, 0]) > abs(scan.affine[0, 0])  # its columns run from front to back
    chosen = np.unique(np.linspace(0, len(scan.hu) - 1, min(SHEET_SLICES, len(scan.hu))).round().astype(int))
    columns = min(SHEET_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(1.7 * columns, 3.5 * rows), squeeze=False, facecolor="black"
    )
    center, width = BRAIN_WINDOW
    for half, volume in enumerate((result.given, result.denoised)):
        for place in range(rows * columns):
            axis = axes[half * rows + place // columns][place % columns]
            axis.axis("off")
            if place >= len(chosen):
                continue
            index = chosen[place]
            axis.imshow(
                radiological(volume[index], scan.affine),
                cmap="gray",
                vmin=center - width / 2,
                vmax=center + width / 2,
                aspect=column_mm / row_mm if turned else row_mm / column_mm,
            )
            title = f"{index + 1}/{len(scan.hu)}"
            title += f"  {name} {scores[index]:.2f}" if half == 0 else "  denoised"
            axis.set_title(title, color="white", fontsize=6, pad=2)
    window = f"brain window, centre {center:g}, width {width:g} HU"
    figure.suptitle(f"given above, denoised below; {window}; {NOTICE.upper()}", color="white", fontsize=8)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.95, 0.02, 0.12)
    with stage.atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=110, format="png", facecolor="black")
    plt.close(figure)


class Reading(NamedTuple):
    """What predict makes of a scan. given, denoised: (S, H, W) HU; facts: JSON types."""

    given: np.ndarray
    denoised: np.ndarray
    facts: dict


def predict(
    scan: Scan, denoiser, classifier, facts: dict, dose: Dose | None, tile: int | None = None
) -> Reading:
    """Denoise a scan at its own matrix and classify its slices. dose: simulated first, if any.

    tile: see inference.denoise."""
    given, quality = scan.hu, None
    if dose is not None:
        given = _simulate(scan, scan.hu, scan.spacing_mm, dose)
    level = scan.noise_hu if math.isfinite(scan.noise_hu) else ROUTINE_NOISE_HU
    if dose is not None:
        level = noise_level(dose.model, dose.value, scan.noise_hu)
    denoised = denoise(denoiser, given, level, tile=tile)
    denoised[scan.hu == AIR_HU] = AIR_HU  # what was never measured stays so
    if dose is not None:
        brain = anatomy.MASKS[anatomy.DEFAULT_MASK](scan.hu, scan.spacing_mm)
        patients = np.zeros(len(scan.hu))
        quality = {
            "dose_model": dose.model,
            "dose": dose.value,
            "mask": anatomy.DEFAULT_MASK,
            "reference": "the scan before simulation",
            "noisy": metrics.image_quality(given, scan.hu, brain, patients),
            "denoised": metrics.image_quality(denoised, scan.hu, brain, patients),
        }
    small = fit_to_square(scan.hu, scan.spacing_mm, facts["size"], AIR_HU)
    if dose is not None:  # at the classifier's own matrix: resampling would average noise away
        pixel_mm = square_pixel_mm(scan.hu.shape[1:], scan.spacing_mm, facts["size"])
        small = _simulate(scan, small, (scan.spacing_mm[0], pixel_mm, pixel_mm), dose)
    if facts["input"] == "denoised":
        small = denoise(denoiser, small, level)
    task, found = TASKS[facts["task"]], read(classifier, small)
    scores, scan_score = task.positive(found.slices), float(task.positive(found.scans)[0])
    thresholds = facts["thresholds"]
    result = {
        "series_uid": scan.series_uid,
        "task": facts["task"],
        "class": task.finding,
        "scan": {
            "probability": scan_score,
            **_call(scan_score, thresholds["scan"]),
            "classes": dict(zip(facts["classes"], found.scans[0].tolist(), strict=True)),
        },
        "slices": [
            {
                "index": index,
                "position_mm": scan.positions_mm[index],
                "probability": float(score),
                **_call(float(score), thresholds["slice"]),
                "classes": dict(zip(facts["classes"], found.slices[index].tolist(), strict=True)),
                "repairs": scan.repairs[index],
            }
            for index, score in enumerate(scores)
        ],
        "thresholds": thresholds,
        "spacing_mm": scan.spacing_mm,
        "gantry_tilt_deg": scan.gantry_tilt_deg,
        "noise_hu": scan.noise_hu,
        "low_dose": quality,
        "note": "research use only; not a medical device",
    }
    return Reading(given, denoised, result)


def _simulate(scan: Scan, volume: np.ndarray, spacing_mm: tuple, dose: Dose) -> np.ndarray:
    """A scan's slices, resampled or not, at a dose, with the noise of the study. Returns float32 HU."""
    seeds = [
        evaluation_seed(dose.seed, scan.series_uid, index, dose.model, dose.value)
        for index in range(len(volume))
    ]
    return simulate_scan(
        volume,
        dose.model,
        [dose.value] * len(seeds),
        seeds,
        spacing_mm=spacing_mm,
        noise_hu=scan.noise_hu,
        own_pixel_mm=math.sqrt(scan.spacing_mm[1] * scan.spacing_mm[2]),
    )


def _call(score: float, threshold: dict) -> dict:
    """Positive or not; null where validation held one class only and no threshold could be chosen."""
    return {"positive": None if threshold["value"] is None else score >= threshold["value"]}


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = training.pick_device(args.device)
    if not args.input.is_dir():
        raise stage.InputError(f"{args.input}: no such folder (--input needs one with DICOM files)")
    denoiser_path = args.denoiser or args.models / "denoiser.pt"
    classifier_path = args.classifier or args.models / "classifier.pt"
    denoiser, trained = load_denoiser(denoiser_path, device)
    classifier, facts = load_classifier(classifier_path, device)
    dose = None
    if args.dose is not None:
        seed = NOISE_SEED if args.seed is None else args.seed
        dose = Dose(args.dose_model or trained["dose_model"], args.dose, seed)
        DOSE_MODELS[dose.model].check(dose.value)
    elif args.dose_model is not None or args.seed is not None:
        raise stage.InputError(
            "--dose-model, --seed: say how --dose is simulated (give --dose, or leave them out)"
        )
    if not fits_denoiser(facts, denoiser_path):
        raise stage.InputError(
            f"{classifier_path}: was trained on the output of another denoiser than {denoiser_path} "
            "(--denoiser names the right one)"
        )
    jobs, rejected = READERS["dicom"].discover(args.input)
    for entry in rejected:
        stage.log.info("left out %s: %s", entry.file, entry.reason)
    models = {path.name: checkpoints.file_sha256(path) for path in (denoiser_path, classifier_path)}
    failed = []
    for job in stage.progress(jobs, desc="predict", unit="series"):
        try:
            scan = read_scan(job)
        except ScanError as error:
            failed.append(str(error))
            stage.log.warning("left out %s", error)
            continue
        reading = predict(scan, denoiser, classifier, facts, dose, args.tile)
        folder = args.out / scan.series_uid
        folder.mkdir(parents=True, exist_ok=True)
        hu = reading.denoised.round().clip(-32768, 32767).astype(np.int16)
        even = write_nifti(folder / "denoised.nii.gz", hu, scan.affine, scan.positions_mm)
        contact_sheet(folder / "contact_sheet.png", reading, scan)
        result = reading.facts | {"models": models, "nifti_resampled_to_even_gaps": even}
        stage.write_json(folder / "prediction.json", result)
        verdict = {True: "above", False: "below", None: "no"}[result["scan"]["positive"]]
        stage.say(
            f"{folder}: {len(scan.hu)} slices, tilt {scan.gantry_tilt_deg:.1f} deg, "
            f"{result['class']} probability {result['scan']['probability']:.3f} ({verdict} threshold)"
        )
        if dose is not None:
            before, after = (result["low_dose"][name]["rmse_hu"] for name in ("noisy", "denoised"))
            stage.say(
                f"  {dose.model} {dose.value:g}: RMSE to the scan inside the {anatomy.DEFAULT_MASK} "
                f"{before:.2f} HU, denoised {after:.2f} HU"
            )
    if len(failed) == len(jobs):
        reason = failed[0] if failed else rejected[0].reason if rejected else "it holds no files"
        raise stage.InputError(f"{args.input}: no usable CT series ({reason})")
    if failed:
        raise stage.StageError(f"{len(failed)} of {len(jobs)} series could not be read", stage.EXIT_REJECTED)


if __name__ == "__main__":
    stage.run(main)
