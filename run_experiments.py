"""Stage 6: the study. How far can the dose be cut, and does denoising help?

Reads:   <data>/test/ of every --data, <models>/denoiser*.pt, classifier*.pt, segmenter*.pt
Writes:  <out>/report.html, experiments.csv, experiments.json, tables/*.csv and *.json, figures/*.png and
         *.svg, cells/ (what every network said, from which a run that was stopped goes on)
Example: python run_experiments.py
         python run_experiments.py --dose-model projection --doses 1 0.5 0.25 0.1 0.05 --noise-seeds 1 2
         python run_experiments.py --denoisers none saved_models/denoiser.pt bm3d nlm --stress motion rings
         python run_experiments.py --plan
         torchrun --nproc_per_node=4 run_experiments.py

All arms see the same patients with the same noise. An arm is a classifier behind a denoiser or on the low
dose itself: pipeline 1 classifies the low-dose slice, pipeline 2 denoises it first; both use the classifier
trained on clean slices. A classifier trained on noisy slices makes pipeline 1n, one trained on denoised
slices 2d, a joint one 2j. Networks whose names differ by .seed<n> alone are one arm of several seeds. What is
missing is left out, and said so. Every --data but the first is another test set, on which classifiers are
tried at the highest dose."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

import anatomy
import checkpoints
import comparisons
import metrics
import report
import runs
import stage
import tables
import training
import wording
from arms import Networks, agree, is_classical, load_networks, plan_arms, plan_outlines
from artifacts import ARTIFACTS, SEVERITIES, check_severity
from cells import Cells
from dataset import load_pack, native_size
from dose import DOSE_MODELS
from inference import LEGEND, check_patients
from low_dose import LowDose, check_doses
from models import CLASSICAL
from scoring import write_table
from study import Design, Study

CLASSICAL_PATIENTS = 20  # BM3D takes seconds for a slice of 512 x 512: 20 patients of 30 slices half an hour
PREVALENCE = 0.1  # of a finding among the head CTs of an emergency department


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[Path("dataset")],
        help="prepared data, then other test sets (default: dataset)",
    )
    parser.add_argument(
        "--models", type=Path, default=Path("saved_models"), help="checkpoints (default: saved_models)"
    )
    parser.add_argument(
        "--denoisers",
        nargs="+",
        help=f"checkpoints, {', '.join(CLASSICAL)}, or none: the low dose as it is (default: none and all "
        "denoiser*.pt in --models)",
    )
    parser.add_argument(
        "--classifiers", type=Path, nargs="+", help="checkpoints (default: all classifier*.pt in --models)"
    )
    parser.add_argument(
        "--segmenters", type=Path, nargs="+", help="checkpoints (default: all segmenter*.pt in --models)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="(default: results)")
    parser.add_argument(
        "--dose-model",
        choices=sorted(DOSE_MODELS),
        nargs="+",
        help="how low dose is simulated; several make several ladders (default: as trained)",
    )
    parser.add_argument(
        "--doses",
        type=stage.positive_float,
        nargs="+",
        help="in the dose model's unit; the highest is the reference (default: all of the model)",
    )
    parser.add_argument(
        "--noise-seeds", type=stage.natural_int, nargs="+", help="noise realisations (default: --seed)"
    )
    parser.add_argument(
        "--seed", type=stage.natural_int, default=42, help="of noise and bootstrap (default: 42)"
    )
    parser.add_argument(
        "--mask",
        choices=sorted(anatomy.MASKS),
        default=anatomy.DEFAULT_MASK,
        help=f"where image quality is measured (default: {anatomy.DEFAULT_MASK})",
    )
    parser.add_argument(
        "--margin-auc",
        type=stage.fraction,
        default=comparisons.MARGINS["auc"],
        help="AUC that may be lost to be called not inferior (default: %(default)s)",
    )
    parser.add_argument(
        "--margin-sens",
        type=stage.fraction,
        default=comparisons.MARGINS["sens"],
        help="the same of the sensitivity (default: %(default)s)",
    )
    parser.add_argument(
        "--prevalence",
        type=stage.fraction,
        default=PREVALENCE,
        help="of the finding where it is to be used, for predictive values (default: %(default)s)",
    )
    parser.add_argument(
        "--classical-patients",
        type=stage.positive_int,
        help=f"test patients on whom classical denoisers are tried (default: {CLASSICAL_PATIENTS})",
    )
    parser.add_argument(
        "--stress", nargs="+", choices=sorted(ARTIFACTS), default=[], help="artifacts (default: none)"
    )
    parser.add_argument(
        "--severities",
        type=float,
        nargs="+",
        help="of --stress, in (0, 1] (default: twelve, evenly)",
    )
    parser.add_argument("--plan", action="store_true", help="say what is done and what is left, and stop")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def make_design(args, networks: Networks) -> Design:
    """What is compared, checked before anything slow starts. Raises InputError or ValueError."""
    if args.severities is not None and not args.stress:
        raise stage.InputError("--severities: says how strong --stress is (give --stress, or leave it out)")
    if args.classical_patients is not None and not any(map(is_classical, networks.denoisers)):
        known = ", ".join(CLASSICAL)
        raise stage.InputError(
            f"--classical-patients: no denoiser is classical (--denoisers names one of {known})"
        )
    severities = sorted(set(args.severities or SEVERITIES))
    for severity in severities:
        check_severity(severity)
    for name in ("prevalence", "margin_auc", "margin_sens"):
        value = getattr(args, name)
        if not 0 < value < 1:
            raise stage.InputError(f"--{name.replace('_', '-')} {value:g}: must be in (0, 1)")
    trained = [network.facts["dose_model"] for network in networks.trained]
    models = args.dose_model or [next(filter(None, trained), training.DOSE_MODEL)]
    return Design(
        ladders={
            model: sorted(set(check_doses(model, args.doses)), reverse=True)
            for model in dict.fromkeys(models)
        },
        noise_seeds=list(dict.fromkeys(args.noise_seeds or [args.seed])),
        seed=args.seed,
        mask=args.mask,
        margins=comparisons.MARGINS | {"auc": args.margin_auc, "sens": args.margin_sens},
        prevalence=args.prevalence,
        classical_patients=args.classical_patients or CLASSICAL_PATIENTS,
        stress={artifact: severities for artifact in dict.fromkeys(args.stress)},
    )


def load_sets(args, networks: Networks, design: Design) -> tuple[dict[str, Study], list[str]]:
    """(the study of each --data by its path, what is left out and why).

    Raises InputError if networks do not fit each other, or were trained on test patients, if a real low dose
    is not there, or if there is nothing to run."""
    arms, left_out = plan_arms(networks)
    outlines = plan_outlines(networks)
    if args.stress and not arms:
        raise stage.InputError(f"--stress: is for classifiers (leave it out); {left_out[0]}")
    size = agree(networks.trained, "size") if networks.trained else native_size(args.data[0], "test")
    sets = {}
    for data in dict.fromkeys(args.data):
        pack = load_pack(data, "test", size)
        check_patients(pack.patient_ids().tolist(), networks.trained)
        sets[str(data)] = Study(
            data, Cells(args.out / "cells", pack, args.mask, args.seed), design, networks, arms, outlines
        )
    first, *others = sets.values()
    for model, doses in design.ladders.items():
        LowDose(first.pack, model, doses)  # real low doses may not be there
    for other in others:
        LowDose(other.pack, design.main_model, [design.reference(design.main_model)])
    if outlines and not first.outlines:
        left_out.insert(0, "segmenters: not every test series has a lesion mask (prepare data with masks)")
    if not (networks.denoisers or arms or first.outlines):
        raise stage.InputError(f"{args.models}: nothing to run; {left_out[0]}")
    return sets, left_out


def say_plan(sets: dict[str, Study]) -> None:
    """What is done and what is left of the grid, by images."""
    for name, study in sets.items():
        grid = study.grid() if study is next(iter(sets.values())) else study.external_grid()
        groups: dict[tuple, list[bool]] = {}
        for cell in grid:
            before = "low dose" if cell.denoiser is None else cell.denoiser.path.name
            groups.setdefault((cell.condition.title, before), []).append(study.cells.done(cell))
        done = sum(map(sum, groups.values()))
        stage.say(f"{name}: {done} of {len(grid)} cells done, {len(grid) - done} left")
        for (title, before), cells in groups.items():
            stage.say(f"  {title:<40} {before:<28} {sum(cells)} of {len(cells)}")


def label_arms(rows: list[dict]) -> list[str]:
    """A label for each row that tells its arm apart, with the classifier where several share the pipeline."""
    labels = []
    for row in rows:
        alike = [other for other in rows if other["arm"] == row["arm"]]
        parts = [row["arm"]]
        for key in ("classifier", "denoiser"):
            if len({other[key] for other in alike}) > 1:
                parts.append(str(row[key]))
        labels.append(" ".join(parts))
    return labels


def print_table(rows: list[dict]) -> None:
    """The result table, per dose: each pipeline per slice, then what denoising does to the image."""
    shown = metrics.shown
    for model, dose in dict.fromkeys((row["dose_model"], row["dose"]) for row in reversed(rows)):
        own = [row for row in rows if (row["dose_model"], row["dose"]) == (model, dose)]
        own = [row for row in own if row["noise_seed"] == own[0]["noise_seed"]]
        for row, label in zip(own, label_arms(own), strict=True):
            if row["level"] == "slice":
                stage.say(
                    f"Pipeline {label:<2} - Dose {dose:g} | Acc: {shown(row['acc'])} | "
                    f"AUC: {shown(row['auc'])} [{shown(row['auc_low'], 2)}, {shown(row['auc_high'], 2)}] | "
                    f"Sensitivity: {shown(row['sens'])} | Specificity: {shown(row['spec'])} | "
                    f"F1: {shown(row['f1'])} | ECE: {shown(row['ece'])}"
                )
        for row in {row["denoiser"]: row for row in own if row["denoiser"]}.values() or own[:1]:
            told = f"MSE: {row['mse_noisy']:.1f} HU2 | PSNR: {row['psnr_noisy']:.2f} dB | "
            told += f"SSIM: {row['ssim_noisy']:.3f} | RMSE: {row['rmse_hu_noisy']:.2f} HU"
            if row["denoiser"]:
                told = (
                    f"MSE: {row['mse']:.1f} (noisy {row['mse_noisy']:.1f}) HU2 | "
                    f"PSNR: {row['psnr']:.2f} (noisy {row['psnr_noisy']:.2f}) dB | "
                    f"SSIM: {row['ssim']:.3f} (noisy {row['ssim_noisy']:.3f}) | "
                    f"RMSE: {row['rmse_hu']:.2f} HU (noisy {row['rmse_hu_noisy']:.2f})"
                )
            stage.say(f"  {'Denoising by ' + row['denoiser'] if row['denoiser'] else 'Low dose'} -> {told}")


def say_results(study: Study, rows: list[dict], left_out: list[str]) -> None:
    """The table, and what it is of."""
    kind = "the image" if study.pack.truth is None else "the noise-free truth"
    patients, names = len(set(study.patients["slice"].tolist())), ", ".join(study.design.ladders)
    low, high = metrics.RANGE_HU
    stage.say(
        f"{patients} test patients, {len(study.pack)} slices, dose model {names}. "
        f"Image quality inside the {study.design.mask} against {kind}, PSNR and SSIM over "
        f"{low:g}..{high:g} HU. AUC with 95 % intervals from a bootstrap over patients."
    )
    print_table(rows)
    for name in LEGEND:
        if any(arm.name == name for arm in study.arms):
            stage.say(f"Pipeline {name:<2} = {LEGEND[name]}")
    for reason in left_out:
        stage.say(f"Left out: {reason}")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = training.pick_device(args.device)
    networks = load_networks(args.models, device, args.denoisers, args.classifiers, args.segmenters)
    design = make_design(args, networks)
    sets, left_out = load_sets(args, networks, design)
    if args.plan:
        say_plan(sets)
        return
    place = runs.world(device)
    with stage.lock(args.out / (".lock" if place.rank == 0 else f".lock{place.rank}")):
        study, *others = sets.values()
        study.cells.fill(study.grid())
        for other in others:
            other.cells.fill(other.external_grid())
        if place.size > 1:
            dist.barrier()
            if place.rank:
                return
        found = tables.all_tables(sets)
        manifest = {
            "data": str(args.data[0]),
            "other_data": [str(data) for data in args.data[1:]],
            "split_hash": study.pack.split_hash,
            "n_patients": len(set(study.patients["slice"].tolist())),
            "n_scans": len(study.pack.series),
            "n_slices": len(study.pack),
            "seed": args.seed,
            "design": design.facts(),
            "checkpoints": {
                network.path.name: checkpoints.file_sha256(network.path) for network in networks.trained
            },
            "versions": checkpoints.versions(),
            "command": " ".join(["run_experiments.py", *(sys.argv[1:] if argv is None else map(str, argv))]),
            "left_out": left_out,
            "answer": wording.answer(study, found),
        }
        files = report.write(args.out, study, manifest, found)
        rows = found.pop("experiments")
        write_table(args.out / "experiments.csv", tables.COLUMNS, rows)
        stage.write_json(args.out / "experiments.json", {"manifest": manifest, "rows": rows})
        for name, own in found.items():
            table = args.out / "tables" / f"{name}.csv"
            if own:
                write_table(table, list(own[0]), own)
                stage.write_json(table.with_suffix(".json"), own)
            else:  # one of an earlier run would pass for this one's
                for file in (table, table.with_suffix(".json")):
                    file.unlink(missing_ok=True)
    say_results(study, rows, left_out)
    for line in manifest["answer"]:
        stage.say(line)
    for path in [args.out / "experiments.csv", args.out / "experiments.json", args.out / "tables", *files]:
        stage.say(f"Wrote {path}")


if __name__ == "__main__":
    stage.run(main)
