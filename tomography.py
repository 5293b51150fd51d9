"""X-ray tomography of one slice in torch: line integrals, filtered back-projection, and its noise.

x runs along columns, y along rows, both in mm from the centre of the image. Everything is batched over
slices and runs on their device. Sinograms are (B, views, detectors); view v looks along (-sin, cos)
of START + v arc / views, its detectors lie along (cos, sin).

Two things make it fast on a CPU. A quarter turn maps views onto views, so the places where rays meet pixels
are worked out for a quarter circle and used for all quarters and slices at once; half a turn maps a parallel
view onto its mirror image, which halves them once more. And all sums over places are weighted sums of table
rows, for which torch has a fused kernel (embedding_bag)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len

START = (
    -math.pi / 4
)  # of the first view: up to a quarter turn later, rays of parallel beams are steeper than 45 deg
TAPS = 2**18  # table rows summed in one call: places and weights of 2 MB stay in a processor's cache


class Geometry(NamedTuple):
    """Where the rays of a scan run. Parallel beams cover half a turn, fan beams (flat detector) a whole one.

    views: of a scan; a multiple of 2 (parallel) or 4 (fan). pitch_mm: of the detectors, at the detector.
    detectors: per view, None for as many as cover the image. source_mm: source to centre, detector_mm: source
    to detector; inf for parallel beams."""

    views: int
    pitch_mm: float
    detectors: int | None = None
    source_mm: float = math.inf
    detector_mm: float = math.inf

    @property
    def parallel(self) -> bool:
        return math.isinf(self.source_mm)

    @property
    def turns(self) -> int:
        """Quarter turns in a scan: groups of views that share their places."""
        return 2 if self.parallel else 4

    @property
    def pitch_centre_mm(self) -> float:
        """Distance of neighbouring rays at the centre of rotation."""
        return self.pitch_mm if self.parallel else self.pitch_mm * self.source_mm / self.detector_mm

    def angles(self) -> torch.Tensor:
        """(views,) in radians."""
        arc = math.pi if self.parallel else 2 * math.pi
        return START + torch.arange(self.views, dtype=torch.float64) * (arc / self.views)

    def offsets_mm(self, count: int) -> torch.Tensor:
        """(count,) distance of the detectors from the central ray, scaled to the centre of rotation."""
        return (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * self.pitch_centre_mm

    def covering(self, height: int, width: int, pixel_mm: float) -> int:
        """Detectors per view: the given number, or as many as see every pixel of an image."""
        if self.views % self.turns:
            raise ValueError(f"{self.views} views: must be a multiple of {self.turns}")
        if self.detectors is not None:
            return self.detectors
        radius = math.hypot(height, width) * pixel_mm / 2 + pixel_mm
        if radius >= self.source_mm:
            raise ValueError(f"an image of {2 * radius:.0f} mm does not fit between source and detector")
        if not self.parallel:  # the outermost ray touches the circle: tan of its angle, at the centre
            radius = self.source_mm * radius / math.sqrt(self.source_mm**2 - radius**2)
        return 2 * math.ceil(radius / self.pitch_centre_mm) + 1


# ---------------------------------------------------------------- image -> sinogram


def project(mu: torch.Tensor, pixel_mm: float, geometry: Geometry) -> torch.Tensor:
    """Line integrals by Joseph's method. mu: (B, H, W) attenuation per mm -> (B, views, detectors), no unit.

    Outside the image there is nothing. Source: Joseph 1982, doi 10.1109/TMI.1982.4307572."""
    batch, height, width = mu.shape
    count = geometry.covering(height, width, pixel_mm)
    side = max(height, width)
    square = F.pad(mu, _to_square(height, width))
    turned = torch.stack([torch.rot90(square, turn, (1, 2)) for turn in range(4)])
    # nothing on either side, so that a ray that leaves the image finds zero there
    table = F.pad(turned, (1, 2)).permute(2, 3, 0, 1).reshape(side * (side + 3), -1).contiguous()
    rows = (torch.arange(side, device=mu.device) - (side - 1) / 2).float()
    starts = (torch.arange(side, device=mu.device) * (side + 3)).int()
    # half of a parallel view is half of the view from the other side
    offsets = geometry.offsets_mm(count)[count // 2 if geometry.parallel else 0 :] / pixel_mm
    base = geometry.angles()[: geometry.views // geometry.turns]
    first, slope = (part.to(mu.device) for part in _rays(base, offsets, geometry, pixel_mm))
    first += (side + 1) / 2

    def sums(views: slice, detectors: slice) -> torch.Tensor:
        place = torch.addcmul(first[views, detectors, None], slope[views, detectors, None], rows)
        return _interpolated_sums(table, place, side + 1, starts)

    sinogram = _tiled(sums, first.shape, side, mu.device)
    sinogram *= pixel_mm * torch.sqrt(1 + slope**2)[..., None]
    sinogram = sinogram.unflatten(2, (4, batch)).permute(3, 2, 0, 1)
    if geometry.parallel:
        sinogram = torch.cat([sinogram[:, 2:, :, count % 2 :].flip(3), sinogram[:, :2]], 3)
    return sinogram.reshape(batch, geometry.views, count)


def _tiled(
    sums: Callable[[slice, slice], torch.Tensor], shape: Sequence[int], summands: int, device: torch.device
) -> torch.Tensor:
    """(*shape, columns) from tiles: sums(rows, columns) gives (M, N, columns) of one.

    Neighbours need the same table rows, so that square tiles keep within the processor's cache."""
    taps = TAPS if device.type == "cpu" else 64 * TAPS
    step = max(1, math.isqrt(taps // (2 * summands)))
    steps = [[slice(i, min(i + step, size)) for i in range(0, size, step)] for size in shape]
    return torch.cat([torch.cat([sums(down, right) for right in steps[1]], 1) for down in steps[0]])


def _interpolated_sums(
    table: torch.Tensor,
    place: torch.Tensor,
    last: int,
    starts: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums of table rows, linearly interpolated between neighbours: (M, N, K) places -> (M, N, columns).

    Summand k is taken from the piece of the table that begins at row starts[k], place (overwritten) rows from
    there; below 0 and beyond last it is as at the end. weight: (M, N, K) of the summands."""
    place.clamp_(0, last)
    left = place.int()
    share = place.sub_(left)
    left += starts
    places = torch.cat([left, left + 1], -1)
    weights = torch.cat([1 - share, share], -1)
    if weight is not None:
        weights *= torch.cat([weight, weight], -1)
    sums = F.embedding_bag(places.flatten(0, 1), table, per_sample_weights=weights.flatten(0, 1), mode="sum")
    return sums.unflatten(0, place.shape[:2])


def _rays(
    angles: torch.Tensor, offsets: torch.Tensor, geometry: Geometry, pixel_mm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each ray at the centre row, and its change per row, both (views, detectors) in pixels."""
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    if geometry.parallel:
        first, slope = offsets / cosine, (-sine / cosine).expand(-1, len(offsets))
    else:
        source = geometry.source_mm / pixel_mm
        slope = (offsets * cosine - source * sine) / (offsets * sine + source * cosine)
        first = source * sine + slope * (source * cosine)  # the line through the source at (sin, -cos)
    return first.float(), slope.float()


def _to_square(height: int, width: int) -> tuple[int, int, int, int]:
    """Padding for F.pad that makes an image square and keeps it in the middle."""
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return (left, side - width - left, top, side - height - top)


# ---------------------------------------------------------------- sinogram -> image

KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # apodisation of the ramp, of the frequency as a share of the detectors' Nyquist frequency
    "ram-lak": torch.ones_like,
    "shepp-logan": lambda share: torch.sinc(share / 2),
    "hann": lambda share: torch.cos(math.pi / 2 * share.clamp(max=1)) ** 2,
    "soft": lambda share: torch.cos(math.pi / 2 * (2 * share).clamp(max=1)) ** 2,  # Hann, cut at half Nyquist
}


def ramp(geometry: Geometry, count: int, kernel: str, resampled_mm: float | None = None) -> torch.Tensor:
    """Frequency response of the reconstruction filter, (1 or views, F) for rfft over a length of 2 (F - 1).

    resampled_mm: as if a finer image were resampled to pixels of this size, linearly and without aliasing; by
    the central slice theorem that is one more filter, of its own in every view.
    Source: Kak and Slaney 1988, eq. 61: the ramp is sampled in space, so that its mean is right."""
    pitch = geometry.pitch_centre_mm
    length = 2 * next_fast_len(count, real=True)  # so long that the filter does not wrap around
    place = torch.fft.fftfreq(length, 1 / length, dtype=torch.float64)
    response = torch.where(place % 2 == 0, 0.0, -1 / (math.pi * place * pitch) ** 2)
    response[0] = 1 / (4 * pitch**2)
    response = torch.fft.rfft(response).real * pitch
    frequency = torch.fft.rfftfreq(length, pitch, dtype=torch.float64)
    apodised = (response * KERNELS[kernel](frequency * 2 * pitch))[None]
    if resampled_mm is not None:
        angles = geometry.angles()[:, None]
        across, along = frequency * resampled_mm * angles.cos(), frequency * resampled_mm * angles.sin()
        apodised = apodised * (torch.sinc(across) * torch.sinc(along)) ** 2
    return apodised


def filtered(sinogram: torch.Tensor, geometry: Geometry, response: torch.Tensor) -> torch.Tensor:
    """Ramp-filter a sinogram (B, views, detectors), weighted for the fan where there is one."""
    count = sinogram.shape[-1]
    if not geometry.parallel:
        offsets = geometry.offsets_mm(count)
        weight = geometry.source_mm / torch.sqrt(geometry.source_mm**2 + offsets**2)
        sinogram = sinogram * weight.to(sinogram)
    length = 2 * (response.shape[-1] - 1)
    response, made = response.to(sinogram), torch.empty_like(sinogram)
    for lines, out in zip(sinogram, made, strict=True):  # one by one, so that spectra stay in the cache
        out.copy_(torch.fft.irfft(torch.fft.rfft(lines, length) * response, length)[:, :count])
    return made


def backproject(
    sinogram: torch.Tensor, geometry: Geometry, shape: tuple[int, int], pixel_mm: float
) -> torch.Tensor:
    """Sum a filtered sinogram (B, views, detectors) over the views, with linear interpolation -> (B, H, W).

    Detectors that would be needed outside the given ones count as zero."""
    batch, views, count = sinogram.shape
    side = max(shape)
    base = geometry.angles()[: views // geometry.turns]
    grouped = sinogram.reshape(batch, geometry.turns, len(base), count).permute(2, 3, 1, 0)
    table = sinogram.new_zeros(len(base), count + 3, 4, batch)  # nothing beside the detectors
    table[:, 1:-2, : geometry.turns] = grouped
    if geometry.parallel:  # a whole turn, of which each quarter sees the nearer half of the image
        table[:, 1:-2, 2:] = grouped.flip(1)
    table = table.reshape(len(base) * (count + 3), 4 * batch)
    starts = (torch.arange(len(base), device=sinogram.device) * (count + 3)).int()
    centred = ((torch.arange(side, device=sinogram.device) - (side - 1) / 2) * pixel_mm).float()

    def sums(down: slice, right: slice) -> torch.Tensor:
        place, weight = _on_detector(centred[right], centred[down], base, geometry)
        place = place.div_(geometry.pitch_centre_mm).add_((count + 1) / 2)
        return _interpolated_sums(table, place, count + 1, starts, weight)

    height = (side + 1) // 2 if geometry.parallel else side
    image = _tiled(sums, (height, side), len(base), sinogram.device)
    image = image.unflatten(2, (4, batch)).permute(2, 3, 0, 1)
    if geometry.parallel:
        image = F.pad(image, (0, 0, 0, side // 2))
        if side % 2:
            image[:, :, side // 2] /= 2  # seen from both sides
    image = sum(torch.rot90(image[turn], -turn, (1, 2)) for turn in range(4))
    left, _, top, _ = _to_square(*shape)
    return image[:, top : top + shape[0], left : left + shape[1]] * (math.pi / views)


def _on_detector(
    x: torch.Tensor, y: torch.Tensor, angles: torch.Tensor, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where each pixel's ray passes the centre, in mm, and its weight (None: 1): (y, x, views)."""
    cosine, sine = angles.cos().to(x), angles.sin().to(x)
    across = x[:, None] * cosine + (y[:, None] * sine)[:, None]
    if geometry.parallel:
        return across, None
    along = (y[:, None] * cosine)[:, None] - x[:, None] * sine
    nearer = geometry.source_mm / (geometry.source_mm + along)
    return across * nearer, nearer**2


def fbp(
    sinogram: torch.Tensor,
    geometry: Geometry,
    shape: tuple[int, int],
    pixel_mm: float,
    kernel: str = "ram-lak",
    resampled_mm: float | None = None,
) -> torch.Tensor:
    """Filtered back-projection: (B, views, detectors) -> (B, H, W) attenuation per mm."""
    response = ramp(geometry, sinogram.shape[-1], kernel, resampled_mm)
    return backproject(filtered(sinogram, geometry, response), geometry, shape, pixel_mm)


def fbp_variance(
    variance: torch.Tensor,
    geometry: Geometry,
    points_mm: torch.Tensor,
    kernel: str = "ram-lak",
    resampled_mm: float | None = None,
) -> torch.Tensor:
    """Variance that fbp leaves at some points, in closed form, if the rays' noise is independent.

    variance: (..., views, detectors) of the line integrals, parallel beams. points_mm: (..., P, 2), x and y.
    Returns (..., P) in 1/mm^2. A filtered value is sum_k h[n - k] p[k]; linear interpolation takes (1 - w) of
    it and w of its neighbour: ((1 - w)^2 h^2 + w^2 g^2 + 2 w (1 - w) h g) * variance, where g is h shifted by
    one."""
    if not geometry.parallel:
        raise ValueError("fbp_variance: for parallel beams only")
    views, count = variance.shape[-2:]
    response = ramp(geometry, count, kernel, resampled_mm)
    length = 2 * (response.shape[-1] - 1)
    taps = torch.fft.irfft(response, length)
    spectrum = torch.fft.rfft(variance.float().cpu(), length)

    def convolved(kernel_taps: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(spectrum * torch.fft.rfft(kernel_taps.float()), length)

    own, mixed = convolved(taps**2), convolved(taps * taps.roll(1, -1))
    angles = geometry.angles()[:, None]
    x, y = points_mm.double().cpu()[..., None, :, :].unbind(-1)
    place = (x * angles.cos() + y * angles.sin()) / geometry.pitch_centre_mm + (count - 1) / 2
    left = place.floor().long().clamp(0, count - 2)  # (..., views, P)
    w = place - left
    at, after = own.gather(-1, left), own.gather(-1, left + 1)
    # taps.roll(1)[m] = taps[m - 1]: mixed at left + 1 holds h[n + 1 - k] h[n - k]
    between = mixed.gather(-1, left + 1)
    total = ((1 - w) ** 2 * at + w**2 * after + 2 * w * (1 - w) * between).sum(-2)
    return total * (math.pi / views) ** 2
