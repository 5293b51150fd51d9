"""training.fit by the clock: what the benchmarks of the training stages have in common."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import runs
import training


def clock(device: torch.device) -> float:
    """Seconds, for differences: on the CPU processor time, so that others at work spoil a ratio little."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class Epochs(NamedTuple):
    """seconds, losses: of each epoch, the loop's own checkpoints and log counted in."""

    seconds: np.ndarray
    losses: list[float]


def fit(
    model: nn.Module, loss_fn: Callable, batches: Any, options: training.Options, device: torch.device
) -> Epochs:
    """Train in a folder that goes away; batches: a batches.Batches."""
    times = [clock(device)]

    def validate(_: nn.Module) -> dict[str, float]:
        times.append(clock(device))
        return {"score": 0.0}

    with tempfile.TemporaryDirectory() as name:
        paths = runs.run_paths(Path(name), "net")
        training.fit(
            model,
            loss_fn,
            batches,
            lambda: validate,
            options=options,
            facts={},
            paths=paths,
            config={},
            select=("score", "max"),
            device=device,
        )
        losses = [json.loads(line)["train_loss"] for line in paths.log.read_text().splitlines()]
    return Epochs(np.diff(times), losses)


def picked(epochs: int, lr: float, device: torch.device) -> training.Options:
    """What the stages pick by themselves."""
    return training.Options(
        epochs,
        lr,
        precision=training.pick_precision("auto", device),
        compile=training.pick_compile("auto", device),
    )
