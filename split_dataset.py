"""Stage 2: split the prepared series by patient into train, val and test.

Reads:   <data>/{unsplit,train,val,test}/<series_uid>/metadata.json
Writes:  <data>/splits.json, and moves every series into its split's folder; with --cache <data>/cache/
Example: python split_dataset.py --fractions 0.7 0.15 0.15 --seed 42
         python split_dataset.py --cache 256 --compress-cache

Run it again after adding data: with the same seed and fractions patients stay where they are and new ones are
added; another seed or other fractions split anew. Patients who share an identical image go together. What
arrives split from its data set stays as it is, and the fractions hold for the other patients.

The stages that train build the packed cache that they read when they first need it, raw. --cache builds it
now; --compress-cache without loss at about a third of the size, for a fraction of the speed of reading."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import stage
from dataset import SPLITS, all_series, describe_labels, load_pack, read_metadata

FORMAT = 1


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    parser.add_argument(
        "--fractions",
        type=stage.fraction,
        nargs=3,
        default=(0.7, 0.15, 0.15),
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the patients (default: 0.7 0.15 0.15)",
    )
    parser.add_argument("--seed", type=stage.natural_int, default=42, help="which split (default: 42)")
    parser.add_argument(
        "--cache",
        type=stage.positive_int,
        metavar="SIZE",
        help="build the packed cache of every split now, SIZE pixels a side (default: when it is needed)",
    )
    parser.add_argument("--compress-cache", action="store_true", help="compress the cache without loss")
    return parser


def group_patients(series: Sequence[dict]) -> list[list[str]]:
    """Groups of patients that must stay together because they share a series or an identical image.

    Returns sorted lists of patient ids, themselves sorted. Slices of one grey value are nobody's own."""
    parent = {metadata["patient_id"]: metadata["patient_id"] for metadata in series}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            patient = parent[patient]
        return patient

    first: dict[str, str] = {}
    for metadata in series:
        for entry in metadata["slices"]:
            if entry["constant"]:
                continue
            owner = first.setdefault(entry["sha256"]["image"], metadata["patient_id"])
            one, two = sorted((root(owner), root(metadata["patient_id"])))
            parent[two] = one
    groups = defaultdict(list)
    for patient in parent:
        groups[root(patient)].append(patient)
    return sorted(sorted(group) for group in groups.values())


def stratify(groups: list[list[str]], series: Sequence[dict]) -> dict[tuple, list[list[str]]]:
    """Sort groups by what their scans show: haemorrhage and ischemia, each 1, 0 or -1 for unknown."""
    labels = defaultdict(list)
    for metadata in series:
        labels[metadata["patient_id"]].append(metadata["labels"])
    strata = defaultdict(list)
    for group in groups:
        own = [entry for patient in group for entry in labels[patient]]
        found = [{entry.get(name) for entry in own} for name in ("any", "ischemia")]
        strata[tuple(1 if 1 in values else 0 if 0 in values else -1 for values in found)].append(group)
    return strata


def assign(
    strata: dict[tuple, list[list[str]]], fractions: Sequence[float], seed: int, known: dict[str, str]
) -> dict[str, str]:
    """Patient -> split. Groups are shuffled within their stratum and dealt to whichever split lags most.

    strata: stratum -> groups of patients. known: patients that already have their place."""
    rng = np.random.default_rng(seed)
    places: dict[str, str] = {}
    wanted, given = np.zeros(3), np.zeros(3)
    for stratum in sorted(strata):
        groups = strata[stratum]
        for number in rng.permutation(len(groups)):
            group = groups[number]
            homes = [known[patient] for patient in group if patient in known]
            wanted += np.array(fractions) * len(group)
            split = SPLITS.index(homes[0]) if homes else int(np.argmax(wanted - given))
            given[split] += len(group)
            places.update(dict.fromkeys(group, SPLITS[split]))
    return places


def given_places(groups: list[list[str]], series: Sequence[dict]) -> dict[str, str]:
    """Patient -> split, for every group of patients that a data set brought in a split of its own.

    Raises InputError if a patient, or patients with an identical image, came in two of them."""
    brought = defaultdict(dict)
    for metadata in series:
        if metadata["split"]:
            brought[metadata["patient_id"]][metadata["split"]] = metadata["series_uid"]
    places: dict[str, str] = {}
    for group in groups:
        found = {split: uid for patient in group for split, uid in brought[patient].items()}
        if len(found) > 1:
            where = " and in ".join(f"{split} (series {uid})" for split, uid in sorted(found.items()))
            raise stage.InputError(
                f"patient {group[0]}: its data set has it, or an identical image, in {where} "
                "(delete all but one of these series folders)"
            )
        for split in found:
            places.update(dict.fromkeys(group, split))
    return places


def plan_split(data: Path, series: Sequence[dict], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Patient -> split, written to splits.json. Raises InputError if a split would be empty."""
    path = data / "splits.json"
    old = stage.read_json(path, "delete it and run again") if path.exists() else {}
    same = (old.get("seed"), old.get("fractions")) == (seed, list(fractions))
    groups = group_patients(series)
    given = given_places(groups, series)
    free = [group for group in groups if group[0] not in given]
    places = given | assign(stratify(free, series), fractions, seed, old["patients"] if same else {})
    empty = [
        split
        for split, share in zip(SPLITS, fractions, strict=True)
        if share and split not in places.values()
    ]
    if empty and free:  # a set that arrives whole as test may stay so
        raise stage.InputError(
            f"{data}: {len(places)} patients are too few, nothing is left for {' and '.join(empty)} "
            "(prepare more, or other --fractions)"
        )
    digest = hashlib.sha256(json.dumps(places, sort_keys=True).encode()).hexdigest()
    new = {"format": FORMAT, "seed": seed, "fractions": list(fractions), "hash": digest, "patients": places}
    if new != old:
        stage.write_json(path, new)
    return places


def check(sides: dict[str, list[dict]]) -> None:
    """Raise StageError if a patient or an identical image stands on two sides. sides: split -> metadata."""
    side_of: dict[str, str] = {}
    for split, series in sides.items():
        for metadata in series:
            keys = {entry["sha256"]["image"] for entry in metadata["slices"] if not entry["constant"]}
            for key in (metadata["patient_id"], *keys):
                if side_of.setdefault(key, split) != split:
                    raise stage.StageError(
                        f"patient {metadata['patient_id']}, or an image of series {metadata['series_uid']}, "
                        f"is in {side_of[key]} and in {split} (run split_dataset.py again)"
                    )


def build_cache(data: Path, splits: Sequence[str], size: int, compress: bool) -> None:
    """Build the packed cache of each split and say what it takes."""
    for split in splits:
        pack = load_pack(data, split, size, compress)
        folder = data / "cache" / f"{split}-{size}"
        used = sum(path.stat().st_size for path in folder.iterdir())
        form = "compressed" if pack.compressed else "raw"
        stage.say(f"{folder}: {len(pack)} slices of {size} x {size}, {form}, {used / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.compress_cache and args.cache is None:
        raise stage.InputError("--compress-cache: there is nothing to compress (give --cache SIZE as well)")
    fractions = [float(value) for value in args.fractions]
    if abs(sum(fractions) - 1) > 1e-6:
        raise stage.InputError(f"--fractions: sum to {sum(fractions):g}, must sum to 1")
    if not args.data.is_dir():
        raise stage.InputError(f"{args.data}: no such folder (run prepare_dataset.py first)")
    with stage.lock(args.data / ".lock"):
        homes = all_series(args.data)
        if not homes:
            raise stage.InputError(f"{args.data}: no prepared series (run prepare_dataset.py first)")
        metadata = {folder: read_metadata(folder) for folder in homes}
        places = plan_split(args.data, list(metadata.values()), fractions, args.seed)
        sides = {split: [] for split in SPLITS}
        for folder, home in homes.items():  # a kill in between is mended by the next run
            split = places[metadata[folder]["patient_id"]]
            sides[split].append(metadata[folder])
            if split != home:
                (args.data / split).mkdir(exist_ok=True)
                folder.rename(args.data / split / folder.name)
        check(sides)
    for split, series in sides.items():
        counts = describe_labels(series)
        patients = len({entry["patient_id"] for entry in series})
        slices = sum(len(entry["slices"]) for entry in series)
        labels = ", ".join(f"{name} {scans}" for name, (scans, _) in counts.items() if scans)
        stage.say(f"{split:<5} {patients:4d} patients {len(series):4d} series {slices:6d} slices  {labels}")
    if args.cache is not None:
        build_cache(args.data, [split for split in SPLITS if sides[split]], args.cache, args.compress_cache)


if __name__ == "__main__":
    stage.run(main)
