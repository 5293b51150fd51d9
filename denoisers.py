"""The networks that denoise.

Networks take HU and keep their own window, so that no caller can apply another one. A denoiser is called as
`model(hu, sigma_hu)`: hu (B, C, H, W) HU with C = model.slices neighbouring slices, the middle one of which
is denoised; sigma_hu (B,) the noise SD in HU at 40 HU, needed where model.dose_aware, else ignored. It
returns (B, 1, H, W) float32 HU of any H and W."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dataset import soft_window_hu
from unet import Levels, pad, start_convolutions, unet_features, unet_levels

SOFT_WINDOW = (40.0, 100.0)  # centre and width in HU: linear over the brain, blood and CSF
POOL_SIZE = 128  # side of the crops that denoisers are trained on, in pixels

# ---------------------------------------------------------------- what denoisers share

LEVEL_FEATURES = 64  # of the noise level, between the MLP and the blocks that it steers
MIDDLE_SIGMA_HU = 10.0  # the logarithm of a noise level is 0 here, and between -3 and 3 for all CT
SMALLEST_SIGMA_HU = 0.5  # no scan is as clean; keeps the logarithm finite where there is no noise at all


class Denoiser(nn.Module):
    """What every denoiser keeps: window (centre, width in HU), slices (odd), dose_aware.

    Raises ValueError for an even number of slices."""

    def __init__(self, window: Sequence[float], slices: int, dose_aware: bool) -> None:
        super().__init__()
        if slices < 1 or slices % 2 == 0:
            raise ValueError(f"slices {slices}: must be odd, as the middle one is denoised")
        self.window, self.slices, self.dose_aware = tuple(window), slices, dose_aware
        if dose_aware:
            self.noise_level = NoiseLevel()

    def middle(self, hu: torch.Tensor) -> torch.Tensor:
        """The slice to denoise: (B, 1, H, W). Raises ValueError if hu has not `slices` channels."""
        if hu.ndim != 4 or hu.shape[1] != self.slices:
            raise ValueError(f"input {tuple(hu.shape)}: must be (batch, {self.slices}, rows, columns)")
        return hu[:, self.slices // 2 : self.slices // 2 + 1].float()

    def levels(self, hu: torch.Tensor, sigma_hu: torch.Tensor | None) -> torch.Tensor | None:
        """(B,) noise SDs -> (B, LEVEL_FEATURES), or None for a network that does not ask.

        Raises ValueError if they are missing, or not one for each image of the batch."""
        if not self.dose_aware:
            return None
        if sigma_hu is None or sigma_hu.shape != hu.shape[:1]:
            found = "missing" if sigma_hu is None else f"shape {tuple(sigma_hu.shape)}"
            raise ValueError(
                f"sigma_hu: {found}, this network knows the dose and needs ({len(hu)},) noise SDs in HU"
            )
        return self.noise_level(sigma_hu.to(hu.device, torch.float32))


class NoiseLevel(nn.Module):
    """The noise SD as features, through its logarithm: doses between those of the training interpolate."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(1, LEVEL_FEATURES), nn.SiLU(), nn.Linear(LEVEL_FEATURES, LEVEL_FEATURES), nn.SiLU()
        )

    def forward(self, sigma_hu: torch.Tensor) -> torch.Tensor:
        level = (sigma_hu.clamp_min(SMALLEST_SIGMA_HU) / MIDDLE_SIGMA_HU).log()
        return self.mlp(level[:, None])


class Modulation(nn.Module):
    """x (1 + scale) + shift, per channel, from the noise level; none of both before training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(LEVEL_FEATURES, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(level).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


def modulations(dose_aware: bool, channels: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(Modulation(count) if dose_aware else Unmodulated() for count in channels)


class Unmodulated(nn.Module):
    """Stands where a dose-aware network has a Modulation, without parameters."""

    def forward(self, x: torch.Tensor, level: None) -> torch.Tensor:  # noqa: ARG002
        return x


# ---------------------------------------------------------------- U-Net


class UNetDenoiser(Denoiser):
    """U-Net that predicts the noise of a slice and takes it away.

    widths: channels per level, (64, 128, 256) in the paper. The slice is padded to a multiple of the coarsest
    level and cropped again. It is seen through a window without ends and the noise is unbounded, so nothing
    saturates; an untrained network returns its input.
    Source: Ronneberger et al. 2015; the residual form is Zhang et al. 2017 (DnCNN)."""

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        window: Sequence[float] = SOFT_WINDOW,
        slices: int = 1,
        dose_aware: bool = False,
    ) -> None:
        super().__init__(window, slices, dose_aware)
        self.encoders, self.ups, self.decoders = unet_levels(slices, widths)
        self.down_levels = modulations(dose_aware, widths)
        self.up_levels = modulations(dose_aware, widths[-2::-1])
        self.head = nn.Conv2d(widths[0], 1, 1)
        start_convolutions(self)
        nn.init.zeros_(self.head.weight)

    def forward(self, hu: torch.Tensor, sigma_hu: torch.Tensor | None = None) -> torch.Tensor:
        middle, level = self.middle(hu), self.levels(hu, sigma_hu)
        x = soft_window_hu(pad(hu.float(), 2 ** len(self.ups)), *self.window)
        modulations = [*self.down_levels, *self.up_levels]
        x = unet_features(
            x,
            Levels(self.encoders, self.ups, self.decoders),
            lambda features, block: modulations[block](features, level),
        )
        noise_hu = self.head(x).float() * (self.window[1] / 2)
        return middle - noise_hu[..., : hu.shape[-2], : hu.shape[-1]]


# ---------------------------------------------------------------- NAFNet


class LayerNorm2d(nn.Module):
    """Normalise the channels of each pixel. In channels_last it is torch's own kernel, without a copy."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # one type for all: the kernel sums in float32 anyway, and mixed types cost 1.5 times as long
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)


def window_means(x: torch.Tensor, size: int | None) -> torch.Tensor:
    """Means over windows of size x size pixels, a quarter of that apart: (B, C, h, w).

    Windows lie inside the image. A side that is not larger than size, or size None, gives one mean.
    As products of matrices, in channels_last, this takes no time beside the convolutions around it."""
    rows, columns = x.shape[-2:]
    if size is None or (rows <= size and columns <= size):
        return x.mean((2, 3), keepdim=True)
    down, across = (_window_matrix(side, size, x) for side in (rows, columns))
    return torch.einsum("nh,bhmc->bcnm", down, across @ x.permute(0, 2, 3, 1))


def window_maxima(x: torch.Tensor, size: int) -> torch.Tensor:
    """The highest of each window of window_means, to the pixel: (B, C, h, w)."""
    for axis in (2, 3):
        side = x.shape[axis]
        last, steps = max(side - size, 0), max(_window_count(side, size) - 1, 1)
        starts = [round(last * step / steps) for step in range(_window_count(side, size))]
        parts = [x.narrow(axis, start, min(size, side)).amax(axis, keepdim=True) for start in starts]
        x = torch.cat(parts, dim=axis)
    return x


def spread(means: torch.Tensor, shape: Sequence[int], size: int | None) -> torch.Tensor:
    """What is known of each window of window_means, interpolated to every pixel of shape (H, W)."""
    if means.shape[-2:] == (1, 1):
        return means
    down, across = (_interpolation_matrix(side, size, means) for side in shape)
    return (across @ torch.einsum("hn,bcnm->bhmc", down, means)).permute(0, 3, 1, 2)


def _window_count(side: int, size: int) -> int:
    """Windows of size pixels along a side: from end to end, and a quarter of a window apart at most."""
    return 1 + math.ceil(4 * max(side - size, 0) / size)


def _window_matrix(side: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(windows, side): each row the mean over the pixels of a window."""
    last = max(side - size, 0)
    size = min(size, side)
    starts = torch.linspace(0, last, _window_count(side, size), device=like.device)[:, None]
    pixels = torch.arange(side, device=like.device)
    share = (torch.minimum(pixels + 1, starts + size) - torch.maximum(pixels, starts)).clamp_min(0)
    return (share / size).to(like.dtype)


def _interpolation_matrix(side: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(side, windows): linear between the two windows that a pixel's own lies between; near the border, where
    a window around the pixel would leave the image, the outermost one."""
    count, last = _window_count(side, size), max(side - size, 0)
    starts = (torch.arange(side, device=like.device) - (size - 1) // 2).clamp(0, last)
    places = starts[:, None] * ((count - 1) / max(last, 1))
    windows = torch.arange(count, device=like.device)
    return (1 - (places - windows).abs()).clamp_min(0).to(like.dtype)


class NAFBlock(nn.Module):
    """Block without activation functions: gates and channel attention, around two shortcuts.

    pool_size: side of the window over which the channel attention averages, in pixels of this level. In
    training that is the whole crop; in a larger image it is a window of the same size around each pixel, as
    otherwise the attention would see in a test image what it never saw in training. None: all of it.
    Source: Chen et al. 2022 (NAFNet); the windows are Chu et al. 2022 (test-time local converter)."""

    def __init__(self, channels: int, pool_size: int | None, dose_aware: bool = False) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.norm1 = LayerNorm2d(channels)
        self.modulate = Modulation(channels) if dose_aware else Unmodulated()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1, 1))
        self.norm2 = LayerNorm2d(channels)
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor, level: torch.Tensor | None = None) -> torch.Tensor:
        y = _gate(self.conv2(self.conv1(self.modulate(self.norm1(x), level))))
        attention = self.attention(window_means(y, self.pool_size))
        y = y * spread(attention, y.shape[-2:], self.pool_size)
        x = x + _scaled(self.conv3, self.beta, y)
        return x + _scaled(self.conv5, self.gamma, _gate(self.conv4(self.norm2(x))))


def _gate(x: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=1)
    return one * other


def _scaled(conv: nn.Conv2d, scale: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
    """scale * conv(x), with the scale taken into the weights: the same numbers without a pass over x."""
    return F.conv2d(x, conv.weight * scale, conv.bias * scale.flatten())


class NAFNetDenoiser(Denoiser):
    """NAFNet that predicts the noise of a slice and takes it away.

    width: channels of the first level, doubled at each further one. enc_blocks, dec_blocks: NAFBlocks per
    level, from fine to coarse and from coarse to fine; middle_blocks: at the coarsest. pool_size: side of the
    training crops in pixels (None: the attention averages over all of every image, as in the paper).
    As with the U-Net nothing saturates, and an untrained network returns its input.
    Source: Chen et al. 2022."""

    def __init__(
        self,
        width: int = 32,
        enc_blocks: Sequence[int] = (2, 2, 4),
        middle_blocks: int = 6,
        dec_blocks: Sequence[int] = (2, 2, 2),
        pool_size: int | None = POOL_SIZE,
        window: Sequence[float] = SOFT_WINDOW,
        slices: int = 1,
        dose_aware: bool = False,
    ) -> None:
        super().__init__(window, slices, dose_aware)
        if len(enc_blocks) != len(dec_blocks):
            raise ValueError(
                f"enc_blocks {list(enc_blocks)} and dec_blocks {list(dec_blocks)}: must have as many levels"
            )

        def blocks(count: int, level: int) -> nn.ModuleList:
            pool = None if pool_size is None else max(pool_size // 2**level, 1)
            return nn.ModuleList(NAFBlock(width * 2**level, pool, dose_aware) for _ in range(count))

        depth = len(enc_blocks)
        widths = [width * 2**level for level in range(depth + 1)]
        self.intro = nn.Conv2d(slices, width, 3, padding=1)
        self.encoders = nn.ModuleList(blocks(count, level) for level, count in enumerate(enc_blocks))
        self.downs = nn.ModuleList(nn.Conv2d(i, 2 * i, 2, stride=2) for i in widths[:-1])
        self.middles = blocks(middle_blocks, depth)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * i, i, 2, stride=2) for i in widths[-2::-1])
        self.decoders = nn.ModuleList(
            blocks(count, depth - 1 - place) for place, count in enumerate(dec_blocks)
        )
        self.head = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hu: torch.Tensor, sigma_hu: torch.Tensor | None = None) -> torch.Tensor:
        middle, level = self.middle(hu), self.levels(hu, sigma_hu)
        x = self.intro(soft_window_hu(pad(hu.float(), 2 ** len(self.ups)), *self.window))
        skips = []
        for blocks, down in zip(self.encoders, self.downs, strict=True):
            for block in blocks:
                x = block(x, level)
            skips.append(x)
            x = down(x)
        for block in self.middles:
            x = block(x, level)
        for up, blocks in zip(self.ups, self.decoders, strict=True):
            x = up(x) + skips.pop()
            for block in blocks:
                x = block(x, level)
        noise_hu = self.head(x).float() * (self.window[1] / 2)
        return middle - noise_hu[..., : hu.shape[-2], : hu.shape[-1]]


# ---------------------------------------------------------------- RED-CNN


class REDCNNDenoiser(Denoiser):
    """RED-CNN: five convolutions and five transposed ones of 5x5 without padding, with three shortcuts.

    width: channels, 96 in the paper. Two things differ, both in its favour: it sees the slice through the
    window without ends instead of a scale of 4096 HU, and the last shortcut is in HU and has no ReLU behind
    it, which would bias the noise in air. An untrained network returns its input.
    Source: Chen et al. 2017."""

    LAYERS = 5
    KERNEL = 5

    def __init__(
        self,
        width: int = 96,
        window: Sequence[float] = SOFT_WINDOW,
        slices: int = 1,
        dose_aware: bool = False,
    ) -> None:
        super().__init__(window, slices, dose_aware)
        inputs = [slices, *[width] * (self.LAYERS - 1)]
        self.convs = nn.ModuleList(nn.Conv2d(count, width, self.KERNEL) for count in inputs)
        self.deconvs = nn.ModuleList(
            nn.ConvTranspose2d(width, width, self.KERNEL) for _ in range(self.LAYERS - 1)
        )
        self.conv_levels = modulations(dose_aware, [width] * self.LAYERS)
        self.head = nn.ConvTranspose2d(width, 1, self.KERNEL)
        start_convolutions(self)
        nn.init.zeros_(self.head.weight)

    def forward(self, hu: torch.Tensor, sigma_hu: torch.Tensor | None = None) -> torch.Tensor:
        middle, level = self.middle(hu), self.levels(hu, sigma_hu)
        smallest = 1 + self.LAYERS * (self.KERNEL - 1)  # what the convolutions leave one pixel of
        x = soft_window_hu(pad(hu.float(), 1, smallest), *self.window)
        shortcuts = []
        for place, (conv, modulate) in enumerate(zip(self.convs, self.conv_levels, strict=True)):
            if place in (2, 4):
                shortcuts.append(x)
            x = modulate(F.relu(conv(x)), level)
        for place, deconv in enumerate(self.deconvs):
            x = deconv(x)
            x = F.relu(x + shortcuts.pop() if place in (0, 2) else x)
        noise_hu = self.head(x).float() * (self.window[1] / 2)
        return middle - noise_hu[..., : hu.shape[-2], : hu.shape[-1]]
