"""The one training loop: device, mixed precision, several processes, resume, best on validation.

A run is a pure function of its configuration: noise and order are drawn from (seed, epoch, place), so a run
that was killed and resumed ends with the same weights, bit for bit on the CPU, as one that was not."""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import importlib.util
import math
import os
import re
import shutil
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_map_only

import checkpoints
import stage
from batches import Batch, Batches
from dataset import Pack
from dose import DOSE_MODELS
from runs import Paths, Report, World, open_run, peak_memory, world

# ---------------------------------------------------------------- options

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,  # weight decay apart from the gradient
    "adam": torch.optim.Adam,  # weight decay as a part of it, as before Loshchilov and Hutter 2019
}

STEPS = (0.5, 0.75)  # where schedule step falls to a tenth, as in He et al. 2016
SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps after the warm-up -> factor of --lr
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** sum(done >= place for place in STEPS),
    "constant": lambda done: 1.0,  # noqa: ARG005
}


class Options(NamedTuple):
    """How a network is trained and what is told of it: the options of the same names, resolved."""

    epochs: int
    lr: float  # at its peak
    accumulate: int = 1
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.05
    clip_norm: float = 1.0  # one bad batch must not undo an epoch
    ema: float = 0.0
    early_stopping: int = 0
    precision: torch.dtype = torch.float32
    compile: bool = False
    keep_every: int = 0
    csv: bool = False
    tensorboard: bool = False
    samples: bool = False


def add_run_options(
    parser: stage.StageParser,
    *,
    name: str,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    samples: bool = False,
) -> None:
    """The options that every training stage has, with its own defaults. samples: whether it has pictures."""
    default = Options._field_defaults
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
        "--accumulate",
        type=stage.positive_int,
        default=default["accumulate"],
        metavar="N",
        help="batches per step: as --batch-size times N, in the memory of one batch (default: 1)",
    )
    parser.add_argument(
        "--optimizer",
        choices=sorted(OPTIMIZERS),
        default=default["optimizer"],
        help=f"(default: {default['optimizer']})",
    )
    parser.add_argument(
        "--lr", type=stage.positive_float, default=lr, help=f"peak learning rate (default: {lr})"
    )
    parser.add_argument(
        "--weight-decay", type=stage.fraction, default=weight_decay, help=f"(default: {weight_decay})"
    )
    parser.add_argument(
        "--schedule",
        choices=sorted(SCHEDULES),
        default=default["schedule"],
        help="of the learning rate after its warm-up: down to 0, to a tenth at 1/2 and at 3/4, or as it is "
        f"(default: {default['schedule']})",
    )
    parser.add_argument(
        "--warmup",
        type=stage.fraction,
        default=default["warmup"],
        help=f"share of all steps in which the learning rate rises (default: {default['warmup']})",
    )
    parser.add_argument(
        "--clip-norm",
        type=stage.positive_float,
        default=default["clip_norm"],
        help=f"a gradient of a larger norm is scaled down to it (default: {default['clip_norm']:g})",
    )
    parser.add_argument(
        "--ema",
        type=stage.fraction,
        default=default["ema"],
        metavar="DECAY",
        help="validate and keep the moving average of the weights, e.g. 0.999 (default: 0, none)",
    )
    parser.add_argument(
        "--early-stopping",
        type=stage.natural_int,
        default=default["early_stopping"],
        metavar="N",
        help="stop after N epochs without a better validation (default: 0, never)",
    )
    parser.add_argument(
        "--seed", type=stage.natural_int, default=42, help="of weights, order and noise (default: 42)"
    )
    parser.add_argument(
        "--seeds",
        type=stage.natural_int,
        nargs="+",
        metavar="N",
        help="one run for each, one after the other, as <name>.seed<n>",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto takes bf16 where the processor is fast in it, fp16 on older GPUs (default: auto)",
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="the network with torch.compile; auto does so on a GPU, where it pays (default: auto)",
    )
    parser.add_argument(
        "--keep-every",
        type=stage.natural_int,
        default=default["keep_every"],
        metavar="N",
        help="also keep every Nth epoch, as <name>.epoch<k>.pt (default: 0, none)",
    )
    parser.add_argument("--csv", action="store_true", help="also write the log as <name>.csv")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write the log for TensorBoard, to <name>.tb/"
    )
    if samples:
        parser.add_argument(
            "--samples", action="store_true", help="write pictures after every epoch, to <name>.samples/"
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
        "--doses",
        type=float,
        nargs="+",
        help="in the dose model's unit: lambda, or fractions such as 0.5 0.25 0.1 (default: all)",
    )


REALISATIONS = 4  # mixed at random: noise of a slice is nearly never the same twice


def add_noise_option(parser: stage.StageParser) -> None:
    """How the projection model's noise comes into training."""
    parser.add_argument(
        "--noise-realisations",
        type=stage.natural_int,
        help="projection: noise images a slice kept in the cache and mixed, 0: made anew for every batch "
        f"(default: {REALISATIONS} on a CPU, 0 on a GPU)",
    )


def noise_realisations(args: argparse.Namespace, device: torch.device) -> int:
    """The option of add_noise_option. Raises InputError where the dose model has no noise images."""
    if DOSE_MODELS[args.dose_model or DOSE_MODEL].scanner is None:
        if args.noise_realisations is not None:
            raise stage.InputError("--noise-realisations: only for --dose-model projection (leave it out)")
        return 0
    if args.noise_realisations is None:
        return 0 if device.type == "cuda" else REALISATIONS
    return args.noise_realisations


# ---------------------------------------------------------------- the machine


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


def pick_compile(name: str, device: torch.device) -> bool:
    """`auto`, `on` or `off` -> whether to compile; auto does on a GPU where all that it needs is there.

    On the CPU the convolutions are what takes the time, and compiling leaves them as they are.
    Raises InputError if it is to be on and cannot."""
    needs = {
        f"a C++ compiler ({os.environ.get('CXX', 'g++')})": shutil.which(os.environ.get("CXX", "g++")),
        "Python.h (the package python3-dev)": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    if device.type == "cuda":
        needs["the package triton"] = importlib.util.find_spec("triton")
    missing = [need for need, found in needs.items() if not found]
    if name == "on" and missing:
        raise stage.InputError(f"--compile on: needs {' and '.join(missing)} (install it, or --compile off)")
    return name == "on" or (name == "auto" and device.type == "cuda" and not missing)


def pick_options(args: argparse.Namespace, device: torch.device) -> Options:
    """The options of add_run_options, resolved for the device. Raises InputError for what cannot be done."""
    if args.ema == 1:
        raise stage.InputError("--ema 1: would keep the weights of the start for ever (try 0.999)")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise stage.InputError("--tensorboard: the package is missing (pip install tensorboard)")
    given = {name: value for name, value in vars(args).items() if name in Options._fields}
    given["precision"] = pick_precision(args.precision, device)
    given["compile"] = pick_compile(args.compile, device)
    return Options(**given)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed: a step on the CPU needs the blocks of the last one again, and to have
    the kernel map them anew takes up to a fifth of its time. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # every block from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks


@contextlib.contextmanager
def one_line_faults(paths: Paths) -> Iterator[None]:
    """What a machine fails at in the middle of a run, as one line that says how to go on."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
            raise stage.StageError(
                f"{paths.last}: not enough memory (a smaller --batch-size, with --accumulate for the same "
                "steps, and --overwrite; or --resume when there is more, this checkpoint stands)"
            ) from error
        if re.search("CUDA error|cuDNN error|NCCL error", text):
            raise stage.StageError(
                f"{paths.last}: the GPU failed, {text.splitlines()[0]} (--resume, this checkpoint stands)"
            ) from error
        raise


# ---------------------------------------------------------------- what a run is


NOT_CONFIG = (  # where things lie, how a run is started, what is told of it: nothing that changes a result
    *("debug", "data", "out", "name", "denoiser", "finetune", "device", "resume", "overwrite", "seeds"),
    *("keep_every", "csv", "tensorboard", "samples"),
)


def run_config(args: argparse.Namespace, **more: Any) -> dict:
    """What decides a run's result, as JSON types: what a resumed run must share with its beginning.

    more: what stands behind paths and defaults among args, such as a hash of the data or the size."""
    options = {key: stage.plain(value) for key, value in sorted(vars(args).items()) if key not in NOT_CONFIG}
    return options | {key: stage.plain(value) for key, value in more.items()}


def each_seed(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options of each run asked for: args itself, or with --seeds one for each, called <name>.seed<n>."""
    if args.seeds is None:
        yield args
        return
    if len(set(args.seeds)) < len(args.seeds):
        raise stage.InputError(f"--seeds {' '.join(map(str, args.seeds))}: one is given twice")
    for seed in args.seeds:
        yield argparse.Namespace(**{**vars(args), "seed": seed, "name": f"{args.name}.seed{seed}"})


# ---------------------------------------------------------------- the loop


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the current step; the second one stops at once."""

    def __init__(self, place: World, device: torch.device) -> None:
        self._asked, self._place, self._device = False, place, device

    def _handle(self, number: int, frame: Any) -> None:  # noqa: ARG002
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def asked(self) -> bool:
        """Whether any process was asked to stop: all of them must leave the loop at the same step."""
        if self._place.size == 1:
            return self._asked
        flag = torch.tensor(float(self._asked), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self._asked = bool(flag.item())
        return self._asked

    def __enter__(self) -> Interrupt:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants it ignored
            numbers.append(signal.SIGHUP)
        self._old = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def learning_rate(step: int, steps: int, options: Options) -> float:
    """The learning rate of a step: linear warm-up, then as the schedule has it."""
    warm = max(1, round(options.warmup * steps))
    if step < warm:
        return options.lr * (step + 1) / warm
    return options.lr * SCHEDULES[options.schedule]((step - warm) / max(1, steps - warm))


Network = Callable[..., Any]  # what the model takes -> what it gives, its tensors in float32
LossFunction = Callable[[Network, Batch], Any]  # -> scalar, or (scalar, {name: scalar to be logged})


class Learner:
    """A network in training, and all that a killed run needs to go on."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        *,
        paths: Paths,
        config: dict,
        device: torch.device,
        place: World,
    ):
        if place.size > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.options, self.paths, self.config, self.device, self.place = options, paths, config, device, place
        self.model = model.to(device, memory_format=torch.channels_last)
        # what is validated and kept
        self.averaged = copy.deepcopy(self.model).requires_grad_(False) if options.ema else self.model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        make = OPTIMIZERS[options.optimizer]
        self.optimizer = make(self.parameters, options.lr, weight_decay=options.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == torch.float16)
        self.trained = DistributedDataParallel(self.model) if place.size > 1 else self.model
        if options.compile:
            torch.compiler.reset()  # of several seeds, all but the first few would go uncompiled
            self.trained = torch.compile(self.trained)
        # step: of the epoch, done; sums: of the losses of these steps; stale: epochs since the best one
        self.state = {"epoch": 0, "step": 0, "sums": {}, "best": None, "best_metrics": None, "stale": 0}

    def finished(self) -> bool:
        patience = self.options.early_stopping
        return self.state["epoch"] >= self.options.epochs or 0 < patience <= self.state["stale"]

    def network(self, *inputs: Any, **named: Any) -> Any:
        """The network as a loss function sees it: mixed precision inside, float32 outside."""
        with autocast(self.device, self.options.precision):
            outputs = self.trained(*(_channels_last(value) for value in inputs), **named)
        return tree_map_only(torch.Tensor, torch.Tensor.float, outputs)

    def step(self, loss_fn: LossFunction, batches: Sequence[Batch], lr: float, done: int) -> dict[str, float]:
        """One step of the optimizer down the mean loss of batches. done: steps before it, in all epochs.

        Returns the means of the loss and of its terms. Raises StageError, the weights unspoiled, if the loss
        or the gradient is not finite."""
        sums: dict[str, Any] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches, start=1):
            # gradients are shared among the processes with the last batch alone
            waits = self.place.size > 1 and number < len(batches)
            with self.trained.no_sync() if waits else contextlib.nullcontext():
                result = loss_fn(self.network, batch)
                loss, terms = result if isinstance(result, tuple) else (result, {})
                self.scaler.scale(loss / len(batches)).backward()
            for name, value in {**terms, "loss": loss}.items():
                share = torch.as_tensor(value, device=self.device).detach() / len(batches)
                sums[name] = sums.get(name, 0) + share
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        # all numbers of a step are fetched from the device at once: each one alone would make it wait
        *values, norm = torch.stack([value.float() for value in (*sums.values(), norm)]).tolist()
        values = dict(zip(sums, values, strict=True))
        # under fp16 the scaler leaves out a step whose gradient overflowed, and lowers its scale
        overflowed = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if not math.isfinite(values["loss"]) or not (math.isfinite(norm) or overflowed):
            raise stage.StageError(
                f"{self.paths.best}: loss is {values['loss']:g}, gradient {norm:g} at epoch "
                f"{self.state['epoch'] + 1}, step {self.state['step'] + 1}, slices "
                f"{np.concatenate([batch.rows for batch in batches]).tolist()[:8]} (lower --lr, or look at "
                "these; the last good checkpoint stands)"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.options.ema:
            self._average(done)
        return values

    @torch.no_grad()
    def _average(self, done: int) -> None:
        """Move the averaged weights towards the trained ones; buffers, as those of batch norm, are copied.

        done: steps before this one."""
        decay = min(self.options.ema, (1 + done) / (10 + done))  # a short run must not keep where it began
        move = get_ema_multi_avg_fn(decay)
        move(list(self.averaged.parameters()), list(self.model.parameters()), None)
        for kept, new in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            kept.copy_(new)

    def judge(self, metrics: dict, score: float, facts: dict) -> bool:
        """End an epoch that validation gave metrics and a score, more being better: whether it is the best.

        Writes the checkpoints that the next stages read: the best, and the epoch's own where wanted."""
        state, best, keep_every = self.state, self.state["best"], self.options.keep_every
        metrics = stage.plain(metrics) | {"epoch": state["epoch"]}
        better = best is None or (math.isfinite(score) and score > best)
        state["stale"] = 0 if better else state["stale"] + 1
        if better:
            state.update(best=score if math.isfinite(score) else None, best_metrics=metrics)
            content = self._checkpoint(facts, metrics)
            checkpoints.save(self.paths.best, content)
            checkpoints.write_card(self.paths.card, content)
        if keep_every and state["epoch"] % keep_every == 0:
            checkpoints.save(self.paths.epoch(state["epoch"]), self._checkpoint(facts, metrics))
        return better

    def _checkpoint(self, facts: dict, metrics: dict) -> dict:
        """The averaged network, and what is known of it."""
        state = self.averaged.state_dict()
        return {
            "format": checkpoints.FORMAT,
            **facts,
            "config": self.config,
            "validation": {key: value for key, value in metrics.items() if not isinstance(value, dict)},
            **{key: value for key, value in metrics.items() if isinstance(value, dict)},
            "versions": checkpoints.versions(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "state": {key: value.detach().cpu().contiguous() for key, value in state.items()},
        }

    def save(self) -> None:
        """Write what a killed run goes on from."""
        content = {
            "format": checkpoints.FORMAT,
            "stage": "resume",
            "config": self.config,
            "versions": checkpoints.versions(),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.options.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "state": self.state,
        }
        checkpoints.save(self.paths.last, content)

    def restore(self) -> None:
        """Go on from what save wrote. Raises InputError naming what was configured otherwise."""
        content = checkpoints.load(self.paths.last, "resume")
        old, new = content["config"], self.config
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            changes = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)
            raise stage.InputError(
                f"{self.paths.last}: was trained otherwise: {changes} (--overwrite starts anew)"
            )
        if content["versions"]["torch"] != str(torch.__version__):
            stage.log.warning(
                "torch %s -> %s: going on, but not bit for bit",
                content["versions"]["torch"],
                torch.__version__,
            )
        self.model.load_state_dict(content["model"])
        if self.options.ema:
            self.averaged.load_state_dict(content["averaged"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.state = content["state"]


def _channels_last(value: Any) -> Any:
    """Images (B, C, H, W) with their channels last in memory, where convolutions are fastest."""
    images = isinstance(value, torch.Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if images else value


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    make_validate: Callable[[], Callable[[nn.Module], dict[str, Any]]],
    *,
    options: Options,
    facts: dict,
    paths: Paths,
    config: dict,
    select: tuple[str, str],
    device: torch.device,
    place: World = World(),  # noqa: B008 immutable
    samples: Callable[[nn.Module], dict[str, np.ndarray]] | None = None,
    checkpoint_minutes: float = 10.0,
) -> dict[str, Any]:
    """Train model and leave the best on validation in paths.best.

    loss_fn(network, batch) -> the mean loss of the batch, a scalar, or (loss, {name: a number to log the
    epoch's mean of}). network takes and returns what model does; only what goes through it is computed in
    mixed precision, not the augmentation, the noise and the loss around it. make_validate() ->
    validate(model) -> metrics, called in the first process only; select names the metric that decides, and
    "max" or "min"; metrics that are dicts (thresholds) are stored as they are. facts: what the checkpoint
    says of itself beside weights and metrics. config: what must not change on resume. samples(model) ->
    pictures by name, (H, W) or (H, W, 3) uint8.
    Returns the metrics of the best epoch. Raises StageError on a non-finite loss, naming step and slices, and
    if memory or the GPU gives out; InputError if a resumed run was started with another configuration;
    KeyboardInterrupt, with the state saved, when asked to stop."""
    metric, direction = select
    steps = len(batches) // options.accumulate  # of the optimizer, in an epoch
    if steps == 0:
        raise stage.InputError(
            f"--accumulate {options.accumulate}: an epoch has {len(batches)} batches of {batches.batch_size}"
        )
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # images of one size: the fastest convolutions are sought once
    going_on = paths.last.exists()  # asked before the processes meet, after which the first one writes it
    learner = Learner(model, options, paths=paths, config=config, device=device, place=place)
    if going_on:
        learner.restore()
    state, first = learner.state, place.rank == 0
    report = None
    if first:
        report = Report(
            paths,
            state["epoch"],
            options.epochs,
            csv=options.csv,
            tensorboard=options.tensorboard,
            samples=options.samples,
        )
    if learner.finished():
        stage.log.info("%s: already trained for %d epochs, nothing to do", paths.best, state["epoch"])
        return state["best_metrics"]
    validate = make_validate() if first else None
    if going_on:
        stage.log.info("resuming at epoch %d, step %d", state["epoch"] + 1, state["step"])
    elif first:
        learner.save()  # a kill before the first epoch is done must leave something to go on from
    started, before, saved = time.monotonic(), state["epoch"], time.monotonic()
    with one_line_faults(paths), Interrupt(place, device) as interrupt:
        while not learner.finished():
            epoch, skipped, began = state["epoch"], state["step"], time.monotonic()
            drawn = batches.epoch(epoch, skipped * options.accumulate)
            groups = zip(*[drawn] * options.accumulate, strict=False)  # an incomplete last group is left out
            bar = stage.progress(groups, desc=f"epoch {epoch + 1}/{options.epochs}", total=steps - skipped)
            learner.trained.train()
            for group in bar:
                done = epoch * steps + state["step"]
                # what a network draws itself, as for dropout
                torch.manual_seed(stage.stable_seed(batches.seed, epoch, state["step"], place.rank))
                lr = learning_rate(done, options.epochs * steps, options)
                values = learner.step(loss_fn, group, lr, done)
                state["step"] += 1
                state["sums"] = {name: state["sums"].get(name, 0.0) + values[name] for name in values}
                bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
                asked = interrupt.asked()
                if first and (asked or time.monotonic() - saved > 60 * checkpoint_minutes):
                    learner.save()
                    saved = time.monotonic()
                if asked:
                    raise KeyboardInterrupt
            trained_s = time.monotonic() - began
            sums = _means_of_all(state["sums"], device) if place.size > 1 else state["sums"]
            state.update(epoch=epoch + 1, step=0, sums={})
            learner.averaged.eval()
            if first:
                metrics = validate(learner.averaged)
                spent = time.monotonic() - started
                entry = {
                    "epoch": epoch + 1,
                    **{f"train_{name}": value / steps for name, value in sums.items()},
                    "lr": learning_rate((epoch + 1) * steps - 1, options.epochs * steps, options),
                    "images_per_s": (steps - skipped) * options.accumulate * batches.batch_size / trained_s,
                    "seconds": time.monotonic() - began,
                    "seconds_left": spent * (options.epochs - epoch - 1) / (epoch + 1 - before),
                    **peak_memory(device),
                    **{name: value for name, value in metrics.items() if not isinstance(value, dict)},
                }
                score = metrics[metric] if direction == "max" else -metrics[metric]
                better = learner.judge(metrics, score, facts)
                report.write(entry, better, {} if samples is None else samples(learner.averaged))
                learner.save()
                saved = time.monotonic()
            if place.size > 1:
                state["stale"] = _from_first(state["stale"], device)
            if interrupt.asked():
                raise KeyboardInterrupt
    return state["best_metrics"]


def run(
    args: argparse.Namespace,
    train: Pack,
    val: Pack,
    *,
    options: Options,
    make_model: Callable[[], nn.Module],
    loss_fn: LossFunction,
    make_validate: Callable[[], Callable[[nn.Module], dict[str, Any]]],
    facts: dict,
    seen: Sequence[str] = (),
    select: tuple[str, str],
    device: torch.device,
    samples: Callable[[nn.Module], dict[str, np.ndarray]] | None = None,
    make_batches: Callable[..., Batches] = Batches,
    **sampling: Any,
) -> tuple[Path, dict[str, Any]] | None:
    """What every training stage does once it has its data, network and loss: join the other processes, take
    the lock, fit, keep the best. args: those of add_run_options, and options what pick_options made of them.
    seen: patients that parents were trained on. sampling: what make_batches has, such as rows, weights and
    targets. make_model, make_validate: called when needed, the second in the first process only.

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
    config = run_config(
        args,
        **{name: facts[name] for name in ("dose_model", "doses", "size")},
        precision=str(options.precision),
        compile=options.compile,
        network=facts["model"],
        train=train.key,
        val=val.key,
        parents={role: parent["sha256"] for role, parent in facts["parents"].items()},
    )
    place = world(device)
    torch.manual_seed(args.seed)
    model = make_model()
    where = {"device": device, "rank": place.rank, "world_size": place.size}
    batches = make_batches(train, **{"batch_size": args.batch_size, "seed": args.seed, **where, **sampling})
    with open_run(args.out, args.name, resume=args.resume, overwrite=args.overwrite, place=place) as paths:
        best = fit(
            model,
            loss_fn,
            batches,
            make_validate,
            options=options,
            facts=facts,
            paths=paths,
            config=config,
            select=select,
            device=device,
            place=place,
            samples=samples,
        )
    return (paths.best, best) if place.rank == 0 else None


def _means_of_all(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Means over the processes."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / dist.get_world_size()).tolist(), strict=True))


def _from_first(value: int, device: torch.device) -> int:
    """The first process's value, in all of them."""
    box = torch.tensor(value, device=device)
    dist.broadcast(box, 0)
    return int(box.item())
