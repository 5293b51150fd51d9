"""The one training loop: device, mixed precision, several processes, resume, best on validation, logs.

A run is a pure function of its configuration: noise and order are drawn from (seed, epoch, place), so a run
that was killed and resumed ends with the same weights, bit for bit on the CPU, as one that was not."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoints
import stage
from dataset import Batch, Batches, Pack
from dose import DOSE_MODELS

WARMUP = 0.05  # share of all steps in which the learning rate rises
CLIP_NORM = 1.0  # gradients above it are scaled down: one bad batch must not undo an epoch


def add_run_options(parser: stage.StageParser, *, name: str, epochs: int, batch_size: int, lr: float) -> None:
    """The options that every training stage has, with its own defaults."""
    parser.add_argument("--data", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    parser.add_argument(
        "--out", type=Path, default=Path("saved_models"), help="checkpoints (default: saved_models)"
    )
    parser.add_argument("--name", default=name, help=f"of the checkpoint (default: {name})")
    parser.add_argument(
        "--size",
        type=stage.positive_int,
        help="train on size x size pixels (default: as prepared; 256 where series differ)",
    )
    parser.add_argument("--epochs", type=stage.positive_int, default=epochs, help=f"(default: {epochs})")
    parser.add_argument(
        "--batch-size",
        type=stage.positive_int,
        default=batch_size,
        help=f"slices, over all processes (default: {batch_size})",
    )
    parser.add_argument(
        "--lr", type=stage.positive_float, default=lr, help=f"peak learning rate (default: {lr})"
    )
    parser.add_argument(
        "--seed", type=stage.natural_int, default=42, help="of weights, order and noise (default: 42)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto takes bf16 where the processor is fast in it (default: auto)",
    )
    parser.add_argument("--resume", action="store_true", help="go on where a run of this name stopped")
    parser.add_argument("--overwrite", action="store_true", help="delete a run of this name first")


DOSE_MODEL = "calibrated"  # where nothing says otherwise


def add_dose_options(parser: stage.StageParser, default: str) -> None:
    """How low dose is simulated, in the same words in every stage. default: what is done without them."""
    parser.add_argument(
        "--dose-model",
        choices=sorted(DOSE_MODELS),
        help=f"how low dose is simulated (default: {default})",
    )
    parser.add_argument(
        "--doses", type=float, nargs="+", help="in the dose model's unit, e.g. 1 5 10 20 40 (default: all)"
    )


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` -> a device; only auto may fall back, and says so.

    Under torchrun each process takes the GPU of its own rank. Raises InputError if the GPU is not there."""
    if name == "auto":
        if not torch.cuda.is_available():
            stage.log.info("no GPU found: running on the CPU")
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise stage.InputError(f"--device {name}: must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise stage.InputError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise stage.InputError(f"--device {name}: torchrun gives each process its own GPU (use cuda)")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise stage.InputError(
            f"--device {name}: {torch.cuda.device_count()} CUDA GPUs found here (use --device auto or cpu)"
        )
    return torch.device("cuda", index)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `fp32`, `bf16` or `fp16` -> the dtype of autocast; auto takes what the device is fast in."""
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise stage.InputError("--precision fp16: needs a GPU (use auto, bf16 or fp32)")
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The mixed-precision context; fp32 switches it off."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


NOT_CONFIG = ("debug", "data", "out", "name", "denoiser", "finetune", "device", "resume", "overwrite")


def run_config(args: argparse.Namespace, **more: Any) -> dict:
    """What decides a run's result, as JSON types: what a resumed run must share with its beginning.

    more: what stands behind paths and defaults among args, such as a hash of the data or the size."""
    options = {key: stage.plain(value) for key, value in sorted(vars(args).items()) if key not in NOT_CONFIG}
    return options | {key: stage.plain(value) for key, value in more.items()}


class World(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int = 0
    size: int = 1


@contextlib.contextmanager
def world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started; alone, do nothing."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others wait while the first process validates, which may take long
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class Paths(NamedTuple):
    """The files of one training run."""

    best: Path
    last: Path
    log: Path
    card: Path
    lock: Path


def run_paths(folder: Path, name: str) -> Paths:
    """Where a run called name keeps its files."""
    folder = Path(folder)
    return Paths(
        folder / f"{name}.pt",
        folder / f"{name}.last.pt",
        folder / f"{name}.jsonl",
        folder / f"{name}.card.json",
        folder / f".{name}.lock",
    )


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
    if overwrite:  # the old best stays until a new one takes its place
        for path in (paths.last, paths.log):
            path.unlink(missing_ok=True)
    for path in (paths.best, paths.last):
        for leftover in path.parent.glob(f".{path.name}.tmp.*"):
            leftover.unlink()


class Interrupt:
    """Ctrl-C and SIGTERM ask for a stop after the current step; the second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: Any) -> None:  # noqa: ARG002
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupt:
        self._old = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def learning_rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def fit(
    model: nn.Module,
    loss_fn: Callable[[Callable[[torch.Tensor], torch.Tensor], Batch], torch.Tensor],
    batches: Batches,
    validate: Callable[[nn.Module], dict[str, float]] | None,
    *,
    facts: dict,
    paths: Paths,
    config: dict,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    select: tuple[str, str],
    device: torch.device,
    precision: torch.dtype,
    place: World = World(),  # noqa: B008 immutable
    checkpoint_minutes: float = 10.0,
) -> dict[str, Any]:
    """Train model and leave the best on validation in paths.best.

    loss_fn(network, batch) -> scalar; only what goes through network is computed in mixed precision, not the
    augmentation, the noise and the loss around it. validate(model) -> metrics, None in all but the first
    process; select names the metric that decides, and "max" or "min"; metrics that are dicts (thresholds) are
    stored as they are. facts: what the checkpoint says of itself beside weights and metrics. config: what
    must not change on resume.
    Returns the metrics of the best epoch. Raises StageError on a non-finite loss, naming step and slices;
    InputError if a resumed run was started with another configuration; KeyboardInterrupt, with the state
    saved, when asked to stop."""
    metric, direction = select
    model = model.to(device)
    if device.type == "cuda" or precision != torch.float32:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    steps = epochs * len(batches)
    state = {"epoch": 0, "step": 0, "loss_sum": 0.0, "best": None, "best_metrics": None}
    if paths.last.exists():
        state = _restore(paths, model, optimizer, scaler, config)
        if state["epoch"] >= epochs:
            stage.log.info("%s: already trained for %d epochs, nothing to do", paths.best, epochs)
            return state["best_metrics"]
        stage.log.info("resuming at epoch %d, step %d", state["epoch"] + 1, state["step"])
    _trim_log(paths.log, state["epoch"])
    trained = model
    if place.size > 1:
        if device.type == "cuda":
            trained = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        trained = DistributedDataParallel(trained)

    def network(images: torch.Tensor) -> torch.Tensor:
        with autocast(device, precision):
            return trained(images).float()

    def keep() -> None:
        if place.rank == 0:
            _save_last(paths.last, model, optimizer, scaler, state, config)

    if not paths.last.exists():
        keep()  # a kill before the first epoch is done must leave something to go on from
    saved = time.monotonic()
    with Interrupt() as interrupt:
        while state["epoch"] < epochs:
            epoch, began, first = state["epoch"], time.monotonic(), state["step"]
            bar = stage.progress(
                batches.epoch(epoch, first), desc=f"epoch {epoch + 1}/{epochs}", total=len(batches) - first
            )
            trained.train()
            for batch in bar:
                done = epoch * len(batches) + state["step"]
                for group in optimizer.param_groups:
                    group["lr"] = lr * learning_rate(done, steps)
                loss = loss_fn(network, batch)
                value = loss.item()
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item()
                # under fp16 the scaler skips a step whose gradient overflowed, and lowers its scale
                if not math.isfinite(value) or not (math.isfinite(norm) or scaler.is_enabled()):
                    raise stage.StageError(
                        f"{paths.best}: loss is {value:g}, gradient {norm:g} at epoch {epoch + 1}, step "
                        f"{state['step'] + 1}, slices {batch.rows.tolist()[:8]} (lower --lr, or look at "
                        "these; the last good checkpoint stands)"
                    )
                scaler.step(optimizer)
                scaler.update()
                state["step"] += 1
                state["loss_sum"] += value
                bar.set_postfix(loss=f"{value:.4g}", refresh=False)
                if place.size > 1:
                    interrupt.asked = _any_of_all(interrupt.asked, device)
                if interrupt.asked or time.monotonic() - saved > 60 * checkpoint_minutes:
                    keep()
                    saved = time.monotonic()
                if interrupt.asked:
                    raise KeyboardInterrupt
            seconds = time.monotonic() - began
            if place.size > 1:
                state["loss_sum"] = _mean_of_all(state["loss_sum"], device)
            model.eval()
            metrics = validate(model) if place.rank == 0 else {}
            entry = {
                "epoch": epoch + 1,
                "train_loss": state["loss_sum"] / len(batches),
                "lr": lr * learning_rate((epoch + 1) * len(batches) - 1, steps),
                "images_per_s": (len(batches) - first) * batches.batch_size / max(seconds, 1e-9),
                "seconds": time.monotonic() - began,
                **{key: value for key, value in metrics.items() if not isinstance(value, dict)},
            }
            state.update(epoch=epoch + 1, step=0, loss_sum=0.0)
            if place.rank == 0:
                score = metrics[metric] if direction == "max" else -metrics[metric]
                better = state["best"] is None or (math.isfinite(score) and score > state["best"])
                if better:
                    state["best"] = score if math.isfinite(score) else None
                    state["best_metrics"] = stage.plain(metrics) | {"epoch": epoch + 1}
                    _save_best(paths, model, facts, config, state["best_metrics"])
                with paths.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(stage.plain(entry)) + "\n")
                numbers = "  ".join(f"{key} {value:.4g}" for key, value in entry.items() if key != "epoch")
                stage.log.info("epoch %d/%d  %s%s", epoch + 1, epochs, numbers, "  *" if better else "")
            keep()
            saved = time.monotonic()
            if interrupt.asked:
                raise KeyboardInterrupt
            if place.size > 1:
                dist.barrier()
    return state["best_metrics"]


def run(
    args: argparse.Namespace,
    train: Pack,
    val: Pack,
    *,
    make_model: Callable[[], nn.Module],
    loss_fn: Callable[[Callable[[torch.Tensor], torch.Tensor], Batch], torch.Tensor],
    make_validate: Callable[[], Callable[[nn.Module], dict]],
    facts: dict,
    seen: Sequence[str] = (),
    select: tuple[str, str],
    weight_decay: float = 0.0,
    device: torch.device,
    precision: torch.dtype,
    **sampling: np.ndarray | None,
) -> tuple[Path, dict[str, Any]] | None:
    """What every training stage does once it has its data, network and loss: join the other processes, take
    the lock, fit, keep the best. args: those of add_run_options. seen: patients that parents were trained on.
    sampling: rows, weights and targets of Batches. make_model, make_validate: called when needed, the second
    in the first process only.

    Returns (checkpoint, metrics of the best epoch) in the first process, None in the others. Raises as fit
    and open_run do."""
    patients = {*seen, *train.patient_ids().tolist(), *val.patient_ids().tolist()}
    facts = {
        **facts,
        "size": train.size,
        "seed": args.seed,
        "split_hash": train.split_hash,
        "trained_on": sorted(patients),
    }
    parents = {role: parent["sha256"] for role, parent in facts["parents"].items()}
    resolved = {name: facts[name] for name in ("dose_model", "doses", "size")}
    with world(device) as place:
        torch.manual_seed(args.seed)
        model = make_model()
        batches = Batches(
            train,
            batch_size=args.batch_size,
            seed=args.seed,
            device=device,
            rank=place.rank,
            world_size=place.size,
            **sampling,
        )
        with open_run(
            args.out, args.name, resume=args.resume, overwrite=args.overwrite, place=place
        ) as paths:
            best = fit(
                model,
                loss_fn,
                batches,
                make_validate() if place.rank == 0 else None,
                facts=facts,
                paths=paths,
                config=run_config(
                    args,
                    **resolved,
                    precision=str(precision),
                    train=train.key,
                    val=val.key,
                    parents=parents,
                ),
                epochs=args.epochs,
                lr=args.lr,
                weight_decay=weight_decay,
                select=select,
                device=device,
                precision=precision,
                place=place,
            )
    return (paths.best, best) if place.rank == 0 else None


def _any_of_all(asked: bool, device: torch.device) -> bool:
    """Whether any process was asked to stop: all of them must leave the loop at the same step."""
    flag = torch.tensor(float(asked), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def _mean_of_all(value: float, device: torch.device) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _save_best(paths: Paths, model: nn.Module, facts: dict, config: dict, metrics: dict) -> None:
    content = {
        "format": checkpoints.FORMAT,
        **facts,
        "config": config,
        "validation": {key: value for key, value in metrics.items() if not isinstance(value, dict)},
        **{key: value for key, value in metrics.items() if isinstance(value, dict)},
        "versions": checkpoints.versions(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state": {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()},
    }
    checkpoints.save(paths.best, content)
    checkpoints.write_card(paths.card, content)


def _save_last(path: Path, model: nn.Module, optimizer, scaler, state: dict, config: dict) -> None:
    content = {
        "format": checkpoints.FORMAT,
        "stage": "resume",
        "config": config,
        "versions": checkpoints.versions(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "state": state,
    }
    checkpoints.save(path, content)


def _restore(paths: Paths, model: nn.Module, optimizer, scaler, config: dict) -> dict:
    content = checkpoints.load(paths.last, "resume")
    old = content["config"]
    changed = [key for key in {**old, **config} if old.get(key) != config.get(key)]
    if changed:
        changes = ", ".join(f"{key} {old.get(key)} -> {config.get(key)}" for key in changed)
        raise stage.InputError(f"{paths.last}: was trained otherwise: {changes} (--overwrite starts anew)")
    if content["versions"]["torch"] != str(torch.__version__):
        stage.log.warning(
            "torch %s -> %s: going on, but not bit for bit", content["versions"]["torch"], torch.__version__
        )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    return content["state"]


def _trim_log(path: Path, epochs: int) -> None:
    """Drop the lines of epochs that will be run again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        with stage.atomic_write(path) as file:
            file.writelines(f"{line}\n" for line in lines[:epochs])
