"""Stage 7: denoise and read a new scan.

Reads:   --input, a folder with DICOM head CT series, a zip of it, a NIfTI file or a folder of NIfTI files;
         <models>/denoiser.pt and classifier.pt, with --segment also segmenter.pt
Writes:  <out>/<series_uid>/denoised.nii.gz, prediction.json, contact_sheet.png, and of a scan that the
         segmenter is asked about lesions.nii.gz, lesions.png, with --mask-format dicom-seg lesions.dcm
Example: python predict.py --input /data/one_patient --out predictions
         python predict.py --input /data/one_patient --out predictions --dose 5
         python predict.py --input /data/one_patient --out predictions --segment --mask-format nifti dicom-seg

Each network sees the scan as it learned to: at its own matrix, and denoised first if it was trained on
denoised slices. The segmenter is asked about scans that the classifier does not call normal. Research use
only."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import anatomy
import checkpoints
import metrics
import stage
import training
from dataset import TASKS, fit_to_square, square_pixel_mm
from dicom_output import Software, highdicom_package, write_segmentation
from dicom_series import read_pixels, scan_of
from dose import DOSE_MODELS, SIMULATED
from inference import (
    ROUTINE_NOISE_HU,
    Network,
    denoise,
    fits_denoiser,
    load_classifier,
    load_denoiser,
    load_segmenter,
    read,
)
from lesion_reading import LesionReading, call_scan, describe, read_lesions
from low_dose import evaluation_seed, noise_level, simulate_scan
from nifti_series import stored_axes
from scans import discover, read_scan
from sheets import contact_sheet, lesion_sheet
from tiling import tile_side
from volumes import AIR_HU, Job, Scan, ScanError, write_nifti

NOISE_SEED = 42  # as in the study
MASK_FORMATS = ("nifti", "dicom-seg")


class Dose(NamedTuple):
    """A dose to simulate, and the seed of its noise."""

    model: str
    value: float
    seed: int


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="DICOM folder or zip, NIfTI file or folder")
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
    parser.add_argument("--segment", action="store_true", help="outline lesions where the scan is not normal")
    parser.add_argument("--segmenter", type=Path, help="checkpoint (default: segmenter.pt in --models)")
    parser.add_argument("--segment-always", action="store_true", help="outline lesions in normal scans too")
    parser.add_argument(
        "--mask-format",
        choices=MASK_FORMATS,
        nargs="+",
        help="of the outlined lesions, DICOM SEG only for DICOM input (default: nifti)",
    )
    parser.add_argument("--tile", type=tile_side, help="denoise in tiles of this side where memory is short")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


class Models(NamedTuple):
    """What reads a scan."""

    denoiser: nn.Module
    classifier: Network
    segmenter: Network | None = None


class Reading(NamedTuple):
    """What predict makes of a scan. given, denoised: (S, H, W) HU; facts: JSON types."""

    given: np.ndarray
    denoised: np.ndarray
    facts: dict
    lesions: LesionReading | None


def predict(
    scan: Scan, models: Models, dose: Dose | None, tile: int | None = None, *, segment_always: bool = False
) -> Reading:
    """Denoise a scan at its own matrix, classify its slices, and outline its lesions if there is a segmenter.

    dose: simulated first, if any. tile: see inference.denoise. segment_always: see read_lesions."""
    given, quality = scan.hu, None
    if dose is not None:
        given = _simulate(scan, scan.hu, scan.spacing_mm, dose)
    level = scan.noise_hu if math.isfinite(scan.noise_hu) else ROUTINE_NOISE_HU
    if dose is not None:
        level = noise_level(dose.model, dose.value, scan.noise_hu)
    denoised = denoise(models.denoiser, given, level, tile=tile)
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

    def as_learnt(facts: dict) -> np.ndarray:
        """(S, size, size) HU as the network of these facts is to see the scan."""
        small = fit_to_square(scan.hu, scan.spacing_mm, facts["size"], AIR_HU)
        if dose is not None:  # at the network's own matrix: resampling would average noise away
            pixel_mm = square_pixel_mm(scan.hu.shape[1:], scan.spacing_mm, facts["size"])
            small = _simulate(scan, small, (scan.spacing_mm[0], pixel_mm, pixel_mm), dose)
        return denoise(models.denoiser, small, level) if facts["input"] == "denoised" else small

    facts = models.classifier.facts
    task, found = TASKS[facts["task"]], read(models.classifier.network, as_learnt(facts))
    lesions = None
    if models.segmenter is not None:
        lesions = read_lesions(
            scan,
            call_scan(found, facts),
            models.segmenter,
            lambda: as_learnt(models.segmenter.facts),
            always=segment_always,
        )
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
        "lesions": None if lesions is None else lesions.facts,
        "note": "research use only; not a medical device",
    }
    return Reading(given, denoised, result, lesions)


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


class Source(NamedTuple):
    """A scan and where it comes from. files: of its slices, of a DICOM series; axes: of a NIfTI file."""

    scan: Scan
    files: list[str] | None = None
    axes: str | None = None


def read_source(job: Job) -> Source:
    """Raises ScanError if the scan cannot be used."""
    if job.source == "dicom":
        pixels = read_pixels(job.inputs, assume_hu=job.assume_hu)
        return Source(scan_of(job, pixels), files=[copies[0] for copies in pixels.files])
    return Source(read_scan(job), axes=stored_axes(job.inputs.image))


def write_lesions(
    folder: Path, source: Source, reading: Reading, formats: Sequence[str], by: Network
) -> None:
    """Mask and pictures of what the segmenter outlined; what an earlier run left does not stay.

    Raises InputError if the headers of the series allow no DICOM SEG."""
    for name in ("lesions.nii.gz", "lesions.dcm", "lesions.png"):
        (folder / name).unlink(missing_ok=True)
    scan, lesions = source.scan, reading.lesions
    if lesions is None or lesions.mask is None:
        return
    percent = [entry["area_percent"] for entry in lesions.facts["slices"]]
    lesion_sheet(folder / "lesions.png", scan, reading.given, lesions.mask, percent)
    if "nifti" in formats:
        path = folder / "lesions.nii.gz"
        write_nifti(path, lesions.mask, scan.affine, scan.positions_mm, source.axes)
    if "dicom-seg" in formats:
        names = dict(enumerate(by.facts["classes"], start=1))
        software = Software(by.path.name, checkpoints.file_sha256(by.path)[:12])
        path = folder / "lesions.dcm"
        if not write_segmentation(path, source.files, lesions.mask, names, software):
            stage.log.info("%s: no lesion outlined, so that there is no DICOM SEG", folder)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect. Raises InputError."""
    if args.dose is None and (args.dose_model is not None or args.seed is not None):
        raise stage.InputError(
            "--dose-model, --seed: say how --dose is simulated (give --dose, or leave them out)"
        )
    if not args.segment and (args.segmenter or args.segment_always or args.mask_format):
        raise stage.InputError(
            "--segmenter, --segment-always, --mask-format: say how lesions are outlined (give --segment too)"
        )
    if "dicom-seg" in (args.mask_format or ()):
        highdicom_package()


def load_models(args: argparse.Namespace, device: torch.device) -> tuple[Models, dict, list[Path]]:
    """(networks, facts of the denoiser, files). Raises InputError if one is missing, or does not fit."""
    paths = [args.denoiser or args.models / "denoiser.pt", args.classifier or args.models / "classifier.pt"]
    denoiser, trained = load_denoiser(paths[0], device)
    networks = [Network(paths[1], *load_classifier(paths[1], device))]
    if args.segment:
        paths.append(args.segmenter or args.models / "segmenter.pt")
        networks.append(Network(paths[2], *load_segmenter(paths[2], device)))
    for network in networks:
        if not fits_denoiser(network.facts, paths[0]):
            raise stage.InputError(
                f"{network.path}: was trained on the output of another denoiser than {paths[0]} "
                "(--denoiser names the right one)"
            )
    return Models(denoiser, *networks), trained, paths


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_options(args)
    device = training.pick_device(args.device)
    if not args.input.exists():
        raise stage.InputError(f"{args.input}: no such file or folder (--input needs DICOM or NIfTI)")
    models, trained, paths = load_models(args, device)
    dose = None
    if args.dose is not None:
        seed = NOISE_SEED if args.seed is None else args.seed
        dose = Dose(args.dose_model or trained["dose_model"], args.dose, seed)
        DOSE_MODELS[dose.model].check(dose.value)
    jobs, rejected = discover(args.input)
    for entry in rejected:
        stage.log.info("left out %s: %s", entry.file, entry.reason)
    formats = args.mask_format or MASK_FORMATS[:1]
    if "dicom-seg" in formats and any(job.source != "dicom" for job in jobs):
        raise stage.InputError(f"{args.input}: is no DICOM series, DICOM SEG needs one (--mask-format nifti)")
    hashes = {path.name: checkpoints.file_sha256(path) for path in paths}
    failed, unwritten = [], []
    for job in stage.progress(jobs, desc="predict", unit="series"):
        try:
            source = read_source(job)
        except ScanError as error:
            failed.append(str(error))
            stage.log.warning("left out %s", error)
            continue
        scan = source.scan
        reading = predict(scan, models, dose, args.tile, segment_always=args.segment_always)
        folder = args.out / scan.series_uid
        folder.mkdir(parents=True, exist_ok=True)
        hu = reading.denoised.round().clip(-32768, 32767).astype(np.int16)
        even = write_nifti(folder / "denoised.nii.gz", hu, scan.affine, scan.positions_mm, source.axes)
        result = reading.facts | {"models": hashes, "nifti_resampled_to_even_gaps": even}
        scores = [entry["probability"] for entry in result["slices"]]
        contact_sheet(
            folder / "contact_sheet.png", scan, reading.given, reading.denoised, result["class"], scores
        )
        stage.write_json(folder / "prediction.json", result)
        try:
            write_lesions(folder, source, reading, formats, models.segmenter)
        except stage.InputError as error:
            unwritten.append(str(error))
            stage.log.warning("no DICOM SEG, %s", error)
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
        if reading.lesions is not None:
            stage.say(f"  {describe(reading.lesions.facts)}")
            if even and reading.lesions.mask is not None and "nifti" in formats:
                stage.say("  gaps are uneven: the NIfTI files are on an even grid, the mask by nearest slice")
    if len(failed) == len(jobs):
        reason = failed[0] if failed else rejected[0].reason if rejected else "it holds no files"
        raise stage.InputError(f"{args.input}: no usable CT series ({reason})")
    if failed:
        raise stage.StageError(f"{len(failed)} of {len(jobs)} series could not be read", stage.EXIT_REJECTED)
    if unwritten:
        raise stage.StageError(
            f"no DICOM SEG of {len(unwritten)} of {len(jobs)} series, {unwritten[0]}", stage.EXIT_REJECTED
        )


if __name__ == "__main__":
    stage.run(main)
