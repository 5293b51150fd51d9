"""Stage 2b: one page about the prepared data, before hours of training.

Reads:   <data>/{unsplit,train,val,test}/, <data>/rejected.csv, <data>/cache/
Writes:  <out>/audit.json, audit.png, and with --contact-sheets <out>/sheets/<series_uid>.png
Example: python check_dataset.py
         python check_dataset.py --data dataset --contact-sheets 20

Prints counts, labels, geometry, repairs and rejects; then what is wrong. Exit code 1 if something would spoil
a result: a patient or an image on two sides, values that are not HU, labels that contradict their mask or
each other, the same patient under two sources, a packed cache that is not what was written."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np

import stage
from anatomy import LESION_CLASSES
from dataset import (
    BRAIN_WINDOW,
    LABELS,
    PACK_FORMAT,
    SPLITS,
    Pack,
    all_series,
    describe_labels,
    read_metadata,
    read_slices,
)
from display import radiological, to_grey
from volumes import ASSUMED_HU, ASSUMED_WINDOW, hu_fault

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 the backend has to be chosen first

SAMPLED_SERIES = 50  # whose pixels are read again: enough to find a whole source that is not in HU
SHOWN = 5  # examples of each finding
NOISE_HU = (0.5, 30.0)  # outside it a scan is smoothed beyond use, or is no routine scan
SPACING_MM = {"slice": (0.3, 30.0), "pixel": (0.15, 6.0)}  # clinical, down to the coarsest for a trial


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="(default: results)")
    parser.add_argument(
        "--contact-sheets", type=stage.natural_int, default=0, help="draw this many series (default: 0)"
    )
    return parser


def sides(series: Iterable[tuple[str, dict]]) -> list[str]:
    """Patients and identical images that stand in more than one split. series: (split, metadata)."""
    places, owners = defaultdict(set), {}
    for split, metadata in series:
        if split not in SPLITS:
            continue
        places[f"patient {metadata['patient_id']}"].add(split)
        for entry in metadata["slices"]:
            if not entry["constant"]:
                image = f"image {entry['sha256']['image'][:12]}"
                places[image].add(split)
                owners.setdefault(image, metadata["series_uid"])
    return [
        f"{what} ({owners.get(what, 'all its series')}) is in {' and '.join(sorted(found))}"
        for what, found in places.items()
        if len(found) > 1
    ]


def shared_patients(series: Iterable[tuple[str, dict]]) -> list[str]:
    """Patients whose scans came in through more than one source, as BHSD's may through RSNA."""
    sources = defaultdict(set)
    for _, metadata in series:
        sources[metadata["patient_id"]].add(metadata["source"])
    return [f"{who} is in {' and '.join(sorted(found))}" for who, found in sources.items() if len(found) > 1]


def contradictions(series: Iterable[tuple[str, dict]]) -> list[str]:
    """Slices whose labels and mask disagree. A lesion of unknown kind (255) may be any of them."""
    found = []
    for _, metadata in series:
        for entry in metadata["slices"]:
            if entry["mask_classes"] is None:
                continue
            classes = set(entry["mask_classes"]) - {0}
            where = f"{metadata['series_uid']} slice {entry['index']}"
            for value, name in enumerate(LESION_CLASSES, start=1):
                label = entry["labels"].get(name)
                if value in classes and label == 0:
                    found.append(f"{where}: mask shows {name}, label says no")
                elif label == 1 and value not in classes and 255 not in classes:
                    found.append(f"{where}: label says {name}, mask shows none")
            bleeds = classes & set(range(1, 6))
            if bleeds and entry["labels"].get("any") == 0:
                found.append(f"{where}: mask shows a haemorrhage, label any says no")
            elif 255 in classes and not any(value in (1, None) for value in entry["labels"].values()):
                found.append(f"{where}: mask shows a lesion, all labels say no")
    return found


def inconsistent_labels(series: Iterable[tuple[str, dict]]) -> list[str]:
    """Slices whose `any` is not the OR of the five kinds, scans whose labels are not of their slices."""
    found = []
    for _, metadata in series:
        own = [(f"slice {entry['index']}", entry["labels"]) for entry in metadata["slices"]]
        for where, labels in [("scan", metadata["labels"]), *own]:
            kinds = [labels.get(name) for name in LESION_CLASSES[:5]]
            if (1 in kinds and labels.get("any") == 0) or (kinds == [0] * 5 and labels.get("any") == 1):
                found.append(
                    f"{metadata['series_uid']} {where}: any is {labels.get('any')}, its kinds {kinds}"
                )
        for name in LABELS:
            values = {labels.get(name) for _, labels in own}
            if 1 in values and metadata["labels"].get(name) == 0:
                found.append(f"{metadata['series_uid']}: a slice has {name}, the scan has not")
    return found


def implausible(series: dict[Path, tuple[str, dict]]) -> list[str]:
    """Series with impossible spacing or noise, and, in a sample, values that are not HU.

    Values that somebody vouched for (prepare_dataset.py --assume-hu) stand among the repairs instead."""
    found = []
    for _, metadata in series.values():
        uid, spacing = metadata["series_uid"], metadata["spacing_mm"]
        if metadata["intensity"] != "hu":
            continue
        for what, value in (("slice", spacing[0]), ("pixel", spacing[1]), ("pixel", spacing[2])):
            low, high = SPACING_MM[what]
            if not low <= value <= high and not (what == "slice" and len(metadata["slices"]) == 1):
                found.append(f"{uid}: {what} spacing {value:g} mm")
        noise = metadata["noise_hu"]
        if noise is not None and not NOISE_HU[0] <= noise <= NOISE_HU[1]:
            found.append(f"{uid}: noise of {noise:.1f} HU in the brain")
    step = max(1, len(series) // SAMPLED_SERIES)
    sample = [
        (folder, metadata)
        for folder, (_, metadata) in list(series.items())[::step]
        if metadata["intensity"] == "hu"
        and not {ASSUMED_HU, ASSUMED_WINDOW} & set(metadata["slices"][0]["repairs"])
    ]
    for folder, metadata in stage.progress(sample, desc="values", unit="series"):
        fault = hu_fault(read_slices(folder, "image", len(metadata["slices"])))
        if fault:
            found.append(f"{metadata['series_uid']}: {fault}")
    return found


def damaged_packs(data: Path) -> list[str]:
    """Packed caches whose files are cut off or whose values have changed since they were written."""
    found = []
    for path in sorted((data / "cache").glob("[!.]*/index.json")):
        folder = path.parent
        try:
            if stage.read_json(path, f"delete {folder}").get("format") == PACK_FORMAT:  # others are rebuilt
                found += [f"{folder}: {what} has changed (delete it)" for what in Pack(folder).damaged()]
        except stage.InputError as error:
            found.append(str(error))
    return found


def read_rejected(data: Path) -> list[dict]:
    """The rows of rejected.csv, none where there is no such file."""
    path = data / "rejected.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summary(series: list[tuple[str, dict]], rejected: list[dict]) -> dict:
    """The counts of the page, as JSON types. rejected: of read_rejected."""
    scans = [metadata for _, metadata in series]
    counts = [len(metadata["slices"]) for metadata in scans]
    repairs = Counter(repair for m in scans for entry in m["slices"] for repair in entry["repairs"])
    return {
        "series": dict(Counter(f"{metadata['source']}, {split}" for split, metadata in series)),
        "patients": len({metadata["patient_id"] for metadata in scans}),
        "slices": sum(counts),
        "slices_per_scan": [min(counts), float(np.median(counts)), max(counts)],
        "labels": describe_labels(scans),
        "labels_known": {
            name: sum(metadata["labels"].get(name) is not None for metadata in scans) for name in LABELS
        },
        "with_mask": sum(metadata["has_mask"] for metadata in scans),
        "with_truth": sum(metadata["has_truth"] for metadata in scans),
        "windowed": sum(metadata["intensity"] != "hu" for metadata in scans),
        "pixel_mm": sorted({round(metadata["spacing_mm"][1], 3) for metadata in scans})[:20],
        "slice_mm": sorted({round(metadata["spacing_mm"][0], 2) for metadata in scans})[:20],
        "tilted": sum(abs(metadata["gantry_tilt_deg"]) > 1 for metadata in scans),
        "repairs": dict(repairs.most_common(20)),
        "rejected": dict(Counter(row["code"] for row in rejected)),
        "painted_files_left_out": [row["file"] for row in rejected if row["code"] == "painted"],
    }


def draw(path: Path, series: list[tuple[str, dict]]) -> None:
    """Label distribution per split, slices per scan, noise."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    splits = [split for split in ("unsplit", *SPLITS) if any(own == split for own, _ in series)]
    for offset, split in enumerate(splits):
        own = [metadata for place, metadata in series if place == split]
        shares = [scans / len(own) for scans, _ in describe_labels(own).values()]
        width = 0.8 / len(splits)
        axes[0].bar(
            np.arange(len(LABELS)) + offset * width, shares, width, label=f"{split} ({len(own)} scans)"
        )
    axes[0].set_xticks(np.arange(len(LABELS)) + 0.4, LABELS, rotation=30, ha="right")
    axes[0].set_ylabel("share of scans")
    axes[0].legend(fontsize=8)
    axes[1].hist([len(metadata["slices"]) for _, metadata in series], bins=30)
    axes[1].set(xlabel="slices a scan", ylabel="scans")
    noise = [metadata["noise_hu"] for _, metadata in series if metadata["noise_hu"] is not None]
    axes[2].hist(noise, bins=30)
    axes[2].set(xlabel="measured noise in the brain (HU)", ylabel="scans")
    with stage.atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def contact_sheet(path: Path, folder: Path, metadata: dict) -> None:
    """Every slice of a series in the brain window, the patient's right at the left."""
    volume = read_slices(folder, "image", len(metadata["slices"]))
    grey = [radiological(to_grey(image, *BRAIN_WINDOW), np.array(metadata["affine"])) for image in volume]
    columns = min(8, len(grey))
    grey += [np.zeros_like(grey[0])] * (-len(grey) % columns)
    rows = [np.hstack(grey[start : start + columns]) for start in range(0, len(grey), columns)]
    with stage.atomic_write(path, "wb") as file:
        plt.imsave(file, np.vstack(rows), cmap="gray", vmin=0, vmax=255, format="png")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if not args.data.is_dir():
        raise stage.InputError(f"{args.data}: no such folder (run prepare_dataset.py first)")
    folders = {folder: (split, read_metadata(folder)) for folder, split in all_series(args.data).items()}
    if not folders:
        raise stage.InputError(f"{args.data}: no prepared series (run prepare_dataset.py first)")
    series = list(folders.values())
    facts = summary(series, read_rejected(args.data))
    spoiling = {
        "on two sides of the split": sides(series),
        "the same patient under two sources": shared_patients(series),
        "values that are not HU, or odd geometry": implausible(folders),
        "labels and mask disagree": contradictions(series),
        "labels that contradict each other": inconsistent_labels(series),
        "damaged packed caches": damaged_packs(args.data),
    }
    spoiling = {what: found for what, found in spoiling.items() if found}
    stage.write_json(args.out / "audit.json", {"facts": facts, "spoiling": spoiling})
    draw(args.out / "audit.png", series)
    for folder, (_, metadata) in list(folders.items())[: args.contact_sheets]:
        contact_sheet(args.out / "sheets" / f"{metadata['series_uid']}.png", folder, metadata)
    for name, value in facts.items():
        stage.say(f"{name.replace('_', ' ')}: {_line(value)}")
    for path in (args.out / "audit.json", args.out / "audit.png"):
        stage.say(f"Wrote {path}")
    for what, found in spoiling.items():
        stage.say(f"SPOILS RESULTS: {what}, {len(found)} times")
        for line in found[:SHOWN]:
            stage.say(f"  {line}")
    if spoiling:
        raise stage.StageError(f"{args.data}: {', '.join(spoiling)} (see {args.out / 'audit.json'})")
    stage.say("Nothing found that would spoil a result.")


def _line(value) -> str:
    """A dict or list of the summary in one line; of file names their number and the first."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return f"{len(value)}, e.g. {value[0]}" if value else "none"
    if isinstance(value, list):
        return " / ".join(f"{entry:g}" for entry in value)
    return str(value)


if __name__ == "__main__":
    stage.run(main)
