"""A training run from outside: the processes that share it, its files and their lock, and what it tells."""

from __future__ import annotations

import atexit
import contextlib
import csv
import functools
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import stage

# ---------------------------------------------------------------- processes


class World(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int = 0
    size: int = 1


def world(device: torch.device) -> World:
    """Join the processes that torchrun started; alone, do nothing.

    Once for all runs of a process: who joins again may meet what the first time left with the others."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the others wait while the first process validates, which may take long
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size())


def gathered(found: dict, place: World) -> dict:
    """What every process found, on the first of them; the others have their own."""
    if place.size == 1:
        return found
    parts: list[dict] | None = [{} for _ in range(place.size)] if place.rank == 0 else None
    dist.gather_object(found, parts)
    return found if parts is None else {key: value for part in parts for key, value in part.items()}


def _leave() -> None:
    """Part from the other processes all at once: gloo's threads abort in one that ends while others talk."""
    if dist.get_backend() == "gloo":
        with contextlib.suppress(RuntimeError):  # of one that is gone already nobody waits for long
            dist.monitored_barrier(timeout=timedelta(seconds=10))
    dist.destroy_process_group()


# ---------------------------------------------------------------- files


class Paths(NamedTuple):
    """The files of one training run."""

    best: Path
    last: Path
    card: Path
    log: Path
    csv: Path
    board: Path
    samples: Path
    lock: Path

    def epoch(self, number: int) -> Path:
        return self.best.with_name(f"{self.best.stem}.epoch{number}.pt")


def run_paths(folder: Path, name: str) -> Paths:
    """Where a run called name keeps its files."""
    endings = ("pt", "last.pt", "card.json", "jsonl", "csv", "tb", "samples")
    return Paths(*(Path(folder) / f"{name}.{ending}" for ending in endings), Path(folder) / f".{name}.lock")


@contextlib.contextmanager
def open_run(folder: Path, name: str, *, resume: bool, overwrite: bool, place: World) -> Iterator[Paths]:
    """Hold the files of a run. The first process takes the lock, and clears an old run with overwrite.

    Raises InputError if the run exists and neither resume nor overwrite was given, StageError (exit 4) if
    another process is at it."""
    paths = run_paths(folder, name)
    with contextlib.ExitStack() as stack:
        if place.rank == 0:
            stack.enter_context(stage.lock(paths.lock))
            _check_run(paths, resume=resume, overwrite=overwrite)
        if place.size > 1:
            dist.barrier()
        yield paths


def _check_run(paths: Paths, *, resume: bool, overwrite: bool) -> None:
    """Refuse to touch a finished run unless told, and clear what a kill left behind."""
    if resume and overwrite:
        raise stage.InputError("--resume and --overwrite: one goes on, the other starts anew (choose one)")
    if resume and paths.best.exists() and not paths.last.exists():
        raise stage.InputError(f"{paths.last}: missing, cannot go on (--overwrite starts anew)")
    if (paths.best.exists() or paths.last.exists()) and not (resume or overwrite):
        raise stage.InputError(
            f"{paths.best}: there is a run of this name (--resume goes on, --overwrite starts anew, "
            "--name gives another)"
        )
    # by exact names: another run, whose name begins like this one's, may be writing beside it
    name = re.escape(paths.best.stem)
    kept = re.compile(rf"{name}\.epoch\d+\.pt")
    half_written = re.compile(rf"\.{name}(\.last|\.epoch\d+)?\.(pt|card\.json|jsonl|csv)\.tmp\.\d+")
    files = list(paths.best.parent.iterdir())
    doomed = [path for path in files if half_written.fullmatch(path.name)]
    doomed += paths.samples.glob(".*.tmp.*")
    if overwrite:  # the old best stays until a new one takes its place
        doomed += [paths.last, paths.log, paths.csv, *(path for path in files if kept.fullmatch(path.name))]
        for folder in (paths.board, paths.samples):
            shutil.rmtree(folder, ignore_errors=True)
    for path in doomed:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- what a run tells


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has held so far, in GB."""
    found = {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}  # Linux: KiB
    if device.type == "cuda":
        found["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


class Report:
    """What a run tells of its epochs: a line to read and one of JSON, and where wanted a table, TensorBoard
    and pictures.

    done: epochs that are, of epochs in all; lines of later ones, which will be run again, are dropped."""

    def __init__(
        self, paths: Paths, done: int, epochs: int, *, csv: bool, tensorboard: bool, samples: bool
    ) -> None:
        self.paths, self.done, self.epochs = paths, done, epochs
        self.csv, self.tensorboard, self.samples = csv, tensorboard, samples
        if paths.log.exists():
            lines = paths.log.read_text(encoding="utf-8").splitlines()
            with stage.atomic_write(paths.log) as file:
                file.writelines(f"{line}\n" for line in lines[:done])
            self._write_csv()

    @functools.cached_property
    def board(self) -> Any:
        """Where TensorBoard reads, opened with the first epoch."""
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        return SummaryWriter(str(self.paths.board), purge_step=self.done + 1)

    def write(self, entry: dict[str, float], better: bool, pictures: dict[str, np.ndarray]) -> None:
        """Tell of one epoch. entry: its numbers by name. pictures: (H, W) or (H, W, 3) uint8 by name."""
        numbers = {name: value for name, value in stage.plain(entry).items() if value is not None}
        shown = "  ".join(
            f"{name} {numbers[name]:.4g}" for name in numbers if name not in ("epoch", "seconds_left")
        )
        left = timedelta(seconds=round(entry["seconds_left"]))
        star = "  *" if better else ""
        stage.log.info("epoch %d/%d  %s  left %s%s", entry["epoch"], self.epochs, shown, left, star)
        with self.paths.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stage.plain(entry)) + "\n")
        self._write_csv()
        if self.samples:
            for name, picture in pictures.items():
                path = self.paths.samples / f"epoch_{entry['epoch']:03d}_{name}.png"
                with stage.atomic_write(path, "wb") as file:
                    Image.fromarray(picture).save(file, "PNG")
        if self.tensorboard:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, entry["epoch"])
            for name, picture in pictures.items():
                layout = "HW" if picture.ndim == 2 else "HWC"
                self.board.add_image(name, picture, entry["epoch"], dataformats=layout)
            self.board.flush()

    def _write_csv(self) -> None:
        """The whole log again as a table."""
        if self.csv:
            rows = [json.loads(line) for line in self.paths.log.read_text(encoding="utf-8").splitlines()]
            columns = {name: None for row in rows for name in row}
            with stage.atomic_write(self.paths.csv) as file:
                table = csv.DictWriter(file, list(columns), lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
