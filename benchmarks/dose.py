"""How fast low doses are made: at load time, through the projector, and beside what one would otherwise use.

    OMP_NUM_THREADS=1 python benchmarks/dose.py
    python benchmarks/dose.py --device cuda --batch-size 32

(1) add_noise on crops and whole slices beside NumPy's Poisson numbers for the same pixels. (2) project and
fbp of a noise-free phantom slice of 512 x 512 beside scikit-image's radon and iradon: the same views,
detectors and filter, and the error of both against the slice. (3) noise_images and simulate_projection by
image size. The best of --rounds runs counts; on the CPU, with one thread, in processor time, so that others
at work on the machine spoil little. With --device cuda our functions run there, by the clock. The bytes that
the sums over table rows gather are given as a share of the speed at which memory is copied, which caches can
exceed. Prints a table and writes results/benchmark_dose.json."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from skimage.transform import iradon, radon

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stage
from anatomy import brain_mask
from dose import SCANNERS, NoiseImages, add_noise, noise_images, simulate_projection, to_attenuation, to_hu
from phantom import FOV_MM, Phantom, generate_phantom
from tomography import Geometry, fbp, project

SIZES = (128, 256, 512)
SLICE = 512
VIEWS = 984  # of the head presets
CROPS, CROP = 64, 128  # a training batch of crops, and pixels a side
WHOLE = 4  # whole slices: as many pixels
REALISATIONS = 2  # of the quantum noise of each slice in the cache
DOSE = 0.1
PHOTONS_OF_WATER = 1562 * 4.0  # dose.simulate_calibrated at lambda 4: a tenth of the routine dose
SCANNER = SCANNERS["head-soft"]
COPIED_BYTES = 2**30


def best_seconds(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Seconds of the fastest of some runs after a first one: of the processor, or of a GPU by the clock."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    work()
    seconds = []
    for _ in range(rounds):
        began = _now(clock, device)
        work()
        seconds.append(_now(clock, device) - began)
    return min(seconds)


def _now(clock: Callable[[], float], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def bench_load_time(rounds: int, device: torch.device) -> dict:
    """Mpixel/s of any dose from noise images, and of NumPy's Poisson numbers on the CPU."""
    rates, rng, cpu = {}, np.random.default_rng(0), torch.device("cpu")
    whole = head(SLICE)
    noise = noise_images(whole, [0], FOV_MM / SLICE, SCANNER, realisations=REALISATIONS)
    for count, size in ((CROPS, CROP), (WHOLE, SLICE)):
        middle = slice((SLICE - size) // 2, (SLICE + size) // 2)
        hu, *parts = (
            part[..., middle, middle].repeat(count, 1, 1, 1).to(device) for part in (whole, *noise[:3])
        )
        images = NoiseImages(*parts, noise.counts.repeat(count))
        doses, seeds, million = [DOSE] * count, list(range(count)), hu.numel() / 1e6
        expected = PHOTONS_OF_WATER * (1 + hu.cpu().numpy().astype(np.float64) / 1000).clip(0)
        ours = best_seconds(partial(add_noise, hu, images, doses, seeds), 5 * rounds, device)
        usual = best_seconds(partial(rng.poisson, expected), rounds, cpu)
        rates[str(size)] = {
            "add_noise": million / ours,
            "numpy_poisson": million / usual,
            "ratio": usual / ours,
        }
    return rates


def head(size: int) -> torch.Tensor:
    """(1, 1, size, size) HU of a slice through the lateral ventricles of a noise-free phantom."""
    return torch.from_numpy(_phantom(size).truth[3:4]).float()[:, None]


def _phantom(size: int) -> Phantom:
    return generate_phantom(3, size=size, slices=5, noise_hu=0.0)


def rows_summed(geometry: Geometry, count: int, size: int) -> tuple[int, int]:
    """Table rows that project and backproject sum for a batch of square slices, see tomography."""
    base, half = geometry.views // geometry.turns, 2 if geometry.parallel else 1
    return base * -(-count // half) * 2 * size, size * -(-size // half) * 2 * base


def bench_projector(rounds: int, device: torch.device, batch: int, copy_bytes_per_s: float) -> dict:
    """Seconds and error of projecting and reconstructing a slice, beside scikit-image."""
    phantom = _phantom(SLICE)
    hu, brain = phantom.truth[3].astype(np.float64), brain_mask(phantom.truth, phantom.spacing_mm)[3]
    mu, pixel_mm = to_attenuation(head(SLICE)[0], SCANNER), phantom.spacing_mm[1]
    geometry = Geometry(VIEWS, pixel_mm, detectors=SLICE)
    degrees = np.linspace(0, 180, VIEWS, endpoint=False)
    image = mu[0].double().numpy()

    def usual() -> np.ndarray:
        return iradon(radon(image, degrees, circle=True), degrees, filter_name="ramp", circle=True)

    def ours(slices: torch.Tensor, scan: Geometry) -> torch.Tensor:
        return fbp(project(slices, pixel_mm, scan), scan, (SLICE, SLICE), pixel_mm, "ram-lak")

    def error(made: np.ndarray) -> float:
        return float(np.sqrt(np.mean((to_hu(torch.from_numpy(made), SCANNER).numpy() - hu)[brain] ** 2)))

    one, many = mu.to(device), mu.repeat(batch, 1, 1).to(device)
    in_batch = f"ours, a slice of {batch}"
    seconds = {
        "scikit-image": best_seconds(usual, 1, torch.device("cpu")),
        "ours, one slice": best_seconds(partial(ours, one, geometry), rounds, device),
        in_batch: best_seconds(partial(ours, many, geometry), rounds, device) / batch,
        "ours, one slice, the rays of head-soft": best_seconds(
            partial(ours, one, SCANNER.geometry), rounds, device
        ),
    }
    # of one place: 4 turns of every slice in float32, and the place and its weight
    gathered = sum(rows_summed(geometry, SLICE, SLICE)) * (4 * 4 * batch + 8)
    reached = gathered / (batch * seconds[in_batch])
    return {
        "seconds_a_slice": seconds,
        "rmse_hu_in_brain": {
            "scikit-image": error(usual()),
            "ours": error(ours(one, geometry)[0].double().cpu().numpy()),
        },
        "ratio_one_slice": seconds["scikit-image"] / seconds["ours, one slice"],
        "ratio_batch": seconds["scikit-image"] / seconds[in_batch],
        "batch": batch,
        "gathered_bytes_per_s": reached,
        "share_of_copy_speed": reached / copy_bytes_per_s,
    }


def bench_noise(rounds: int, device: torch.device, batch: int) -> dict:
    """Slices per second of noise_images and simulate_projection, by size, alone and in batches."""
    rates = {}
    for size in SIZES:
        for count in (1, batch):
            hu, seeds, pixel_mm = head(size).repeat(count, 1, 1, 1).to(device), range(count), FOV_MM / size
            images = partial(noise_images, hu, seeds, pixel_mm, SCANNER, realisations=REALISATIONS)
            low = partial(simulate_projection, hu, [DOSE] * count, seeds, pixel_mm, scanner=SCANNER)
            for name, work in (("noise_images", images), ("simulate_projection", low)):
                rates[f"{name}, {size} x {size}, batch of {count}"] = count / best_seconds(
                    work, rounds, device
                )
    rays = VIEWS * SCANNER.geometry.covering(SLICE, SLICE, FOV_MM / SLICE)
    rates["normal numbers for a slice of 512, on the CPU"] = 1 / best_seconds(
        partial(torch.randn, rays), rounds, torch.device("cpu")
    )
    return rates


def copy_speed(device: torch.device, rounds: int) -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    source = torch.zeros(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / best_seconds(lambda: target.copy_(source), rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=stage.positive_int, default=8)
    parser.add_argument("--rounds", type=stage.positive_int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is here (use --device cpu)")
    torch.set_num_threads(1)
    copied = copy_speed(device, args.rounds)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, one thread",
        "torch": torch.__version__,
        "copy_bytes_per_s": copied,
        "load_time_mpixel_per_s": bench_load_time(args.rounds, device),
        "projector": bench_projector(args.rounds, device, args.batch_size, copied),
        "noise_slices_per_s": bench_noise(args.rounds, device, args.batch_size),
    }
    for size, rates in result["load_time_mpixel_per_s"].items():
        for name in ("add_noise", "numpy_poisson"):
            print(f"{name + ', ' + size + ' x ' + size:<58} {rates[name]:10.0f} Mpixel/s")
        print(f"{'ratio':<58} {rates['ratio']:10.1f}")
    projector = result["projector"]
    for name, value in projector["seconds_a_slice"].items():
        print(f"{'project and fbp: ' + name:<58} {value:10.3f} s")
    for name, value in projector["rmse_hu_in_brain"].items():
        print(f"{'RMSE in the brain: ' + name:<58} {value:10.2f} HU")
    for name in ("ratio_one_slice", "ratio_batch", "share_of_copy_speed"):
        print(f"{name:<58} {projector[name]:10.2f}")
    for name, value in result["noise_slices_per_s"].items():
        print(f"{name:<58} {value:10.1f} /s")
    stage.write_json(args.out / "benchmark_dose.json", result)


if __name__ == "__main__":
    main()
