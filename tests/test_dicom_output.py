"""DICOM segmentations read back: every frame against the mask, every position against the affine."""

from __future__ import annotations

import builtins
import shutil
import subprocess

import numpy as np
import pydicom
import pytest

from anatomy import LESION_CLASSES
from dicom_headers import quiet_pydicom
from dicom_output import IDENTITY_TAGS, INFARCT, Software, write_derived_series, write_segmentation
from dicom_series import discover_dicom, read_pixels
from stage import InputError
from tests.test_dicom_series import NAME, TILTED, along_z, head_hu, real, write_series, write_slice

NAMES = dict(enumerate(LESION_CLASSES, start=1))
BY = Software("segmenter.pt", "0123456789ab")


@pytest.fixture(autouse=True)
def optional():
    """Skips where the optional package is absent."""
    pytest.importorskip("highdicom")


def pixels_of(folder):
    (job,), _ = discover_dicom(folder)
    return read_pixels(job.inputs)


def first_files(pixels):
    return [copies[0] for copies in pixels.files]


def scattered(shape):
    """A mask of three classes in few slices, one of them with two."""
    mask = np.zeros(shape, np.uint8)
    mask[1, 5:9, 20:32], mask[-1, 10:20, 5:8], mask[-1, 3, 3], mask[0, 30:33, 20:22] = 2, 6, 2, 5
    return mask


def read_back(path, pixels, names=NAMES):
    """(mask with the values of names, data set); every frame lies where the scan's affine has its slice."""
    from highdicom.seg import segread

    made = pydicom.dcmread(path)
    segread(path)  # highdicom's own reader checks the object as a whole
    mask = np.zeros(pixels.hu.shape, np.uint8)
    frames = np.atleast_3d(made.pixel_array.reshape(-1, made.Rows, made.Columns))
    numbers = {entry.SegmentNumber: entry.SegmentLabel.split()[0] for entry in made.SegmentSequence}
    stack, shared = pixels.stack, made.SharedFunctionalGroupsSequence[0]
    assert len(frames) == len(made.PerFrameFunctionalGroupsSequence) == made.NumberOfFrames
    for frame, groups in zip(frames, made.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        at = (np.linalg.inv(stack.affine) @ [*corner, 1])[:3]
        assert at[:2] == pytest.approx([0, 0], abs=1e-3)  # the first pixel: column and row
        place = np.array(stack.positions_mm) - stack.positions_mm[0] - at[2] * stack.spacing_mm[0]
        index = int(np.abs(place).argmin())
        assert abs(place[index]) < 1e-3
        source = pydicom.dcmread(pixels.files[index][0], stop_before_pixels=True)
        refers_to = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert refers_to == source.SOPInstanceUID
        which = groups if "SegmentIdentificationSequence" in groups else shared  # of a single segment
        name = numbers[which.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        value = next(value for value, known in names.items() if known == name)
        assert set(np.unique(frame)) == {0, 1} and not (mask[index][frame == 1]).any()
        mask[index][frame == 1] = value
    return mask, made


@pytest.mark.parametrize("heights", [(0, 5, 10, 15), (0, 4, 8, 9.5)], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 1, 0), TILTED, (0, 1, 0, -1, 0, 0)], ids=["axial", "tilted", "turned"]
)
def test_write_segmentation_is_the_mask_frame_by_frame_where_the_affine_has_it(
    tmp_path, heights, orientation
):
    shuffled = [heights[place] for place in (2, 0, 3, 1)]  # files in another order than slices
    write_series(tmp_path / "in", along_z(*shuffled), ImageOrientationPatient=list(orientation))
    pixels = pixels_of(tmp_path / "in")
    mask = scattered(pixels.hu.shape)
    path = tmp_path / "lesions.dcm"
    assert write_segmentation(path, first_files(pixels), mask, NAMES, BY)
    found, made = read_back(path, pixels)
    np.testing.assert_array_equal(found, mask)
    assert made.SegmentationType == "BINARY" and made.NumberOfFrames == 4
    kinds = [entry.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for entry in made.SegmentSequence]
    assert kinds == ["Hemorrhage", "Hemorrhage", INFARCT.meaning]
    labels = [entry.SegmentLabel for entry in made.SegmentSequence]
    assert labels == ["intraparenchymal hemorrhage", "subdural hemorrhage", "ischemia"]
    assert {entry.SegmentAlgorithmName for entry in made.SegmentSequence} == {BY.name}


def test_write_segmentation_belongs_to_its_patient_and_study_under_uids_of_its_own(tmp_path):
    pixels = pixels_of(write_series(tmp_path / "in", along_z(0, 5, 10)))
    mask = scattered(pixels.hu.shape)
    made = []
    for name in ("a.dcm", "b.dcm"):
        write_segmentation(tmp_path / name, first_files(pixels), mask, NAMES, BY)
        made.append(pydicom.dcmread(tmp_path / name))
    source = pydicom.dcmread(first_files(pixels)[0])
    for one in made:
        assert one.PatientName == NAME and one.PatientID == source.PatientID
        assert one.StudyInstanceUID == source.StudyInstanceUID
        assert all(tag in one for tag in IDENTITY_TAGS)
        assert one.SeriesInstanceUID != source.SeriesInstanceUID
    assert len({one.SeriesInstanceUID for one in made}) == len({one.SOPInstanceUID for one in made}) == 2
    assert made[0].FrameOfReferenceUID == made[1].FrameOfReferenceUID  # the series has none of its own


def test_write_segmentation_of_a_lesion_of_whatever_kind_says_lesion(tmp_path):
    pixels = pixels_of(write_slice(tmp_path / "in" / "a", head_hu()).parent)
    mask = np.zeros(pixels.hu.shape, np.uint8)
    mask[0, 4:9, 5:7] = 1
    write_segmentation(tmp_path / "x.dcm", first_files(pixels), mask, {1: "lesion"}, BY)
    made = pydicom.dcmread(tmp_path / "x.dcm")
    assert made.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lesion"
    np.testing.assert_array_equal(made.pixel_array, mask[0])


def test_write_segmentation_of_an_empty_mask_writes_nothing(tmp_path):
    pixels = pixels_of(write_series(tmp_path / "in", along_z(0, 5)))
    empty = np.zeros(pixels.hu.shape, np.uint8)
    assert not write_segmentation(tmp_path / "x.dcm", first_files(pixels), empty, NAMES, BY)
    assert not (tmp_path / "x.dcm").exists()


def test_write_segmentation_takes_headers_as_sparse_as_those_of_rsna(tmp_path):
    ids = {"StudyInstanceUID": "ID_0123abcd", "SeriesInstanceUID": "ID_4567"}
    absent = ("PatientName", "PatientBirthDate", "AccessionNumber")
    folder = tmp_path / "in"
    for index, height in enumerate((0, 5, 10)):
        tags = {"SOPInstanceUID": f"ID_{index}", "ImageOrientationPatient": list(TILTED), **ids}
        with quiet_pydicom():
            write_slice(folder / f"{index}", head_hu(index), (0, 0, height), drop=absent, **tags)
    pixels = pixels_of(folder)
    mask = scattered(pixels.hu.shape)
    write_segmentation(tmp_path / "x.dcm", first_files(pixels), mask, NAMES, BY)
    with quiet_pydicom():
        found, made = read_back(tmp_path / "x.dcm", pixels)
        assert made.StudyInstanceUID == "ID_0123abcd"
    np.testing.assert_array_equal(found, mask)


def test_write_segmentation_of_slices_without_a_position_says_so(tmp_path):
    for index in range(2):
        drop = ("ImagePositionPatient",)
        write_slice(tmp_path / "in" / f"{index}", head_hu(index), InstanceNumber=index, drop=drop)
    pixels = pixels_of(tmp_path / "in")
    mask = np.ones(pixels.hu.shape, np.uint8)
    with pytest.raises(InputError, match="ImagePositionPatient is missing.*--mask-format nifti"):
        write_segmentation(tmp_path / "x.dcm", first_files(pixels), mask, NAMES, BY)


def test_write_segmentation_refuses_masks_that_do_not_belong_to_the_files(tmp_path):
    pixels = pixels_of(write_series(tmp_path / "in", along_z(0, 5)))
    files, mask = first_files(pixels), np.ones(pixels.hu.shape, np.uint8)
    for wrong, words in ((mask[:1], "2 files"), (mask[:, 1:], "slices of the series"), (9 * mask, "holds 9")):
        with pytest.raises(ValueError, match=words):
            write_segmentation(tmp_path / "x.dcm", files, wrong, NAMES, BY)


def test_write_segmentation_without_highdicom_names_the_package(tmp_path, monkeypatch):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("highdicom"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"\(pip install highdicom\)"):
        write_segmentation(tmp_path / "x.dcm", [], np.zeros((0, 1, 1), np.uint8), NAMES, BY)


def test_real_ge_head_gets_a_segmentation_in_its_geometry(tmp_path):
    pixels = pixels_of(real("head_ge_tilted"))
    mask = scattered(pixels.hu.shape)
    write_segmentation(tmp_path / "x.dcm", first_files(pixels), mask, NAMES, BY)
    found, _ = read_back(tmp_path / "x.dcm", pixels)
    np.testing.assert_array_equal(found, mask)


# ---------------------------------------------------------------- derived slices


def check_derived(folder, pixels, hu):
    """Written, read again by our reader, and by the validator where there is one."""
    written = write_derived_series(folder, first_files(pixels), hu, BY)
    back = pixels_of(folder)
    np.testing.assert_array_equal(back.hu, hu)
    np.testing.assert_allclose(back.stack.affine, pixels.stack.affine, atol=1e-6)
    for path in written if shutil.which("dciodvfy") else []:
        told = subprocess.run(["dciodvfy", path], capture_output=True, text=True).stderr
        assert "Error" not in told, told
    return [pydicom.dcmread(path) for path in written]


def test_derived_series_holds_the_values_in_the_geometry_of_its_source_under_new_uids(tmp_path):
    pixels = pixels_of(write_series(tmp_path / "in", along_z(0, 5, 10)))
    hu = pixels.hu + np.arange(3)[:, None, None].astype(np.int16)
    made = check_derived(tmp_path / "out", pixels, hu.clip(-1024, 3071))
    sources = [pydicom.dcmread(file) for file in first_files(pixels)]
    for one, source in zip(made, sources, strict=True):
        assert (one.PatientName, one.PatientID) == (NAME, source.PatientID)
        assert one.StudyInstanceUID == source.StudyInstanceUID
        assert one.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert one.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert BY.name in one.DerivationDescription
    uids = {one.SOPInstanceUID for one in (*made, *sources)}
    assert len(uids) == 6
    assert len({one.SeriesInstanceUID for one in made}) == 1
    assert made[0].SeriesInstanceUID != sources[0].SeriesInstanceUID


def test_derived_series_rounds_and_clips_to_what_12_bits_hold(tmp_path):
    pixels = pixels_of(write_series(tmp_path / "in", along_z(0, 5)))
    hu = np.full(pixels.hu.shape, 10.4)
    hu[0, 0, :3] = -2000, 5000, 10.6
    write_derived_series(tmp_path / "out", first_files(pixels), hu, BY)
    stored = pydicom.dcmread(tmp_path / "out" / "00001.dcm").pixel_array.astype(int) - 1024
    assert stored[0, :4].tolist() == [-1024, 3071, 11, 10]


def test_derived_series_of_sources_without_position_or_of_another_shape_is_refused(tmp_path):
    pixels = pixels_of(write_series(tmp_path / "in", along_z(0, 5)))
    files = first_files(pixels)
    with pytest.raises(ValueError, match="1 files for slices of shape"):
        write_derived_series(tmp_path / "out", files[:1], pixels.hu, BY)
    with pytest.raises(ValueError, match="as the derived slices are"):
        write_derived_series(tmp_path / "out", files, pixels.hu[:, 1:], BY)
    slice_ = pydicom.dcmread(files[0])
    del slice_.ImagePositionPatient
    slice_.save_as(files[0])
    with pytest.raises(InputError, match="ImagePositionPatient is missing"):
        write_derived_series(tmp_path / "out", files, pixels.hu, BY)


def test_real_tilted_head_comes_back_as_a_derived_series(tmp_path):
    pixels = pixels_of(real("head_ge_tilted"))
    check_derived(tmp_path, pixels, pixels.hu)
