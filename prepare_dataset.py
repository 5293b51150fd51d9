"""Stage 1: turn raw scans, or synthetic ones, into the prepared layout in HU.

Reads:   --input, a folder in the layout of --source (dicom: any, or a zip); nothing for --source phantom
Writes:  <out>/unsplit/<series_uid>/, <out>/rejected.csv
Example: python prepare_dataset.py --source phantom --patients 120 --size 128 --slices 24
         python prepare_dataset.py --source dicom --input /data/head_ct"""

from __future__ import annotations

import csv
import inspect
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import stage
from dataset import all_series, describe_labels, read_metadata, write_scan
from scans import READERS, read_scan
from volumes import EXPECTED_CODES, Job, Rejected, ScanError

PHANTOM_DEFAULTS = {"patients": 100, "size": 128, "slices": 24, "seed": 42}


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--source", required=True, choices=sorted(READERS), help="what kind of data to read")
    parser.add_argument("--input", type=Path, help="folder with the raw files (all sources but phantom)")
    parser.add_argument("--out", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    group = parser.add_argument_group("phantom")
    group.add_argument("--patients", type=stage.positive_int, help="synthetic patients (default: 100)")
    group.add_argument("--size", type=stage.positive_int, help="matrix, pixels a side (default: 128)")
    group.add_argument("--slices", type=stage.positive_int, help="slices a scan (default: 24)")
    group.add_argument("--seed", type=stage.natural_int, help="which patients (default: 42)")
    parser.add_argument("--workers", type=stage.positive_int, default=2, help="processes (default: 2)")
    parser.add_argument("--limit", type=stage.positive_int, help="only the first so many series, for a try")
    parser.add_argument(
        "--assume-hu",
        action="store_true",
        help="take values that do not look like HU as HU, and record it (default: such series are left out)",
    )
    parser.add_argument(
        "--assume-window",
        type=float,
        nargs=2,
        metavar=("CENTRE", "WIDTH"),
        help="take 8-bit pictures as HU of this window, e.g. 40 80, and record it (default: flag them, "
        "and refused where HU are needed)",
    )
    parser.add_argument(
        "--max-reject",
        type=stage.fraction,
        default=0.01,
        help="share of broken cases above which the stage fails with exit code 3 (default: 0.01)",
    )
    return parser


def reader_options(args) -> dict:
    """The options of the chosen source. Raises InputError for one that belongs to another source."""
    if args.assume_window is not None and not args.assume_window[1] > 0:
        raise stage.InputError(f"--assume-window: width {args.assume_window[1]:g} must be positive")
    given = {name: getattr(args, name) for name in PHANTOM_DEFAULTS if getattr(args, name) is not None}
    if args.source == "phantom":
        for option in ("assume_hu", "assume_window"):
            if getattr(args, option):
                words = option.replace("_", "-")
                raise stage.InputError(f"--{words}: --source phantom is in HU (leave it out)")
        if args.input is not None:
            raise stage.InputError("--input: --source phantom makes its own data (leave it out)")
        return PHANTOM_DEFAULTS | given
    if given:
        raise stage.InputError(f"--{next(iter(given))}: only for --source phantom (leave it out)")
    if args.input is None:
        raise stage.InputError(f"--input: --source {args.source} needs the folder with the raw files")
    is_zip = args.source == "dicom" and args.input.suffix.lower() == ".zip" and args.input.is_file()
    if not (args.input.is_dir() or is_zip):
        raise stage.InputError(f"{args.input}: no such folder (--input needs one with CT images)")
    options = {"input_dir": args.input}
    if "workers" in inspect.signature(READERS[args.source].discover).parameters:
        options["workers"] = args.workers  # this reader can share its headers among processes
    return options


def space_needed(args, options: dict, share: float) -> int:
    """About the bytes that will be written: image, mask and truth of phantoms, else the size of the input.

    share: of the series found, how many are still to be prepared."""
    if args.source == "phantom":
        return int(options["patients"] * options["slices"] * options["size"] ** 2 * 5 * share)
    if args.input.is_file():
        return int(args.input.stat().st_size * share)
    return int(sum(path.lstat().st_size for path in args.input.rglob("*")) * share)


def _start_worker() -> None:
    stage.die_with_parent()
    torch.set_num_threads(1)  # the processes are the parallelism


def _prepare(job: Job, folder: Path) -> None:
    """One series, in a worker process."""
    write_scan(read_scan(job), folder)


def prepare(jobs: list[Job], folder: Path, workers: int) -> Iterator[Rejected]:
    """Write every job below folder; yield the series that could not be used.

    Raises StageError if a worker dies."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker) as pool:
        futures = {pool.submit(_prepare, job, folder): job for job in jobs}
        try:
            done = as_completed(futures)
            for future in stage.progress(done, desc="prepare", total=len(jobs), unit="series"):
                job = futures[future]
                try:
                    future.result()
                except ScanError as error:
                    yield Rejected(job.case, error.file, error.code, f"{error.what} ({error.fix})")
        except BrokenProcessPool:
            raise stage.StageError("a worker process died (out of memory? try --workers 1)") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_rejected(path: Path, rejected: list[Rejected]) -> None:
    """rejected.csv: case, file, code, reason; file names that are not UTF-8 are escaped."""
    with stage.atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(Rejected._fields)
        writer.writerows(sorted(rejected))


def summarise(out: Path, rejected: list[Rejected], new: int) -> None:
    """Print what is prepared now: series, slices, labels, repairs, and what was left out and why."""
    series = [read_metadata(folder) for folder in all_series(out)]
    slices = sum(len(metadata["slices"]) for metadata in series)
    patients = len({metadata["patient_id"] for metadata in series})
    stage.say(f"{out}: {len(series)} series of {patients} patients, {slices} slices ({new} series new)")
    for name, (scans, positive) in describe_labels(series).items():
        known = sum(metadata["labels"].get(name) is not None for metadata in series)
        if known:
            stage.say(f"  {name:<17} {scans:5d} of {known} scans, {positive:6d} slices")
    if not any(value is not None for metadata in series for value in metadata["labels"].values()):
        stage.say("  labels: none known")
    repairs = Counter(repair for m in series for entry in m["slices"] for repair in entry["repairs"])
    for repair, count in repairs.most_common(10):
        stage.say(f"  repaired or assumed in {count} slices: {repair}")
    for code, count in Counter(entry.code for entry in rejected).most_common():
        reason = next(entry.reason for entry in rejected if entry.code == code)
        stage.say(f"  left out: {count} x {code}, e.g. {reason}")
    if rejected:
        stage.say(f"  all of them: {out / 'rejected.csv'}")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    options = reader_options(args)
    unsplit = args.out / "unsplit"
    unsplit.mkdir(parents=True, exist_ok=True)
    with stage.lock(args.out / ".lock"):
        for leftover in unsplit.glob(".*.partial"):  # of a run that was killed
            shutil.rmtree(leftover)
        jobs, rejected = READERS[args.source].discover(**options)
        if not jobs:
            seen = f"{len(rejected)} files left out" if rejected else "it holds no files"
            example = f", e.g. {rejected[0].file}: {rejected[0].reason}" if rejected else ""
            raise stage.InputError(f"{args.input}: no usable series ({seen}{example})")
        window = None if args.assume_window is None else tuple(args.assume_window)
        jobs = [job._replace(assume_hu=args.assume_hu, assume_window=window) for job in jobs[: args.limit]]
        finished = {folder.name for folder in all_series(args.out)}
        waiting = [job for job in jobs if job.series_uid not in finished]
        stage.log.info("%d series found, %d already prepared", len(jobs), len(jobs) - len(waiting))
        if waiting:
            stage.require_space(args.out, space_needed(args, options, len(waiting) / len(jobs)))
            failed = list(prepare(waiting, unsplit, min(args.workers, len(waiting))))
            rejected += failed
        else:
            failed = []
        write_rejected(args.out / "rejected.csv", rejected)
        summarise(args.out, rejected, len(waiting) - len(failed))
    broken = sum(entry.code not in EXPECTED_CODES for entry in rejected)
    if broken > args.max_reject * (len(jobs) + broken):
        raise stage.StageError(
            f"{broken} broken cases, more than --max-reject {args.max_reject:g} of {len(jobs)} series "
            f"(see {args.out / 'rejected.csv'})",
            stage.EXIT_REJECTED,
        )


if __name__ == "__main__":
    stage.run(main)
