"""What a scan is, and its way out to NIfTI."""

from __future__ import annotations

import pickle

import nibabel as nib
import numpy as np
import pytest

from tests.test_dicom_series import TILTED, read_one, real
from volumes import ScanError, stack_geometry, write_nifti

# ---------------------------------------------------------------- geometry


def test_gantry_tilt_of_an_oblique_stack_without_shear_is_zero():
    normal = np.cross(TILTED[:3], TILTED[3:])
    corners = np.arange(4)[:, None] * 3.0 * normal
    stack = stack_geometry(corners, TILTED, (0.5, 0.5), 5.0)
    assert stack.gantry_tilt_deg == 0
    assert stack_geometry(corners[:1], TILTED, (0.5, 0.5), 5.0).gantry_tilt_deg == pytest.approx(
        18.5, abs=0.01
    )


def test_scan_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ScanError("a/b", "is wrong", "mend it", "code")))
    assert str(error) == "a/b: is wrong (mend it)" and error.code == "code"


# ---------------------------------------------------------------- NIfTI out


def lps_point(image: nib.Nifti1Image, column: float, row: float, index: float) -> np.ndarray:
    x, y, z, _ = image.affine @ (column, row, index, 1)
    return np.array([-x, -y, z])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_write_nifti_keeps_values_and_places_every_voxel(tmp_path, suffix):
    volume = np.arange(3 * 5 * 7).reshape(3, 5, 7).astype(np.int16)
    affine = np.array([[0.5, 0, 0, -10], [0, 0.57, 0.3, -20], [0, -0.19, 4, 30], [0, 0, 0, 1.0]])
    path = tmp_path / "deep" / f"scan{suffix}"
    assert write_nifti(path, volume, affine, [0.0, 4.0, 8.0]) is False
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    assert data.shape == (7, 5, 3) and data.dtype == np.int16
    for s, r, c in ((0, 0, 0), (2, 4, 6), (1, 2, 3)):
        assert data[c, r, s] == volume[s, r, c]
        np.testing.assert_allclose(lps_point(image, c, r, s), (affine @ (c, r, s, 1))[:3], atol=1e-4)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_write_nifti_of_the_same_volume_gives_the_same_bytes(tmp_path):
    volume = np.random.default_rng(0).integers(-1000, 1000, (2, 8, 8)).astype(np.int16)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, volume, np.eye(4))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_write_nifti_with_uneven_gaps_resamples_along_the_shear(tmp_path):
    """A field that is linear in space is reproduced exactly by linear interpolation, tilt and all."""
    positions = np.array([0.0, 4.0, 8.0, 9.0, 16.0, 23.0])
    affine = np.array([[0.5, 0, 0, -10], [0, 0.57, 1.3, -20], [0, -0.19, 4.2, 30], [0, 0, 0, 1.0]])
    step = float(np.median(np.diff(positions)))
    gradient = np.array([1.0, -2.0, 3.0])
    s, r, c = np.meshgrid(positions / step, np.arange(6), np.arange(5), indexing="ij")
    voxels = np.stack([c, r, s, np.ones_like(c)], axis=-1)
    volume = ((voxels @ affine.T)[..., :3] @ gradient).astype(np.float32)
    path = tmp_path / "tilted.nii.gz"
    assert write_nifti(path, volume, affine, positions) is True
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    for index in np.ndindex(*data.shape):
        assert data[index] == pytest.approx(lps_point(image, *index) @ gradient, abs=1e-2)
    last = (affine @ (0, 0, positions[-1] / step, 1))[:3]
    np.testing.assert_allclose(lps_point(image, 0, 0, data.shape[2] - 1), last, atol=1e-4)
    assert b"resampled" in image.header["descrip"].tobytes()


def test_write_nifti_of_a_mask_with_uneven_gaps_invents_no_class(tmp_path):
    mask = np.zeros((4, 6, 6), np.uint8)
    mask[1], mask[2] = 1, 6
    path = tmp_path / "mask.nii.gz"
    assert write_nifti(path, mask, np.eye(4), [0.0, 1.0, 4.0, 5.0])
    data = np.asarray(nib.load(path).dataobj)
    assert set(np.unique(data)) == {0, 1, 6} and data.dtype == np.uint8


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPR", "ILA"])
def test_write_nifti_along_other_axes_leaves_every_voxel_where_it_is(tmp_path, axes):
    volume = np.arange(4 * 5 * 7).reshape(4, 5, 7).astype(np.int16)
    affine = np.array([[0.5, 0, 0, -10], [0, 0.57, 1.3, -20], [0, -0.19, 4.2, 30], [0, 0, 0, 1.0]])
    write_nifti(tmp_path / "x.nii", volume, affine, [0.0, 4.0, 8.0, 12.0], axes)
    image = nib.load(tmp_path / "x.nii")
    assert "".join(nib.aff2axcodes(image.affine)) == axes
    data, to_volume = np.asarray(image.dataobj), np.linalg.inv(affine)
    for index in np.ndindex(*data.shape):
        column, row, place = (to_volume @ [*lps_point(image, *index), 1])[:3].round().astype(int)
        assert data[index] == volume[place, row, column]


def test_write_nifti_refuses_what_it_cannot_place(tmp_path):
    volume = np.zeros((2, 4, 4), np.int16)
    with pytest.raises(ValueError, match="shape"):
        write_nifti(tmp_path / "x.nii", volume[0], np.eye(4))
    with pytest.raises(ValueError, match="finite and invertible"):
        write_nifti(tmp_path / "x.nii", volume, np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="ascend"):
        write_nifti(tmp_path / "x.nii", volume, np.eye(4), [1.0, 0.0])
    assert not list(tmp_path.iterdir())


def test_real_ge_head_written_as_nifti_is_resampled_and_stays_in_place(tmp_path):
    scan = read_one(real("head_ge_tilted"))
    path = tmp_path / "ge.nii.gz"
    assert write_nifti(path, scan.hu[:, ::8, ::8], scan.affine @ np.diag([8.0, 8, 1, 1]), scan.positions_mm)
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    last = (scan.positions_mm[-1] - scan.positions_mm[0]) / scan.spacing_mm[0]
    top = (scan.affine @ (0, 0, last, 1))[:3]
    np.testing.assert_allclose(lps_point(image, 0, 0, image.shape[2] - 1), top, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[..., -1].T, scan.hu[-1, ::8, ::8])
