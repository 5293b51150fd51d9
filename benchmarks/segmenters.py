"""The segmenter's training and reading against MONAI's BasicUNet, as a user of MONAI would write them.

    OMP_NUM_THREADS=1 python benchmarks/segmenters.py
    python benchmarks/segmenters.py --device cuda --patients 32 --batch-size 32

MONAI's way: BasicUNet in 2-D, DiceCELoss, a plain loop in fp32 over windowed slices that lie in memory,
without augmentation, which spares it work; a scan is read by sliding_window_inference with windows as large
as a slice, the fewest there can be. Ours: the U-Net of the same widths, packed cache, augmentation and loss
of train_segmenter.py, training.fit with what it picks by itself; a scan is read by inference.segment, in fp32
as well. The same slices, batch size and optimiser; each is measured in a process of its own, --rounds times
in turn, and the best counts; on the CPU with one thread, in processor time, so that others at work on the
machine spoil the ratio little. Prints a table and writes results/benchmark_segmenters.json."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engine

import prepare_dataset
import runs
import split_dataset
import stage
import training
from batches import Batch, Batches
from dataset import BRAIN_WINDOW, Pack, load_pack, window_hu
from inference import PIXELS_AT_ONCE, segment
from losses import bce_dice_loss
from models import build_model
from reading_inputs import ReadingInputs

EPOCHS = 3  # the first one warms up
READINGS = 3  # of the same scan, likewise
SLICES = 16  # of a scan
LR = 1e-3
GOAL = 1.0
MONAI = "MONAI: BasicUNet, plain loop, fp32"
OURS = "ours: unet, training.fit"


def windowed(pack: Pack, rows: slice) -> torch.Tensor:
    """(B, 1, H, W) 0..1 over the brain window."""
    return window_hu(torch.from_numpy(np.array(pack.image[rows])).float()[:, None], *BRAIN_WINDOW)


def shortest_reading(read: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of READINGS after the first."""
    seconds = []
    for _ in range(READINGS):
        began = engine.clock(device)
        read()
        seconds.append(engine.clock(device) - began)
    return min(seconds[1:])


def monai(pack: Pack, widths: list[int], batch_size: int, device: torch.device) -> tuple[nn.Module, dict]:
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet

    model = BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=(*widths, widths[0])).to(device)
    loss_function = DiceCELoss(sigmoid=True, lambda_dice=0.5, lambda_ce=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    masks = torch.from_numpy((np.array(pack.mask[:]) > 0).astype(np.float32))[:, None]
    slices = TensorDataset(windowed(pack, slice(None)), masks)
    loader = DataLoader(slices, batch_size, shuffle=True, drop_last=True)
    seconds = []
    for _ in range(EPOCHS):
        began = engine.clock(device)
        for images, wanted in loader:
            loss = loss_function(model(images.to(device)), wanted.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        seconds.append(engine.clock(device) - began)
    model.eval()

    def read() -> np.ndarray:
        with torch.inference_mode():
            images = windowed(pack, slice(SLICES)).to(device)
            at_once = max(1, PIXELS_AT_ONCE[device.type] // pack.size**2)
            logits = sliding_window_inference(images, (pack.size, pack.size), at_once, model)
            return (logits.sigmoid() >= 0.5).cpu().numpy()

    return model, {"epoch_s": min(seconds[1:]), "scan_s": shortest_reading(read, device)}


def ours(pack: Pack, widths: list[int], batch_size: int, device: torch.device) -> tuple[nn.Module, dict]:
    model = build_model("unet", kind="segmenter", widths=widths)
    batches = Batches(pack, batch_size=batch_size, seed=0, device=device)
    inputs = ReadingInputs(pack, None, [])

    def loss_fn(network: training.Network, batch: Batch) -> torch.Tensor:
        hu, _ = inputs.draw(batch)
        return bce_dice_loss(network(hu), inputs.mask(batch))

    epochs = engine.fit(model, loss_fn, batches, engine.picked(EPOCHS, LR, device), device)
    model = model.to(device).eval()
    scan = pack.image[np.arange(SLICES)]
    seconds = shortest_reading(lambda: segment(model, scan), device)
    return model, {"epoch_s": float(epochs.seconds[1:].min()), "scan_s": seconds}


WAYS = {MONAI: monai, OURS: ours}


def measure(
    name: str, data: Path, size: int, widths: list[int], batch_size: int, device: torch.device
) -> dict:
    """Seconds of an epoch and of a scan, parameters, and peak memory in GB."""
    torch.set_num_threads(torch.get_num_threads() if device.type == "cuda" else 1)
    torch.manual_seed(0)
    pack = load_pack(data, "train", size)
    model, found = WAYS[name](pack, widths, batch_size, device)
    parameters = sum(one.numel() for one in model.parameters())
    images = len(pack) // batch_size * batch_size
    found |= {"images_per_s": images / found["epoch_s"], "parameters": parameters}
    return found | runs.peak_memory(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=stage.positive_int, default=256)
    parser.add_argument(
        "--widths",
        type=stage.positive_int,
        nargs=5,
        default=[32, 32, 64, 128, 256],
        help="of the five levels of a BasicUNet (default: its own)",
    )
    parser.add_argument("--patients", type=stage.positive_int, default=2, help=f"of {SLICES} slices each")
    parser.add_argument("--batch-size", type=stage.positive_int, default=8)
    parser.add_argument("--rounds", type=stage.positive_int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    if importlib.util.find_spec("monai") is None:
        sys.exit("monai: is not installed (pip install monai)")
    device = training.pick_device(args.device)
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        words = ["--source", "phantom", "--patients", args.patients, "--size", args.size, "--slices", SLICES]
        prepare_dataset.main([str(word) for word in [*words, "--out", data]])
        split_dataset.main(["--data", name, "--fractions", "1", "0", "0"])
        load_pack(data, "train", args.size)  # built once, as for a training of many epochs
        context = multiprocessing.get_context("spawn")
        for _ in range(args.rounds):
            for what in WAYS:
                with ProcessPoolExecutor(1, mp_context=context) as alone:
                    job = alone.submit(measure, what, data, args.size, args.widths, args.batch_size, device)
                    found.setdefault(what, []).append(job.result())
    rows = [{"what": what, **_best(rounds)} for what, rounds in found.items()]
    for row in rows:
        row |= {f"{part}_times_monai": rows[0][f"{part}_s"] / row[f"{part}_s"] for part in ("epoch", "scan")}
    slices = args.patients * SLICES
    print(f"\n{slices} slices of {args.size} x {args.size} an epoch, {SLICES} a scan; widths {args.widths}")
    print(
        f"{'what':35} {'parameters':>10} {'epoch s':>8} {'x MONAI':>8} {'scan s':>7} {'x MONAI':>8} {'GB':>6}"
    )
    for row in rows:
        print(
            f"{row['what']:35} {row['parameters']:10,d} {row['epoch_s']:8.2f} "
            f"{row['epoch_times_monai']:8.2f} {row['scan_s']:7.3f} {row['scan_times_monai']:8.2f} "
            f"{row['memory_gb']:6.2f}"
        )
    print(f"\nGoal: at least as fast, {GOAL:g} times MONAI or more, in both.")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    manifest = {
        "device": machine,
        "torch": str(torch.__version__),
        "monai": importlib.metadata.version("monai"),
        "goal": GOAL,
    }
    settings = {name: getattr(args, name) for name in ("size", "widths", "patients", "batch_size")}
    stage.write_json(args.out / "benchmark_segmenters.json", manifest | settings | {"rows": rows})


def _best(rounds: list[dict]) -> dict:
    """The quickest epoch and the quickest reading, each of any round."""
    best = dict(min(rounds, key=lambda row: row["epoch_s"]))
    return best | {"scan_s": min(row["scan_s"] for row in rounds)}


if __name__ == "__main__":
    main()
