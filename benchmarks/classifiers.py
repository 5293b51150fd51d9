"""The classifier's training against the loop that one would write first.

    OMP_NUM_THREADS=1 python benchmarks/classifiers.py
    python benchmarks/classifiers.py --device cuda --patients 64 --batch-size 64

The plain way: a DataLoader whose data set opens one npz file a slice and hands it to ResNet-18 in fp32. Ours:
the packed cache, augmentation on the device, training.fit with what it picks by itself. The same network,
slices, batch size and optimiser; each is measured in a process of its own, --rounds times in turn, and the
best epoch counts; on the CPU with one thread, in processor time, so that others at work on the machine spoil
the ratio little. Waiting is the share of an epoch's time that goes by before a batch is there. Prints a table
and writes results/benchmark_classifiers.json."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engine

import prepare_dataset
import runs
import split_dataset
import stage
import training
from batches import Batch, Batches, augment
from dataset import load_pack, series_folders, task_targets
from losses import masked_bce_loss
from models import build_model

EPOCHS = 3  # the first one warms up
LR = 1e-3
GOAL, WAITING_GOAL = 3.0, 0.05
PLAIN = "plain: npz, DataLoader, fp32"
OURS = "ours: packed cache, training.fit"


class NpzSlices(Dataset):
    """What one would write first: a file a slice, read and windowed when it is asked for."""

    def __init__(self, data: Path):
        self.files, self.targets = [], []
        for folder in series_folders(data, "train"):
            metadata = stage.read_json(folder / "metadata.json", "")
            self.files += [folder / f"{entry['index']:05d}" / "image.npz" for entry in metadata["slices"]]
            self.targets += [entry["labels"] for entry in metadata["slices"]]
        self.targets = torch.from_numpy(task_targets("stroke", self.targets))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with np.load(self.files[index]) as file:
            hu = file["arr_0"].astype(np.float32)
        if np.random.default_rng(index).random() < 0.5:
            hu = hu[:, ::-1]
        return torch.from_numpy(hu.copy())[None], self.targets[index]


class Waiting:
    """Batches, and how long was waited for them in each epoch."""

    def __init__(self, batches: Batches):
        self.batches, self.waited = batches, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        drawn = self.batches.epoch(epoch, start)
        self.waited.append(0.0)
        while True:
            began = engine.clock(self.batches.device)
            batch = next(drawn, None)
            self.waited[-1] += engine.clock(self.batches.device) - began
            if batch is None:
                return
            yield batch


def plain_loop(model: nn.Module, data: Path, batch_size: int, device: torch.device) -> dict:
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    loader = DataLoader(NpzSlices(data), batch_size, shuffle=True, drop_last=True)
    speeds, shares = [], []
    for _ in range(EPOCHS):
        began, waited = engine.clock(device), 0.0
        drawn = iter(loader)
        for _ in range(len(loader)):
            asked = engine.clock(device)
            hu, targets = next(drawn)
            waited += engine.clock(device) - asked
            loss = masked_bce_loss(model(hu.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        spent = engine.clock(device) - began
        speeds.append(len(loader) * batch_size / spent)
        shares.append(waited / spent)
    return {"images_per_s": max(speeds[1:]), "waiting": min(shares[1:])}


def ours(model: nn.Module, data: Path, batch_size: int, device: torch.device, size: int) -> dict:
    pack = load_pack(data, "train", size)
    targets = task_targets("stroke", pack.labels)
    batches = Waiting(Batches(pack, batch_size=batch_size, seed=0, device=device, targets=targets))

    def loss_fn(network: training.Network, batch: Batch) -> torch.Tensor:
        return masked_bce_loss(network(augment(batch.hu, batch.seeds)), batch.targets)

    seconds = engine.fit(model, loss_fn, batches, engine.picked(EPOCHS, LR, device), device).seconds
    return {
        "images_per_s": max(len(batches) * batch_size / seconds[1:]),
        "waiting": float(np.min(np.array(batches.waited[1:]) / seconds[1:])),
    }


def measure(name: str, data: Path, size: int, width: int, batch_size: int, device: torch.device) -> dict:
    """One measurement: images/s of the best epoch after the first, share of waiting, peak memory in GB."""
    torch.set_num_threads(torch.get_num_threads() if device.type == "cuda" else 1)
    torch.manual_seed(0)
    model = build_model("resnet18", width=width)
    if name == PLAIN:
        found = plain_loop(model, data, batch_size, device)
    else:
        found = ours(model, data, batch_size, device, size)
    return found | runs.peak_memory(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=stage.positive_int, default=256)
    parser.add_argument("--widths", type=stage.positive_int, nargs="+", default=[16, 64])
    parser.add_argument("--patients", type=stage.positive_int, default=12)
    parser.add_argument("--batch-size", type=stage.positive_int, default=16)
    parser.add_argument("--rounds", type=stage.positive_int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    device = training.pick_device(args.device)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        words = ["--source", "phantom", "--patients", args.patients, "--size", args.size, "--slices", 16]
        prepare_dataset.main([str(word) for word in [*words, "--out", data]])
        split_dataset.main(["--data", name, "--fractions", "1", "0", "0"])
        load_pack(data, "train", args.size)  # built once, as for a training of many epochs
        context = multiprocessing.get_context("spawn")
        for width in args.widths:
            found: dict[str, list[dict]] = {}
            for _ in range(args.rounds):
                for what in (PLAIN, OURS):
                    with ProcessPoolExecutor(1, mp_context=context) as alone:
                        job = alone.submit(measure, what, data, args.size, width, args.batch_size, device)
                        found.setdefault(what, []).append(job.result())
            best = {what: max(one, key=lambda row: row["images_per_s"]) for what, one in found.items()}
            for what, row in best.items():
                times = row["images_per_s"] / best[PLAIN]["images_per_s"]
                rows.append({"width": width, "what": what, **row, "times_plain": times})
    print(f"\n{'width':>5}  {'what':33} {'images/s':>9} {'x plain':>8} {'waiting':>8} {'GB':>6}")
    for row in rows:
        print(
            f"{row['width']:5d}  {row['what']:33} {row['images_per_s']:9.1f} {row['times_plain']:8.2f} "
            f"{row['waiting']:8.1%} {row['memory_gb']:6.2f}"
        )
    print(f"\nGoals: {GOAL:g} times the plain way, and less than {WAITING_GOAL:.0%} of the time waiting.")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    manifest = {"device": machine, "torch": str(torch.__version__), "size": args.size, "rows": rows}
    stage.write_json(args.out / "benchmark_classifiers.json", manifest)


if __name__ == "__main__":
    main()
