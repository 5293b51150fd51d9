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
from torch import nn

import anatomy
import checkpoints
import metrics
import stage
import training
from dataset import Pack, check_doses, evaluation_input, load_pack, task_targets
from dose import DOSE_MODELS
from inference import LEGEND, PIPELINES, classify, denoise, load_classifier, load_denoiser

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


class Network(NamedTuple):
    """A denoiser or classifier, and what its checkpoint says."""

    path: Path
    network: nn.Module
    facts: dict


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
    training.add_dose_options(parser, default=None)
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


def load_models(args, device) -> tuple[Network | None, list[Network], list[str]]:
    """What there is to measure: (denoiser or None, classifiers, what is left out and why).

    A checkpoint that was named must be there; a default one that is missing is left out."""
    left_out = []
    path = args.denoiser or args.models / "denoiser.pt"
    denoiser = None
    if args.denoiser or path.exists():
        denoiser = Network(path, *load_denoiser(path, device))
    else:
        left_out.append(f"{path} is missing: no denoising, no pipeline 2 (run train_denoiser.py)")
    paths = args.classifiers or sorted(
        path for path in args.models.glob("classifier*.pt") if not path.name.endswith(".last.pt")
    )
    classifiers = [Network(path, *load_classifier(path, device)) for path in paths]
    if not classifiers:
        left_out.append(
            f"{args.models}/classifier.pt is missing: no pipeline 1 and 2 (run train_classifier.py)"
        )
    if denoiser is None and not classifiers:
        raise stage.InputError(
            f"{args.models}: no denoiser.pt and no classifier.pt (run train_denoiser.py first)"
        )
    return denoiser, classifiers, left_out


def agree(facts: list[tuple[Path, dict]], key: str):
    """The value of key that all checkpoints share. Raises InputError naming two that differ."""
    first_path, first = facts[0]
    for path, other in facts[1:]:
        if other[key] != first[key]:
            raise stage.InputError(
                f"{path}: {key} {other[key]}, but {first_path} has {first[key]} (train them alike)"
            )
    return first[key]


def classification_rows(pack: Pack, classifier: Network, images: np.ndarray, seed: int) -> list[dict]:
    """Metrics of a classifier on images (N, H, W) HU: one dict for slices, one for scans (largest slice)."""
    facts = classifier.facts
    targets = task_targets(facts["task"], pack.labels, facts["assume_absent"])[:, 0]
    scores = classify(classifier.network, images)[:, 0].astype(np.float64)
    patients = pack.patient_ids()
    first = np.unique(pack.series_of, return_index=True)[1]
    levels = {
        "slice": (targets, scores, patients),
        "scan": (
            metrics.scan_scores(targets, pack.series_of),
            metrics.scan_scores(scores, pack.series_of),
            patients[first],
        ),
    }
    rows = []
    for level, values in levels.items():
        threshold = facts["thresholds"][level]["value"]
        threshold = np.nan if threshold is None else threshold
        found = metrics.classification(*values, threshold=threshold, seed=seed)
        rows.append({"level": level, "threshold": threshold, **found})
    return rows


def measure(
    pack: Pack,
    denoiser: Network | None,
    classifiers: list[Network],
    dose_model: str,
    doses: list[float],
    *,
    mask: str,
    seed: int,
) -> list[dict]:
    """One row per dose, arm and level, in COLUMNS. Doses from low to high, arms in the order of LEGEND."""
    reference = pack.image if pack.truth is None else pack.truth
    inside = pack.masks(anatomy.MASKS[mask])
    patients = pack.patient_ids()
    low, high = metrics.RANGE_HU
    rows = []
    for dose in stage.progress(sorted(doses), desc="doses", unit="dose"):
        noisy = evaluation_input(pack, range(len(pack)), dose_model, [dose] * len(pack), seed)
        before = metrics.image_quality(noisy, reference, inside, patients)
        after, denoised = before, None
        if denoiser is not None:
            denoised = denoise(denoiser.network, noisy)
            after = metrics.image_quality(denoised, reference, inside, patients)
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
            **{f"{name}_noisy": value for name, value in before.items()},
        }
        if denoiser is not None and not any(PIPELINES[c.facts["input"]][1] for c in classifiers):
            rows.append(common | {"arm": "denoised", "denoiser": denoiser.path.name, **after})
        for classifier in classifiers:
            direct, through = PIPELINES[classifier.facts["input"]]
            arms = [(direct, noisy, before, None)] if direct else []
            if through and denoised is not None:
                arms.append((through, denoised, after, denoiser.path.name))
            for arm, images, quality, name in arms:
                for found in classification_rows(pack, classifier, images, seed):
                    about = {
                        "arm": arm,
                        "denoiser": name,
                        "classifier": classifier.path.name,
                        "task": classifier.facts["task"],
                        "train_seed": classifier.facts["seed"],
                    }
                    rows.append(common | about | quality | found)
    order = list(LEGEND)
    rows.sort(key=lambda row: (row["dose"], order.index(row["arm"]) if row["arm"] in order else -1))
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def print_table(rows: list[dict]) -> None:
    """The result table, per dose: each pipeline per slice, then what denoising does to the image."""
    shown = metrics.shown
    for dose in sorted({row["dose"] for row in rows}):
        own = [row for row in rows if row["dose"] == dose]
        for row in own:
            if row["level"] == "slice":
                stage.say(
                    f"Pipeline {row['arm']:<2} - Dose {dose:g} | Acc: {shown(row['acc'])} | "
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
    arms = sorted({row["arm"] for row in rows})
    for axis, (column, label) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for arm in arms:
            own = [row for row in rows if row["arm"] == arm and row[column] is not None]
            doses, values = [row["dose"] for row in own], [row[column] for row in own]
            (line,) = axis.plot(doses, values, "o-", label=f"{arm}: {LEGEND[arm]}" if arm in LEGEND else arm)
            if column == "auc":
                low, high = ([row[key] for row in own] for key in ("auc_low", "auc_high"))
                axis.fill_between(doses, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.set(xscale="log", xlabel=f"dose ({unit})", ylabel=label)
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
    seen = {}
    for row in rows:
        seen.setdefault((row["dose"], row["denoiser"]), row | {"arm": row["denoiser"] or "noisy input"})
    for row in list(seen.values()):
        noisy = {name: row[f"{name}_noisy"] for name in metrics.IMAGE_METRICS}
        seen.setdefault((row["dose"], None), row | noisy | {"arm": "noisy input"})
    plot(written[-1], sorted(seen.values(), key=lambda row: row["dose"]), panels, unit)
    return written


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = training.pick_device(args.device)
    denoiser, classifiers, left_out = load_models(args, device)
    facts = [(c.path, c.facts) for c in classifiers]
    if denoiser is not None:
        facts.insert(0, (denoiser.path, denoiser.facts))
    dose_model = args.dose_model or facts[0][1]["dose_model"]
    doses = check_doses(dose_model, args.doses)
    pack = load_pack(args.data, "test", agree(facts, "size"))
    if agree(facts, "split_hash") != pack.split_hash:
        raise stage.InputError(
            f"{facts[0][0]}: was trained on another split than {args.data}/splits.json, which may have had "
            "these test patients in it (train again)"
        )
    rows = measure(pack, denoiser, classifiers, dose_model, doses, mask=args.mask, seed=args.seed)
    manifest = {
        "data": str(args.data),
        "split_hash": pack.split_hash,
        "seed": args.seed,
        "checkpoints": {path.name: checkpoints.file_sha256(path) for path, _ in facts},
        "versions": checkpoints.versions(),
        "command": " ".join(["run_experiments.py", *(sys.argv[1:] if argv is None else map(str, argv))]),
        "left_out": left_out,
    }
    with stage.lock(args.out / ".lock"):
        write_tables(args.out, rows, manifest)
        files = write_figures(args.out, rows, DOSE_MODELS[dose_model].unit)
    reference = "the image" if pack.truth is None else "the noise-free truth"
    stage.say(
        f"{rows[0]['n_patients']} test patients, {rows[0]['n_slices']} slices, dose model {dose_model}. "
        f"Image quality inside the {args.mask} against {reference}, PSNR and SSIM over "
        f"{rows[0]['range_hu']} HU. AUC with 95 % intervals from a bootstrap over patients."
    )
    print_table(rows)
    for arm in sorted({row["arm"] for row in rows} & set(LEGEND)):
        stage.say(f"Pipeline {arm:<2} = {LEGEND[arm]}")
    for reason in left_out:
        stage.say(f"Left out: {reason}")
    for path in [args.out / "experiments.csv", args.out / "experiments.json", *files]:
        stage.say(f"Wrote {path}")


if __name__ == "__main__":
    stage.run(main)
