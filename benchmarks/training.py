"""How fast the training loop is: beside a plain loop, on the same network, slices, noise and steps.

    OMP_NUM_THREADS=1 python benchmarks/training.py
    python benchmarks/training.py --device cuda --slices 2048 --batch-size 32

The plain loop is what one would write first: fp32, tensors as they come, nothing around it. The engine is
training.fit with what it picks by itself, and its parts one by one. Each is measured in a process of its own,
--rounds times in turn, and the best epoch counts; on the CPU, with one thread, in processor time, so that
others at work on the machine spoil the ratio little. Prints a table and writes
results/benchmark_training.json; fails if a loss is further from the plain one than TOLERANCE."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engine

import runs
import stage
import training
from batches import Batch, Batches
from losses import rmse_loss
from models import build_model
from phantom import generate_phantom

SIZE = 128
NOISE_HU = 12.0  # of a slice at an eighth of the dose
LR = 2e-3
EPOCHS = 3  # the first one warms up and, compiled, compiles
TOLERANCE = 0.02  # of the mean loss of the last epoch: bf16 has 8 bits, and the steps go other ways
GOALS = {"cpu": 3.0, "cuda": 4.0}
PLAIN = "plain loop: fp32"


class PhantomPack:
    """Slices of four phantoms, over and over: all that Batches wants of a pack."""

    mask = None

    def __init__(self, slices: int):
        volumes = [generate_phantom(seed, size=SIZE, slices=16).hu for seed in range(4)]
        self.image = np.resize(np.concatenate(volumes).astype(np.int16), (slices, SIZE, SIZE))

    def __len__(self) -> int:
        return len(self.image)


def loss_fn(network, batch: Batch) -> torch.Tensor:
    """Remove white noise, drawn for each slice by its seed."""
    generator = torch.Generator(batch.hu.device)
    noise = [
        torch.randn(image.shape, generator=generator.manual_seed(seed), device=image.device)
        for image, seed in zip(batch.hu, batch.seeds, strict=True)
    ]
    return rmse_loss(network(batch.hu + NOISE_HU * torch.stack(noise)), batch.hu, None)


def plain_loop(model: nn.Module, batches: Batches, options: training.Options, device: torch.device) -> list:
    """[(images per second, mean loss) of each epoch]."""
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=options.weight_decay)
    epochs = []
    for epoch in range(options.epochs):
        began, total = engine.clock(device), 0.0
        for step, batch in enumerate(batches.epoch(epoch)):
            done, steps = epoch * len(batches) + step, options.epochs * len(batches)
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate(done, steps, options)
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            optimizer.step()
            total += loss.item()
        speed = len(batches) * batches.batch_size / (engine.clock(device) - began)
        epochs.append((speed, total / len(batches)))
    return epochs


def measure(name: str, width: int, slices: int, batch_size: int, device: torch.device, **options) -> dict:
    """One measurement: images/s of the best epoch after the first, last loss, and peak memory in GB."""
    torch.set_num_threads(torch.get_num_threads() if device.type == "cuda" else 1)
    torch.manual_seed(0)
    model = build_model("unet", widths=[width, 2 * width, 4 * width])
    batches = Batches(PhantomPack(slices), batch_size=batch_size, seed=0, device=device)
    chosen = training.Options(EPOCHS, LR, **options)
    if name == PLAIN:
        epochs = plain_loop(model, batches, chosen, device)
    else:
        found = engine.fit(model, loss_fn, batches, chosen, device)
        images = len(batches) * batches.batch_size
        epochs = list(zip((images / found.seconds).tolist(), found.losses, strict=True))
    return {
        "images_per_s": max(speed for speed, _ in epochs[1:]),
        "loss": epochs[-1][1],
        **runs.peak_memory(device),
    }


def variants(device: torch.device) -> dict[str, dict]:
    """Name -> options of training.fit; the last one is what it picks by itself."""
    precision = training.pick_precision("auto", device)
    chosen, short = training.pick_compile("auto", device), str(precision).removeprefix("torch.")
    found = {PLAIN: {}, "engine: fp32": {}, f"engine: {short}": {"precision": precision}}
    try:
        training.pick_compile("on", device)
        found[f"engine: {short}, compiled"] = {"precision": precision, "compile": True}
    except stage.InputError as missing:
        print(missing)
    picked = f"engine: {short}, compiled" if chosen else f"engine: {short}"
    return {name: found[name] for name in found if name != picked} | {picked: found[picked]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--widths", type=stage.positive_int, nargs="+", default=[16, 32])
    parser.add_argument("--slices", type=stage.positive_int, default=64, help="of an epoch")
    parser.add_argument("--batch-size", type=stage.positive_int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=stage.positive_int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    device = training.pick_device(args.device)
    rows, context = [], multiprocessing.get_context("spawn")
    for width in args.widths:
        for batch_size in args.batch_size:
            found: dict[str, list[dict]] = {}
            for _ in range(args.rounds):
                for name, options in variants(device).items():
                    with ProcessPoolExecutor(1, mp_context=context) as alone:
                        job = alone.submit(measure, name, width, args.slices, batch_size, device, **options)
                        found.setdefault(name, []).append(job.result())
            plain = max(round_["images_per_s"] for round_ in found[PLAIN])
            for name, rounds in found.items():
                best = max(rounds, key=lambda round_: round_["images_per_s"])
                rows.append({"width": width, "batch_size": batch_size, "what": name, **best})
                rows[-1]["times_plain"] = best["images_per_s"] / plain
                rows[-1]["loss_off"] = best["loss"] / found[PLAIN][0]["loss"] - 1
    print(f"\n{'width':>5} {'batch':>5}  {'what':28} {'images/s':>9} {'x plain':>8} {'loss':>7} {'GB':>6}")
    for row in rows:
        print(
            f"{row['width']:5d} {row['batch_size']:5d}  {row['what']:28} {row['images_per_s']:9.1f} "
            f"{row['times_plain']:8.2f} {row['loss']:7.3f} {row['memory_gb']:6.2f}"
        )
    picked = [row["times_plain"] for row in rows if row["what"] == list(variants(device))[-1]]
    goal = GOALS[device.type]
    print(f"\nThe engine as it is by itself: {min(picked):.2f} to {max(picked):.2f} times; goal {goal:g}.")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    manifest = {"device": machine, "torch": str(torch.__version__), "size": SIZE, "goal": goal, "rows": rows}
    stage.write_json(args.out / "benchmark_training.json", manifest)
    off = [row for row in rows if abs(row["loss_off"]) > TOLERANCE]
    if off:
        sys.exit(f"losses further than {TOLERANCE:.0%} from the plain loop's: {off}")


if __name__ == "__main__":
    main()
