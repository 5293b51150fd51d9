"""Stage 7: denoise, classify, explain and outline new head CT scans.

Reads:   --input, one or many: a folder of DICOM series, a zip of it, a NIfTI file, a folder of NIfTI files;
         <models>/denoiser.pt and classifier.pt, with --segment also segmenter.pt
Writes:  <out>/manifest.json, what became of each scan, and for each <out>/<series_uid>/
           denoised.nii.gz       in the geometry of the input
           contact_sheet.png     given above denoised, with the probability of each slice
           denoised/*.dcm        --dicom: the same as a derived series of the same study
           gradcam.nii.gz, .png  --gradcam: where the classifier looked
           lesions.nii.gz, .png  --segment: what was outlined; --mask-format dicom-seg: lesions.dcm
           prediction.json       probabilities, thresholds, volumes; written last
Example: python predict.py --input /data/one_patient --out predictions
         python predict.py --input /data/a /data/b.zip /data/c.nii.gz --out predictions
         python predict.py --input /data/one_patient --out predictions --dose 5
         python predict.py --input /data/one_patient --out predictions --gradcam --segment --dicom
         torchrun --nproc_per_node=4 predict.py --input /data/studies --out predictions

Each network sees a scan as it learned to: at its own matrix, and denoised first if it was trained on denoised
slices. The segmenter is asked about scans that the classifier does not call normal. A scan that an earlier
run with the same networks and options has finished is left alone, so a run that was stopped goes on when it
is started again. Research use only."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import anatomy
import checkpoints
import runs
import stage
import training
from dicom_output import Software, highdicom_package, write_derived_series, write_segmentation
from dicom_series import read_pixels, scan_of
from dose import DOSE_MODELS, SIMULATED
from inference import Network, fits_denoiser, load_classifier, load_denoiser, load_segmenter
from lesion_reading import describe
from nifti_series import stored_axes
from own_scan import Dose, Outcome, Request, work
from scans import discover, read_scan
from sheets import contact_sheet, heat_sheet, lesion_sheet
from tiling import tile_side
from volumes import Job, Rejected, Scan, ScanError, write_nifti

NOISE_SEED = 42  # as in the study
MASK_FORMATS = ("nifti", "dicom-seg")


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, help="DICOM folders or zips, NIfTI files or folders"
    )
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
    parser.add_argument(
        "--gradcam",
        nargs="?",
        const="",
        metavar="CLASS",
        help="show where the classifier looked for a class (default: that of its task)",
    )
    parser.add_argument("--segment", action="store_true", help="outline lesions where the scan is not normal")
    parser.add_argument("--segmenter", type=Path, help="checkpoint (default: segmenter.pt in --models)")
    parser.add_argument("--segment-always", action="store_true", help="outline lesions in normal scans too")
    parser.add_argument(
        "--mask-format",
        choices=MASK_FORMATS,
        nargs="+",
        help="of the outlined lesions, DICOM SEG only for DICOM input (default: nifti)",
    )
    parser.add_argument("--dicom", action="store_true", help="denoised slices as DICOM too; for DICOM input")
    parser.add_argument("--tile", type=tile_side, help="denoise in tiles of this side where memory is short")
    parser.add_argument("--overwrite", action="store_true", help="do scans anew that are finished")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


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
    for path in args.input:
        if not path.exists():
            raise stage.InputError(f"{path}: no such file or folder (--input needs DICOM or NIfTI)")
    if "dicom-seg" in (args.mask_format or ()):
        highdicom_package()


def make_request(args: argparse.Namespace, device: torch.device) -> Request:
    """The networks and what is asked of them. Raises InputError if one is missing, or does not fit."""
    denoiser_path = args.denoiser or args.models / "denoiser.pt"
    classifier_path = args.classifier or args.models / "classifier.pt"
    denoiser = Network(denoiser_path, *load_denoiser(denoiser_path, device))
    classifier = Network(classifier_path, *load_classifier(classifier_path, device))
    segmenter = None
    if args.segment:
        path = args.segmenter or args.models / "segmenter.pt"
        segmenter = Network(path, *load_segmenter(path, device))
    for network in filter(None, (classifier, segmenter)):
        if not fits_denoiser(network.facts, denoiser_path):
            raise stage.InputError(
                f"{network.path}: was trained on the output of another denoiser than {denoiser_path} "
                "(--denoiser names the right one)"
            )
    dose = None
    if args.dose is not None:
        seed = NOISE_SEED if args.seed is None else args.seed
        dose = Dose(args.dose_model or denoiser.facts["dose_model"], args.dose, seed)
        DOSE_MODELS[dose.model].check(dose.value)
    of_class, classes = args.gradcam, classifier.facts["classes"]
    if of_class == "":  # of several classes the question's own: "any" comes last, "normal" first
        of_class = classes[-1]
    if of_class is not None and of_class not in classes:
        raise stage.InputError(f"--gradcam {of_class}: {classifier_path} knows {', '.join(classes)}")
    return Request(
        denoiser=denoiser,
        classifier=classifier,
        through=classifier.facts["input"] == "denoised",
        segmenter=segmenter,
        always=args.segment_always,
        dose=dose,
        of_class=of_class,
        tile=args.tile,
    )


def asked_of(request: Request, args: argparse.Namespace) -> dict[str, Any]:
    """All that decides the files of a scan, as JSON types."""
    return stage.plain(
        {
            "models": {one.path.name: checkpoints.file_sha256(one.path) for one in request.networks},
            "dose": None if request.dose is None else request.dose._asdict(),
            "gradcam": request.of_class,
            "segment": args.segment,
            "segment_always": args.segment_always,
            "mask_format": sorted(args.mask_format or MASK_FORMATS[:1]),
            "dicom": args.dicom,
            "tile": args.tile,
        }
    )


# ---------------------------------------------------------------- one scan


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


def finished(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether an earlier run has made the same of this scan."""
    path = folder / "prediction.json"
    return path.exists() and stage.read_json(path, f"delete {folder}").get("asked") == asked


def software(network: Network) -> Software:
    return Software(network.path.name, checkpoints.file_sha256(network.path)[:12])


def write_images(folder: Path, source: Source, outcome: Outcome) -> bool:
    """denoised.nii.gz, contact_sheet.png and what Grad-CAM shows. Returns whether gaps were made even."""
    scan, facts = source.scan, outcome.facts
    geometry = scan.affine, scan.positions_mm, source.axes
    hu = outcome.denoised.round().clip(-32768, 32767).astype(np.int16)
    even = write_nifti(folder / "denoised.nii.gz", hu, *geometry)
    scores = [entry["probability"] for entry in facts["slices"]]
    contact_sheet(folder / "contact_sheet.png", scan, outcome.given, outcome.denoised, facts["class"], scores)
    if outcome.heat is not None:
        write_nifti(folder / "gradcam.nii.gz", outcome.heat.astype(np.float32), *geometry)
        heat_sheet(folder / "gradcam.png", scan, outcome.given, outcome.heat, facts["class"], scores)
    return even


def write_lesions(
    folder: Path, source: Source, outcome: Outcome, formats: Sequence[str], by: Network
) -> None:
    """Mask and pictures of what the segmenter outlined.

    Raises InputError if the headers of the series allow no DICOM SEG."""
    scan, lesions = source.scan, outcome.lesions
    if lesions is None or lesions.mask is None:
        return
    percent = [entry["area_percent"] for entry in lesions.facts["slices"]]
    lesion_sheet(folder / "lesions.png", scan, outcome.given, lesions.mask, percent)
    if "nifti" in formats:
        path = folder / "lesions.nii.gz"
        write_nifti(path, lesions.mask, scan.affine, scan.positions_mm, source.axes)
    if "dicom-seg" in formats:
        names = dict(enumerate(by.facts["classes"], start=1))
        if not write_segmentation(folder / "lesions.dcm", source.files, lesions.mask, names, software(by)):
            stage.log.info("%s: no lesion outlined, so that there is no DICOM SEG", folder)


def clear(folder: Path) -> None:
    """Take away what an earlier run has made of a scan: it would lie beside other answers."""
    for name in ("prediction.json", "lesions.nii.gz", "lesions.dcm", "lesions.png", "gradcam.nii.gz"):
        (folder / name).unlink(missing_ok=True)
    (folder / "gradcam.png").unlink(missing_ok=True)
    shutil.rmtree(folder / "denoised", ignore_errors=True)


def one_scan(job: Job, request: Request, asked: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Read a scan, ask the networks, write the files. Returns its entry of the manifest.

    Raises ScanError for a scan that cannot be used."""
    source = read_source(job)
    folder = args.out / job.series_uid
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    outcome = work(source.scan, request)
    facts = outcome.facts | {"asked": asked, "models": asked["models"]}
    facts["nifti_resampled_to_even_gaps"] = even = write_images(folder, source, outcome)
    refused = None
    try:
        if args.dicom:
            write_derived_series(
                folder / "denoised", source.files, outcome.denoised, software(request.denoiser)
            )
        write_lesions(folder, source, outcome, asked["mask_format"], request.segmenter)
    except stage.InputError as error:
        refused = str(error)
        stage.log.warning("no DICOM, %s", error)
    stage.write_json(folder / "prediction.json", facts)
    say(folder, outcome, even and "nifti" in asked["mask_format"])
    return {"status": "done" if refused is None else "no DICOM", "reason": refused}


def say(folder: Path, outcome: Outcome, even: bool) -> None:
    """What was found, in a line or three. even: whether a NIfTI mask had to be made even."""
    facts, scan = outcome.facts, outcome.facts["scan"]
    verdict = {True: "above", False: "below", None: "no"}[scan["positive"]]
    stage.say(
        f"{folder}: {len(outcome.given)} slices, tilt {facts['gantry_tilt_deg']:.1f} deg, "
        f"{facts['class']} probability {scan['probability']:.3f} ({verdict} threshold)"
    )
    if "quality" in facts:
        dose, before, after = facts["dose"], facts["quality"]["given"], facts["quality"]["denoised"]
        stage.say(
            f"  {dose['model']} {dose['value']:g}: RMSE to the scan inside the {anatomy.DEFAULT_MASK} "
            f"{before['rmse_hu']:.2f} HU, denoised {after['rmse_hu']:.2f} HU"
        )
    if outcome.lesions is not None:
        stage.say(f"  {describe(outcome.lesions.facts)}")
        if even and outcome.lesions.mask is not None:
            stage.say("  gaps are uneven: the NIfTI files are on an even grid, the mask by nearest slice")


# ---------------------------------------------------------------- all of them


def find_scans(args: argparse.Namespace) -> tuple[list[Job], list[Rejected]]:
    """Every scan of every --input, each once. Raises InputError if none is there, or no DICOM for DICOM."""
    jobs: dict[str, Job] = {}
    rejected = []
    for path in args.input:
        found, left_out = discover(path)
        jobs |= {job.series_uid: job for job in found}
        rejected += left_out
        for entry in left_out:
            stage.log.info("left out %s: %s", entry.file, entry.reason)
    wanted, remedy = (
        ("--dicom", "leave it out") if args.dicom else ("--mask-format dicom-seg", "--mask-format nifti")
    )
    if args.dicom or "dicom-seg" in (args.mask_format or ()):
        for job in jobs.values():
            if job.source != "dicom":
                raise stage.InputError(f"{job.case}: is no DICOM series, {wanted} needs one ({remedy})")
    return list(jobs.values()), rejected


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_options(args)
    device = training.pick_device(args.device)
    request = make_request(args, device)
    asked = asked_of(request, args)
    jobs, rejected = find_scans(args)
    place = runs.world(device)
    known: dict[str, dict] = {}
    for job in stage.progress(jobs[place.rank :: place.size], desc="predict", unit="scan"):
        entry = {"series_uid": job.series_uid, "input": job.case}
        if not args.overwrite and finished(args.out / job.series_uid, asked):
            stage.say(f"{args.out / job.series_uid}: finished earlier")
            known[job.series_uid] = entry | {"status": "done", "reason": None}
            continue
        try:
            known[job.series_uid] = entry | one_scan(job, request, asked, args)
        except ScanError as error:
            stage.log.warning("left out %s", error)
            known[job.series_uid] = entry | {"status": "failed", "reason": str(error)}
    known = runs.gathered(known, place)
    if place.rank:
        return
    scans = [known[job.series_uid] for job in jobs]
    failed = [one for one in scans if one["status"] == "failed"]
    if len(failed) == len(jobs):
        reason = failed[0]["reason"] if failed else rejected[0].reason if rejected else "it holds no files"
        raise stage.InputError(f"{args.input[0]}: no usable CT series ({reason})")
    manifest = {
        "command": " ".join(["predict.py", *(sys.argv[1:] if argv is None else map(str, argv))]),
        "asked": asked,
        "versions": checkpoints.versions(),
        "scans": scans,
        "left_out": [{"file": entry.file, "reason": entry.reason} for entry in rejected],
    }
    stage.write_json(args.out / "manifest.json", manifest)
    if failed:
        raise stage.StageError(f"{len(failed)} of {len(jobs)} series could not be read", stage.EXIT_REJECTED)
    unwritten = [one["reason"] for one in scans if one["status"] == "no DICOM"]
    if unwritten:
        raise stage.StageError(
            f"no DICOM of {len(unwritten)} of {len(jobs)} series, {unwritten[0]}", stage.EXIT_REJECTED
        )


if __name__ == "__main__":
    stage.run(main)
