"""The anatomy-aware system: a teacher that learns to give full dose back, and students that put an encoder
for low dose before its frozen decoder. Autoencoders, called as denoisers.py says.

Source: "Anatomy-Aware CT Scan Denoising"."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dataset import unwindow_hu, window_hu
from denoisers import (
    POOL_SIZE,
    Denoiser,
    Modulation,
    NAFBlock,
    Unmodulated,
    modulations,
    spread,
    window_maxima,
    window_means,
)
from unet import pad, start_convolutions
from weights import freeze

AUTOENCODER_WINDOW = (0.0, 2000.0)  # centre and width in HU: [-1000, 1000], the anatomy-aware system's own

# ---------------------------------------------------------------- encoders and decoders


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
        self.modulations = modulations(dose_aware, widths)

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
        means, maxima = window_means(x, self.pool_size), window_maxima(x, self.pool_size)
        attention = torch.sigmoid(self.mlp(means) + self.mlp(maxima))
        x = x * spread(attention, x.shape[-2:], self.pool_size)
        places = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.place(places))


class _CBAMBlock(nn.Module):
    """A residual block with CBAM before its shortcut."""

    def __init__(self, channels: int, pool_size: int, dose_aware: bool) -> None:
        super().__init__()
        self.first = _conv_relu(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = CBAM(channels, pool_size)
        self.modulate = Modulation(channels) if dose_aware else Unmodulated()

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


# ---------------------------------------------------------------- how they start

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


def _center(layer: nn.Conv2d) -> tuple[int, int]:
    return layer.kernel_size[0] // 2, layer.kernel_size[1] // 2


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
    middle = head.in_channels // 2
    _wire(head, [_Wire(0, middle, _center(head)), _Wire(1, middle, _center(head), -1.0)])
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
        _wire(layer, [_Wire(channel, channel, _center(layer)) for channel in range(2 * 4**levels)])
    _wire(end, [_Wire(0, 0, _center(end)), _Wire(0, 1, _center(end), -1.0)])


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


# ---------------------------------------------------------------- the system


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
    An untrained network returns its input, save baseline, and those of less than 16 channels.
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
    pools = [
        [part.pool_size for part in one.decoder.modules() if isinstance(part, NAFBlock)]
        for one in (teacher, model)
    ]
    if shapes != wanted or model.window != teacher.window or pools[0] != pools[1]:
        raise ValueError("teacher and student: must have the same encoder kind, width, window and crop")
    model.decoder.load_state_dict(theirs)
    freeze(model.decoder)
