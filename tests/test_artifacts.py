import math

import numpy as np
import pytest
import torch
from scipy import ndimage

import artifacts
from artifacts import ARTIFACTS, SEVERITIES, gain_change, moved, scan_seed
from dose import SCANNERS, standard_head
from tomography import Geometry, fbp, project

PIXEL_MM = 3.5
HEAD = standard_head(66, PIXEL_MM)[None, None]  # 231 mm
SCAN = Geometry(views=180, pitch_mm=0.5, detectors=401)


def changed(name, severity, seed=3, hu=HEAD, pixel_mm=PIXEL_MM):
    return (ARTIFACTS[name](hu, severity, [seed] * len(hu), pixel_mm) - hu)[:, 0].numpy()


def rmse(change):
    return math.sqrt(np.mean(np.square(change, dtype=np.float64)))


def blob_lines(x, y, width=8.0, geometry=SCAN):
    """Line integrals of a Gaussian of SD width at (x, y) mm, per view: (views, detectors)."""
    angles = geometry.angles()
    at = (x * angles.cos() + y * angles.sin())[:, None]
    return (torch.exp(-((geometry.offsets_mm(401) - at) ** 2) / (2 * width**2)) * width).float()


def disc(size, pixel_mm, radius_mm, centre_mm=(0.0, 0.0)):
    """(1, size, size) attenuation of water in a disc, edges of one pixel."""
    centred = (torch.arange(size) - (size - 1) / 2) * pixel_mm
    distance = torch.hypot(centred[None, :] - centre_mm[0], centred[:, None] - centre_mm[1])
    return 0.019 * ((radius_mm - distance) / pixel_mm + 0.5).clamp(0, 1)[None]


# ---------------------------------------------------------------- all of them


def test_severities_are_twelve_rising_ones():
    assert len(SEVERITIES) == 12
    assert all(0 < one < other <= 1 for one, other in zip(SEVERITIES, SEVERITIES[1:], strict=False))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifact_grows_with_severity_and_is_hardly_there_near_zero(name):
    sizes = [rmse(changed(name, severity)) for severity in (1e-3, *SEVERITIES[::3], 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.02 * sizes[-1]
    assert sizes[-1] > 2


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifact_depends_on_the_seed_alone(name):
    batch = torch.cat([HEAD, HEAD - 3, HEAD])
    together = ARTIFACTS[name](batch, 0.5, [3, 4, 3], PIXEL_MM)
    alone = ARTIFACTS[name](batch[1:2], 0.5, [4], PIXEL_MM)
    torch.testing.assert_close(together[1:2], alone, atol=0.05, rtol=1e-4)
    assert torch.equal(together[0], together[2])  # slices of one scan have one artifact
    assert rmse((together[0] - together[1]).numpy() - 3) > 1


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("shape", [(1, 1, 61, 48), (2, 1, 33, 64)])
def test_artifact_of_any_shape_leaves_the_input_alone(name, shape):
    hu = standard_head(64, PIXEL_MM)[: shape[2], : shape[3]].expand(shape).contiguous()
    before = hu.clone()
    out = ARTIFACTS[name](hu, 0.5, list(range(len(hu))), PIXEL_MM)
    assert torch.equal(hu, before)
    assert (out.shape, out.dtype) == (hu.shape, hu.dtype)
    assert out.isfinite().all()
    assert not torch.equal(out, hu)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifact_hardly_reaches_the_corners(name):
    change = changed(name, 1.0)[0]
    corners = np.stack([change[rows, columns] for rows in (slice(4), slice(-4, None)) for columns in (0, -1)])
    assert rmse(corners) < (0.05 if name == "rings" else 0.2) * rmse(change)  # streaks reach everywhere


def test_combined_is_the_sum_of_the_others():
    parts = sum(changed(name, 0.5) for name in ("motion", "rings", "starvation"))
    np.testing.assert_allclose(changed("combined", 0.5), parts, atol=0.01)


@pytest.mark.parametrize("name", ["motion", "rings"])
def test_artifact_is_the_same_at_another_matrix(name):
    # one smooth head on two grids
    fine = torch.nn.functional.avg_pool2d(standard_head(528, PIXEL_MM / 8)[None, None], 4)
    coarse = torch.nn.functional.avg_pool2d(fine, 2)
    small = changed(name, 1.0, hu=coarse)[0]
    large = changed(name, 1.0, hu=fine, pixel_mm=PIXEL_MM / 2)[0].reshape(66, 2, 66, 2).mean((1, 3))
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    ("severity", "seeds", "pixel_mm", "words"),
    [
        (0.0, [1], 1.0, "severity 0: must be in"),
        (2.0, [1], 1.0, "severity 2: must be in"),
        (math.nan, [1], 1.0, "severity nan"),
        (0.5, [1], 0.0, "PixelSpacing"),
        (0.5, [1], math.nan, "PixelSpacing"),
        (0.5, [1, 2], 1.0, r"2 seeds: must be \(B, 1, H, W\)"),
    ],
)
@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifact_refuses_in_one_line(name, severity, seeds, pixel_mm, words):
    with pytest.raises(ValueError, match=words) as refused:
        ARTIFACTS[name](HEAD, severity, seeds, pixel_mm)
    assert "\n" not in str(refused.value)


def test_scan_seed_is_stable_and_tells_scans_apart():
    assert scan_seed(0, "a") == scan_seed(0, "a") == 7172166013362675146
    assert len({scan_seed(seed, uid) for seed in (0, 1) for uid in "ab"}) == 4


# ---------------------------------------------------------------- motion


def test_moved_lines_are_those_of_a_blob_in_the_other_place():
    turn = 0.1
    x, y = 30 * math.cos(turn) - 20 * math.sin(turn) + 2.3, 30 * math.sin(turn) + 20 * math.cos(turn) - 1.1
    shift = torch.tensor([2.3, -1.1]).expand(180, 2)
    found = moved(blob_lines(30.0, 20.0), SCAN, shift, torch.full((180,), turn))
    # linear interpolation between views 1 degree apart: step^2 / 8 times the curvature 8 (36 / 8)^2
    torch.testing.assert_close(found, blob_lines(x, y), atol=6.2e-3, rtol=0)


def test_moved_lines_follow_the_move_from_view_to_view():
    shift = torch.zeros(180, 2)
    shift[90:] = torch.tensor([5.0, 0.0])
    found = moved(blob_lines(0.0, 0.0), SCAN, shift, torch.zeros(180))
    torch.testing.assert_close(found[:90], blob_lines(0.0, 0.0)[:90], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[90:], blob_lines(5.0, 0.0)[90:], atol=1e-4, rtol=0)


def test_turn_of_a_centred_disc_changes_nothing():
    lines = project(disc(81, 1.0, 30.0), 1.0, SCAN)[0]
    turned = moved(lines, SCAN, torch.zeros(180, 2), torch.linspace(0, 0.2, 180))
    # pixels are square: the edge of their disc is not quite the same from every side
    torch.testing.assert_close(turned, lines, atol=0.02 * lines.max().item(), rtol=0)


def test_motion_before_every_view_is_the_image_elsewhere():
    """What the change of the lines reconstructs to is the difference of the two images."""
    geometry = Geometry(views=360, pitch_mm=0.5)
    here, there = disc(96, 1.0, 30.0), disc(96, 1.0, 30.0, (3.0, -2.0))
    lines = project(here, 1.0, geometry)
    elsewhere = moved(lines[0], geometry, torch.tensor([3.0, -2.0]).expand(360, 2), torch.zeros(360))
    change = fbp(elsewhere[None] - lines, geometry, (96, 96), 1.0, "ram-lak", 1.0)
    expected = (there - here)[0].numpy()
    assert rmse(change[0].numpy() - expected) < 0.2 * rmse(expected)  # edges are one pixel wide
    assert np.corrcoef(change[0].numpy().ravel(), expected.ravel())[0, 1] > 0.98


def test_motion_makes_and_loses_no_mass():
    hu = (disc(66, PIXEL_MM, 70.0)[None] / 0.019 - 1) * 1000
    change = changed("motion", 1.0, hu=hu)
    assert abs(change.sum()) < 0.01 * np.abs(change).sum()


def test_motion_blurs_the_skull_into_the_brain_but_not_into_the_middle():
    change = np.abs(changed("motion", 0.5)[0])
    assert change.max() > 200
    assert change[30:36, 30:36].mean() < 0.1 * change.max()


# ---------------------------------------------------------------- rings


def test_wrong_detector_makes_a_circle_at_its_distance_from_the_centre():
    detector, scan = 90, SCAN._replace(views=720)
    gains = torch.zeros(2 * scan.views, 401)
    gains[:, detector] = 0.01
    image = fbp(gain_change(gains)[None], scan, (257, 257), 0.5)[0].numpy()
    radius_mm = abs(detector - 200) * scan.pitch_mm
    row, column = np.mgrid[:257, :257] - 128.0
    distance = np.hypot(row, column) * 0.5
    labels = np.rint(distance / 0.5).astype(int)
    profile = ndimage.mean(image, labels, np.arange(128))
    assert np.abs(profile).argmax() == round(radius_mm / 0.5)
    assert profile.min() == profile[round(radius_mm / 0.5)]  # too strong a signal is too little attenuation
    on_it = np.abs(distance - radius_mm) < 0.25
    quarters = [
        image[on_it & (np.sign(row) == a) & (np.sign(column) == b)].mean() for a in (-1, 1) for b in (-1, 1)
    ]
    np.testing.assert_allclose(quarters, np.mean(quarters), rtol=0.05)  # the whole circle, evenly
    # the support theorem: nothing outside the circle
    assert np.abs(image[distance > radius_mm + 2]).max() < 0.05 * np.abs(profile).max()


def test_rings_keep_the_mean_and_the_air_outside_them():
    change = changed("rings", 1.0)[0]
    assert abs(change.mean()) < 0.5
    assert rmse(change) > 2


def test_rings_do_not_depend_on_the_head():
    np.testing.assert_allclose(changed("rings", 0.5), changed("rings", 0.5, hu=HEAD * 0 - 1000), atol=1e-3)


def test_rings_are_drawn_within_the_width_of_a_head():
    """Also in a picture much smaller, and one much larger, than a head."""
    small = changed("rings", 0.5, hu=torch.zeros(1, 1, 16, 16), pixel_mm=1.0)
    assert np.isfinite(small).all()
    large = changed("rings", 0.5, hu=torch.zeros(1, 1, 100, 100), pixel_mm=4.0)[0]
    row, column = np.mgrid[:100, :100] - 49.5
    outside = np.hypot(row, column) * 4 > 115
    assert rmse(large[outside]) < 0.1 * rmse(large[~outside])


# ---------------------------------------------------------------- starvation


def test_starved_rays_without_metal_stay_as_they_are():
    rng = np.random.default_rng(0)
    change = artifacts._starved(np.full(100, 50.0), np.ones(100), SCANNERS["head-soft"], rng)
    assert not change.any()


@pytest.mark.parametrize("share", [0.5, 0.1, 1e-4])
def test_starved_rays_read_what_passes_and_what_is_scattered(share):
    rng = np.random.default_rng(0)
    change = artifacts._starved(np.full(2000, 1e6), np.full(2000, share), SCANNERS["head-soft"], rng)
    assert change.mean() == pytest.approx(-math.log(share + artifacts.SCATTER * (1 - share)), rel=1e-3)


def test_starvation_puts_two_pieces_on_the_skull_and_a_dark_band_between_them():
    for seed in range(3):
        change = changed("starvation", 1.0, seed)[0]
        places = artifacts._on_the_skull(HEAD[0, 0].numpy(), _directions(seed), PIXEL_MM)
        pixels = np.array([(y / PIXEL_MM + 32.5, x / PIXEL_MM + 32.5) for x, y in places])
        for row, column in pixels.round().astype(int):
            assert change[row - 1 : row + 2, column - 1 : column + 2].max() > 2000
            assert HEAD[0, 0, row, column] > artifacts.BONE_HU
        between = pixels[0] + np.linspace(0.3, 0.7, 9)[:, None] * (pixels[1] - pixels[0])
        band = ndimage.map_coordinates(change, between.T, order=1)
        assert band.mean() < -50


def _directions(seed):
    rng = np.random.default_rng((seed, 3))
    first = rng.uniform(0, 2 * math.pi)
    return first, first + math.radians(rng.uniform(*artifacts.METAL_APART_DEG)) * rng.choice((-1, 1))


def test_starvation_needs_a_head():
    air = torch.full((1, 1, 32, 32), -1000.0)
    assert torch.equal(ARTIFACTS["starvation"](air, 1.0, [1], 5.0), air)


def test_metal_is_on_the_skin_where_there_is_no_bone():
    water = torch.where(HEAD > 300, torch.tensor(40.0), HEAD)
    (place,) = artifacts._on_the_skull(water[0, 0].numpy(), (0.0,), PIXEL_MM)
    assert place[0] == pytest.approx(75, abs=PIXEL_MM)  # half the width of the head
    assert place[1] == pytest.approx(0, abs=PIXEL_MM)


def test_head_holder_carries_no_metal():
    held = HEAD.clone()
    held[..., 10:56, 2] = 500.0  # a shell of carbon, apart from the head
    places = artifacts._on_the_skull(held[0, 0].numpy(), (math.pi,), PIXEL_MM)
    assert places == artifacts._on_the_skull(HEAD[0, 0].numpy(), (math.pi,), PIXEL_MM)
