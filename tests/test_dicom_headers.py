"""The headers of DICOM files: which make up a series, read fast or slowly, in folders and in archives."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import ImplicitVRLittleEndian

import dicom_headers
from dicom_headers import read_headers
from dicom_series import discover_dicom, read_dicom
from tests.test_dicom_series import (
    TILTED,
    along_z,
    codes,
    head_hu,
    read_one,
    real,
    write_series,
    write_slice,
)
from volumes import EXPECTED_CODES, ScanError

# ---------------------------------------------------------------- which files make a series


def test_discover_dicom_tells_patients_studies_and_series_in_one_folder_apart(tmp_path):
    kinds = [("p1", "1.1", "1.1.1"), ("p1", "1.1", "1.1.2"), ("p1", "1.2", "1.2.1"), ("p2", "1.1", "1.1.1")]
    for k, (patient, study, series) in enumerate(kinds):
        for i in range(2):
            tags = {"PatientID": patient, "StudyInstanceUID": study, "SeriesInstanceUID": series}
            write_slice(tmp_path / f"{i}{k}", head_hu(i), (0, 0, 5 * i), **tags)
    jobs, rejected = discover_dicom(tmp_path)
    found = [read_dicom(job) for job in jobs]
    assert not rejected and [len(scan.hu) for scan in found] == [2, 2, 2, 2]
    assert len({scan.series_uid for scan in found}) == 4
    assert len({scan.study_uid for scan in found}) == 3  # p2's study is another one in spite of its uid
    assert len({scan.patient_id for scan in found}) == 2
    assert len({job.case for job in jobs}) == 4


def test_discover_dicom_names_every_series_before_reading_and_always_the_same(tmp_path):
    write_series(tmp_path / "a", along_z(0, 5))
    job = discover_dicom(tmp_path)[0][0]
    assert job.case == "a"
    assert read_dicom(pickle.loads(pickle.dumps(job))).series_uid == job.series_uid
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert discover_dicom(tmp_path)[0][0].series_uid == job.series_uid


def test_discover_dicom_splits_a_series_of_mixed_shapes_and_orientations(tmp_path):
    write_series(tmp_path / "a", along_z(0, 5, 10))
    write_series(tmp_path / "b", along_z(0, 5), ImageOrientationPatient=list(TILTED))
    write_slice(tmp_path / "c", head_hu()[:, :-2], (0, 0, 50))
    jobs, _ = discover_dicom(tmp_path)
    assert sorted(len(read_dicom(job).hu) for job in jobs) == [1, 2, 3]
    assert len({job.series_uid for job in jobs}) == 3


def test_discover_dicom_splits_acquisitions_only_where_they_cover_the_same_positions(tmp_path):
    for i in range(4):  # numbered slice by slice, as GE does
        write_slice(tmp_path / "ge" / str(i), head_hu(i), (0, 0, 5 * i), AcquisitionNumber=i)
        for phase in (1, 2):  # two phases over the same range
            write_slice(
                tmp_path / "two" / f"{phase}{i}", head_hu(i + phase), (0, 0, 5 * i), AcquisitionNumber=phase
            )
    assert len(read_one(tmp_path / "ge").hu) == 4
    assert [len(read_dicom(job).hu) for job in discover_dicom(tmp_path / "two")[0]] == [4, 4]


def test_discover_dicom_splits_two_kernels_of_one_series(tmp_path):
    for i in range(3):
        for kernel in ("STANDARD", "BONE"):
            hu = head_hu(i + (kernel == "BONE"))
            write_slice(tmp_path / f"{i}{kernel}", hu, (0, 0, 5 * i), ConvolutionKernel=kernel)
    jobs, rejected = discover_dicom(tmp_path)
    assert not rejected and len({job.series_uid for job in jobs}) == 2
    assert sorted(int(read_dicom(job).hu[0, 20, 18]) for job in jobs) == [100, 101]


def test_discover_dicom_names_what_it_skips(tmp_path):
    write_series(tmp_path, along_z(0, 5))
    hu = head_hu()
    write_slice(tmp_path / "scout", hu, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_slice(tmp_path / "capture", hu, SOPClassUID=dicom_headers.SECONDARY_CAPTURE)
    write_slice(tmp_path / "dose", hu, ImageType=["DERIVED", "SECONDARY", "DOSE_INFO"])
    write_slice(tmp_path / "mr", hu, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    write_slice(tmp_path / "enhanced", hu, SOPClassUID=dicom_headers.ENHANCED_CT[0], NumberOfFrames=2)
    write_slice(tmp_path / "coronal", hu, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    write_slice(tmp_path / "slope", hu, drop=("RescaleSlope",))
    write_slice(tmp_path / "spacing", hu, drop=("PixelSpacing",))
    write_slice(tmp_path / "huge", hu, Rows=65535, Columns=65535)
    write_slice(tmp_path / "zero", hu, stored=hu + 1024, RescaleSlope=0)
    write_slice(tmp_path / "skew", hu, ImageOrientationPatient=[1, 0, 0, 1, 1, 0])
    write_slice(tmp_path / "colour", hu, SamplesPerPixel=3, PhotometricInterpretation="RGB")
    (tmp_path / "text.dcm").write_text("PatientName: nobody")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    for junk in (".DS_Store", "Thumbs.db", "._000.dcm"):
        (tmp_path / junk).write_bytes(b"\0")
    assert codes(tmp_path) == {
        "scout": "localizer",
        "capture": "secondary_capture",
        "dose": "secondary_capture",
        "mr": "not_ct",
        "enhanced": "multi_frame",
        "coronal": "not_axial",
        "slope": "no_rescale",
        "spacing": "no_geometry",
        "huge": "damaged",
        "zero": "damaged",
        "skew": "no_geometry",
        "colour": "colour",
        "text.dcm": "not_dicom",
        "empty.dcm": "not_dicom",
        "notes.txt": "other_file",
    }
    assert not {"no_rescale", "damaged", "not_dicom", "multi_frame", "truncated"} & EXPECTED_CODES
    assert len(read_one(tmp_path).hu) == 2


def test_discover_dicom_of_an_empty_or_missing_folder_says_so(tmp_path):
    jobs, rejected = discover_dicom(tmp_path)
    assert not jobs and [r.code for r in rejected] == ["no_ct"] and "0 files seen" in rejected[0].reason
    with pytest.raises(ScanError, match="no such file or folder"):
        discover_dicom(tmp_path / "nowhere")


def test_discover_dicom_of_a_single_file_finds_its_slice(tmp_path):
    file = write_slice(tmp_path / "case" / "only", head_hu())
    jobs, rejected = discover_dicom(file)
    assert not rejected and jobs[0].case == "only" and len(read_dicom(jobs[0]).hu) == 1


@pytest.mark.filterwarnings("error")
def test_discover_dicom_follows_no_links_and_opens_no_pipes(tmp_path):
    write_series(tmp_path / "in", along_z(0, 5))
    write_slice(tmp_path / "outside.dcm", head_hu(3), (0, 0, 10))
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "link.dcm").symlink_to(tmp_path / "outside.dcm")
    os.mkfifo(tmp_path / "in" / "pipe")
    assert codes(tmp_path / "in") == {"loop": "not_regular", "link.dcm": "not_regular", "pipe": "not_regular"}
    assert len(read_one(tmp_path / "in").hu) == 2


def test_blank_ids_fall_back_to_the_study_and_then_the_folder(tmp_path):
    for place in ("a", "b"):
        write_series(tmp_path / place, along_z(0, 5), PatientID="", StudyInstanceUID="", SeriesInstanceUID="")
    found = [read_dicom(job) for job in discover_dicom(tmp_path)[0]]
    assert len({scan.patient_id for scan in found}) == len({scan.series_uid for scan in found}) == 2


# ---------------------------------------------------------------- headers by the hundred thousand


def through_pydicom(path: Path, monkeypatch) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(dicom_headers, "_plain_tags", lambda _: None)
        return next(read_headers([str(path)]))[1]


def same(a, b) -> bool:
    return str(a) == str(b) if isinstance(a, ScanError) else a == b


def test_headers_read_fast_equal_those_read_by_pydicom(tmp_path, monkeypatch):
    odd = {
        "plain": {},
        "implicit": {"syntax": ImplicitVRLittleEndian},
        "padding": {"PixelPaddingValue": -2000, "PixelRepresentation": 1, "RescaleIntercept": 0},
        "spaces": {"PatientID": " a\\b ", "AcquisitionNumber": "3", "SliceLocation": "-2.50 "},
        "empty": {"PatientID": "", "InstanceNumber": None, "SliceThickness": ""},
        "accent": {"SpecificCharacterSet": "ISO_IR 100", "PatientID": "J\xe9r\xf4me"},
        "long": {"PatientComments": "x" * 9000, "RescaleIntercept": -1024.25},
        "report": {"Modality": "SR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"},
    }
    for name, tags in odd.items():
        file = write_slice(tmp_path / name, head_hu(), (1.5, 2, 3), **tags)
        fast = next(read_headers([str(file)]))[1]
        assert same(fast, through_pydicom(file, monkeypatch)), name
        is_plain = dicom_headers._plain_tags(file.read_bytes()[: dicom_headers.HEAD_BYTES]) is not None
        assert is_plain == (name not in ("accent", "long")), name


def test_real_headers_read_fast_equal_those_read_by_pydicom(monkeypatch):
    folders = ("head_ge_tilted", "head_toshiba_encodings", "skull_phantom_philips", "pydicom_files")
    files = [path for name in folders for path in real(name).rglob("*") if path.is_file()]
    assert len(files) > 80
    for file in files:
        fast = next(read_headers([str(file)]))[1]
        assert same(fast, through_pydicom(file, monkeypatch)), file


def test_read_headers_by_several_processes_keeps_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_headers, "HEADERS_AT_A_TIME", 2)
    write_series(tmp_path, along_z(*range(13)))
    (tmp_path / "002.dcm").write_text("no")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    one, two = list(read_headers(paths)), list(read_headers(paths, workers=2))
    assert [path for path, _ in two] == paths
    assert all(same(a[1], b[1]) for a, b in zip(one, two, strict=True))
    assert discover_dicom(tmp_path, workers=2) == discover_dicom(tmp_path)


def test_discover_dicom_with_a_limit_gives_whole_series(tmp_path):
    for name in "abc":
        write_series(tmp_path / name, along_z(0, 5), SeriesInstanceUID=f"1.2.{ord(name)}")
    jobs, _ = discover_dicom(tmp_path)
    assert discover_dicom(tmp_path, limit=2)[0] == jobs[:2] and len(jobs[1].inputs) == 2


def test_headers_of_one_series_share_what_is_equal(tmp_path):
    """The headers of 750,000 slices must fit in memory together."""
    write_series(tmp_path, along_z(0, 5, 10))
    (headers,) = dicom_headers.index_series(tmp_path, dicom_headers.walk(tmp_path)).series.values()
    shared = {
        name
        for name in headers[0]._fields
        if all(getattr(header, name) is getattr(headers[0], name) for header in headers)
    }
    assert set(headers[0]._fields) - shared == {"path", "corner"}


# ---------------------------------------------------------------- archives and special files


def zip_of(folder: Path, target: Path, **more: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, f"study/{file.relative_to(folder)}")
        for name, data in more.items():
            archive.writestr(name, data)
    return target


@pytest.mark.parametrize("as_root", [True, False])
def test_zip_of_a_study_is_read_without_unpacking(tmp_path, as_root):
    write_series(tmp_path / "raw" / "a", along_z(0, 5, 10))
    archive = zip_of(
        tmp_path / "raw", tmp_path / "in" / "Study \u0130 One.ZIP", **{"study/readme.txt": b"hello"}
    )
    shutil.rmtree(tmp_path / "raw")
    jobs, rejected = discover_dicom(archive if as_root else archive.parent)
    assert [r.code for r in rejected] == ["other_file"] and rejected[0].file.endswith("//study/readme.txt")
    scan = read_dicom(pickle.loads(pickle.dumps(jobs[0])))
    np.testing.assert_array_equal(scan.hu, [head_hu(0), head_hu(1), head_hu(2)])
    assert jobs[0].case == "Study \u0130 One.ZIP/study/a" and not any(scan.repairs)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_zip_members_that_are_odd_are_named_and_the_others_read(tmp_path, monkeypatch):
    write_series(tmp_path / "raw", along_z(0, 5))
    inner = zip_of(tmp_path / "raw", tmp_path / "inner.zip").read_bytes()
    more = {"inner.zip": inner, "__MACOSX/._000.dcm": b"x", "study/Thumbs.db": b"x", "big.dcm": bytes(99_000)}
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip", **more)
    with zipfile.ZipFile(archive, "a") as file:
        link = zipfile.ZipInfo("link.dcm")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    monkeypatch.setattr(dicom_headers, "MAX_INFLATED_BYTES", 50_000)
    assert codes(archive) == {
        "inner.zip": "nested_archive",
        "link.dcm": "not_regular",
        "big.dcm": "too_large",
    }
    assert len(read_one(archive).hu) == 2


def test_zip_whose_members_are_encrypted_is_refused_by_name(tmp_path):
    write_series(tmp_path / "raw", along_z(0, 5))
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip")
    data = bytearray(archive.read_bytes())
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(mark)
        while at >= 0:
            data[at + place] |= 1
            at = data.find(mark, at + 4)
    archive.write_bytes(data)
    assert set(codes(archive.parent).values()) == {"encrypted", "no_ct"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"../evil.dcm": b"x"}, "lead out of it"),
        ({"/etc/evil.dcm": b"x"}, "lead out of it"),
        ({"bomb.dcm": bytes(30_000_000)}, "times its size"),
        (None, "not a zip archive"),
    ],
)
def test_zip_that_cannot_be_trusted_is_refused_as_a_whole(tmp_path, more, reason):
    write_series(tmp_path / "raw", along_z(0, 5))
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip", **(more or {}))
    if more is None:
        archive.write_bytes(archive.read_bytes()[:-30])
    jobs, rejected = discover_dicom(archive.parent)
    assert not jobs and [r.code for r in rejected] == ["archive", "no_ct"] and reason in rejected[0].reason
    assert not (tmp_path / "evil.dcm").exists()


def test_zip_with_two_members_of_one_name_or_too_many_is_refused(tmp_path, monkeypatch):
    write_series(tmp_path / "raw", along_z(0, 5))
    archive = zip_of(tmp_path / "raw", tmp_path / "in" / "x.zip")
    with pytest.warns(UserWarning), zipfile.ZipFile(archive, "a") as file:
        file.writestr("study/000.dcm", b"another")
    assert "two members of one name" in discover_dicom(archive)[1][0].reason
    monkeypatch.setattr(dicom_headers, "MAX_MEMBERS", 2)
    assert "3 members" in discover_dicom(archive)[1][0].reason


def test_zip_member_with_a_flipped_bit_is_refused_by_name(tmp_path):
    write_slice(tmp_path / "raw" / "a.dcm", head_hu())
    archive = tmp_path / "in" / "x.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        file.write(tmp_path / "raw" / "a.dcm", "a.dcm")
    data = bytearray(archive.read_bytes())
    data[2500] ^= 1  # in the pixels
    archive.write_bytes(data)
    assert codes(archive)["a.dcm"] == "damaged"
    assert discover_dicom(archive)[1][0].reason == "damaged DICOM file (BadZipFile) (copy or export it again)"


def test_dicomdir_written_by_its_class_is_named_and_its_files_are_found_without_it(tmp_path):
    write_series(tmp_path / "IMAGES", along_z(0, 5))
    directory = write_slice(tmp_path / "DICOMDIR", head_hu(), SOPClassUID=dicom_headers.MEDIA_DIRECTORY)
    assert codes(tmp_path) == {directory.name: "dicomdir"} and "dicomdir" in EXPECTED_CODES
    assert len(read_one(tmp_path).hu) == 2
