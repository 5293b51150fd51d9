"""Stage 6: measure every pipeline at every dose on the test patients.

Reads:   <data>/test/, <models>/denoiser.pt, <models>/classifier*.pt
Writes:  <out>/experiments.csv, experiments.json, classification.png, image_quality.png
Example: python run_experiments.py
         python run_experiments.py --dose-model poisson --doses 1 5 10

Pipeline 1 classifies the low-dose slice, pipeline 2 denoises it first; both use the classifier trained on
clean slices. A classifier trained on noisy slices makes pipeline 1n, one trained on denoised slices 2d. All
pipelines see the same patients with the same noise. What is missing is left out, and said so."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

import anatomy
import checkpoints
import metrics
import stage
import training
from dataset import TASKS, Pack, load_pack, task_targets
from dose import DOSE_MODELS
from inference import (
    LEGEND,
    PIPELINES,
    Network,
    check_patients,
    denoise,
    fits_denoiser,
    load_classifier,
    load_denoiser,
    read,
)
from low_dose import LowDose, check_doses

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 the backend has to be chosen first

DOSE_COLUMNS = ("dose_model", "dose", "dose_fraction", "sigma_hu")
ARM_COLUMNS = ("arm", "denoiser", "classifier", "task", "level", "train_seed", "noise_seed")
COUNT_COLUMNS = ("n_patients", "n_slices")
IMAGE_COLUMNS = tuple(name + end for name in ("rmse_hu", "psnr", "ssim", "mse") for end in ("", "_noisy"))
COLUMNS = (
    *DOSE_COLUMNS,
    *ARM_COLUMNS,
    *COUNT_COLUMNS,
    *metrics.CLASSIFICATION_METRICS,
    "threshold",
    *IMAGE_COLUMNS,
    "range_hu",
    "mask",
)


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    parser.add_argument(
        "--models", type=Path, default=Path("saved_models"), help="checkpoints (default: saved_models)"
    )
    parser.add_argument("--denoiser", type=Path, help="checkpoint (default: denoiser.pt in --models)")
    parser.add_argument(
        "--classifiers", type=Path, nargs="+", help="checkpoints (default: all classifier*.pt in --models)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="(default: results)")
    training.add_dose_options(parser, "as trained")
    parser.add_argument(
        "--seed", type=stage.natural_int, default=42, help="of noise and bootstrap (default: 42)"
    )
    parser.add_argument(
        "--mask",
        choices=sorted(anatomy.MASKS),
        default=anatomy.DEFAULT_MASK,
        help=f"where image quality is measured (default: {anatomy.DEFAULT_MASK})",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


class Arm(NamedTuple):
    """A pipeline: its name in LEGEND, the classifier, and the denoiser before it or None."""

    name: str
    classifier: Network
    denoiser: Network | None


def load_models(args, device) -> tuple[Network | None, list[Network]]:
    """The denoiser, or None, and the classifiers. One that was named must be there, a default one not."""
    path = args.denoiser or args.models / "denoiser.pt"
    denoiser = None
    if args.denoiser or path.exists():
        denoiser = Network(path, *load_denoiser(path, device))
    paths = args.classifiers or checkpoints.finished(args.models, "classifier")
    classifiers = [Network(path, *load_classifier(path, device)) for path in paths]
    if denoiser is None and not classifiers:
        raise stage.InputError(
            f"{args.models}: no denoiser.pt and no classifier.pt (run train_denoiser.py first)"
        )
    return denoiser, classifiers


def plan_arms(denoiser: Network | None, classifiers: list[Network]) -> tuple[list[Arm], list[str]]:
    """(what can be run, in the order of LEGEND; what is left out and why)."""
    arms, left_out = [], []
    for classifier in classifiers:
        direct, through = PIPELINES[classifier.facts["input"]]
        what = f"pipeline {through} of {classifier.path.name}"
        if direct:
            arms.append(Arm(direct, classifier, None))
        if through and denoiser is None:
            left_out.append(f"{what}: no denoiser (run train_denoiser.py)")
        elif through and not fits_denoiser(classifier.facts, denoiser.path):
            left_out.append(
                f"{what}: trained on the output of another denoiser than {denoiser.path} "
                "(run train_classifier.py --input denoised again)"
            )
        elif through:
            arms.append(Arm(through, classifier, denoiser))
    for kind, names in PIPELINES.items():
        if not any(classifier.facts["input"] == kind for classifier in classifiers):
            missing = " and ".join(name for name in names if name)
            left_out.append(
                f"pipeline {missing}: no classifier trained on {kind} slices "
                f"(run train_classifier.py --input {kind})"
            )
    arms.sort(key=lambda arm: list(LEGEND).index(arm.name))
    return arms, left_out


def agree(networks: list[Network], key: str):
    """The value of key that all checkpoints share. Raises InputError naming two that differ."""
    first = networks[0]
    for other in networks[1:]:
        if other.facts[key] != first.facts[key]:
            raise stage.InputError(
                f"{other.path}: {key} {other.facts[key]}, but {first.path} has {first.facts[key]} "
                "(name those that belong together with --denoiser and --classifiers)"
            )
    return first.facts[key]


def classification_rows(pack: Pack, classifier: Network, images: np.ndarray, seed: int) -> list[dict]:
    """Metrics of a classifier on images (N, H, W) HU: one dict for slices, one for scans."""
    facts = classifier.facts
    task, absent = TASKS[facts["task"]], facts["assume_absent"]
    targets = task.positive(task_targets(facts["task"], pack.labels, absent))
    scan_labels = [metadata["labels"] for metadata in pack.series]
    scan_targets = task.positive(task_targets(facts["task"], scan_labels, absent))
    scores, scan_scores = map(task.positive, read(classifier.network, images, pack.series_of))
    patients = pack.patient_ids()
    first = np.unique(pack.series_of, return_index=True)[1]
    levels = {
        "slice": (targets, scores, patients),
        "scan": (scan_targets, scan_scores, patients[first]),
    }
    rows = []
    for level, values in levels.items():
        threshold = facts["thresholds"][level]["value"]
        threshold = np.nan if threshold is None else threshold
        found = metrics.classification(*values, threshold=threshold, seed=seed)
        scored = pack.series_of[~np.isnan(targets)]
        counts = {"n_patients": len(np.unique(patients[first][scored])), "n_slices": len(scored)}
        rows.append({"level": level, "threshold": threshold, **counts, **found})
    return rows


def measure(
    pack: Pack,
    denoiser: Network | None,
    arms: list[Arm],
    dose_model: str,
    doses: list[float],
    *,
    mask: str,
    seed: int,
) -> list[dict]:
    """One row per dose, arm and level, in COLUMNS; without arms one row per dose for the denoiser alone."""
    reference = pack.image if pack.truth is None else pack.truth
    inside = pack.masks(anatomy.MASKS[mask])
    patients = pack.patient_ids()
    low, high = metrics.RANGE_HU
    source = LowDose(pack, dose_model, doses)
    rows = []
    for dose in stage.progress(sorted(doses), desc="doses", unit="dose"):
        images, quality = {}, {}
        all_rows, same = np.arange(len(pack)), [dose] * len(pack)
        noisy, levels = source.evaluation(all_rows, same, seed), source.levels(all_rows, same)
        for used in (None, denoiser):
            images[used] = noisy
            if used is not None:
                images[used] = denoise(used.network, noisy, levels, pack.series_of)
            quality[used] = metrics.image_quality(images[used], reference, inside, patients)
        common = {
            "dose_model": dose_model,
            "dose": dose,
            "dose_fraction": DOSE_MODELS[dose_model].fraction(dose),
            "sigma_hu": DOSE_MODELS[dose_model].sigma_hu(dose),
            "noise_seed": seed,
            "n_patients": len(np.unique(patients)),
            "n_slices": len(pack),
            "range_hu": f"{low:g}..{high:g}",
            "mask": mask,
            **{f"{name}_noisy": value for name, value in quality[None].items()},
        }
        if not arms:
            rows.append(common | {"arm": "denoised", "denoiser": denoiser.path.name} | quality[denoiser])
        for arm in arms:
            about = {
                "arm": arm.name,
                "denoiser": arm.denoiser and arm.denoiser.path.name,
                "classifier": arm.classifier.path.name,
                "task": arm.classifier.facts["task"],
                "train_seed": arm.classifier.facts["seed"],
            }
            for found in classification_rows(pack, arm.classifier, images[arm.denoiser], seed):
                rows.append(common | about | quality[arm.denoiser] | found)
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def label_arms(rows: list[dict]) -> list[str]:
    """A label for each row that tells its arm apart, with the classifier where several share the pipeline."""
    pairs = {(row["arm"], row["classifier"]) for row in rows}
    shared = {arm for arm, _ in pairs if sum(other == arm for other, _ in pairs) > 1}
    return [f"{row['arm']} {row['classifier']}" if row["arm"] in shared else row["arm"] for row in rows]


def print_table(rows: list[dict]) -> None:
    """The result table, per dose: each pipeline per slice, then what denoising does to the image."""
    shown = metrics.shown
    for dose in sorted({row["dose"] for row in rows}):
        own = [row for row in rows if row["dose"] == dose]
        for row, label in zip(own, label_arms(own), strict=True):
            if row["level"] == "slice":
                stage.say(
                    f"Pipeline {label:<2} - Dose {dose:g} | Acc: {shown(row['acc'])} | "
                    f"AUC: {shown(row['auc'])} [{shown(row['auc_low'], 2)}, {shown(row['auc_high'], 2)}] | "
                    f"Sensitivity: {shown(row['sens'])} | Specificity: {shown(row['spec'])} | "
                    f"F1: {shown(row['f1'])} | ECE: {shown(row['ece'])}"
                )
        row = next((row for row in own if row["denoiser"]), None)
        if row is None:
            row = own[0]
            stage.say(
                f"  Low dose -> MSE: {row['mse_noisy']:.1f} HU2 | PSNR: {row['psnr_noisy']:.2f} dB | "
                f"SSIM: {row['ssim_noisy']:.3f} | RMSE: {row['rmse_hu_noisy']:.2f} HU"
            )
        else:
            stage.say(
                f"  Denoising -> MSE: {row['mse']:.1f} (noisy {row['mse_noisy']:.1f}) HU2 | "
                f"PSNR: {row['psnr']:.2f} (noisy {row['psnr_noisy']:.2f}) dB | "
                f"SSIM: {row['ssim']:.3f} (noisy {row['ssim_noisy']:.3f}) | "
                f"RMSE: {row['rmse_hu']:.2f} HU (noisy {row['rmse_hu_noisy']:.2f})"
            )


def write_tables(out: Path, rows: list[dict], manifest: dict) -> None:
    """experiments.csv and experiments.json; empty cells and null where a number does not exist."""
    plain = stage.plain(rows)
    with stage.atomic_write(out / "experiments.csv") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(plain)
    stage.write_json(out / "experiments.json", {"manifest": manifest, "rows": plain})


def plot(path: Path, rows: list[dict], panels: dict[str, str], unit: str) -> None:
    """One panel per column against dose, one line per arm, AUC with its interval. panels: column -> label."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained")
    labels = label_arms(rows)
    legend = dict(zip(labels, (LEGEND.get(row["arm"], "") for row in rows), strict=True))
    for axis, (column, title) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for label, meaning in legend.items():
            own = [
                row for row, its in zip(rows, labels, strict=True) if its == label and row[column] is not None
            ]
            doses, values = [row["dose"] for row in own], [row[column] for row in own]
            (line,) = axis.plot(doses, values, "o-", label=f"{label}: {meaning}" if meaning else label)
            if column == "auc":
                low, high = ([row[key] for row in own] for key in ("auc_low", "auc_high"))
                axis.fill_between(doses, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.set(xscale="log", xlabel=f"dose ({unit})", ylabel=title)
        ticks = sorted({row["dose"] for row in rows})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(2, len(labels)), frameon=False, fontsize=8
    )
    with stage.atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def write_figures(out: Path, rows: list[dict], unit: str) -> list[Path]:
    """Metric against dose as PNG, one line per pipeline. Returns the files."""
    rows = stage.plain(rows)
    written = []
    slices = [row for row in rows if row["level"] == "slice"]
    if slices:
        panels = {"auc": "AUC per slice", "sens": "sensitivity", "spec": "specificity", "ece": "ECE"}
        written.append(out / "classification.png")
        plot(written[-1], slices, panels, unit)
    written.append(out / "image_quality.png")
    panels = {
        "rmse_hu": f"RMSE inside the {rows[0]['mask']} (HU)",
        "psnr": f"PSNR, {rows[0]['range_hu']} HU (dB)",
        "ssim": f"SSIM, {rows[0]['range_hu']} HU",
    }
    # arms that share a denoiser share their images: one line for the noisy input, one for each denoiser
    seen, plain = {}, {"classifier": None}
    for row in rows:
        seen.setdefault(
            (row["dose"], row["denoiser"]), row | plain | {"arm": row["denoiser"] or "noisy input"}
        )
    for row in list(seen.values()):
        noisy = {name: row[f"{name}_noisy"] for name in metrics.IMAGE_METRICS}
        seen.setdefault((row["dose"], None), row | noisy | {"arm": "noisy input"})
    plot(written[-1], sorted(seen.values(), key=lambda row: row["dose"]), panels, unit)
    return written


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = training.pick_device(args.device)
    denoiser, classifiers = load_models(args, device)
    networks = [*([denoiser] if denoiser else []), *classifiers]
    if classifiers:
        agree(classifiers, "task")
    arms, left_out = plan_arms(denoiser, classifiers)
    if denoiser is None and not arms:
        raise stage.InputError(f"{args.models}: nothing to run; {left_out[0]}")
    trained = [network.facts["dose_model"] for network in networks]
    dose_model = args.dose_model or next(filter(None, trained), training.DOSE_MODEL)
    doses = check_doses(dose_model, args.doses)
    pack = load_pack(args.data, "test", agree(networks, "size"))
    check_patients(pack.patient_ids().tolist(), networks)
    with stage.lock(args.out / ".lock"):
        rows = measure(pack, denoiser, arms, dose_model, doses, mask=args.mask, seed=args.seed)
        manifest = {
            "data": str(args.data),
            "split_hash": pack.split_hash,
            "seed": args.seed,
            "checkpoints": {network.path.name: checkpoints.file_sha256(network.path) for network in networks},
            "versions": checkpoints.versions(),
            "command": " ".join(["run_experiments.py", *(sys.argv[1:] if argv is None else argv)]),
            "left_out": left_out,
        }
        write_tables(args.out, rows, manifest)
        files = write_figures(args.out, rows, DOSE_MODELS[dose_model].unit)
    reference = "the image" if pack.truth is None else "the noise-free truth"
    stage.say(
        f"{len(np.unique(pack.patient_ids()))} test patients, {len(pack)} slices, dose model {dose_model}. "
        f"Image quality inside the {args.mask} against {reference}, PSNR and SSIM over "
        f"{rows[0]['range_hu']} HU. AUC with 95 % intervals from a bootstrap over patients."
    )
    print_table(rows)
    for name in LEGEND:
        if any(arm.name == name for arm in arms):
            stage.say(f"Pipeline {name:<2} = {LEGEND[name]}")
    for reason in left_out:
        stage.say(f"Left out: {reason}")
    for path in [args.out / "experiments.csv", args.out / "experiments.json", *files]:
        stage.say(f"Wrote {path}")


if __name__ == "__main__":
    stage.run(main)
