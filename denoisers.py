"""The networks that denoise.

Networks take HU and keep their own window, so that no caller can apply another one. A denoiser is called as
`model(hu, sigma_hu)`: hu (B, C, H, W) HU with C = model.slices neighbouring slices, the middle one of which
is denoised; sigma_hu (B,) the noise SD in HU at 40 HU, needed where model.dose_aware, else ignored. It
returns (B, 1, H, W) float32 HU of any H and W."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dataset import soft_window_hu, unwindow_hu, window_hu
from unet import Levels, pad, start_convolutions, unet_features, unet_levels
from weights import freeze

SOFT_WINDOW = (40.0, 100.0)  # centre and width in HU: linear over the brain, blood and CSF
AUTOENCODER_WINDOW = (0.0, 2000.0)  # centre and width in HU: [-1000, 1000], the anatomy-aware system's own
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


def _modulations(dose_aware: bool, channels: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(Modulation(count) if dose_aware else _Unmodulated() for count in channels)


class _Unmodulated(nn.Module):
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
        self.down_levels = _modulations(dose_aware, widths)
        self.up_levels = _modulations(dose_aware, widths[-2::-1])
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


def _window_means(x: torch.Tensor, size: int | None) -> torch.Tensor:
    """Means over windows of size x size pixels, a quarter of that apart: (B, C, h, w).

    Windows lie inside the image. A side that is not larger than size, or size None, gives one mean.
    As products of matrices, in channels_last, this takes no time beside the convolutions around it."""
    rows, columns = x.shape[-2:]
    if size is None or (rows <= size and columns <= size):
        return x.mean((2, 3), keepdim=True)
    down, across = (_window_matrix(side, size, x) for side in (rows, columns))
    return torch.einsum("nh,bhmc->bcnm", down, across @ x.permute(0, 2, 3, 1))


def _window_maxima(x: torch.Tensor, size: int) -> torch.Tensor:
    """The highest of each window of _window_means, to the pixel: (B, C, h, w)."""
    for axis in (2, 3):
        side = x.shape[axis]
        starts = torch.linspace(0, max(side - size, 0), _window_count(side, size)).round().int().tolist()
        parts = [x.narrow(axis, start, min(size, side)).amax(axis, keepdim=True) for start in starts]
        x = torch.cat(parts, dim=axis)
    return x


def _spread(means: torch.Tensor, shape: Sequence[int], size: int | None) -> torch.Tensor:
    """What is known of each window of _window_means, interpolated to every pixel of shape (H, W)."""
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
        self.modulate = Modulation(channels) if dose_aware else _Unmodulated()
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
        attention = self.attention(_window_means(y, self.pool_size))
        y = y * _spread(attention, y.shape[-2:], self.pool_size)
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
        self.conv_levels = _modulations(dose_aware, [width] * self.LAYERS)
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


# ---------------------------------------------------------------- the anatomy-aware system


def _conv_relu(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


def _up_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    up = nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1)
    return nn.Sequential(up, nn.ReLU(inplace=True))


class _PairEncoder(nn.Module):
    """The Baseline AE's: pairs of convolutions and four max-pools. Latent 8 width x H/16 x W/16."""

    def __init__(self, width: int, slices: int, dose_aware: bool) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.pairs = nn.ModuleList(
            nn.Sequential(_conv_relu(i, o), _conv_relu(o, o))
            for i, o in zip([slices, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.last = _conv_relu(8 * width, 8 * width)
        self.modulations = _modulations(dose_aware, widths)

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = []
        for pair, modulate in zip(self.pairs, self.modulations, strict=True):
            features.append(modulate(pair(x), level))
            x = self.pool(features[-1])
        return self.last(x), features


class _PairDecoder(nn.Module):
    """Four times a transposed convolution 4x4 and a convolution 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [8 * width, 8 * width, 4 * width, 2 * width, width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(_up_relu(i, o), _conv_relu(o, o))
                for i, o in zip(widths[:-1], widths[1:], strict=True)
            ),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, latent: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        return self.layers(latent)


AUTOENCODER_BLOCKS = 8  # NAFBlocks in the encoder and again in the decoder
RESIDUAL_BLOCKS = 3  # of the ResNet and the U-Net with CBAM


class _NAFEncoder(nn.Module):
    """Head, three convolutions of stride 2, NAFBlocks. Latent 16 width x H/8 x W/8."""

    def __init__(self, width: int, slices: int, dose_aware: bool, pool_size: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(slices, width, 3, padding=1)
        self.downs = nn.ModuleList(
            nn.Conv2d(i, 2 * i, 3, stride=2, padding=1) for i in (width, 2 * width, 4 * width)
        )
        self.blocks = _latent_blocks(8 * width, pool_size, dose_aware)
        self.last = nn.Conv2d(8 * width, 16 * width, 1)

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.head(x)
        features = [x]
        for down in self.downs:
            x = F.relu(down(x))
            features.append(x)
        for block in self.blocks:
            x = block(x, level)
        return self.last(x), [*features[:-1], x]


def _latent_blocks(channels: int, pool_size: int, dose_aware: bool) -> nn.ModuleList:
    pool = max(pool_size // 8, 1)
    return nn.ModuleList(NAFBlock(channels, pool, dose_aware) for _ in range(AUTOENCODER_BLOCKS))


class _NAFDecoder(nn.Module):
    """NAFBlocks, then three transposed convolutions."""

    def __init__(self, width: int, pool_size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(16 * width, 8 * width, 1)
        self.blocks = _latent_blocks(8 * width, pool_size, dose_aware=False)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(2 * i, i, 4, stride=2, padding=1) for i in (4 * width, 2 * width, width)
        )
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, latent: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        x = self.first(latent)
        for block in self.blocks:
            x = block(x)
        for up in self.ups:
            x = F.relu(up(x))
        return self.head(x)


class CBAM(nn.Module):
    """Attention over channels, then over places.

    pool_size: as for NAFBlock. Source: Woo et al. 2018."""

    def __init__(self, channels: int, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        hidden = max(channels // 16, 1)  # the paper's reduction
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means, maxima = _window_means(x, self.pool_size), _window_maxima(x, self.pool_size)
        attention = torch.sigmoid(self.mlp(means) + self.mlp(maxima))
        x = x * _spread(attention, x.shape[-2:], self.pool_size)
        places = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.place(places))


class _CBAMBlock(nn.Module):
    """A residual block with CBAM before its shortcut."""

    def __init__(self, channels: int, pool_size: int, dose_aware: bool) -> None:
        super().__init__()
        self.first = _conv_relu(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = CBAM(channels, pool_size)
        self.modulate = Modulation(channels) if dose_aware else _Unmodulated()

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        y = self.attention(self.second(self.first(x)))
        return self.modulate(F.relu(x + y), level)


class _ResEncoder(nn.Module):
    """Head 7x7, three convolutions of stride 2, residual blocks with CBAM. Latent 8 width x H/8 x W/8."""

    def __init__(self, width: int, slices: int, dose_aware: bool, pool_size: int) -> None:
        super().__init__()
        self.head = _conv_relu(slices, width, kernel=7)
        self.downs = nn.ModuleList(_conv_relu(i, 2 * i, stride=2) for i in (width, 2 * width, 4 * width))
        pool = max(pool_size // 8, 1)
        self.blocks = nn.ModuleList(_CBAMBlock(8 * width, pool, dose_aware) for _ in range(RESIDUAL_BLOCKS))

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = [self.head(x)]
        for down in self.downs:
            features.append(down(features[-1]))
        x = features[-1]
        for block in self.blocks:
            x = block(x, level)
        return x, features


class _ResDecoder(nn.Module):
    """Three transposed convolutions, then 7x7; with skips each takes in a feature map."""

    def __init__(self, width: int, with_skips: bool = False) -> None:
        super().__init__()
        widths = (4 * width, 2 * width, width)
        self.ups = nn.ModuleList(_up_relu(2 * i, i) for i in widths)
        self.merges = nn.ModuleList(_conv_relu(2 * i, i) for i in widths) if with_skips else None
        self.head = nn.Conv2d(width, 1, 7, padding=3)

    def forward(self, latent: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        x = latent
        for place, up in enumerate(self.ups):
            x = up(x)
            if self.merges is not None:
                x = self.merges[place](torch.cat([x, skips[2 - place]], dim=1))
        return self.head(x)


# ---------------------------------------------------------------- how the anatomy-aware system starts

# The 2 x 2 pixels that one of the next level covers, as (row, column) of a kernel of 3 x 3 with stride 2; and
# of a transposed one of 4 x 4, where these four places write that pixel's own 2 x 2
STEP_TAPS = ((1, 1), (1, 2), (2, 1), (2, 2))
IDENTITY_WIDTH = 16  # fewer channels cannot hold 8 x 8 pixels with both signs at an eighth of the size


class _Wire(NamedTuple):
    """An output channel of a convolution that copies an input channel. tap: (row, column) of the kernel."""

    out: int
    source: int
    tap: tuple[int, int]
    gain: float = 1.0


@torch.no_grad()
def _wire(layer: nn.Conv2d | nn.ConvTranspose2d, wires: Sequence[_Wire]) -> None:
    """Let output channels of a layer do what their wires say, and nothing else."""
    weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    for wire in wires:
        weight[wire.out], layer.bias[wire.out] = 0, 0
    for wire in wires:
        weight[wire.out, wire.source, *wire.tap] = wire.gain


def _start_as_identity(
    head: nn.Conv2d,
    downs: Sequence[nn.Conv2d],
    ups: Sequence[nn.ConvTranspose2d],
    end: nn.Conv2d,
    passing: Sequence[tuple[nn.Conv2d, int]],
) -> None:
    """Let the layers of an encoder and its decoder give their input back, through every ReLU.

    passing: layers between them, each with the levels above it. Every level carries the pixels that it covers
    in channels of their own, positive and negative parts apart, which ReLU leaves alone and bfloat16 stores
    finely around 0. All other channels start at random, and no carried one reads them. Networks narrower than
    IDENTITY_WIDTH are left as they are."""
    if head.out_channels < IDENTITY_WIDTH:
        return
    middle, center = head.in_channels // 2, (head.kernel_size[0] // 2,) * 2
    _wire(head, [_Wire(0, middle, center), _Wire(1, middle, center, -1.0)])
    for level, (down, up) in enumerate(zip(downs, reversed(ups), strict=True)):
        steps = [
            _Wire(2 * (4 * pixel + place) + sign, 2 * pixel + sign, tap)
            for pixel in range(4**level)
            for place, tap in enumerate(STEP_TAPS)
            for sign in (0, 1)
        ]
        _wire(down, steps)
        _wire(up, [_Wire(step.source, step.out, step.tap) for step in steps])
    for layer, levels in passing:
        center = (layer.kernel_size[0] // 2,) * 2
        _wire(layer, [_Wire(channel, channel, center) for channel in range(2 * 4**levels)])
    center = (end.kernel_size[0] // 2,) * 2
    _wire(end, [_Wire(0, 0, center), _Wire(0, 1, center, -1.0)])


def _start_pairs(encoder: _PairEncoder, decoder: _PairDecoder) -> None:
    """At random: what a maximum over 2 x 2 pixels drops cannot be carried."""
    start_convolutions(encoder)
    start_convolutions(decoder)


def _start_naf(encoder: _NAFEncoder, decoder: _NAFDecoder) -> None:
    """NAFBlocks are the identity before training, whatever lies around them."""
    depth = len(encoder.downs)
    passing = [(encoder.last, depth), (decoder.first, depth)]
    _start_as_identity(encoder.head, encoder.downs, decoder.ups, decoder.head, passing)


def _start_residual(encoder: _ResEncoder, decoder: _ResDecoder) -> None:
    start_convolutions(encoder)
    start_convolutions(decoder)
    for block in encoder.blocks:
        nn.init.zeros_(block.second.weight)
    downs, ups = ([conv for conv, _ in layers] for layers in (encoder.downs, decoder.ups))
    merges = [] if decoder.merges is None else [conv for conv, _ in decoder.merges]
    passing = [(merge, len(downs) - 1 - place) for place, merge in enumerate(merges)]
    _start_as_identity(encoder.head[0], downs, ups, decoder.head, passing)


class AutoencoderKind(NamedTuple):
    """An encoder with its decoder, how the two start, the side of a latent pixel, the width of the paper, and
    which of the two have an attention that averages over the slice."""

    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]
    start: Callable[[nn.Module, nn.Module], None]
    step: int
    width: int
    pooling: Sequence[str]


AUTOENCODERS = {
    "baseline": AutoencoderKind(_PairEncoder, _PairDecoder, _start_pairs, 16, 64, ()),
    "nafnet": AutoencoderKind(_NAFEncoder, _NAFDecoder, _start_naf, 8, 32, ("encoder", "decoder")),
    "resnet": AutoencoderKind(_ResEncoder, _ResDecoder, _start_residual, 8, 32, ("encoder",)),
    "unet": AutoencoderKind(
        _ResEncoder, functools.partial(_ResDecoder, with_skips=True), _start_residual, 8, 32, ("encoder",)
    ),
}


class Encoded(NamedTuple):
    """What a distillation compares. output: (B, 1, H, W) HU. features: four maps, from fine to coarse."""

    output: torch.Tensor
    latent: torch.Tensor
    features: list[torch.Tensor]


class Autoencoder(Denoiser):
    """Encoder and decoder of the anatomy-aware system: teacher, student, and the Baseline AE.

    encoder: baseline, nafnet, resnet or unet. The teacher learns to give full-dose slices back; a student of
    the same kind takes over its decoder (adopt_decoder) and learns an encoder for low dose. With `unet` the
    skips carry the slice past the latent, so that a teacher can copy its input and its latent may be empty:
    the student then learns from the skips. width: channels at full resolution (None: 64 for baseline, 32
    else), all others are multiples of it. pool_size: side of the training crops in pixels, for the attention
    of all but baseline (None: POOL_SIZE). Dose-aware is the encoder only, with a Modulation per block.
    HU are clipped to the window and scaled to -1..1. What lies beyond it, dense bone, metal and padding, is
    added to the output again as it came, with its noise.
    Raises ValueError for another encoder, or a pool_size where there is no use for it.
    An untrained network returns its input (within the window; not so baseline, and below 16 channels).
    Source: "Anatomy-Aware CT Scan Denoising". New are that start; a ReLU after every strided layer of nafnet,
    without which its decoder would be linear behind the last block; no tanh at the end, which would bend air;
    and no batch norm, as what else is in a batch would decide about a slice's HU."""

    def __init__(
        self,
        encoder: str = "nafnet",
        width: int | None = None,
        pool_size: int | None = None,
        window: Sequence[float] = AUTOENCODER_WINDOW,
        slices: int = 1,
        dose_aware: bool = False,
    ) -> None:
        super().__init__(window, slices, dose_aware)
        if encoder not in AUTOENCODERS:
            raise ValueError(f"encoder {encoder!r}: must be one of {', '.join(AUTOENCODERS)}")
        kind = AUTOENCODERS[encoder]
        if pool_size is not None and not kind.pooling:
            raise ValueError(f"pool_size {pool_size}: the encoder {encoder} has no use for it")
        pools = {part: {"pool_size": pool_size or POOL_SIZE} for part in kind.pooling}
        width = kind.width if width is None else width
        self.step = kind.step
        self.encoder = kind.encoder(width, slices, dose_aware, **pools.get("encoder", {}))
        self.decoder = kind.decoder(width, **pools.get("decoder", {}))
        kind.start(self.encoder, self.decoder)

    def encode(
        self, hu: torch.Tensor, sigma_hu: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(latent, four feature maps) of a batch, padded to a multiple of `step`."""
        level = self.levels(hu, sigma_hu)
        x = window_hu(pad(hu.float(), self.step), *self.window) * 2 - 1
        return self.encoder(x, level)

    def decode(self, latent: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, 1, padded H, padded W) HU, of the window's range. skips: the encoder's features."""
        return unwindow_hu((self.decoder(latent, skips).float() + 1) / 2, *self.window)

    def forward(
        self, hu: torch.Tensor, sigma_hu: torch.Tensor | None = None, *, encoded: bool = False
    ) -> torch.Tensor | Encoded:
        """The denoised slice; with encoded=True as Encoded, with what it was made of."""
        middle = self.middle(hu)
        center, width = self.window
        beyond = middle - middle.clamp(center - width / 2, center + width / 2)
        latent, features = self.encode(hu, sigma_hu)
        output = self.decode(latent, features)[..., : hu.shape[-2], : hu.shape[-1]] + beyond
        return Encoded(output, latent, features) if encoded else output


def student(dose_aware: bool = True, **kwargs: Any) -> Autoencoder:
    """A student of the anatomy-aware system; kwargs as for Autoencoder. The ablation is dose_aware=False."""
    return Autoencoder(dose_aware=dose_aware, **kwargs)


def adopt_decoder(model: Autoencoder, teacher: Autoencoder) -> None:
    """Give a student its teacher's decoder, frozen. Raises ValueError if the two do not fit."""
    mine, theirs = model.decoder.state_dict(), teacher.decoder.state_dict()
    shapes, wanted = ({key: value.shape for key, value in state.items()} for state in (theirs, mine))
    if shapes != wanted or model.window != teacher.window:
        raise ValueError("teacher and student: must have the same encoder kind, width and window")
    model.decoder.load_state_dict(theirs)
    freeze(model.decoder)
