"""What is known of slices and scans, and how well a classifier answers: targets, balance, validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import calibration
import metrics
import stage
from dataset import TASKS, Pack, Task, task_targets
from inference import Probabilities, logits_of


def known_targets(
    pack: Pack, split: str, task: str, assume_absent: list[str], *, of_scans: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(targets of slices (N, classes), targets of scans (series, classes)), NaN where unknown.

    of_scans: whether answers about scans are enough to learn from. Raises InputError if nothing is known, or
    if train lacks positives or negatives."""
    slices = task_targets(task, pack.labels, assume_absent)
    scans = task_targets(task, [metadata["labels"] for metadata in pack.series], assume_absent)
    answers = TASKS[task].positive(np.concatenate([slices, scans]) if of_scans else slices)
    found = set(answers[~np.isnan(answers)].tolist())
    if not found:
        raise stage.InputError(
            f"--task {task}: no {'scan' if of_scans else 'slice'} with a known answer in {split} "
            "(other data, or --assume-absent)"
        )
    if split == "train" and found != {0.0, 1.0}:
        raise stage.InputError(f"--task {task}: only slices with answer {found.pop():.0f} (--assume-absent?)")
    if found != {0.0, 1.0}:
        stage.log.warning("val holds one class only: no AUC, no threshold, the last epoch is kept")
    return slices, scans


def level_metrics(task: Task, targets: np.ndarray, found: np.ndarray, origin: str) -> dict[str, Any]:
    """Loss, AUCs, threshold and temperature of probabilities (N, classes) of slices or of scans."""
    known = ~np.isnan(targets)
    logits, kind = logits_of(found, task.classes)
    if task.exclusive:
        parts = -np.where(targets == 1, logits, 0).sum(1)[known.all(1)]
    else:
        parts = np.logaddexp(0, np.where(targets == 1, -logits, logits))[known]
    positive = task.positive(targets)
    asked, scores = ~np.isnan(positive), task.positive(found)
    values = {
        name: metrics.youden_threshold(targets[known[:, n], n], found[known[:, n], n])
        for n, name in enumerate(task.classes)
    }
    return {
        "loss": float(parts.mean()) if len(parts) else math.nan,
        "auc": metrics.auc(positive[asked], scores[asked]),
        "aucs": {
            name: metrics.auc(targets[known[:, n], n], found[known[:, n], n])
            for n, name in enumerate(task.classes)
        },
        "threshold": {
            "value": metrics.youden_threshold(positive[asked], scores[asked]),
            "values": values,
            "origin": f"largest Youden index on val, {origin}",
        },
        "temperature": {
            "value": calibration.fit_temperature(logits, targets, kind),
            "origin": f"least log loss on val, {origin}",
        },
    }


class Validation:
    """What a classifier is chosen by, per slice and per scan. reading(model) -> Probabilities."""

    def __init__(
        self,
        task: Task,
        targets: tuple[np.ndarray, np.ndarray],
        reading: Callable[[nn.Module], Probabilities],
        origin: str,
        auxiliary: float | None = None,
    ):
        self.task, self.targets, self.reading, self.origin = task, targets, reading, origin
        self.auxiliary = 1.0 if auxiliary is None else auxiliary  # the share of the slices in the loss

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """loss, AUC of the task's one question, mean AUC over classes, thresholds and temperatures."""
        levels = {
            level: level_metrics(self.task, targets, found, self.origin)
            for level, targets, found in zip(
                ("slice", "scan"), self.targets, self.reading(model), strict=True
            )
        }
        losses = [(levels["slice"]["loss"], self.auxiliary), (levels["scan"]["loss"], 1 - self.auxiliary)]
        known = [(loss, share) for loss, share in losses if share and not math.isnan(loss)]
        found: dict[str, Any] = {
            "loss": sum(loss * share for loss, share in known) / sum(share for _, share in known),
            "auc": levels["slice"]["auc"],
            "auc_scan": levels["scan"]["auc"],
        }
        if len(self.task.classes) > 1:
            for level, end in (("slice", ""), ("scan", "_scan")):
                aucs = levels[level]["aucs"]
                known_aucs = [value for value in aucs.values() if not math.isnan(value)]
                found[f"auc_mean{end}"] = float(np.mean(known_aucs)) if known_aucs else math.nan
                found |= {f"auc_{name}{end}": value for name, value in aucs.items()}
        found["thresholds"] = {level: values["threshold"] for level, values in levels.items()}
        found["temperatures"] = {level: values["temperature"] for level, values in levels.items()}
        return found


def sampling(task: Task, targets: np.ndarray, balance: str) -> dict[str, Any]:
    """rows and weights of batches, and pos_weight of the loss: one of the two, or it would balance twice.

    targets: (N, classes) of slices or scans; rows are those of which something is known."""
    rows = np.flatnonzero(~np.isnan(targets).all(axis=1))
    weights, pos_weight = None, None
    positive = task.positive(targets[rows])
    if balance == "sampler":
        groups = targets[rows].argmax(1) if task.exclusive else np.where(positive == 1, 1, 0)
        counts = np.bincount(groups)
        weights = 1 / counts[groups]
    elif balance == "pos-weight":
        ones = (targets[rows] == 1).sum(0)
        zeros = (targets[rows] == 0).sum(0)
        # of exclusive classes each weighs as much as all others together, of others its negatives
        whole = len(rows) / len(task.classes) if task.exclusive else zeros
        pos_weight = torch.tensor(whole / ones.clip(1), dtype=torch.float32)
    return {"rows": rows, "weights": weights, "pos_weight": pos_weight}
