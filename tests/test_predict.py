"""A new scan through predict.py with a segmenter: where its mask lies, when it is written, what is said."""

from __future__ import annotations

import json
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest

import checkpoints
import predict
import stage
import train_segmenter
from anatomy import LESION_CLASSES
from lesion_reading import slice_thickness_mm
from phantom import generate_phantom
from tests.test_dicom_output import pixels_of, read_back
from tests.test_dicom_series import TILTED, write_slice
from tests.toy_models import bright, write_models  # noqa: F401 a fixture
from volumes import LPS_TO_RAS

pytestmark = pytest.mark.usefixtures("bright")

GAP_MM, ROW_MM, COLUMN_MM = 5.0, 1.9, 2.3
LEFT = (slice(1, 4), slice(24, 34), slice(28, 36))  # one-sided, in the brain of every slice


def run(tmp_path, source, models, *more):
    """prediction.json and the folder of the only series."""
    arguments = ["--input", source, "--models", models, "--out", tmp_path / "out", "--device", "cpu", *more]
    predict.main([str(word) for word in arguments])
    (folder,) = (entry for entry in (tmp_path / "out").iterdir() if entry.is_dir())
    return json.loads((folder / "prediction.json").read_text()), folder


def head():
    """((5, 60, 52) HU of a phantom without bone and blood but for one lesion, where it is)."""
    hu = generate_phantom(3, size=(60, 52), slices=5).hu.round()
    hu = np.where(hu > 45, 45, hu)
    lesion = np.zeros(hu.shape, bool)
    lesion[LEFT] = True
    lesion[3, 37:41, 29:34] = True
    return np.where(lesion, 85, hu).astype(np.int16), lesion


def corner(index, heights=None):
    return np.array([-60.0, -55.0, GAP_MM * index if heights is None else heights[index]])


def write_head(folder, hu, heights=None, orientation=TILTED):
    for index, image in enumerate(hu):
        tags = {"PixelSpacing": [ROW_MM, COLUMN_MM], "ImageOrientationPatient": list(orientation)}
        name = f"{(7 * index) % 11}.dcm"  # in no order
        write_slice(folder / name, image, corner(index, heights), **tags)
    return folder


def centroid_lps(inside, heights=None, orientation=TILTED):
    """Of the voxels of a mask, from the headers alone."""
    index, row, column = np.nonzero(inside)
    corners = np.array([corner(n, heights) for n in range(len(inside))])[index]
    x, y = np.array(orientation).reshape(2, 3)
    return (corners + column[:, None] * COLUMN_MM * x + row[:, None] * ROW_MM * y).mean(axis=0)


def nifti_centroid_lps(path):
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    place = np.argwhere(data > 0).mean(axis=0)
    return (LPS_TO_RAS @ image.affine @ [*place, 1])[:3], image


@pytest.fixture
def models(tmp_path):
    return write_models(tmp_path / "models")


# ---------------------------------------------------------------- geometry


def test_predict_puts_a_one_sided_lesion_of_a_tilted_series_where_it_is(tmp_path, models, capsys):
    pytest.importorskip("highdicom")
    hu, lesion = head()
    source = write_head(tmp_path / "in", hu)
    result, folder = run(tmp_path, source, models, "--segment", "--mask-format", "nifti", "dicom-seg")
    assert abs(result["gantry_tilt_deg"]) == pytest.approx(18.5, abs=0.01)
    found, image = nifti_centroid_lps(folder / "lesions.nii.gz")
    half_a_voxel = np.abs(np.array(image.affine)[:3, :3]).sum(axis=1) / 2
    assert (np.abs(found - centroid_lps(lesion)) < half_a_voxel).all()
    np.testing.assert_allclose(found, centroid_lps(lesion), atol=1.0)
    denoised = nib.load(folder / "denoised.nii.gz")
    np.testing.assert_array_equal(image.affine, denoised.affine)
    assert image.shape == denoised.shape and image.get_data_dtype() == np.uint8

    facts, mask = result["lesions"], np.asarray(image.dataobj).transpose(2, 1, 0)
    slice_mm = GAP_MM * TILTED[4]  # along the normal
    assert facts["volume_ml"] == pytest.approx((mask > 0).sum() * slice_mm * ROW_MM * COLUMN_MM / 1000)
    assert facts["volume_ml"] == pytest.approx(lesion.sum() * slice_mm * ROW_MM * COLUMN_MM / 1000, rel=0.15)
    assert facts["lesions"] == 2 and facts["contradiction"] is None
    assert [entry["area_mm2"] > 0 for entry in facts["slices"]] == lesion.any((1, 2)).tolist()
    assert f"lesions: 2, {facts['volume_ml']:.2f} ml" in capsys.readouterr().out
    assert (folder / "lesions.png").read_bytes().startswith(b"\x89PNG")

    drawn, made = read_back(folder / "lesions.dcm", pixels_of(source), {1: "lesion"})
    np.testing.assert_array_equal(drawn, mask)
    assert made.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == (
        "segmenter.pt"
    )


def test_predict_of_uneven_gaps_resamples_the_mask_and_says_so(tmp_path, models, capsys):
    hu, lesion = head()
    heights = [0.0, 5.0, 10.0, 12.0, 20.0]
    result, folder = run(tmp_path, write_head(tmp_path / "in", hu, heights), models, "--segment")
    assert "mask by nearest slice" in capsys.readouterr().out
    _, image = nifti_centroid_lps(folder / "lesions.nii.gz")
    assert set(np.unique(image.dataobj)) == {0, 1}
    assert image.affine[:3, 3] == pytest.approx(nib.load(folder / "denoised.nii.gz").affine[:3, 3])
    per_slice = np.array([entry["area_mm2"] for entry in result["lesions"]["slices"]])
    thickness = np.array([5.0, 5.0, 3.5, 5.0, 8.0]) * TILTED[4]
    assert result["lesions"]["volume_ml"] == pytest.approx(per_slice @ thickness / 1000)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PSR"])
def test_predict_of_a_nifti_gives_the_mask_on_its_own_grid(tmp_path, models, axes):
    hu, lesion = head()
    affine = np.array([[-COLUMN_MM, 0, 0, 60], [0, -ROW_MM, 0, 55], [0, 0.9, GAP_MM, 0], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), affine)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axes))
    )
    stored = image.as_reoriented(turn)
    truth = nib.Nifti1Image(lesion.astype(np.uint8).transpose(2, 1, 0), affine).as_reoriented(turn)
    folder = tmp_path / "in"
    folder.mkdir()
    nib.save(stored, folder / "head.nii.gz")
    nib.save(truth, folder / "head_mask.nii.gz")
    _, out = run(tmp_path, folder, models, "--segment")
    found = nib.load(out / "lesions.nii.gz")
    assert "".join(nib.aff2axcodes(found.affine)) == axes
    assert found.shape == stored.shape
    np.testing.assert_allclose(found.affine, stored.affine, atol=1e-4)
    inside, expected = np.asarray(found.dataobj) > 0, np.asarray(truth.dataobj) > 0
    np.testing.assert_allclose(np.argwhere(inside).mean(axis=0), np.argwhere(expected).mean(axis=0), atol=0.5)
    assert (inside & expected).sum() > 0.8 * expected.sum()


@pytest.mark.slow
def test_predict_of_the_real_head_outlines_in_its_geometry(tmp_path, models, real_data):
    pytest.importorskip("highdicom")
    source = real_data / "head_ge_tilted"
    result, folder = run(tmp_path, source, models, "--segment", "--mask-format", "nifti", "dicom-seg")
    pixels = pixels_of(source)
    mask, _ = read_back(folder / "lesions.dcm", pixels, {1: "lesion"})
    stack = pixels.stack
    areas_mm2 = mask.sum((1, 2)) * stack.spacing_mm[1] * stack.spacing_mm[2]
    assert [entry["area_mm2"] for entry in result["lesions"]["slices"]] == pytest.approx(areas_mm2.tolist())
    thickness_mm = slice_thickness_mm(stack.positions_mm, stack.spacing_mm[0])
    assert result["lesions"]["volume_ml"] == pytest.approx(areas_mm2 @ thickness_mm / 1000)
    image, denoised = (nib.load(folder / name) for name in ("lesions.nii.gz", "denoised.nii.gz"))
    np.testing.assert_array_equal(image.affine, denoised.affine)
    assert image.shape == denoised.shape
    data = np.asarray(image.dataobj)  # both ends of an uneven series stay where they are
    np.testing.assert_array_equal(data[..., 0].T, mask[0])
    np.testing.assert_array_equal(data[..., -1].T, mask[-1])
    volume_ml = data.sum() * np.abs(np.linalg.det(image.affine)) / 1000
    assert volume_ml == pytest.approx(result["lesions"]["volume_ml"], rel=0.03)


# ---------------------------------------------------------------- when the segmenter is asked


def test_predict_of_a_scan_called_normal_leaves_no_mask(tmp_path, models, capsys):
    source = write_head(tmp_path / "in", head()[0])
    _, folder = run(tmp_path, source, models, "--segment")
    assert (folder / "lesions.nii.gz").exists()
    before = json.loads((folder / "prediction.json").read_text())
    write_models(models, threshold=2.0)
    result, folder = run(tmp_path, source, models, "--segment")
    assert not [path for path in folder.iterdir() if path.name.startswith("lesions")]  # of the run before
    assert result["lesions"]["segmented"] is False and "2.000" in result["lesions"]["why"]
    assert before["lesions"]["segmented"] is True
    assert "not outlined" in capsys.readouterr().out


def test_predict_flags_a_contradiction_and_changes_no_answer(tmp_path, capsys):
    source = write_head(tmp_path / "in", head()[0])
    models = write_models(tmp_path / "models", threshold=2.0)
    plain, _ = run(tmp_path, source, models)
    assert plain["lesions"] is None
    result, folder = run(tmp_path, source, models, "--segment", "--segment-always")
    assert (folder / "lesions.nii.gz").exists()
    assert "calls the scan normal" in result["lesions"]["contradiction"]
    assert "CONTRADICTION" in capsys.readouterr().out
    for name in ("scan", "slices", "thresholds"):
        assert result[name] == plain[name]
    write_models(models, threshold=0.0, rule_ml=1e4)
    result, _ = run(tmp_path, source, models, "--segment")
    assert "sees a lesion" in result["lesions"]["contradiction"] and result["scan"]["positive"] is True


def test_predict_with_nothing_outlined_writes_an_empty_mask_and_no_dicom_seg(tmp_path, models, capsys):
    pytest.importorskip("highdicom")
    source = write_head(tmp_path / "in", np.minimum(head()[0], 45))
    result, folder = run(tmp_path, source, models, "--segment", "--mask-format", "nifti", "dicom-seg")
    assert not np.asarray(nib.load(folder / "lesions.nii.gz").dataobj).any()
    assert not (folder / "lesions.dcm").exists() and "no DICOM SEG" in capsys.readouterr().err
    assert result["lesions"]["lesions"] == 0
    assert "below the 1.00 ml" in result["lesions"]["contradiction"]


# ---------------------------------------------------------------- what goes in, and what is refused


def test_predict_reads_a_zip_of_dicom_as_the_folder(tmp_path, models):
    pytest.importorskip("highdicom")
    source = write_head(tmp_path / "in", head()[0])
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in source.iterdir():
            archive.write(path, f"deep/{path.name}")
    more = ("--segment", "--mask-format", "dicom-seg")
    plain, folder = run(tmp_path, source, models, *more)
    mask = pydicom.dcmread(folder / "lesions.dcm").pixel_array
    zipped, folder = run(tmp_path, tmp_path / "in.zip", models, *more)
    assert zipped == plain
    np.testing.assert_array_equal(pydicom.dcmread(folder / "lesions.dcm").pixel_array, mask)
    assert not (folder / "lesions.nii.gz").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--segment-always"], "--segment too"),
        (["--mask-format", "nifti"], "--segment too"),
        (["--segment", "--segmenter", "nowhere.pt"], "train_segmenter.py"),
        (["--segment", "--mask-format", "png"], "--mask-format"),
    ],
)
def test_predict_refuses_what_has_no_effect_or_does_not_exist(tmp_path, models, more, words):
    with pytest.raises(stage.InputError, match=words):
        run(tmp_path, write_head(tmp_path / "in", head()[0]), models, *more)


def test_predict_refuses_a_dicom_seg_of_a_nifti(tmp_path, models):
    pytest.importorskip("highdicom")
    nib.save(nib.Nifti1Image(head()[0].transpose(2, 1, 0), np.diag([-2, -2, 5, 1.0])), tmp_path / "a.nii")
    with pytest.raises(stage.InputError, match="--mask-format nifti"):
        run(tmp_path, tmp_path / "a.nii", models, "--segment", "--mask-format", "dicom-seg")


def test_predict_of_a_series_that_no_dicom_seg_can_refer_to_writes_the_rest(tmp_path, models):
    pytest.importorskip("highdicom")
    for index, image in enumerate(head()[0]):
        path = tmp_path / "in" / f"{index}.dcm"
        write_slice(path, image, drop=("ImagePositionPatient",), InstanceNumber=index)
    with pytest.raises(stage.StageError, match="no DICOM of 1 of 1 series") as caught:
        run(tmp_path, tmp_path / "in", models, "--segment", "--mask-format", "nifti", "dicom-seg")
    assert caught.value.exit_code == stage.EXIT_REJECTED
    assert list((tmp_path / "out").glob("*/lesions.nii.gz"))


def test_predict_refuses_a_segmenter_of_another_denoiser(tmp_path):
    parents = {"denoiser": {"path": "denoiser.pt", "sha256": "other"}}
    models = write_models(tmp_path / "models", parents=parents, input="denoised")
    with pytest.raises(stage.InputError, match="segmenter.pt: was trained on the output of another denoiser"):
        run(tmp_path, write_head(tmp_path / "in", head()[0]), models, "--segment")


# ---------------------------------------------------------------- with a segmenter that was trained


def test_predict_takes_what_train_segmenter_made_and_its_volume_rule(tmp_path, models, split_data):
    options = ["--data", split_data, "--out", tmp_path, "--name", "mine", "--epochs", 1, "--widths", 4, 8]
    train_segmenter.main([str(word) for word in [*options, "--classes", "lesions", "--device", "cpu"]])
    rule = checkpoints.load(tmp_path / "mine.pt", "segmenter")["volume_rule"]
    assert "on val" in rule["origin"] and (rule["value"] is None or rule["value"] > 0)
    source = write_head(tmp_path / "in", head()[0])
    result, folder = run(tmp_path, source, models, "--segment", "--segmenter", tmp_path / "mine.pt")
    facts, mask = result["lesions"], np.asarray(nib.load(folder / "lesions.nii.gz").dataobj)
    assert facts["volume_rule"] == (None if rule["value"] is None else rule)
    assert list(facts["volume_ml_by_class"]) == list(LESION_CLASSES)
    assert set(np.unique(mask)) <= set(range(7)) and "mine.pt" in result["models"]
    volume_ml = (mask > 0).sum() * GAP_MM * TILTED[4] * ROW_MM * COLUMN_MM / 1000
    assert facts["volume_ml"] == pytest.approx(volume_ml)


# ---------------------------------------------------------------- many studies, again and again


def call(tmp_path, *more):
    predict.main([str(word) for word in ("--models", tmp_path / "models", "--out", tmp_path / "out", *more)])
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_predict_of_many_studies_says_in_one_manifest_what_became_of_each(tmp_path, models, capsys):
    hu, _ = head()
    first, second = write_head(tmp_path / "a", hu), tmp_path / "b.nii.gz"
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-1.0, -1.0, 5.0, 1.0])), second)
    (tmp_path / "c").mkdir()
    nib.save(nib.Nifti1Image(np.full((20, 20, 3), 7, np.int16), np.eye(4)), tmp_path / "c" / "odd.nii")
    with pytest.raises(stage.StageError, match="1 of 3 series could not be read") as caught:
        call(tmp_path, "--input", first, second, tmp_path / "c")
    assert caught.value.exit_code == stage.EXIT_REJECTED
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [scan["status"] for scan in manifest["scans"]] == ["done", "done", "failed"]
    assert "HU" in manifest["scans"][2]["reason"]
    for scan in manifest["scans"][:2]:
        assert (tmp_path / "out" / scan["series_uid"] / "prediction.json").exists()
    assert manifest["asked"]["models"].keys() == {"denoiser.pt", "classifier.pt"}


def test_predict_again_leaves_finished_scans_alone_until_something_is_asked_otherwise(
    tmp_path, models, capsys
):
    source = write_head(tmp_path / "in", head()[0])
    (scan,) = call(tmp_path, "--input", source)["scans"]
    folder = tmp_path / "out" / scan["series_uid"]
    before = (folder / "prediction.json").stat().st_mtime_ns
    call(tmp_path, "--input", source)
    assert "finished earlier" in capsys.readouterr().out
    assert (folder / "prediction.json").stat().st_mtime_ns == before
    call(tmp_path, "--input", source, "--gradcam")
    assert (folder / "gradcam.png").exists()
    after = (folder / "prediction.json").stat().st_mtime_ns
    assert after != before
    call(tmp_path, "--input", source)  # without Grad-CAM again: its files do not stay
    assert not (folder / "gradcam.png").exists() and not (folder / "gradcam.nii.gz").exists()
    latest = (folder / "prediction.json").stat().st_mtime_ns
    call(tmp_path, "--input", source, "--overwrite")
    assert (folder / "prediction.json").stat().st_mtime_ns != latest


def test_predict_of_a_scan_that_was_killed_midway_begins_it_anew(tmp_path, models):
    source = write_head(tmp_path / "in", head()[0])
    (scan,) = call(tmp_path, "--input", source)["scans"]
    folder = tmp_path / "out" / scan["series_uid"]
    (folder / "prediction.json").unlink()  # it is written last
    (folder / "denoised.nii.gz").write_bytes(b"half")
    call(tmp_path, "--input", source)
    assert nib.load(folder / "denoised.nii.gz").shape == (52, 60, 5)
    assert (folder / "prediction.json").exists()


def test_predict_with_gradcam_gives_its_heat_in_the_geometry_of_the_scan(tmp_path, models):
    source = write_head(tmp_path / "in", head()[0])
    _, folder = run(tmp_path, source, models, "--gradcam", "stroke")
    heat, denoised = (nib.load(folder / name) for name in ("gradcam.nii.gz", "denoised.nii.gz"))
    np.testing.assert_array_equal(heat.affine, denoised.affine)
    assert heat.shape == denoised.shape and heat.get_data_dtype() == np.float32
    assert (np.asarray(heat.dataobj) >= 0).all()
    assert (folder / "gradcam.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(stage.InputError, match="--gradcam tumour: .* knows stroke"):
        run(tmp_path, source, models, "--gradcam", "tumour")


def test_predict_with_dicom_writes_a_series_that_reads_back_as_what_was_denoised(tmp_path, models):
    source = write_head(tmp_path / "in", head()[0])
    _, folder = run(tmp_path, source, models, "--dicom")
    back = pixels_of(folder / "denoised")
    volume = np.asarray(nib.load(folder / "denoised.nii.gz").dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(back.hu, volume.clip(-1024, 3071))
    np.testing.assert_allclose(back.stack.affine, pixels_of(source).stack.affine, atol=1e-6)
    affine = np.diag([-1.0, -1.0, 5.0, 1.0])
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(head()[0].transpose(2, 1, 0), affine), path)
    with pytest.raises(stage.InputError, match="--dicom needs one"):
        run(tmp_path, path, models, "--dicom")
