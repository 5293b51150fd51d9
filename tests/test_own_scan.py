"""A scan of one's own: from any kind of file, by the networks as predict.py does, and back to files."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

import metrics
import own_scan
import stage
from dataset import fit_to_square
from dose import DOSE_MODELS
from inference import Network, denoise, load_classifier, load_denoiser, load_segmenter, read, segment
from own_scan import Dose, Request
from scans import discover
from tests.test_app import SIZE, SLICES, make_scan
from tests.test_dicom_series import along_z, write_series
from tests.toy_models import bright, write_models  # noqa: F401 a fixture
from volumes import AIR_HU, ScanError, write_nifti

QUIET = pytest.mark.usefixtures("bright")


def silent(_share: float, _what: str) -> None:
    """Progress that nobody looks at."""


def networks(folder: Path) -> dict[str, Network]:
    write_models(folder)
    loads = {"denoiser": load_denoiser, "classifier": load_classifier, "segmenter": load_segmenter}
    return {kind: Network(path := folder / f"{kind}.pt", *load(path)) for kind, load in loads.items()}


def as_nifti(path: Path) -> bytes:
    scan = make_scan()
    write_nifti(path, scan.hu, scan.affine)
    return path.read_bytes()


def as_png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def as_npz(hu: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, hu)
    return file.getvalue()


# ---------------------------------------------------------------- from files


def test_open_scan_of_every_kind_of_upload_gives_its_slices_in_order(tmp_path):
    write_series(tmp_path / "in", along_z(0, 5, 10))
    files = sorted(path for path in (tmp_path / "in").rglob("*") if path.is_file())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        for path in files:
            made.write(path, path.name)
    slices = make_scan().hu
    kinds = {
        "dicom": [(f"study/{path.name}", path.read_bytes()) for path in reversed(files)],
        "zip": [("study.zip", archive.getvalue())],
        "nifti": [("scan.NII.gz", as_nifti(tmp_path / "made.nii.gz"))],
        "npz": [(f"{index}.npz", as_npz(hu)) for index, hu in enumerate(slices)][::-1],
    }
    counts = {"dicom": 3, "zip": 3, "nifti": SLICES, "npz": SLICES}
    for kind, given in kinds.items():
        with own_scan.uploaded(given) as path:
            opened = own_scan.open_scan(path)
            folder = path
        assert len(opened.scan.hu) == counts[kind], kind
        assert opened.dicom == (kind in ("dicom", "zip")) and not folder.exists()
        if kind == "npz":
            assert np.array_equal(opened.scan.hu, slices)


def test_open_scan_of_an_8_bit_picture_takes_the_brain_window_and_says_so():
    grey = np.full((40, 40), 0, np.uint8)
    grey[10:30, 10:30] = 255
    grey[15:20, 15:20] = 51
    with own_scan.uploaded([("slice.png", as_png(grey))]) as path:
        opened = own_scan.open_scan(path)
    assert sorted(set(opened.scan.hu.ravel())) == [0, 16, 80]  # 51 / 255 of 80 HU
    assert opened.scan.intensity == "hu" and "window 40 / 80 HU" in opened.notes[0]


def test_open_scan_of_several_series_takes_the_one_that_is_asked_for(tmp_path):
    for name, count in (("1.2.3.4", 3), ("1.2.3.5", 4)):
        heights = range(0, 5 * count, 5)
        write_series(tmp_path / "in" / name, along_z(*heights), SeriesInstanceUID=name)
    found = [own_scan.open_scan(tmp_path / "in", number) for number in (0, 1, 7)]
    assert {len(one.scan.hu) for one in found[:2]} == {3, 4} and {one.series for one in found} == {2}
    assert len(found[2].scan.hu) == len(found[1].scan.hu)  # the last, where there are not so many


@pytest.mark.parametrize("files", [[("note.txt", b"no scan")], [("a.dcm", b"")], [("a.zip", b"PK")]])
def test_uploaded_files_without_a_scan_are_refused_without_a_path_of_this_machine(files):
    with pytest.raises(stage.InputError) as caught, own_scan.uploaded(files) as path:
        own_scan.open_scan(path)
    assert str(path) not in str(caught.value) and "\n" not in str(caught.value)


def test_uploaded_names_cannot_lead_out_of_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = ["../../a.nii", "/etc/b.nii", "c\x00d.nii", "e" * 999 + ".nii", "..", "C:\\f.nii"]
    with own_scan.uploaded([(name, b"x") for name in names]) as path:
        assert len(list(path.iterdir())) == len(names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", own_scan.SAMPLES)
def test_sample_scan_has_what_it_is_called_by(kind):
    scan = own_scan.sample_scan(kind).scan
    label = {"Haemorrhage": "any", "Infarct": "ischemia", "Normal": None}[kind]
    assert {name for name in ("any", "ischemia") if scan.labels[name] == 1} == ({label} if label else set())


# ---------------------------------------------------------------- what networks say


@QUIET
def test_work_is_what_its_parts_say_of_the_scan(tmp_path):
    own, scan = networks(tmp_path), make_scan()
    request = Request(own["denoiser"], own["classifier"], through=True, segmenter=own["segmenter"])
    outcome = own_scan.work(scan, request, None, silent)
    whole = denoise(own["denoiser"].network, scan.hu, own_scan.ROUTINE_NOISE_HU)
    whole[scan.hu == AIR_HU] = AIR_HU
    np.testing.assert_allclose(outcome.denoised, whole, atol=1e-3)  # other batches round otherwise
    small = fit_to_square(scan.hu, scan.spacing_mm, own["classifier"].facts["size"], AIR_HU)
    seen = denoise(own["denoiser"].network, small, own_scan.ROUTINE_NOISE_HU)
    said = read(own["classifier"].network, seen)
    assert outcome.facts["scan"]["probability"] == pytest.approx(said.scans[0, 0])
    np.testing.assert_allclose([one["probability"] for one in outcome.facts["slices"]], said.slices[:, 0])
    found = segment(own["segmenter"].network, small)  # which was trained on clean slices
    assert found.any() and outcome.lesions.mask.shape == scan.hu.shape
    assert outcome.lesions.mask.any(axis=(1, 2)).tolist() == found.any(axis=(1, 2)).tolist()


def test_work_at_a_simulated_dose_has_the_noise_of_the_study_and_measures_it():
    scan = make_scan()
    dose = Dose("calibrated", 5.0, 42)
    outcome = own_scan.work(scan, Request(dose=dose), None, silent)
    again = own_scan.work(scan, Request(dose=dose), None, silent)
    assert np.array_equal(outcome.given, again.given)
    assert not np.array_equal(outcome.given, own_scan.work(scan, Request(dose=dose._replace(seed=1))).given)
    sd = (outcome.given - scan.hu)[scan.truth == 35].std()
    assert sd == pytest.approx(DOSE_MODELS["calibrated"].sigma_hu(5.0), rel=0.1)
    assert outcome.facts["dose"] == {"model": "calibrated", "value": 5.0, "seed": 42}
    assert set(outcome.facts["quality"]["given"]) == set(metrics.IMAGE_METRICS)


@QUIET
def test_work_with_a_known_outcome_takes_over_its_images(tmp_path, monkeypatch):
    own, scan = networks(tmp_path), make_scan()
    request = Request(own["denoiser"], own["classifier"], dose=Dose("calibrated", 5.0, 42))
    first = own_scan.work(scan, request, None, silent)
    monkeypatch.setattr(own_scan, "_in_parts", None)  # it would fail
    again = own_scan.work(scan, request._replace(threshold=0.5), None, silent, first)
    assert again.denoised is first.denoised and again.given is first.given
    assert again.facts["quality"] == first.facts["quality"]
    assert again.facts["scan"]["probability"] == first.facts["scan"]["probability"]


@QUIET
def test_work_with_a_threshold_of_ones_own_calls_by_it(tmp_path):
    own, scan = networks(tmp_path), make_scan()
    for threshold, positive in ((0.0, True), (1.1, False)):
        request = Request(classifier=own["classifier"], segmenter=own["segmenter"], threshold=threshold)
        outcome = own_scan.work(scan, request, None, silent)
        assert outcome.facts["scan"]["positive"] is positive
        assert (outcome.lesions.mask is not None) is positive
        assert outcome.facts["thresholds"]["scan"] == {"value": threshold, "origin": "chosen by hand"}


@QUIET
def test_work_explains_on_the_pixels_of_the_scan_and_tells_its_progress(tmp_path):
    own, scan, told = networks(tmp_path), make_scan(rows=39), []
    request = Request(own["denoiser"], own["classifier"], of_class="stroke")
    outcome = own_scan.work(scan, request, None, lambda share, what: told.append((share, what)))
    assert outcome.heat.shape == scan.hu.shape and (outcome.heat >= 0).all()
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert {"Denoising", "Classifying", "Explaining"} <= {what for _, what in told}


def test_work_against_a_reference_measures_as_metrics_does_and_refuses_another_shape():
    scan, reference = make_scan(), make_scan("other")
    reference.hu[:] = reference.truth
    outcome = own_scan.work(scan, Request(), reference, silent)
    inside = own_scan.anatomy.MASKS[own_scan.anatomy.DEFAULT_MASK](reference.hu, reference.spacing_mm)
    expected = metrics.image_quality(scan.hu, reference.hu, inside, np.zeros(SLICES))
    assert outcome.facts["quality"]["given"] == pytest.approx(expected, nan_ok=True)
    with pytest.raises(stage.InputError, match="reference: its shape"):
        own_scan.work(scan, Request(), make_scan(rows=39), silent)


# ---------------------------------------------------------------- to files


@QUIET
def test_files_of_an_outcome_hold_what_was_found(tmp_path):
    own = networks(tmp_path)
    opened = own_scan.Opened(make_scan())
    request = Request(own["denoiser"], own["classifier"], segmenter=own["segmenter"])
    outcome = own_scan.work(opened.scan, request, None, silent)
    (tmp_path / "out.nii.gz").write_bytes(own_scan.nifti_bytes(outcome.denoised, opened))
    image = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(np.asarray(image.dataobj).transpose(2, 1, 0), outcome.denoised, atol=0.5)
    np.testing.assert_allclose(image.affine[:2], -opened.scan.affine[:2])  # RAS
    facts = json.loads(own_scan.json_bytes(outcome))
    assert len(facts["slices"]) == SLICES and facts["models"]["denoiser.pt"] == "denoiser"
    with Image.open(io.BytesIO(own_scan.sheet_bytes(opened, outcome))) as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > SIZE


@QUIET
def test_dicom_of_an_outcome_is_of_the_same_study_under_new_uids(tmp_path):
    own = networks(tmp_path / "models")
    write_series(tmp_path / "in", along_z(0, 5, 10))
    scan = own_scan.open_scan(tmp_path / "in").scan
    files = own_scan.dicom_files(tmp_path / "in", 0)
    denoised = scan.hu.astype(np.float32) + 7
    archive = zipfile.ZipFile(io.BytesIO(own_scan.derived_bytes(files, denoised, own["denoiser"])))
    made = tmp_path / "derived"
    archive.extractall(made)
    (job,), _ = discover(made)
    again = own_scan.read_scan(job)
    assert np.array_equal(again.hu, np.clip(denoised, -1024, 3071).astype(np.int16))
    np.testing.assert_allclose(again.affine, scan.affine)
    first = pydicom.dcmread(files[0])
    for path in made.iterdir():
        one = pydicom.dcmread(path)
        assert one.StudyInstanceUID == first.StudyInstanceUID
        assert one.SeriesInstanceUID != first.SeriesInstanceUID
    pytest.importorskip("highdicom")
    mask = np.zeros(scan.hu.shape, np.uint8)
    mask[1, 5:9, 5:9] = 1
    found = pydicom.dcmread(io.BytesIO(own_scan.segmentation_bytes(files, mask, own["segmenter"])))
    assert found.Modality == "SEG" and found.StudyInstanceUID == first.StudyInstanceUID


def test_open_scan_of_damaged_pixels_names_the_file_as_it_was_uploaded(tmp_path):
    write_series(tmp_path / "in", along_z(0, 5, 10))
    files = sorted(path for path in (tmp_path / "in").rglob("*") if path.is_file())
    given = [(path.name, path.read_bytes()[: -200 if path == files[1] else None]) for path in files]
    with pytest.raises((stage.InputError, ScanError)) as caught, own_scan.uploaded(given) as path:
        own_scan.open_scan(path)
    assert files[1].name in str(caught.value)
