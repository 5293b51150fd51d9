"""The public data sets that come as DICOM: RSNA 2019, CQ500, and Mayo's pairs of full and quarter dose.

Each reader adds to dicom_series what its data set says beside the pixels: labels, which series to take, which
two belong together. Layouts are those of the downloads; labels are taken by name, null where unknown."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anatomy import LESION_CLASSES
from dicom_headers import (
    Index,
    index_series,
    position_groups,
    positions_mm,
    series_jobs,
    split_stacks,
    walk,
)
from dicom_series import SeriesPixels, read_pixels, scan_of
from volumes import (
    ASSUMED_HU,
    LABEL_NAMES,
    Job,
    Reader,
    Rejected,
    Scan,
    ScanError,
    pseudonym,
    shown,
    unknown_labels,
)

HEMORRHAGES = LESION_CLASSES[:5]
RSNA_LABELS = (*HEMORRHAGES, "any")
Labels = dict[str, int | None]


def _require(path: Path, fix: str) -> Path:
    if not path.exists():
        raise ScanError(path, "not found", fix, "missing")
    return path


def _counted(file: Path, code: str, names: Sequence[str], what: str, fix: str) -> list[Rejected]:
    """One line for many of a kind, which names the first three; none for none."""
    if not names:
        return []
    examples = ", ".join(shown(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return [Rejected(shown(file.name), shown(file), code, f"{len(names)} {what}: {examples} ({fix})")]


# ---------------------------------------------------------------- RSNA 2019

RSNA_FOLDER, RSNA_CSV = "stage_2_train", "stage_2_train.csv"
RSNA_ROOT = "rsna-intracranial-hemorrhage-detection"  # what Kaggle's archive calls it
UNKNOWN = (1 << len(RSNA_LABELS)) - 1 << len(RSNA_LABELS)  # packed: all bits of unknown, none positive
MAX_UNLABELLED = 0.01  # share of images; more than that is the wrong table, not a few lost rows


class RsnaTable(NamedTuple):
    """The labels of each image, packed: three quarters of a million dicts would take a gigabyte."""

    packed: dict[str, int]  # image -> unknown << 6 | positive, each a set of bits in RSNA_LABELS' order
    notes: list[Rejected]  # what was wrong with the table


def unpack_labels(packed: int) -> Labels:
    """The labels of an image by name."""
    unknown = packed >> len(RSNA_LABELS)
    places = enumerate(RSNA_LABELS)
    return unknown_labels() | {n: None if unknown >> i & 1 else packed >> i & 1 for i, n in places}


def read_rsna_labels(path: Path) -> RsnaTable:
    """stage_2_train.csv: `ID,Label` with ID = `ID_<hex>_<subtype>`, one row for each image and subtype.

    A row that repeats another is dropped, rows that disagree make that label unknown, and a slice whose `any`
    is not the union of its subtypes has none that can be trusted; all of them are counted in the notes.
    Raises ScanError if the table has other columns."""
    count = len(RSNA_LABELS)
    place_of = {name: place for place, name in enumerate(RSNA_LABELS)}
    packed: dict[str, int] = {}
    repeated, unreadable, conflicts = [], [], []
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        if not {"ID", "Label"} <= set(header):
            fix = "give the table of the data set"
            raise ScanError(
                path, f"its columns are {', '.join(header) or 'none'}, not ID, Label", fix, "table"
            )
        id_column, label_column, columns = header.index("ID"), header.index("Label"), len(header)
        for row in rows:
            if len(row) != columns:
                if row:
                    unreadable.append(",".join(row))
                continue
            image, _, name = row[id_column].strip().rpartition("_")
            place, label = place_of.get(name), row[label_column].strip()
            if place is None or label not in ("0", "1"):
                unreadable.append(",".join(row))
                continue
            state = packed.get(image, UNKNOWN)
            if state >> count + place & 1:
                packed[image] = state ^ 1 << count + place | (label == "1") << place
            elif state >> place & 1 == (label == "1"):
                repeated.append(row[id_column])
            else:
                conflicts.append((image, place))
    for image, place in conflicts:
        packed[image] |= 1 << count + place
    any_bit = 1 << RSNA_LABELS.index("any")
    mismatched = [
        image
        for image, state in packed.items()
        if not state & UNKNOWN and (state & any_bit > 0) != (state & ~any_bit > 0)
    ]
    packed |= dict.fromkeys(mismatched, UNKNOWN)
    disputed = [f"{image}_{RSNA_LABELS[place]}" for image, place in dict.fromkeys(conflicts)]
    notes = [
        *_counted(path, "duplicate_row", repeated, "rows repeat an earlier one", "dropped"),
        *_counted(path, "bad_row", unreadable, "rows are no label", "dropped"),
        *_counted(path, "label_conflict", disputed, "labels are both 0 and 1", "taken as unknown"),
        *_counted(
            path,
            "any_mismatch",
            mismatched,
            "slices whose 'any' is not the union of their subtypes",
            "their labels are taken as unknown",
        ),
    ]
    return RsnaTable(packed, notes)


class _Labelled(NamedTuple):
    """The files of a series and the packed labels of each."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]


def discover_rsna(
    input_dir: str | Path, limit: int | None = None, workers: int = 1
) -> tuple[list[Job], list[Rejected]]:
    """The series of RSNA 2019 below a folder that holds stage_2_train/ and stage_2_train.csv.

    Which files make a patient, a study and a series stands in their headers alone, and so all of them are
    read, limit or not. Images without a label and labels without an image are counted. Returns (jobs,
    rejected). Raises ScanError if the folder or the table is missing, or if more than 1 % of the images have
    no label."""
    root = Path(input_dir)
    if (root / RSNA_ROOT).is_dir():
        root = root / RSNA_ROOT
    folder = _require(root / RSNA_FOLDER, "give the folder that holds it")
    table = _require(root / RSNA_CSV, "it comes with the data set")
    packed, notes = read_rsna_labels(table)
    waiting = set(packed)
    unlabelled: list[str] = []

    def images() -> Iterator[tuple[str, ScanError | None]]:
        for path, problem in walk(folder):
            image = _stem(path)
            if image in packed:
                waiting.discard(image)
            elif problem is None and path.endswith(".dcm"):
                unlabelled.append(image)
            yield path, problem

    index = index_series(root, images(), limit=limit, workers=workers)
    if len(unlabelled) > MAX_UNLABELLED * index.seen:
        what = f"no labels for {len(unlabelled)} of {index.seen} images, e.g. {shown(unlabelled[0])}"
        raise ScanError(table, what, f"give the table that belongs to {RSNA_FOLDER}", "no_label")
    found, unplaced = series_jobs(root, index.series, "rsna")
    jobs = [
        job._replace(
            case=shown(_stem(job.inputs[0])),  # all lie in one folder
            inputs=_Labelled(job.inputs, tuple(packed.get(_stem(path), UNKNOWN) for path in job.inputs)),
        )
        for job in found[:limit]
    ]
    counted = _counted(table, "no_image", sorted(waiting), "labelled images are not here", "not used")
    counted += _counted(folder, "no_label", unlabelled, "images have no label", "taken as unknown")
    return jobs, [*notes, *counted, *index.rejected, *unplaced]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122 pathlib takes ten times as long


def read_rsna(job: Job) -> Scan:
    """Read one series with the labels of its slices; those of the scan follow from them.

    Raises ScanError, see read_pixels."""
    labels = dict(zip(job.inputs.paths, job.inputs.labels, strict=True))
    pixels = read_pixels(job.inputs.paths, assume_hu=job.assume_hu)
    slice_labels = []
    for files, notes in zip(pixels.files, pixels.repairs, strict=True):
        copies = [unpack_labels(labels[file]) for file in files]
        slice_labels.append({name: _agreed([copy[name] for copy in copies]) for name in LABEL_NAMES})
        if any(copy != copies[0] for copy in copies):
            notes.append("copies of this slice have different labels: taken as unknown")
    scan_labels = {name: _any([labels[name] for labels in slice_labels]) for name in LABEL_NAMES}
    return scan_of(job, pixels, slice_labels=slice_labels, labels=scan_labels)


def _agreed(values: Sequence[int | None]) -> int | None:
    return values[0] if len(set(values)) == 1 else None


def _any(values: Sequence[int | None]) -> int | None:
    """Present in a scan if in one slice, absent if in none, unknown otherwise."""
    if 1 in values:
        return 1
    return None if None in values else 0


# ---------------------------------------------------------------- CQ500

CQ500_CSV = "reads.csv"
CQ500_CASE = re.compile(r"CQ500-?CT-?(\d+)", re.IGNORECASE)  # CQ500CT12 on disk, CQ500-CT-12 in the table
CQ500_READERS = ("R1", "R2", "R3")
CQ500_NAMES = {
    "EDH": "epidural",
    "IPH": "intraparenchymal",
    "IVH": "intraventricular",
    "SAH": "subarachnoid",
    "SDH": "subdural",
    "ICH": "any",
}
MIN_CQ500_SLICES = 16  # at 5 mm a brain takes 25 or more; fewer are a reference or a detail
CONTRAST = re.compile(r"post|contrast|cect|angio|cta\b|\d\s*cc", re.IGNORECASE)  # "CT 4cc sec 150cc D3D on"
BONE = re.compile(
    r"bone|sharp|edge|lung|\b[bhj][6-9]\d", re.IGNORECASE
)  # Siemens' kernels from 60 on are sharp


def read_cq500_labels(path: Path) -> tuple[dict[str, Labels], list[Rejected]]:
    """reads.csv: case ("CQ500-CT-0") -> its labels by the majority of three readers.

    A label that two readers do not agree on, because values are missing, is unknown; so are all labels of a
    case that two rows describe differently, or that bleeds of a kind but not at all. Returns (labels, notes).
    Raises ScanError if a column is missing."""
    wanted = {f"{reader}:{finding}" for reader in CQ500_READERS for finding in CQ500_NAMES}
    labels: dict[str, Labels] = {}
    repeated, conflicts, mismatched, unreadable = [], [], [], []
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        rows = csv.DictReader(file)
        rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        missing = sorted({"name", *wanted} - set(rows.fieldnames))
        if missing:
            what = f"no column {', '.join(missing[:3])}"
            raise ScanError(path, what, "give the reads.csv of the data set", "table")
        for row in rows:
            name = (row["name"] or "").strip()
            case = _cq500_case(name)
            if case is None:
                unreadable.append(name)
                continue
            found = unknown_labels() | {
                label: _majority([row[f"{reader}:{finding}"] for reader in CQ500_READERS])
                for finding, label in CQ500_NAMES.items()
            }
            if found["any"] == 0 and 1 in found.values():
                mismatched.append(case)
                found = unknown_labels()
            if case not in labels:
                labels[case] = found
            elif labels[case] == found:
                repeated.append(case)
            else:
                conflicts.append(case)
    labels |= {case: unknown_labels() for case in conflicts}
    notes = [
        *_counted(path, "duplicate_row", repeated, "rows repeat an earlier one", "dropped"),
        *_counted(path, "bad_row", unreadable, "rows name no case", "dropped"),
        *_counted(path, "label_conflict", conflicts, "cases have rows that differ", "taken as unknown"),
        *_counted(
            path,
            "any_mismatch",
            mismatched,
            "cases with a kind of haemorrhage but no haemorrhage",
            "their labels are taken as unknown",
        ),
    ]
    return labels, notes


def _majority(votes: Sequence[str | None]) -> int | None:
    counts = Counter((vote or "").strip() for vote in votes)
    return next((int(value) for value in ("0", "1") if counts[value] >= 2), None)


def _cq500_case(text: str) -> str | None:
    found = CQ500_CASE.search(text)
    return f"CQ500-CT-{int(found[1])}" if found else None


class _Cq500Case(NamedTuple):
    name: str
    paths: tuple[str, ...]
    labels: Labels


def discover_cq500(
    input_dir: str | Path, limit: int | None = None, workers: int = 1
) -> tuple[list[Job], list[Rejected]]:
    """One series for each case of CQ500, below a folder that holds reads.csv and the case folders (or zips).

    Of a case's axial series with at least 16 slices, those without contrast and bone kernel go first (by the
    names of their folders and by ConvolutionKernel), then the one with most slices, which is the thinnest;
    the others are named with code "other_series". limit: look at so many cases. Returns (jobs, rejected).
    Raises ScanError if reads.csv is missing."""
    root = Path(input_dir)
    table = _require(root / CQ500_CSV, "download it beside the scans, from where they come from")
    labels, rejected = read_cq500_labels(table)
    cases: dict[str, list] = defaultdict(list)
    for path, problem in walk(root):
        case = _cq500_case(os.path.relpath(path, root))
        if case:
            cases[case].append((path, problem))
    rejected += _counted(
        table, "no_image", sorted(set(labels) - set(cases)), "cases are not here", "not used"
    )
    chosen = sorted(cases, key=lambda case: int(case.rpartition("-")[2]))[:limit]
    if not chosen:
        raise ScanError(root, "no case folder (CQ500CT0, ...)", "give the folder that holds them", "no_ct")
    index = index_series(root, (file for case in chosen for file in cases[case]), workers=workers)
    rejected += index.rejected
    stacks: dict[str, list] = defaultdict(list)
    for headers in index.series.values():
        by_case = defaultdict(list)  # anonymised ids may be the same in two cases
        for header in headers:
            by_case[_cq500_case(os.path.relpath(header.path, root))].append(header)
        for case, own in by_case.items():
            stacks[case] += split_stacks(own)
    jobs = []
    for case in chosen:
        ranked = sorted(stacks[case], key=lambda stack: _cq500_rank(root, stack))
        if not ranked or len(ranked[0]) < MIN_CQ500_SLICES:
            reason = f"no axial series of at least {MIN_CQ500_SLICES} slices (look at its files)"
            rejected.append(Rejected(case, shown(root), "no_series", reason))
            continue
        for other in ranked[1:]:
            place = os.path.relpath(os.path.dirname(other[0].path), root)  # noqa: PTH120
            reason = f"{len(other)} slices; another series of this case is used (nothing to do)"
            rejected.append(Rejected(case, shown(place), "other_series", reason))
        paths = tuple(header.path for header in ranked[0])
        known = labels.get(case)
        if known is None:
            rejected.append(Rejected(case, shown(table), "no_label", "the case has no row (labels unknown)"))
        inputs = _Cq500Case(case, paths, known or unknown_labels())
        jobs.append(Job("cq500", pseudonym("cq500", case, *ranked[0][0].ids), case, inputs))
    return jobs, rejected


def _cq500_rank(root: Path, stack: list) -> tuple:
    """Sorts the series to take first."""
    place = os.path.relpath(os.path.dirname(stack[0].path), root)  # noqa: PTH120
    plain = not CONTRAST.search(os.path.basename(place))  # noqa: PTH119
    soft = not BONE.search(f"{os.path.basename(place)} {stack[0].kernel}")  # noqa: PTH119
    return len(stack) < MIN_CQ500_SLICES, not plain, not soft, -len(stack), place


def read_cq500(job: Job) -> Scan:
    """Read the chosen series of one case. Raises ScanError, see read_pixels."""
    patient = pseudonym("patient", "cq500", job.inputs.name)
    study = pseudonym("study", "cq500", job.inputs.name)
    pixels = read_pixels(job.inputs.paths, assume_hu=job.assume_hu)
    return scan_of(job, pixels, patient_id=patient, study_uid=study, labels=job.inputs.labels)


# ---------------------------------------------------------------- Mayo / AAPM low dose

# L067/full_1mm and L067/quarter_1mm (2016); C002/<study>/1.0-Full Dose Images-1 and Low Dose Images (2020)
MAYO_2016 = re.compile(r"(full|quarter)_(\w+)", re.IGNORECASE)
MAYO_2020 = re.compile(r"(full|low) dose images", re.IGNORECASE)
PARTNER_MM = 0.1  # rounding of headers; slices of the two doses lie at the same places
CHEST = re.compile(r"C\d+", re.IGNORECASE)  # of the set of 2020; its N are heads, L abdomens as in 2016
CHEST_DOSE, DOSE = "0.1", "0.25"


class _MayoPlace(NamedTuple):
    """Which scan a folder belongs to."""

    patient: str
    variant: str  # "1mm", or the folder of the study
    full: bool


class _Pair(NamedTuple):
    patient: str
    variant: str
    full: tuple[str, ...]
    low: tuple[str, ...]
    dose: str
    notes: tuple[str, ...]


def discover_mayo(
    input_dir: str | Path, limit: int | None = None, workers: int = 1
) -> tuple[list[Job], list[Rejected]]:
    """Pairs of full and low dose below a folder, in the layouts of 2016 and 2020.

    Slices are matched by their position; one without a partner is named and left out. limit: look at so many
    pairs of folders. Returns (jobs, rejected). Raises ScanError if input_dir does not exist."""
    root = _require(Path(input_dir), "check the path")
    files: dict[_MayoPlace, list] = defaultdict(list)
    for path, problem in walk(root):
        place = _mayo_place(Path(path).absolute().parent)
        if place:
            files[place].append((path, problem))
    pairs = sorted({place[:2] for place in files})
    jobs, rejected = [], []
    for patient, variant in pairs[:limit]:
        case = shown(f"{patient} {variant}")
        sides = []
        for full in (True, False):
            index = index_series(root, files.get(_MayoPlace(patient, variant, full), []), workers=workers)
            rejected += index.rejected
            sides.append(_only_stack(index))
        if None in sides:
            reason = "needs one axial series at full and one at low dose (use --source dicom for one alone)"
            rejected.append(Rejected(case, shown(root), "no_pair", reason))
            continue
        full, low, alone = _match(*sides)
        for header, position, other in alone:
            reason = f"no {other} slice at {position:.2f} mm (copy it again; this one is left out)"
            rejected.append(Rejected(case, shown(header.path), "no_partner", reason))
        if not full:
            rejected.append(Rejected(case, shown(root), "no_pair", "no slices at the same positions (check)"))
            continue
        notes = (f"{len(alone)} slices of this pair had no partner and were left out",) if alone else ()
        dose = CHEST_DOSE if CHEST.fullmatch(patient) else DOSE
        inputs = _Pair(patient, variant, full, low, dose, notes)
        jobs.append(Job("mayo", pseudonym("mayo", patient, variant), case, inputs))
    if not jobs and not rejected:
        reason = "no folders such as L067/full_1mm and L067/quarter_1mm (give the folder that holds them)"
        rejected.append(Rejected(shown(root.name), shown(root), "no_ct", reason))
    return jobs, rejected


def _mayo_place(folder: Path) -> _MayoPlace | None:
    old, new = MAYO_2016.fullmatch(folder.name), MAYO_2020.search(folder.name)
    if old:
        return _MayoPlace(folder.parent.name, old[2].lower(), old[1].lower() == "full")
    if new:
        return _MayoPlace(folder.parent.parent.name, folder.parent.name, new[1].lower() == "full")
    return None


def _only_stack(index: Index) -> list | None:
    """The one stack of slices in a folder, or None where there are more or fewer."""
    stacks = [stack for headers in index.series.values() for stack in split_stacks(headers)]
    return stacks[0] if len(stacks) == 1 and stacks[0][0].corner is not None else None


def _match(full: list, low: list) -> tuple[tuple[str, ...], tuple[str, ...], list]:
    """Paths of the slices that have a partner, in order, and (header, position, missing dose) of the rest."""
    sides = [position_groups(stack) for stack in (full, low)]
    places = [positions_mm([group[0] for group in groups]) for groups in sides]
    kept, alone = [], []
    for mine, other, name in ((0, 1, "low-dose"), (1, 0, "full-dose")):
        nearest = np.abs(places[mine][:, None] - places[other]).min(axis=1)
        paired: list[str] = []
        for group, position, distance in zip(sides[mine], places[mine], nearest, strict=True):
            if distance < PARTNER_MM:
                paired += [header.path for header in group]
            else:
                alone += [(header, position, name) for header in group]
        kept.append(tuple(paired))
    return *kept, alone


def read_mayo(job: Job) -> Scan:
    """Read the full dose as `hu` and the real low dose as `low`. Raises ScanError, see read_pixels."""
    pair = job.inputs
    full, low = (read_pixels(paths, assume_hu=job.assume_hu) for paths in (pair.full, pair.low))
    _check_grids(pair, full, low)
    full.repairs[0].extend(pair.notes)
    for notes, low_notes in zip(full.repairs, low.repairs, strict=True):
        if ASSUMED_HU in low_notes and ASSUMED_HU not in notes:
            notes.append(ASSUMED_HU)
    scan = scan_of(
        job,
        full,
        patient_id=pseudonym("patient", "mayo", pair.patient),
        study_uid=pseudonym("study", "mayo", pair.patient),
    )
    return dataclasses.replace(scan, low={pair.dose: low.hu})


def _check_grids(pair: _Pair, full: SeriesPixels, low: SeriesPixels) -> None:
    same = full.hu.shape == low.hu.shape
    if same:
        (full_axes, full_origin), (low_axes, low_origin) = (
            np.split(side.stack.affine, [3], axis=1) for side in (full, low)
        )
        same = np.allclose(full_axes, low_axes, atol=1e-3) and np.allclose(
            full_origin, low_origin, atol=PARTNER_MM
        )
    if not same:
        what = f"its grid differs from that of the full dose: {low.hu.shape} and {full.hu.shape}"
        raise ScanError(pair.low[0], what, "take both from one reconstruction", "grid")


DICOM_SET_READERS = {
    "rsna": Reader(discover_rsna, read_rsna),
    "cq500": Reader(discover_cq500, read_cq500),
    "mayo": Reader(discover_mayo, read_mayo),
}
