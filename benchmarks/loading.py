"""How fast slices come in: headers, preparing, the packed cache, and what a user would otherwise do.

    python benchmarks/loading.py --series 6 --slices 40

Writes a phantom as 512 x 512 DICOM files into a temporary folder, then measures on one core, in one run:
headers indexed, series prepared, cache built at 256 x 256, raw and compressed, and warm random reads from it
beside (a) DICOM decoded, shown through three windows and resized for every read, and (b) one compressed npz a
slice, resized. Prints a table, by the clock and by the processor time of this process and its workers, which
tells about the same on an idle machine and more on a busy one; and writes results/benchmark_loading.json."""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import prepare_dataset
import split_dataset
import stage
from dataset import load_pack, read_slices, series_folders, window_hu
from phantom import generate_phantom
from scans import READERS

SIZE, TRAINING_SIZE = 512, 256
WINDOWS = ((40, 80), (80, 200), (40, 380))  # centre, width: what the field feeds its networks
RSNA_SLICES = 752_803


def write_dicom(folder: Path, series: int, slices: int) -> None:
    """Phantoms as uncompressed CT files, with the tags that a series needs."""
    volume = generate_phantom(0, size=SIZE, slices=slices).hu
    for number in range(series):
        uid = generate_uid()
        for index, image in enumerate(volume):
            file = Dataset()
            file.file_meta = FileMetaDataset()
            file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
            file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            file.Modality, file.PatientID, file.StudyInstanceUID, file.SeriesInstanceUID = (
                "CT",
                str(number),
                uid,
                uid + ".1",
            )
            file.ImagePositionPatient = [-120, -120, 5.0 * index]
            file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            file.PixelSpacing = [0.46, 0.46]
            file.Rows = file.Columns = SIZE
            file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
            file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
            file.RescaleSlope, file.RescaleIntercept = 1, 0
            file.PixelData = np.roll(image, number, axis=1).astype("<i2").tobytes()
            file.save_as(folder / f"{number}_{index}.dcm", enforce_file_format=True)


class Rate(NamedTuple):
    """Slices per second."""

    clock: float
    processor: float


def processor_s() -> float:
    """Processor time of this process and of the workers that have ended."""
    whose = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in whose)


def once(work, count: int) -> Rate:
    """How many a second, if work() does count of them."""
    began, used = time.perf_counter(), processor_s()
    work()
    return Rate(count / (time.perf_counter() - began), count / (processor_s() - used))


def rate(work, count: int) -> Rate:
    """How often work(i) can be called in a second, for i in range(count)."""

    def all_of_them() -> None:
        for index in range(count):
            work(index)

    return once(all_of_them, count)


def resized(image: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(image.astype(np.float32))[None, None]
    return F.interpolate(tensor, (TRAINING_SIZE, TRAINING_SIZE), mode="bilinear", antialias=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", type=stage.positive_int, default=8)
    parser.add_argument("--slices", type=stage.positive_int, default=40)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    total = args.series * args.slices
    with tempfile.TemporaryDirectory() as name:
        raw, data = Path(name) / "raw", Path(name) / "data"
        raw.mkdir()
        write_dicom(raw, args.series, args.slices)
        rows = {"headers indexed": once(lambda: READERS["dicom"].discover(raw), total)}
        prepare = ["--source", "dicom", "--input", str(raw), "--out", str(data), "--workers", "1"]
        rows["series prepared, 512 x 512"] = once(lambda: prepare_dataset.main(prepare), total)
        split_dataset.main(["--data", str(data)])
        train = sum(1 for folder in series_folders(data, "train") for _ in folder.glob("*/image.npz"))
        order = rng.integers(0, train, 20_000)
        reads, bytes_a_slice = {}, {}
        for form, compress in (("raw", False), ("compressed", True)):
            build = functools.partial(load_pack, data, "train", TRAINING_SIZE, compress)
            rows[f"{form} cache built, 256 x 256"] = once(build, train)
            image = build().image
            reads[form] = rate(lambda index, image=image: image[order[index]].astype(np.float32), len(order))
            rows[f"warm random reads of the {form} cache"] = reads[form]
            files = (data / "cache" / f"train-{TRAINING_SIZE}").glob("image.*")
            bytes_a_slice[form] = sum(path.stat().st_size for path in files) / train
        files = sorted(raw.iterdir())
        slices = [path for folder in series_folders(data, "train") for path in folder.glob("*/image.npz")]

        def usual(index: int) -> None:
            dataset = pydicom.dcmread(files[index % len(files)])
            hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            torch.cat([resized(window_hu(hu, *window)) for window in WINDOWS])

        def npz(index: int) -> None:
            with np.load(slices[index % len(slices)]) as archive:
                resized(archive["arr_0"])

        rows["(a) DICOM, three windows, resized"] = rate(usual, 200)
        rows["(b) one npz a slice, resized"] = rate(npz, 200)
        folder = series_folders(data, "train")[0]
        rows["a whole series of npz, as prepared"] = once(
            lambda: read_slices(folder, "image", args.slices), args.slices
        )
    result = {
        "slices_per_s": {what: found.clock for what, found in rows.items()},
        "slices_per_processor_s": {what: found.processor for what, found in rows.items()},
    }
    for form, warm in reads.items():
        result |= {
            f"{form}_over_a": warm.processor / rows["(a) DICOM, three windows, resized"].processor,
            f"{form}_over_b": warm.processor / rows["(b) one npz a slice, resized"].processor,
            f"{form}_gb_for_rsna": bytes_a_slice[form] * RSNA_SLICES / 1e9,
        }
    result |= {
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "worker_peak_memory_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
        "slices": total,
    }
    print(f"{'slices a second':<42} {'clock':>10} {'processor':>10}")
    for what, found in rows.items():
        print(f"{what:<42} {found.clock:10.0f} {found.processor:10.0f}")
    for what, value in result.items():
        if isinstance(value, float):
            print(f"{what:<42} {value:10.2f}")
    stage.write_json(args.out / "benchmark_loading.json", result)


if __name__ == "__main__":
    main()
