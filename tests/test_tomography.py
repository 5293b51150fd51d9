"""Line integrals and filtered back-projection against closed forms, and against scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.transform import iradon, radon

from tomography import KERNELS, Geometry, backproject, fbp, fbp_variance, project, ramp

PARALLEL = Geometry(views=180, pitch_mm=0.6)
FAN = Geometry(views=360, pitch_mm=1.1, source_mm=595.0, detector_mm=1085.0)
BEAMS = pytest.mark.parametrize("geometry", [PARALLEL, FAN], ids=["parallel", "fan"])
WATER_PER_MM = 0.019


def ellipse_image(shape, pixel_mm, centre, axes, tilt=0.0, fine=8):
    """Share of every pixel that lies in an ellipse, (1, H, W)."""
    y, x = ((torch.arange(n * fine).double() - (n * fine - 1) / 2) * pixel_mm / fine for n in shape)
    x, y = x[None] - centre[0], y[:, None] - centre[1]
    u = (x * math.cos(tilt) + y * math.sin(tilt)) / axes[0]
    v = (y * math.cos(tilt) - x * math.sin(tilt)) / axes[1]
    inside = (u**2 + v**2 <= 1).float()
    return inside.reshape(shape[0], fine, shape[1], fine).mean((1, 3))[None]


def ellipse_chords(geometry, count, centre, axes, tilt=0.0):
    """(lengths in an ellipse, distance of the ray from its tangent, > 0 inside), both (views, detectors)."""
    angles, offsets = geometry.angles()[:, None], geometry.offsets_mm(count)[None]
    if geometry.parallel:
        normal = torch.stack(torch.broadcast_tensors(angles.cos(), angles.sin() + 0 * offsets))
        distance = offsets + 0 * angles
    else:
        fan = torch.atan(offsets / geometry.source_mm)  # of each ray against the central one
        normal = torch.stack([(angles - fan).cos(), (angles - fan).sin()])
        distance = geometry.source_mm * fan.sin() + 0 * angles
    distance = distance - normal[0] * centre[0] - normal[1] * centre[1]
    u = normal[0] * math.cos(tilt) + normal[1] * math.sin(tilt)
    v = normal[1] * math.cos(tilt) - normal[0] * math.sin(tilt)
    radius = torch.sqrt((axes[0] * u) ** 2 + (axes[1] * v) ** 2)
    chord = 2 * axes[0] * axes[1] * torch.sqrt((radius**2 - distance**2).clamp_min(0)) / radius**2
    return chord, radius - distance.abs()


# ---------------------------------------------------------------- projection


@BEAMS
@pytest.mark.parametrize(
    ("centre", "axes", "tilt"), [((0, 0), (50, 50), 0.0), ((12, -17), (30, 52), 0.5)], ids=["disc", "ellipse"]
)
def test_project_of_an_ellipse_gives_its_chords_within_half_a_percent(geometry, centre, axes, tilt):
    pixel_mm = 0.5
    lines = project(ellipse_image((320, 320), pixel_mm, centre, axes, tilt), pixel_mm, geometry)[0].double()
    chords, depth = ellipse_chords(geometry, lines.shape[1], centre, axes, tilt)
    inside = depth > 2.5 * pixel_mm  # nearer to the tangent a ray sees the size of the pixels
    error = (lines - chords).abs()
    assert error[inside].max() < 0.005 * chords.max()
    assert (error / chords)[inside].square().mean().sqrt() < 0.002
    assert lines[depth < -1.5 * pixel_mm].abs().max() == 0
    assert 0.1 < inside.double().mean() < 0.9


def test_project_of_any_image_keeps_its_mass_in_every_parallel_view():
    image = torch.rand(2, 45, 60, generator=torch.Generator().manual_seed(0))
    lines = project(image, 1.3, PARALLEL._replace(views=60, pitch_mm=0.1))
    mass = lines.double().sum(2) * 0.1
    torch.testing.assert_close(
        mass, (image.double().sum((1, 2)) * 1.3**2)[:, None].expand_as(mass), rtol=2e-3, atol=0
    )


def test_project_where_the_object_is_cut_off_sees_nothing_outside_the_image():
    """A square that fills the image: a ray beyond its edge must not see the outermost pixels for ever."""
    lines = project(torch.ones(1, 40, 40), 1.0, Geometry(views=8, pitch_mm=1.0, detectors=80))[0]
    assert lines[0].max() == pytest.approx(40 * math.sqrt(2), rel=0.02)
    straight = lines[2]  # 45 degrees after the first view: along the columns
    assert torch.allclose(straight[20:60], torch.full((40,), 40.0), atol=1e-4)
    assert straight[:19].abs().max() == 0
    assert straight[61:].abs().max() == 0


@BEAMS
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_project_of_a_turned_image_is_the_sinogram_moved_by_views(geometry, turn):
    image = torch.rand(1, 31, 31, generator=torch.Generator().manual_seed(1))
    lines = project(image, 2.0, geometry)
    if geometry.parallel:
        lines = torch.cat([lines, lines.flip(2)], 1)  # the other half of the turn
    turned = project(image.rot90(turn, (1, 2)), 2.0, geometry)
    # rot90 turns the image from y down to x: a turned image is seen as the image by a view that comes later
    quarter = lines.shape[1] // 4
    moved = lines.roll(-turn * quarter, 1)[:, : geometry.views]
    torch.testing.assert_close(turned, moved, rtol=1e-4, atol=1e-3)


@BEAMS
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 3), (17, 33), (40, 21), (64, 64)])
def test_project_and_fbp_keep_shapes_and_do_a_batch_as_one_by_one(geometry, shape):
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(2))
    lines = project(images, 1.5, geometry)
    count = geometry.covering(*shape, 1.5)
    assert lines.shape == (3, geometry.views, count)
    back = fbp(lines, geometry, shape, 1.5)
    assert back.shape == images.shape
    assert torch.isfinite(back).all()
    for i in range(3):
        alone = project(images[i : i + 1], 1.5, geometry)
        torch.testing.assert_close(lines[i : i + 1], alone, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(back[i : i + 1], fbp(alone, geometry, shape, 1.5), rtol=1e-4, atol=1e-4)


@BEAMS
def test_an_image_that_is_not_square_gives_what_its_padded_square_gives(geometry):
    image = torch.rand(1, 20, 31, generator=torch.Generator().manual_seed(3))
    square = torch.nn.functional.pad(image, (0, 0, 5, 6))
    geometry = geometry._replace(detectors=100)
    lines = project(image, 1.0, geometry)
    torch.testing.assert_close(lines, project(square, 1.0, geometry))
    torch.testing.assert_close(
        fbp(lines, geometry, (20, 31), 1.0),
        fbp(lines, geometry, (31, 31), 1.0)[:, 5:25],
        rtol=1e-5,
        atol=1e-5,
    )


def test_views_that_no_quarter_turn_maps_onto_each_other_are_refused():
    with pytest.raises(ValueError, match="361 views: must be a multiple of 4"):
        project(torch.zeros(1, 8, 8), 1.0, FAN._replace(views=361))


def test_an_image_that_reaches_the_source_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        project(torch.zeros(1, 100, 100), 10.0, FAN)


# ---------------------------------------------------------------- reconstruction


@BEAMS
@pytest.mark.parametrize("kernel", KERNELS)
def test_fbp_of_the_chords_of_a_water_cylinder_is_water_in_every_pixel_within_2_hu(geometry, kernel):
    centre, radius, pixel_mm = (3.0, -5.0), 80.0, 1.5
    geometry = geometry._replace(views=2 * geometry.views)
    count = geometry.covering(128, 128, pixel_mm)
    chords, _ = ellipse_chords(geometry, count, centre, (radius, radius))
    image = fbp(WATER_PER_MM * chords[None].float(), geometry, (128, 128), pixel_mm, kernel)[0]
    hu = (image / WATER_PER_MM - 1) * 1000
    place = (torch.arange(128) - 63.5) * pixel_mm
    distance = torch.hypot(place[None] - centre[0], place[:, None] - centre[1])
    assert hu[distance < radius - 8].abs().max() < 2  # the soft kernel blurs the edge over some 8 mm
    assert hu[distance < radius - 8].mean().abs() < 0.2
    assert hu[(distance > radius + 6) & (distance < radius + 12)].mean() == pytest.approx(-1000, abs=2)


@BEAMS
@pytest.mark.parametrize("kernel", KERNELS)
def test_project_then_fbp_returns_a_water_cylinder(geometry, kernel):
    """The mean and the soft kernels within 2 HU; sharp ones show the stairs of the pixels, some 1.2 HU SD."""
    geometry = geometry._replace(views=400 * geometry.turns // 2, pitch_mm=1.0 if geometry.parallel else 1.82)
    image = WATER_PER_MM * ellipse_image((180, 180), 1.0, (3, -5), (80, 80))
    back = fbp(project(image, 1.0, geometry), geometry, (180, 180), 1.0, kernel)[0]
    hu = (back / WATER_PER_MM - 1) * 1000
    place = torch.arange(180) - 89.5
    inside = hu[torch.hypot(place[None] - 3, place[:, None] + 5) < 72]
    assert inside.mean().abs() < 0.2
    assert inside.std() < 2
    if kernel in ("hann", "soft"):
        assert inside.abs().max() < 2


def test_backproject_outside_the_detectors_counts_as_zero():
    """One view: what it does not see is nothing, not what its last detector saw."""
    geometry = Geometry(views=2, pitch_mm=1.0, detectors=5)
    sinogram = torch.zeros(1, 2, 5)
    sinogram[:, 0] = 1.0
    geometry_angle = geometry.angles()[0]
    image = backproject(sinogram, geometry, (41, 41), 1.0)[0]
    place = torch.arange(41.0) - 20
    across = place[None] * geometry_angle.cos() + place[:, None] * geometry_angle.sin()
    expected = (3 - across.abs()).clamp(0, 1) * math.pi / 2
    torch.testing.assert_close(image, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [3, 64, 129])
def test_ramp_is_long_enough_not_to_wrap_and_passes_no_mean(kernel, count):
    geometry = PARALLEL._replace(pitch_mm=0.7)
    response = ramp(geometry, count, kernel)
    length = 2 * (response.shape[1] - 1)
    assert length >= 2 * count - 1
    frequency = torch.fft.rfftfreq(length, 0.7).double()
    # as an ideal ramp but for the mean, which a ramp sampled in space over a finite length keeps right
    ideal = frequency * KERNELS[kernel](frequency * 2 * 0.7)
    assert (response[0, 1:] - ideal[1:]).abs().max() < 0.5 / (length * 0.7)
    assert 0 < response[0, 0] < 0.5 / (length * 0.7)


@pytest.mark.parametrize(
    ("name", "kernel"), [("ramp", "ram-lak"), ("shepp-logan", "shepp-logan"), ("hann", "hann")]
)
def test_project_and_fbp_agree_with_scikit_image(name, kernel):
    """scikit-image turns the other way (y is up there) and is exact about the centre for odd sizes only."""
    size = 129
    image = ellipse_image((size, size), 1.0, (12, -17), (20, 35), 0.5) + ellipse_image(
        (size, size), 1.0, (-20, 10), (8, 8)
    )
    image = torch.nn.functional.avg_pool2d(image, 3, 1, 1)  # bilinear and Joseph differ on hard edges
    geometry = Geometry(views=180, pitch_mm=1.0, detectors=size)
    degrees = -np.degrees(geometry.angles().numpy())
    lines = project(image, 1.0, geometry)[0].numpy()
    oracle = radon(image[0].double().numpy(), degrees, circle=True).T
    assert np.corrcoef(lines.ravel(), oracle.ravel())[0, 1] > 0.99999
    assert np.sqrt(np.mean((lines - oracle) ** 2)) < 0.0005 * oracle.max()
    back = fbp(torch.from_numpy(oracle)[None].float(), geometry, (size, size), 1.0, kernel)[0].numpy()
    expected = iradon(oracle.T, degrees, filter_name=name, circle=True)
    y, x = np.mgrid[:size, :size] - size // 2
    inside = np.hypot(x, y) < 60  # scikit-image leaves the corners empty
    assert np.corrcoef(back[inside], expected[inside])[0, 1] > 0.9999999
    assert np.sqrt(np.mean((back - expected)[inside] ** 2)) < 1e-4 * expected.max()


# ---------------------------------------------------------------- noise


def white_noise_variance(kernel, share):
    """Sum of squares of an ideal filter, interpolated linearly between samples at `share` (None: anywhere).

    Of a unit pitch, by Parseval; interpolation passes (1 - w)^2 + w^2 + 2 w (1 - w) cos of the power."""
    frequency = (np.arange(20000) + 0.5) / 40000  # the midpoints of 0 to Nyquist
    window = {
        "ram-lak": np.ones_like(frequency),
        "shepp-logan": np.sinc(frequency),
        "hann": np.cos(np.pi * frequency) ** 2,
        "soft": np.where(frequency < 0.25, np.cos(2 * np.pi * frequency.clip(max=0.25)) ** 2, 0),
    }[kernel]
    neighbours = np.cos(2 * np.pi * frequency)
    if share is None:
        passed = 2 / 3 + neighbours / 3
    else:
        passed = (1 - share) ** 2 + share**2 + 2 * share * (1 - share) * neighbours
    return np.mean((frequency * window) ** 2 * passed)


def test_the_closed_form_of_white_noise_is_the_known_one():
    assert white_noise_variance("ram-lak", 0.0) == pytest.approx(1 / 12, rel=1e-6)
    assert white_noise_variance("ram-lak", 0.5) == pytest.approx(1 / 24 - 1 / (4 * math.pi**2), rel=1e-6)
    interpolated = white_noise_variance("ram-lak", None) / white_noise_variance("ram-lak", 0.0)
    assert interpolated == pytest.approx(2 / 3 - 2 / math.pi**2, rel=1e-6)  # 0.681 of the SD


@pytest.mark.parametrize("kernel", KERNELS)
def test_fbp_of_white_noise_has_the_variance_of_the_closed_form_and_of_fbp_variance(kernel):
    """Over 64 realisations of 40 x 40 pixels; the sampling error of the variance is below 1 %."""
    geometry = Geometry(views=120, pitch_mm=0.8, detectors=129)
    noise = torch.randn(64, 120, 129, generator=torch.Generator().manual_seed(4))
    image = fbp(noise, geometry, (41, 40), 1.1, kernel).double()
    measured = image.var(0, correction=0).mean().item()
    closed = math.pi**2 / (120 * 0.8**2) * white_noise_variance(kernel, None)
    assert measured == pytest.approx(closed, rel=0.03)
    y, x = torch.meshgrid((torch.arange(41) - 20) * 1.1, (torch.arange(40) - 19.5) * 1.1, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    predicted = fbp_variance(torch.ones(120, 129), geometry, points, kernel)
    assert predicted.mean().item() == pytest.approx(closed, rel=0.01)
    assert measured == pytest.approx(predicted.mean().item(), rel=0.03)
    # pixel by pixel: 64 realisations know a variance to 18 %, and interpolation changes it by up to 2.6 times
    ratio = image.var(0).flatten() / predicted
    assert ratio.std().item() == pytest.approx(math.sqrt(2 / 63), rel=0.1)


@BEAMS
@pytest.mark.parametrize("kernel", KERNELS)
def test_fbp_of_white_noise_in_the_centre_of_rotation_meets_no_interpolation(geometry, kernel):
    """The centre lies on the middle one of an odd number of detectors in every view."""
    geometry = geometry._replace(views=32, detectors=65)
    noise = torch.randn(4000, 32, 65, generator=torch.Generator().manual_seed(5))
    measured = fbp(noise, geometry, (1, 1), 1.0, kernel).double().var().item()
    pitch = geometry.pitch_centre_mm
    closed = math.pi**2 / (32 * pitch**2) * white_noise_variance(kernel, 0.0)
    assert measured == pytest.approx(closed, rel=0.06)  # 2.2 % SD of a variance from 4000 numbers
    if geometry.parallel:
        predicted = fbp_variance(torch.ones(32, 65), geometry, torch.zeros(1, 2), kernel).item()
        assert predicted == pytest.approx(closed, rel=0.003)


def test_fbp_variance_of_rays_of_unequal_noise_and_resampled_pixels_is_what_is_measured():
    geometry = Geometry(views=60, pitch_mm=0.8, detectors=81)
    sd = 0.3 + torch.rand(60, 81, generator=torch.Generator().manual_seed(6)) * torch.linspace(1, 3, 81)
    noise = torch.randn(3000, 60, 81, generator=torch.Generator().manual_seed(7)) * sd
    points = torch.tensor([[x, y] for y in (-22.0, -2.0, 0.0) for x in (-22.0, 0.0, 14.0)])
    images = fbp(noise, geometry, (23, 23), 2.0, "hann", 2.0).double()
    columns, rows = (points / 2.0 + 11).long().unbind(1)
    measured = images[:, rows, columns].var(0)
    predicted = fbp_variance(sd**2, geometry, points, "hann", 2.0)
    assert (measured / predicted - 1).abs().max() < 0.1  # 2.6 % SD each, of nine
    assert (measured / predicted).mean().item() == pytest.approx(1, abs=0.03)
    assert predicted.max() > 1.3 * predicted.min()


def test_fbp_variance_of_a_fan_is_refused():
    with pytest.raises(ValueError, match="parallel beams only"):
        fbp_variance(torch.ones(360, 9), FAN, torch.zeros(1, 2))
