"""Denoisers trained alike and measured alike, on phantoms and on a real head that none of them has seen.

    OMP_NUM_THREADS=1 python benchmarks/denoisers.py
    OMP_NUM_THREADS=1 python benchmarks/denoisers.py --real HEAD_OF_DICOM_FILES
    python benchmarks/denoisers.py --size-of gpu --images 400000 --patients 400 --device cuda

Run it in the folder of the project. Each network learns from the same phantom patients, on crops of 128 x 128
with the projection model: once from the same number of images, once for the same wall time; the best on
validation also as one network a dose, and from as many images as these five together. What was trained or
measured is kept in --work, and a run that was stopped goes on where it was. Scored on test patients against
the noise-free truth (the real head: against the scan itself, which has its own noise) at doses that were
trained and at one that was not. Prints tables and writes results/benchmark_denoisers.json."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import anatomy
import checkpoints
import metrics
import stage
import training
from dataset import Pack, load_pack
from detectability import noise_power_spectrum, spectrum_distance
from inference import denoise, load_denoiser
from losses import LOSSES
from low_dose import LowDose
from models import CLASSICAL, PRESETS, build_model
from runs import peak_memory
from train_denoiser import STUDENT_ERRORS

DOSE_MODEL = "projection"
TRAINED = (0.7, 0.5, 0.25, 0.1, 0.05)
DOSES = (0.7, 0.5, 0.25, 0.15, 0.1, 0.05)  # 0.15 was never trained
SIZE, SLICES, CROP, BATCH = 256, 6, 128, 8
# best of three after 1,656 crops, by the RMSE on validation patients; students: one at which all kinds learn
LEARNING_RATES = {"unet": 4e-3, "nafnet": 4e-3, "redcnn": 1e-3, "student": 1e-3, "autoencoder": 1e-3}
STRENGTHS = (0.7, 1.0, 1.5, 2.5)  # of the classical ones: the best on validation is taken
NOISE_SEEDS = (1, 2)  # the second one only tells noise from error
TWICE = 4  # patients who are seen under both
EVERY = 3  # of a scan's slices one in so many: BM3D takes two seconds for each of them
WIDE_HU = (-1000.0, 1000.0)
BLOCK = 32  # pixels a side: blocks of brain in which the noise power spectrum is taken
BLOOD = range(1, 6)  # mask classes
INFARCT = 6


class Run(NamedTuple):
    """One training. of: the preset. images: crops that it learns from. target: what it is to give back.
    end: of its name. dose: the only one, if it has one. bias_weight: of train_denoiser.py."""

    of: str
    images: int
    target: str
    end: str = ""
    dose: float | None = None
    bias_weight: float | None = None

    @property
    def name(self) -> str:
        return ".".join(part for part in (self.of, self.target, self.end) if part not in ("", "clean"))


# ---------------------------------------------------------------- data and training


def stage_command(*words: object) -> None:
    """Run a stage of the pipeline as a user would. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=sys.stderr)


def prepare(work: Path, patients: int) -> Path:
    data = work / "dataset"
    if not (data / "splits.json").exists():
        options = ("--patients", patients, "--size", SIZE, "--slices", SLICES, "--seed", 42)
        stage_command("prepare_dataset.py", "--source", "phantom", *options, "--out", data)
        stage_command("split_dataset.py", "--data", data, "--fractions", 0.72, 0.11, 0.17)
    return data


def prepare_real(work: Path, head: Path) -> Path:
    data = work / "real"
    if not (data / "splits.json").exists():
        stage_command("prepare_dataset.py", "--source", "dicom", "--input", head.resolve(), "--out", data)
        stage_command("split_dataset.py", "--data", data, "--fractions", 0, 0, 1)
    return data


def train(run: Run, data: Path, models: Path, slices: int, loss: str, device: str) -> Path:
    """Train one network, or find it trained. slices: of the training patients."""
    path, model = models / f"{run.name}.pt", PRESETS[run.of][0]
    epochs = max(1, round(run.images / slices))
    options = ["--data", data, "--out", models, "--name", run.name, "--model", run.of, "--resume"]
    options += ["--target", run.target]
    options += ["--lr", LEARNING_RATES[model], "--crop", CROP, "--batch-size", BATCH, "--device", device]
    options += ["--dose-model", DOSE_MODEL, "--doses", *(TRAINED if run.dose is None else [run.dose])]
    if model == "student":  # each of its two networks learns from as many images as the others
        options += ["--lam-perc", 0, "--epochs-teacher", epochs, "--epochs-student", epochs]
        options += ["--loss", loss] if loss in STUDENT_ERRORS else []
    else:
        options += ["--epochs", epochs, "--loss", loss]
        options += [] if run.bias_weight is None else ["--bias-weight", run.bias_weight]
    stage_command("train_denoiser.py", *options)
    return path


def logged(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- cost


def giga_macs(model: torch.nn.Module, side: int = 512) -> float:
    """Multiply-adds for one slice of side x side, in 10^9."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, model.slices, side, side), torch.ones(1))
    return counter.get_total_flops() / 2e9


def cost(path: Path, device: torch.device) -> dict[str, float]:
    """Parameters, GMAC at 512 x 512, images/s of the training, slices/s at 512 x 512, peak memory in GB."""
    model, facts = load_denoiser(path, device)
    volume = np.full((2 if device.type == "cpu" else 32, 512, 512), 30, np.float32)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        denoise(model, volume, 10.0)
        times.append(time.perf_counter() - began)
    used = peak_memory(device)["memory_gb"]
    fresh = build_model(facts["model"]["name"], **facts["model"]["kwargs"])
    epochs = logged(path)
    return {
        "parameters": sum(value.numel() for value in fresh.parameters()),
        "gmac": giga_macs(fresh),
        "train_images_per_s": max(epoch["images_per_s"] for epoch in epochs),
        "train_memory_gb": max(epoch["memory_gb"] for epoch in epochs),
        "slices_per_s": len(volume) / min(times),
        "inference_memory_gb": used,
    }


def alone(function: Callable[..., dict], *arguments: object) -> dict:
    """A call in a process of its own, whose peak memory is that of the call."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# ---------------------------------------------------------------- quality


class Test:
    """Slices to be denoised at every dose, and what they are measured against."""

    def __init__(self, pack: Pack, every: int = 1):
        self.pack, self.rows = pack, np.arange(0, len(pack), every)
        source = LowDose(pack, DOSE_MODEL, DOSES)
        self.reference = (pack.image if pack.truth is None else pack.truth)[self.rows].astype(np.float32)
        self.brain = pack.masks(anatomy.brain_mask)[self.rows]
        self.classes = pack.masks(anatomy.tissue_classes)[self.rows]
        self.lesions = None if pack.mask is None else np.asarray(pack.mask[self.rows])
        self.patients = pack.patient_ids()[self.rows]
        self.series_of = pack.series_of[self.rows]
        self.twice = np.isin(self.patients, np.unique(self.patients)[:TWICE])
        self.levels, self.noisy, self.again = {}, {}, {}
        for dose in stage.progress(DOSES, desc="simulate"):
            same = [dose] * len(self.rows)
            self.levels[dose] = source.levels(self.rows, same)
            self.noisy[dose] = source.evaluation(self.rows, same, NOISE_SEEDS[0])
            some = self.rows[self.twice]
            self.again[dose] = source.evaluation(some, [dose] * len(some), NOISE_SEEDS[1])
        self.noise = {
            dose: (self.noisy[dose][self.twice] - self.again[dose]) / math.sqrt(2) for dose in DOSES
        }


Apply = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (noisy, levels, series) -> denoised


def quality(test: Test, apply: Apply, dose: float) -> dict[str, float]:
    """The figures of one denoiser at one dose; means over patients where they are of images."""
    noisy, levels, twice = test.noisy[dose], test.levels[dose], test.twice
    output = apply(noisy, levels, test.series_of)
    again = apply(test.again[dose], levels[twice], test.series_of[twice])
    found = metrics.image_quality(output, test.reference, test.brain, test.patients)
    wide = []
    for image, target in zip(output.clip(*WIDE_HU), test.reference.clip(*WIDE_HU), strict=True):
        span = {"data_range": WIDE_HU[1] - WIDE_HU[0]}
        ssim = structural_similarity(target, image, gaussian_weights=True, **span)
        wide.append((peak_signal_noise_ratio(target, image, **span), ssim))
    found["psnr_wide"], found["ssim_wide"] = np.mean(wide, axis=0).tolist()
    error = output - test.reference
    places = {name: test.classes == anatomy.TISSUES[name] for name in ("brain", "csf", "bone")}
    if test.lesions is not None:
        places |= {"blood": np.isin(test.lesions, BLOOD), "infarct": test.lesions == INFARCT}
    for name, place in places.items():
        found[f"bias_{name}"] = float(error[place].mean(dtype=np.float64)) if place.any() else math.nan
    noise, before, brain = (output[twice] - again) / math.sqrt(2), test.noise[dose], test.brain[twice]
    found["noise_ratio"] = float(noise[brain].std() / before[brain].std())
    pixel_mm = float(test.pack.pixel_mm.mean())
    spectra = (noise_power_spectrum(one, brain, pixel_mm, BLOCK) for one in (noise, before))
    found["spectrum"] = spectrum_distance(*spectra)
    return found


# ---------------------------------------------------------------- denoisers as functions


def network(path: Path, device: torch.device) -> Apply:
    model, _ = load_denoiser(path, device)
    return lambda noisy, levels, series: denoise(model, noisy, levels, series)


def per_dose(paths: dict[float, Path], device: torch.device, dose: float) -> Apply:
    """The network of a dose; at a dose without one, that of the nearest noise level."""
    nearest = min(paths, key=lambda known: abs(math.log(known / dose)))
    return network(paths[nearest], device)


def classical(name: str, strength: float) -> Apply:
    model = build_model(name, strength=strength)
    return lambda noisy, levels, series: denoise(model, noisy, levels, series)


def tuned_strength(name: str, pack: Pack) -> float:
    """Of STRENGTHS, that with the lowest RMSE in the brain on validation slices, each at a dose in turn."""
    rows = np.linspace(0, len(pack) - 1, 10).round().astype(int)
    source, turns = LowDose(pack, DOSE_MODEL, TRAINED), [TRAINED[n % len(TRAINED)] for n in range(10)]
    noisy, levels = source.evaluation(rows, turns, 0), source.levels(rows, turns)
    inside, truth = pack.masks(anatomy.brain_mask)[rows], pack.truth[rows]
    errors = {}
    for strength in STRENGTHS:
        output = classical(name, strength)(noisy, levels, np.arange(10))
        found = [metrics.rmse_hu(*three) for three in zip(output, truth, inside, strict=True)]
        errors[strength] = np.nanmean(found)  # NaN: a slice without brain
    return min(errors, key=errors.get)


# ---------------------------------------------------------------- the whole


def kept(path: Path, key: object, make: Callable[[], dict]) -> dict:
    """What make gave for this key, from an earlier run where there is one."""
    key = stage.plain(key)
    if path.exists() and (known := json.loads(path.read_text()))["key"] == key:
        return known["value"]
    value = make()
    stage.write_json(path, {"key": key, "value": value})
    return json.loads(path.read_text())["value"]


def runs_of(names: list[str], targets: list[str], images: int, seconds: float, models: Path) -> Iterator[Run]:
    """The trainings, one after the other: those for a wall time need the speed of those before."""
    for target in targets:
        for name in names:
            yield Run(name, images, target)
    for name in names:
        speed = max(epoch["images_per_s"] for epoch in logged(models / f"{Run(name, 0, targets[0]).name}.pt"))
        stages = 2 if PRESETS[name][0] == "student" else 1
        yield Run(name, round(seconds * speed / stages), targets[0], "time")


def table(rows: list[dict], columns: dict[str, str]) -> None:
    width = max(len(str(row["name"])) for row in rows)
    print(f"{'':{width}}  " + "  ".join(f"{title:>8}" for title in columns.values()))
    for row in rows:
        cells = "  ".join(f"{metrics.shown(row.get(key), 2):>8}" for key in columns)
        print(f"{row['name']:{width}}  {cells}")


QUALITY = {
    **{"rmse_hu": "RMSE HU", "psnr": "PSNR dB", "ssim": "SSIM"},
    **{"psnr_wide": "PSNR+-1k", "ssim_wide": "SSIM+-1k"},
    **{"bias_brain": "b.brain", "bias_csf": "b.CSF", "bias_bone": "b.bone", "bias_blood": "b.blood"},
    **{"bias_infarct": "b.infarc", "noise_ratio": "SD ratio", "spectrum": "spectrum"},
}
COST = {
    "parameters_m": "M param",
    "gmac": "GMAC512",
    "train_images_per_s": "train/s",
    "slices_per_s": "infer/s",
    "train_memory_gb": "train GB",
    "inference_memory_gb": "infer GB",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-of", choices=("cpu", "gpu"), default="cpu", help="presets (default: cpu)")
    parser.add_argument("--models", nargs="+", help="presets (default: all denoisers of that size)")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=("clean", "truth"),
        default=["truth"],
        help="what they learn: the scan, with its own noise, or the phantom without; the first of these also "
        "for the same wall time, and as one network a dose (default: truth)",
    )
    parser.add_argument(
        "--loss",
        choices=sorted(LOSSES),
        default="tissue-weighted",
        help="of students only one in HU, else their own (default: tissue-weighted)",
    )
    parser.add_argument(
        "--bias-weight",
        type=stage.positive_float,
        help="train the best from as many images as the five with this --bias-weight too (default: none)",
    )
    parser.add_argument("--images", type=stage.positive_int, default=4000, help="(default: 4000)")
    parser.add_argument(
        "--seconds", type=stage.positive_float, default=120, help="of the same wall time (default: 120)"
    )
    parser.add_argument("--patients", type=stage.positive_int, default=96, help="phantoms (default: 96)")
    parser.add_argument("--per-dose", help="preset of which one a dose is trained too (default: the best)")
    parser.add_argument("--classical", nargs="*", choices=sorted(CLASSICAL), default=sorted(CLASSICAL))
    parser.add_argument("--real", type=Path, help="folder of DICOM files of a head")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("results/benchmark_denoisers"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    device = training.pick_device(args.device)
    work, models = args.work.resolve(), args.work.resolve() / "models"
    wanted = ("unet", "nafnet", "redcnn", "student")  # a teacher alone is no denoiser
    names = args.models or [
        name for name, (model, _) in PRESETS.items() if model in wanted and name.endswith(f"-{args.size_of}")
    ]
    data = prepare(work, args.patients)
    count = len(load_pack(data, "train", SIZE))
    paths: dict[str, Path] = {}
    for run in runs_of(names, args.targets, args.images, args.seconds, models):
        paths[run.name] = train(run, data, models, count, args.loss, args.device)
    target = args.targets[0]
    first = {name: paths[Run(name, args.images, target).name] for name in names}
    best = args.per_dose or min(names, key=lambda name: min(e["rmse_hu"] for e in logged(first[name])))
    if args.bias_weight is not None and PRESETS[best][0] == "student":
        parser.error(
            f"--bias-weight: {best} has a loss of its own (leave it out, or name another --per-dose)"
        )
    own = {
        dose: train(
            Run(best, args.images, target, f"dose{dose:g}", dose), data, models, count, args.loss, args.device
        )
        for dose in TRAINED
    }
    together = Run(best, len(TRAINED) * args.images, target, "five")  # as many images as all of them
    paths[together.name] = train(together, data, models, count, args.loss, args.device)
    if args.bias_weight is not None:
        fair = together._replace(end=f"{together.end}.bias{args.bias_weight:g}", bias_weight=args.bias_weight)
        paths[fair.name] = train(fair, data, models, count, args.loss, args.device)
    strengths = {
        name: kept(
            work / f"strength-{name}.json",
            STRENGTHS,
            lambda name=name: {"strength": tuned_strength(name, load_pack(data, "val", SIZE))},
        )["strength"]
        for name in args.classical
    }
    costs = []
    for name in names:
        key = checkpoints.file_sha256(first[name])
        found = kept(work / f"cost-{name}.json", key, lambda name=name: alone(cost, first[name], device))
        costs.append({"name": name, "parameters_m": found["parameters"] / 1e6, **found})

    sets = {"phantoms": Test(load_pack(data, "test", SIZE), every=EVERY)}
    if args.real:
        sets["real head"] = Test(load_pack(prepare_real(work, args.real), "test", SIZE), every=EVERY)
    rows = []
    for where, test in sets.items():
        for dose in DOSES:
            applied: dict[str, tuple[object, Callable[[], Apply]]] = {
                "noisy input": ("noisy", lambda: lambda noisy, _levels, _series: noisy)
            }
            for name, path in paths.items():
                applied[name] = (checkpoints.file_sha256(path), lambda path=path: network(path, device))
            applied[f"{best}, one a dose"] = (
                [checkpoints.file_sha256(path) for path in own.values()],
                lambda dose=dose: per_dose(own, device, dose),
            )
            for name, strength in strengths.items():
                applied[name] = (strength, lambda name=name, strength=strength: classical(name, strength))
            for name, (key, make) in applied.items():
                stage.log.info("%s, dose %g, %s", where, dose, name)
                file = work / "quality" / f"{where} {name} {dose:g}.json".replace(" ", "_")
                found = kept(
                    file,
                    [test.pack.key, EVERY, key],
                    lambda make=make, test=test, dose=dose: quality(test, make(), dose),
                )
                rows.append({"where": where, "dose": dose, "name": name, **found})

    print(f"\n{args.images} crops of {CROP} x {CROP} each (.time: {args.seconds:g} s each); {device}")
    table(costs, COST)
    for where, test in sets.items():
        for dose in DOSES:
            patients = len(np.unique(test.patients))
            print(f"\n{where}: {patients} patients, {len(test.rows)} slices, dose {100 * dose:g} %")
            table([row for row in rows if (row["where"], row["dose"]) == (where, dose)], QUALITY)
    manifest = {
        "command": " ".join(["benchmarks/denoisers.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": checkpoints.versions(),
        "strengths": strengths,
        "best_on_validation": best,
        "learning_rates": LEARNING_RATES,
        "loss": args.loss,
        "cost": costs,
        "rows": rows,
    }
    stage.write_json(args.out / "benchmark_denoisers.json", manifest)


if __name__ == "__main__":
    main()
