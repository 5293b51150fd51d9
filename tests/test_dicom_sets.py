"""RSNA 2019, CQ500 and Mayo: small sets in their exact layouts, made from the phantom, read back exactly."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import dicom_series
from dicom_headers import CT_IMAGE
from dicom_sets import (
    DICOM_SET_READERS,
    RSNA_LABELS,
    discover_cq500,
    discover_mayo,
    discover_rsna,
    read_cq500,
    read_cq500_labels,
    read_mayo,
    read_rsna,
    read_rsna_labels,
    unpack_labels,
)
from phantom import Phantom, generate_phantom
from tests.test_dicom_series import write_slice
from volumes import AIR_HU, ASSUMED_HU, LABEL_NAMES, ScanError

SIZE, SLICES = 48, 6


def phantom(seed: int, **options) -> Phantom:
    return generate_phantom(seed, **({"size": SIZE, "slices": SLICES} | options))


def corner(made: Phantom, index: int) -> list[str]:
    return [f"{value:.6f}" for value in (made.affine @ (0, 0, index, 1))[:3]]


def codes(rejected) -> dict[str, int]:
    """Code -> how many lines."""
    return {code: [r.code for r in rejected].count(code) for code in {r.code for r in rejected}}


# ---------------------------------------------------------------- RSNA 2019


def write_rsna_slice(path: Path, hu, position, patient: str, **tags) -> Path:
    """Exactly the 22 elements of the real files, invalid UIDs and all."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CT_IMAGE
    values = {
        "SOPInstanceUID": path.stem,
        "Modality": "CT",
        "PatientID": patient,
        "StudyInstanceUID": f"{patient}_study",
        "SeriesInstanceUID": f"{patient}_series",
        "StudyID": "",
        "ImagePositionPatient": position,
        "ImageOrientationPatient": ["1.000000", "0.000000", "0.000000", "0.000000", "1.000000", "0.000000"],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": hu.shape[0],
        "Columns": hu.shape[1],
        "PixelSpacing": [f"{236 / SIZE:.6f}"] * 2,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "WindowCenter": "30",
        "WindowWidth": "80",
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
        "PixelData": (hu + 1024).astype(np.uint16).tobytes(),
    }
    assert len(values) == 22
    with pydicom.config.disable_value_validation():
        for name, value in (values | tags).items():
            setattr(dataset, name, value)
        dataset["PixelData"].VR = "OW"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=False)
        data = path.read_bytes()
        if data[128:132] != b"DICM":
            path.write_bytes(bytes(128) + b"DICM" + data)
    return path


def rsna_name(patient: int, index: int) -> str:
    return f"ID_{(patient * 7919 + index * 104729) * 2654435761 % 16**9:09x}"


def write_rsna(root: Path, phantoms: list[Phantom]) -> dict[str, dict]:
    """stage_2_train/ and its table; returns image -> its labels. Names have nothing to do with positions."""
    labels = {}
    for number, made in enumerate(phantoms):
        for index, hu in enumerate(made.hu):
            name = rsna_name(number, index)
            write_rsna_slice(
                root / "stage_2_train" / f"{name}.dcm", hu, corner(made, index), f"ID_p{number:07d}"
            )
            labels[name] = made.slice_labels[index]
    write_table(root, labels)
    return labels


def write_table(root: Path, labels: dict[str, dict], extra: list[str] = ()) -> Path:
    """Rows in the order of the real table, which is not that of LABEL_NAMES for `any`."""
    order = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
    rows = [f"{image}_{name},{known[name]}" for image, known in labels.items() for name in order]
    path = root / "stage_2_train.csv"
    path.write_text("\n".join(["ID,Label", *rows, *extra]) + "\n")
    return path


def test_rsna_set_is_read_back_exactly(tmp_path):
    phantoms = [phantom(3, lesions=["subdural", "intraventricular"]), phantom(4, lesions=[])]
    write_rsna(tmp_path, phantoms)
    names = sorted(path.name for path in (tmp_path / "stage_2_train").iterdir())
    by_position = [f"{rsna_name(0, index)}.dcm" for index in range(SLICES)]
    assert by_position != [name for name in names if name in by_position]  # file order is not slice order
    jobs, rejected = discover_rsna(tmp_path)
    assert len(jobs) == 2 and rejected == []
    found = [read_rsna(pickle.loads(pickle.dumps(job))) for job in jobs]
    found.sort(key=lambda scan: scan.labels["any"], reverse=True)
    for scan, made in zip(found, phantoms, strict=True):
        np.testing.assert_array_equal(scan.hu, made.hu)
        np.testing.assert_allclose(scan.affine, made.affine, atol=1e-4)
        np.testing.assert_allclose(scan.spacing_mm, made.spacing_mm, atol=1e-5)
        for mine, theirs in zip(scan.slice_labels, made.slice_labels, strict=True):
            assert mine == {name: theirs[name] for name in RSNA_LABELS} | {"ischemia": None}
        assert scan.labels == {name: made.labels[name] for name in RSNA_LABELS} | {"ischemia": None}
        assert scan.source == "rsna" and scan.mask is None and not any(scan.repairs)
    assert found[0].labels["subdural"] == 1 and found[1].labels["subdural"] == 0
    assert len({scan.patient_id for scan in found}) == 2


def test_rsna_series_whose_air_wrapped_around_twelve_bits_is_repaired_and_says_so(tmp_path):
    made = phantom(5)
    hu = made.hu.clip(-1000)
    for index, image in enumerate(hu):
        stored = (image.astype(int) % 4096).astype(np.uint16).tobytes()
        path = tmp_path / "stage_2_train" / f"ID_{index:09x}.dcm"
        tags = {"RescaleIntercept": "0", "PixelData": stored}
        write_rsna_slice(path, image, corner(made, index), "ID_p", **tags)
    write_table(tmp_path, {f"ID_{index:09x}": made.slice_labels[index] for index in range(SLICES)})
    scan = read_rsna(discover_rsna(tmp_path)[0][0])
    np.testing.assert_array_equal(scan.hu, hu)
    assert all("unwrapped" in notes[0] for notes in scan.repairs)


def test_rsna_corrupt_file_is_named_and_its_series_stays_with_a_gap(tmp_path):
    made = phantom(6)
    write_rsna(tmp_path, [made])
    broken = tmp_path / "stage_2_train" / f"{rsna_name(0, 2)}.dcm"
    broken = broken.rename(broken.with_name("ID_6431af929.dcm"))
    broken.write_bytes(broken.read_bytes()[:2000])
    names = [rsna_name(0, index) for index in range(SLICES)]
    names[2] = "ID_6431af929"
    write_table(tmp_path, dict(zip(names, made.slice_labels, strict=True)))
    jobs, rejected = discover_rsna(tmp_path)
    assert [(Path(r.file).name, r.code) for r in rejected] == [("ID_6431af929.dcm", "truncated")]
    scan = read_rsna(jobs[0])
    np.testing.assert_array_equal(scan.hu, np.delete(made.hu, 2, axis=0))
    assert scan.slice_labels[2] == {n: made.slice_labels[3].get(n) for n in RSNA_LABELS} | {"ischemia": None}
    assert [bool(notes) for notes in scan.repairs] == [False, False, True, False, False]
    assert scan.repairs[2][0].startswith("gap of")


def test_rsna_table_with_repeated_conflicting_and_odd_rows_counts_them(tmp_path):
    clean = dict.fromkeys(RSNA_LABELS, 0)
    labels = {"ID_a": clean, "ID_b": clean | {"subdural": 1, "any": 1}, "ID_c": clean | {"epidural": 1}}
    extra = ["ID_a_any,0"] * 24 + ["ID_b_subdural,0", "ID_b_ischemia,1", "ID_b_epidural,2", "garbage"]
    path = write_table(tmp_path, labels, extra)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    packed, notes = read_rsna_labels(path)
    assert unpack_labels(packed["ID_a"]) == clean | {"ischemia": None}
    assert unpack_labels(packed["ID_b"]) == clean | {"subdural": None, "any": 1, "ischemia": None}
    assert unpack_labels(packed["ID_c"]) == dict.fromkeys(
        LABEL_NAMES
    )  # epidural without any: neither can be trusted
    reasons = {note.code: note.reason for note in notes}
    assert reasons["duplicate_row"].startswith("24 rows")
    assert reasons["bad_row"].startswith("3 rows")
    assert reasons["label_conflict"].startswith("1 labels are both 0 and 1: ID_b_subdural")
    assert "ID_c" in reasons["any_mismatch"]


def test_rsna_labels_go_by_name_in_any_order_of_rows_and_columns(tmp_path):
    path = tmp_path / "stage_2_train.csv"
    rows = [("subdural", 0), ("any", 1), ("intraventricular", 1), ("epidural", 0)]
    path.write_text("Label,ID\n" + "".join(f"{value},ID_a_{name}\n" for name, value in rows))
    found = unpack_labels(read_rsna_labels(path).packed["ID_a"])
    unknown = {"intraparenchymal": None, "subarachnoid": None, "ischemia": None}
    assert found == dict(rows) | unknown  # a label without a row is unknown, not absent


@pytest.mark.parametrize("text", ["", "name,R1:ICH\n"])
def test_rsna_table_with_other_columns_is_refused(tmp_path, text):
    path = tmp_path / "stage_2_train.csv"
    path.write_text(text)
    with pytest.raises(ScanError, match="not ID, Label"):
        read_rsna_labels(path)


def test_rsna_images_and_labels_without_counterpart_are_counted(tmp_path):
    made = phantom(7, slices=120, size=16)
    labels = write_rsna(tmp_path, [made])
    first, second = list(labels)[:2]
    (tmp_path / "stage_2_train" / f"{first}.dcm").unlink()
    write_table(tmp_path, {image: known for image, known in labels.items() if image != second})
    jobs, rejected = discover_rsna(tmp_path)
    assert codes(rejected) == {"no_image": 1, "no_label": 1}
    assert first in rejected[0].reason and second in rejected[1].reason
    scan = read_rsna(jobs[0])
    assert sum(labels["any"] is None for labels in scan.slice_labels) == 1
    write_table(tmp_path, {})
    with pytest.raises(ScanError, match=r"stage_2_train\.csv: no labels for 119 of 119 images"):
        discover_rsna(tmp_path)


def test_rsna_copies_of_a_slice_with_different_labels_have_none(tmp_path):
    made = phantom(8, lesions=["subdural"])
    labels = write_rsna(tmp_path, [made])
    index = next(i for i, known in enumerate(made.slice_labels) if known["subdural"])
    twin = tmp_path / "stage_2_train" / "ID_twin.dcm"
    twin.write_bytes((twin.parent / f"{rsna_name(0, index)}.dcm").read_bytes())
    write_table(tmp_path, labels | {"ID_twin": dict.fromkeys(RSNA_LABELS, 0)})
    scan = read_rsna(discover_rsna(tmp_path)[0][0])
    assert scan.slice_labels[index]["subdural"] is None and scan.slice_labels[index]["epidural"] == 0
    assert any("different labels" in note for note in scan.repairs[index])


def test_rsna_with_a_limit_gives_whole_series_and_with_workers_the_same_jobs(tmp_path):
    root = tmp_path / "rsna-intracranial-hemorrhage-detection"  # as Kaggle's archive unpacks
    write_rsna(root, [phantom(seed, size=16) for seed in range(4)])
    jobs, _ = discover_rsna(tmp_path)
    few, _ = discover_rsna(tmp_path, limit=2)
    assert few == jobs[:2] and all(len(job.inputs.paths) == SLICES for job in few)
    assert discover_rsna(tmp_path, workers=2)[0] == jobs


def test_rsna_without_its_table_or_folder_says_what_is_missing(tmp_path):
    with pytest.raises(ScanError, match="stage_2_train: not found"):
        discover_rsna(tmp_path)
    (tmp_path / "stage_2_train").mkdir()
    with pytest.raises(ScanError, match=r"stage_2_train\.csv: not found"):
        discover_rsna(tmp_path)


# ---------------------------------------------------------------- CQ500

FINDINGS = ("ICH", "IPH", "IVH", "SDH", "EDH", "SAH")
OTHER = (
    "BleedLocation-Left",
    "BleedLocation-Right",
    "ChronicBleed",
    "Fracture",
    "MassEffect",
    "MidlineShift",
)


def write_reads(root: Path, votes: dict[str, dict[str, tuple]]) -> Path:
    """reads.csv; votes: case -> finding -> the three readers' values, 0 where left out."""
    header = ["name", "Category", *(f"R{r}:{name}" for r in (1, 2, 3) for name in (*FINDINGS, *OTHER))]
    lines = [",".join(header)]
    for case, found in votes.items():
        values = [str(found.get(n, (0, 0, 0))[r]) for r in range(3) for n in (*FINDINGS, *OTHER)]
        lines.append(",".join([case, "B1", *values]))
    path = root / "reads.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_cq500_series(root: Path, number: int, folder: str, made: Phantom, **tags) -> Path:
    place = root / f"CQ500CT{number} CQ500CT{number}" / "Unknown Study" / folder
    for index, hu in enumerate(made.hu):
        write_slice(
            place / f"CT{index:06d}.dcm",
            hu.astype(int),
            [float(v) for v in corner(made, index)],
            PatientID=f"CQ500-CT-{number}",
            StudyInstanceUID=f"1.2.{number}",
            SeriesInstanceUID=f"1.2.{number}.{sum(folder.encode())}",
            PixelSpacing=[made.spacing_mm[1], made.spacing_mm[2]],
            **tags,
        )
    return place


def test_cq500_set_is_read_back_exactly_with_the_majority_of_its_readers(tmp_path):
    made = phantom(9, slices=20)
    votes = {"ICH": (1, 1, 1), "SDH": (1, 0, 1), "IPH": (0, 1, 0), "SAH": (1, 1, 0), "Fracture": (1, 1, 1)}
    write_cq500_series(tmp_path, 0, "CT Plain", made)
    write_cq500_series(tmp_path, 12, "CT Plain", phantom(10, slices=20))
    write_reads(tmp_path, {"CQ500-CT-0": votes, "CQ500-CT-12": {}})
    jobs, rejected = discover_cq500(tmp_path)
    assert [job.case for job in jobs] == ["CQ500-CT-0", "CQ500-CT-12"] and not rejected
    scan, healthy = (read_cq500(pickle.loads(pickle.dumps(job))) for job in jobs)
    np.testing.assert_array_equal(scan.hu, made.hu)
    np.testing.assert_allclose(scan.affine, made.affine, atol=1e-4)
    absent = dict.fromkeys(RSNA_LABELS, 0) | {"ischemia": None}
    assert scan.labels == absent | {"any": 1, "subdural": 1, "subarachnoid": 1}
    assert healthy.labels == absent
    assert scan.slice_labels == [dict.fromkeys(LABEL_NAMES)] * 20  # of slices the readers said nothing
    assert scan.mask is None and scan.patient_id != healthy.patient_id


def test_cq500_takes_the_plain_soft_series_with_most_slices_and_names_the_others(tmp_path):
    long, thin, thick = (phantom(11, slices=n, size=32) for n in (40, 24, 16))
    write_cq500_series(tmp_path, 1, "CT 4cc sec 150cc D3D on-3", long)
    write_cq500_series(tmp_path, 1, "CT POST CONTRAST", long)
    write_cq500_series(tmp_path, 1, "CT BONE", long)
    write_cq500_series(tmp_path, 1, "CT Thin 2", long, ConvolutionKernel="BONEPLUS")
    write_cq500_series(tmp_path, 1, "CT PLAIN THIN", thin, ConvolutionKernel="STANDARD")
    write_cq500_series(tmp_path, 1, "CT Plain", thick)
    write_cq500_series(tmp_path, 1, "CT Plain 2", phantom(11, slices=3, size=32))
    write_reads(tmp_path, {"CQ500-CT-1": {}})
    jobs, rejected = discover_cq500(tmp_path)
    assert {Path(path).parent.name for path in jobs[0].inputs.paths} == {"CT PLAIN THIN"}
    assert codes(rejected) == {"other_series": 6}
    np.testing.assert_array_equal(read_cq500(jobs[0]).hu, thin.hu)


def test_cq500_with_nothing_but_contrast_takes_that_and_with_too_few_slices_none(tmp_path):
    write_cq500_series(tmp_path, 1, "CT POST CONTRAST", phantom(12, slices=16, size=16))
    write_cq500_series(tmp_path, 2, "CT Plain", phantom(12, slices=5, size=16))
    write_cq500_series(tmp_path, 3, "CT Plain", phantom(12, slices=16, size=16))
    write_reads(tmp_path, {"CQ500-CT-1": {}, "CQ500-CT-2": {}, "CQ500-CT-4": {}})
    jobs, rejected = discover_cq500(tmp_path)
    assert [job.case for job in jobs] == ["CQ500-CT-1", "CQ500-CT-3"]
    found = {r.code: (r.case, r.reason) for r in rejected}
    assert found["no_series"][0] == "CQ500-CT-2" and "CQ500-CT-4" in found["no_image"][1]
    assert found["no_label"][0] == "CQ500-CT-3"
    assert set(read_cq500(jobs[1]).labels.values()) == {None}
    assert [job.case for job in discover_cq500(tmp_path, limit=1)[0]] == ["CQ500-CT-1"]


def test_cq500_case_still_in_its_zip_is_read(tmp_path):
    made = phantom(13, slices=16, size=16)
    place = write_cq500_series(tmp_path / "unpacked", 7, "CT Plain", made)
    with zipfile.ZipFile(tmp_path / "CQ500CT7.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in place.iterdir():
            archive.write(file, file.relative_to(tmp_path / "unpacked"))
    write_reads(tmp_path, {"CQ500-CT-7": {"ICH": (1, 1, 0)}})
    for file in sorted((tmp_path / "unpacked").rglob("*.dcm")):
        file.unlink()
    (job,), _ = discover_cq500(tmp_path)
    scan = read_cq500(job)
    np.testing.assert_array_equal(scan.hu, made.hu)
    assert scan.labels["any"] == 1


def test_cq500_votes_that_are_missing_split_or_contradictory_are_unknown(tmp_path):
    votes = {
        "CQ500-CT-0": {"ICH": (1, "", 1), "SDH": (1, "", 0), "SAH": ("x", "", "nan")},
        "CQ500-CT-1": {"EDH": (1, 1, 1)},
    }
    path = write_reads(tmp_path, votes)
    lines = path.read_text().splitlines()
    lines += [lines[1], lines[1].replace("CQ500-CT-0", "CQ500-CT-5")]
    lines += [lines[-1].replace(",1,", ",0,", 1), "nobody" + lines[1][10:]]
    path.write_text("\ufeff" + "\r\n".join(lines))
    labels, notes = read_cq500_labels(path)
    expected = dict.fromkeys(RSNA_LABELS, 0) | {"any": 1, "subdural": None, "subarachnoid": None}
    assert labels["CQ500-CT-0"] == expected | {"ischemia": None}
    assert labels["CQ500-CT-1"] == labels["CQ500-CT-5"] == dict.fromkeys(LABEL_NAMES)
    assert codes(notes) == {"duplicate_row": 1, "label_conflict": 1, "bad_row": 1, "any_mismatch": 1}
    path.write_text("name,R1:ICH\n")
    with pytest.raises(ScanError, match="no column R1:EDH"):
        read_cq500_labels(path)


# ---------------------------------------------------------------- Mayo


def abdomen(index: int, noise_hu: float = 0) -> np.ndarray:
    """(64, 64) int HU: a body with fat, organs, bowel gas and spine inside a circular field of view."""
    y, x = np.mgrid[:64, :64] - 31.5
    body = np.hypot(x / 28, y / 20)
    hu = np.select([body < 0.8, body < 1], [50 + index, -100], -1000)
    hu[np.hypot(x - 10, y + 4) < 3] = -900
    hu[np.hypot(x, y - 12) < 4] = 400
    rng = np.random.default_rng(index)
    hu = hu + rng.normal(0, noise_hu, hu.shape).round().astype(int)
    return np.where(np.hypot(x, y) < 32, hu, -2000)


def write_mayo(folder: Path, heights, noise_hu: float, **tags) -> Path:
    """One dose of one scan as the challenge has it: signed, padded with -2000, .IMA."""
    for height in heights:
        hu = abdomen(round(height), noise_hu)
        stored = np.where(hu == -2000, -2000, hu + 1024)
        name = f"L067_{'FD' if 'full' in folder.name.lower() else 'QD'}_1_1.CT.0001.{round(height):04d}.IMA"
        signed = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "PixelPaddingValue": -2000}
        values = signed | {"stored": stored, "SeriesInstanceUID": f"1.2.{sum(folder.name.encode())}"} | tags
        write_slice(folder / name, hu, (-180.0, -180.0, float(-height)), **values)
    return folder


def test_mayo_pair_is_read_back_exactly_slice_by_slice(tmp_path):
    write_mayo(tmp_path / "L067" / "full_1mm", range(8), 0)
    write_mayo(tmp_path / "L067" / "quarter_1mm", range(8), 25, PatientID="another id in the other file")
    write_mayo(tmp_path / "L067" / "full_3mm", range(0, 8, 3), 0)
    write_mayo(tmp_path / "L067" / "quarter_3mm", range(0, 8, 3), 25)
    jobs, rejected = discover_mayo(tmp_path)
    assert [job.case for job in jobs] == ["L067 1mm", "L067 3mm"] and not rejected
    scan, thick = (read_mayo(pickle.loads(pickle.dumps(job))) for job in jobs)
    for index, height in enumerate(reversed(range(8))):  # ascending towards the head
        full, low = abdomen(height), abdomen(height, 25)
        np.testing.assert_array_equal(scan.hu[index], np.where(full == -2000, AIR_HU, full))
        expected = np.where(low == -2000, AIR_HU, low).clip(AIR_HU)
        np.testing.assert_array_equal(scan.low["0.25"][index], expected)
    assert list(scan.low) == ["0.25"] and scan.low["0.25"].dtype == np.int16
    assert scan.padding_count == 8 * (abdomen(0) == -2000).sum()
    assert scan.labels == dict.fromkeys(LABEL_NAMES) and scan.mask is None
    assert scan.patient_id == thick.patient_id and scan.series_uid != thick.series_uid
    assert thick.low["0.25"].shape == thick.hu.shape == (3, 64, 64)
    assert scan.spacing_mm[0] == pytest.approx(1) and thick.spacing_mm[0] == pytest.approx(3)


@pytest.mark.parametrize("dose", ["full", "quarter"])
def test_mayo_with_assumed_hu_takes_either_dose_as_it_is_and_says_so(tmp_path, dose):
    for name in ("full", "quarter"):
        spoilt = {"RescaleIntercept": 0} if name == dose else {}  # values are HU + 1024
        write_mayo(tmp_path / "L067" / f"{name}_1mm", range(3), 0, **spoilt)
    (job,), _ = discover_mayo(tmp_path)
    with pytest.raises(ScanError, match=f"{dose}_1mm.* not HU"):
        read_mayo(job)
    scan = read_mayo(job._replace(assume_hu=True))
    assert all(notes.count(ASSUMED_HU) == 1 for notes in scan.repairs)
    spoilt, right = (scan.hu, scan.low["0.25"]) if dose == "full" else (scan.low["0.25"], scan.hu)
    inside = right > AIR_HU
    np.testing.assert_array_equal(spoilt[inside], right[inside] + 1024)


@pytest.mark.parametrize("source", ["rsna", "cq500"])
def test_sets_with_assumed_hu_are_read_as_they_are_and_say_so(tmp_path, monkeypatch, source):
    made = phantom(13, slices=16, size=16)
    if source == "rsna":
        write_rsna(tmp_path, [made])
    else:
        write_cq500_series(tmp_path, 7, "CT Plain", made)
        write_reads(tmp_path, {"CQ500-CT-7": {"ICH": (1, 1, 0)}})
    reader = DICOM_SET_READERS[source]
    (job,), _ = reader.discover(tmp_path)
    monkeypatch.setattr(dicom_series, "hu_fault", lambda _: "its values are not HU: said so")
    with pytest.raises(ScanError, match="not HU"):
        reader.read(job)
    scan = reader.read(job._replace(assume_hu=True))
    np.testing.assert_array_equal(scan.hu, made.hu)
    assert all(ASSUMED_HU in notes for notes in scan.repairs)


def test_mayo_slice_without_partner_is_named_and_left_out(tmp_path):
    write_mayo(tmp_path / "L067" / "full_1mm", [0, 1, 2, 4, 5, 6], 0)
    write_mayo(tmp_path / "L067" / "quarter_1mm", [0, 1, 2, 3, 4, 5], 25)
    jobs, rejected = discover_mayo(tmp_path)
    assert [(Path(r.file).name, r.code) for r in rejected] == [
        ("L067_FD_1_1.CT.0001.0006.IMA", "no_partner"),
        ("L067_QD_1_1.CT.0001.0003.IMA", "no_partner"),
    ]
    assert "no low-dose slice at -6.00 mm" in rejected[0].reason
    scan = read_mayo(jobs[0])
    assert scan.positions_mm == pytest.approx([-5, -4, -2, -1, 0])
    for index, height in enumerate([5, 4, 2, 1, 0]):
        middle = scan.low["0.25"][index, 25:40, 20:30].mean()
        assert middle == pytest.approx(50 + height, abs=8)  # 25 HU over 150 pixels: 2 HU
    assert any("2 slices of this pair had no partner" in note for note in scan.repairs[0])
    assert any("gap of 2.00 mm" in note for note in scan.repairs[2])


@pytest.mark.parametrize(("patient", "dose"), [("L004", "0.25"), ("N012", "0.25"), ("C002", "0.1")])
def test_mayo_layout_of_2020_is_read_with_its_own_dose(tmp_path, patient, dose):
    study = tmp_path / "LDCT-and-Projection-data" / patient / "12-23-2021-NA-NA-62464"
    write_mayo(study / "1.000000-Full Dose Images-95670", range(4), 0)
    write_mayo(study / "1.000000-Low Dose Images-40548", range(4), 25)
    jobs, rejected = discover_mayo(tmp_path)
    assert not rejected and len(jobs) == 1 and jobs[0].case.startswith(patient)
    assert list(read_mayo(jobs[0]).low) == [dose]


def test_mayo_full_dose_without_low_and_two_series_in_a_folder_are_refused(tmp_path):
    write_mayo(tmp_path / "L067" / "full_1mm", range(3), 0)
    write_mayo(tmp_path / "L096" / "full_1mm", range(3), 0)
    write_mayo(tmp_path / "L096" / "quarter_1mm", range(3), 25)
    write_slice(tmp_path / "L096" / "full_1mm" / "other.IMA", abdomen(0)[:32] + 0, (0, 0, 9.0))
    jobs, rejected = discover_mayo(tmp_path)
    assert not jobs and [(r.case, r.code) for r in rejected] == [
        ("L067 1mm", "no_pair"),
        ("L096 1mm", "no_pair"),
    ]
    assert discover_mayo(tmp_path / "L096" / "full_1mm", limit=1)[1]
    with pytest.raises(ScanError, match="nowhere: not found"):
        discover_mayo(tmp_path / "nowhere")


def test_mayo_pair_on_different_grids_is_refused(tmp_path):
    write_mayo(tmp_path / "L067" / "full_1mm", range(3), 0)
    write_mayo(tmp_path / "L067" / "quarter_1mm", range(3), 25, PixelSpacing=[0.7, 0.7])
    with pytest.raises(ScanError, match="its grid differs"):
        read_mayo(discover_mayo(tmp_path)[0][0])


def test_mayo_without_its_folders_says_which_ones_it_needs(tmp_path):
    jobs, rejected = discover_mayo(tmp_path)
    assert not jobs and "L067/full_1mm" in rejected[0].reason


# ---------------------------------------------------------------- registry


def test_each_set_finds_itself_through_the_registry_with_the_same_arguments(tmp_path):
    write_rsna(tmp_path / "rsna", [phantom(1, size=16)])
    write_cq500_series(tmp_path / "cq500", 1, "CT Plain", phantom(1, slices=16, size=16))
    write_reads(tmp_path / "cq500", {"CQ500-CT-1": {}})
    write_mayo(tmp_path / "mayo" / "L067" / "full_1mm", range(2), 0)
    write_mayo(tmp_path / "mayo" / "L067" / "quarter_1mm", range(2), 25)
    for name, reader in DICOM_SET_READERS.items():
        jobs, rejected = reader.discover(input_dir=tmp_path / name, limit=1, workers=1)
        assert [job.source for job in jobs] == [name] and not rejected
        scan = reader.read(jobs[0])
        assert scan.source == name and scan.series_uid == jobs[0].series_uid and scan.intensity == "hu"
