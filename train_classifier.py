"""Stage 4: train a slice classifier on clean, low-dose or denoised slices.

Reads:   <data>/{train,val}/, and --denoiser for --input denoised
Writes:  <out>/<name>.pt, .last.pt, .jsonl, .card.json, and with --keep-every .epoch<k>.pt, with --csv .csv,
         with --tensorboard .tb/
Example: python train_classifier.py --task stroke --input clean --epochs 40 --batch-size 32
         python train_classifier.py --task stroke --input noisy --name classifier_noisy"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import checkpoints
import metrics
import stage
import training
from dataset import (
    BRAIN_WINDOW,
    LABELS,
    TASKS,
    Batch,
    Pack,
    augment,
    load_pack,
    native_size,
    task_targets,
)
from inference import classify, denoise, load_classifier, load_denoiser
from losses import masked_bce_loss
from low_dose import LowDose, check_doses
from models import CLASSIFIERS, build_model

INPUTS = ("clean", "noisy", "denoised")
VALIDATION_SEED = 0  # of the noise in validation: the same in every epoch and run


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    training.add_run_options(parser, name="classifier", epochs=40, batch_size=32, lr=1e-3, weight_decay=0.05)
    parser.add_argument("--task", choices=sorted(TASKS), default="stroke", help="question (default: stroke)")
    parser.add_argument("--input", choices=INPUTS, default="clean", help="what it learns on (default: clean)")
    parser.add_argument("--denoiser", type=Path, help="for --input denoised (default: denoiser.pt in --out)")
    parser.add_argument(
        "--finetune", type=Path, help="begin with the weights of this classifier, e.g. on noisy slices"
    )
    parser.add_argument(
        "--model", choices=sorted(CLASSIFIERS), default="resnet18", help="network (default: resnet18)"
    )
    parser.add_argument(
        "--width", type=stage.positive_int, default=64, help="channels of the first stage (default: 64)"
    )
    parser.add_argument(
        "--balance",
        choices=("sampler", "pos-weight", "none"),
        default="sampler",
        help="against rare positives: draw them more often, weigh them more, or neither (default: sampler)",
    )
    parser.add_argument(
        "--assume-absent",
        nargs="+",
        choices=LABELS,
        default=[],
        help="labels whose unknown values count as 0, e.g. ischemia on RSNA; kept in the checkpoint",
    )
    training.add_dose_options(parser, training.DOSE_MODEL)
    training.add_noise_option(parser)
    return parser


def known_targets(
    pack: Pack, split: str, task: str, assume_absent: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """((N, classes) targets, rows whose answer is known). Raises InputError if there are none, or if train
    lacks a class."""
    targets = task_targets(task, pack.labels, assume_absent)
    rows = np.flatnonzero(~np.isnan(targets).all(axis=1))
    found = set(targets[rows, 0].tolist())
    if not found:
        raise stage.InputError(
            f"--task {task}: no slice with a known answer in {split} (other data, or --assume-absent)"
        )
    if split == "train" and found != {0.0, 1.0}:
        raise stage.InputError(f"--task {task}: only slices with answer {found.pop():.0f} (--assume-absent?)")
    if found != {0.0, 1.0}:
        stage.log.warning("val holds one class only: no AUC, no threshold, the last epoch is kept")
    return targets, rows


def validator(
    pack: Pack, targets: np.ndarray, rows: np.ndarray, images: np.ndarray, origin: str
) -> Callable[[torch.nn.Module], dict]:
    """validate(model) -> loss, AUC and the thresholds of largest Youden index, per slice and per scan.

    images: (len(rows), H, W) HU as the classifier is to see them. origin: where the thresholds come from."""
    own, series = targets[rows, 0], pack.series_of[rows]

    def validate(model: torch.nn.Module) -> dict:
        scores = classify(model, images)[:, 0].astype(np.float64)
        clipped = scores.clip(1e-7, 1 - 1e-7)
        scan_own, scan_scores = metrics.scan_scores(own, series), metrics.scan_scores(scores, series)
        known = ~np.isnan(scan_own)
        return {
            "loss": float(-np.where(own == 1, np.log(clipped), np.log(1 - clipped)).mean()),
            "auc": metrics.auc(own, scores),
            "auc_scan": metrics.auc(scan_own[known], scan_scores[known]),
            "thresholds": {
                "slice": {"value": metrics.youden_threshold(own, scores), "origin": origin},
                "scan": {
                    "value": metrics.youden_threshold(scan_own[known], scan_scores[known]),
                    "origin": origin,
                },
            },
        }

    return validate


def start_from(path: Path, name: str, kwargs: dict) -> tuple[dict, dict]:
    """(weights, facts) of the classifier to begin with. Raises InputError if it is another network."""
    network, facts = load_classifier(path)
    wanted = {"name": name, "kwargs": kwargs}
    if facts["model"] != wanted:
        raise stage.InputError(f"--finetune {path}: is {facts['model']}, to be trained is {wanted}")
    return network.state_dict(), facts


def sampling(
    targets: np.ndarray, rows: np.ndarray, balance: str
) -> tuple[np.ndarray | None, torch.Tensor | None]:
    """(sampling weights of rows, pos_weight): never both, which would balance twice."""
    positive = targets[rows, 0] == 1
    if balance == "sampler":
        return np.where(positive, 1 / positive.sum(), 1 / (~positive).sum()), None
    if balance == "pos-weight":
        return None, torch.tensor([(~positive).sum() / positive.sum()], dtype=torch.float32)
    return None, None


def main(argv: list[str] | None = None) -> None:
    for args in training.each_seed(get_parser().parse_args(argv)):
        train_one(args)


def train_one(args: argparse.Namespace) -> None:
    """One classifier, as the options have it."""
    device = training.pick_device(args.device)
    options = training.pick_options(args, device)
    simulation = args.dose_model, args.doses, args.noise_realisations
    if args.input == "clean" and simulation != (None, None, None):
        raise stage.InputError(
            "--dose-model, --doses, --noise-realisations: clean slices have no low dose (leave them out)"
        )
    dose_model = args.dose_model or training.DOSE_MODEL
    doses = check_doses(dose_model, args.doses)
    denoiser, start, parents, seen = None, None, {}, []
    kwargs = {"classes": list(TASKS[args.task].classes), "window": list(BRAIN_WINDOW), "width": args.width}
    if args.input == "denoised":
        path = args.denoiser or args.out / "denoiser.pt"
        denoiser, facts = load_denoiser(path, device)
        parents["denoiser"] = {"path": path.name, "sha256": checkpoints.file_sha256(path)}
        seen += facts["trained_on"]
    elif args.denoiser is not None:
        raise stage.InputError(f"--denoiser: only for --input denoised, not {args.input} (leave it out)")
    if args.finetune is not None:
        start, facts = start_from(args.finetune, args.model, kwargs)
        parents["finetune"] = {"path": args.finetune.name, "sha256": checkpoints.file_sha256(args.finetune)}
        seen += facts["trained_on"]
    size = args.size or native_size(args.data)
    train, val = (load_pack(args.data, split, size) for split in ("train", "val"))
    targets, rows = known_targets(train, "train", args.task, args.assume_absent)
    weights, pos_weight = sampling(targets, rows, args.balance)
    pos_weight = None if pos_weight is None else pos_weight.to(device)

    low_dose = None
    if args.input != "clean":
        low_dose = LowDose(train, dose_model, doses, training.noise_realisations(args, device))

    def loss_fn(network: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> torch.Tensor:
        if low_dose is None:
            return masked_bce_loss(network(augment(batch.hu, batch.seeds)), batch.targets, pos_weight)
        _, hu, drawn = low_dose.pair(batch, augment, 1 if denoiser is None else denoiser.slices)
        if denoiser is not None:
            levels = torch.tensor(low_dose.levels(batch.rows, drawn), dtype=torch.float32, device=device)
            with torch.no_grad():
                hu = denoiser(hu, levels)
        return masked_bce_loss(network(hu), batch.targets, pos_weight)

    val_targets, val_rows = known_targets(val, "val", args.task, args.assume_absent)

    def make_validate() -> Callable[[torch.nn.Module], dict]:
        images, origin = np.asarray(val.image[val_rows]), f"largest Youden index on val, {args.input} slices"
        if args.input != "clean":
            turns = [doses[place % len(doses)] for place in range(len(val_rows))]
            source = LowDose(val, dose_model, doses)
            images = source.evaluation(val_rows, turns, VALIDATION_SEED)
            levels = source.levels(val_rows, turns)
            origin += f", {dose_model} {' '.join(f'{dose:g}' for dose in doses)} in turn"
        if denoiser is not None:
            images = denoise(denoiser, images, levels, val.series_of[val_rows])
        return validator(val, val_targets, val_rows, images, origin)

    def make_model() -> torch.nn.Module:
        model = build_model(args.model, **kwargs)
        if start is not None:
            model.load_state_dict(start)
        return model

    done = training.run(
        args,
        train,
        val,
        options=options,
        make_model=make_model,
        loss_fn=loss_fn,
        make_validate=make_validate,
        facts={
            "stage": "classifier",
            "model": {"name": args.model, "kwargs": kwargs},
            "task": args.task,
            "classes": kwargs["classes"],
            "input": args.input,
            "assume_absent": args.assume_absent,
            "dose_model": dose_model if args.input != "clean" else None,
            "doses": doses if args.input != "clean" else [],
            "parents": parents,
        },
        seen=seen,
        select=("auc", "max"),
        device=device,
        rows=rows,
        weights=weights,
        targets=targets,
    )
    if done is not None:
        path, best = done
        stage.say(
            f"{path}: epoch {best['epoch']}, validation AUC {metrics.shown(best['auc'])} per slice, "
            f"{metrics.shown(best['auc_scan'])} per scan ({args.task}, {args.input} input)"
        )


if __name__ == "__main__":
    stage.run(main)
