"""The U-Net that denoiser and segmenter share, and what convolutions of slices of any size need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def pad(hu: torch.Tensor, step: int, smallest: int = 1) -> torch.Tensor:
    """Repeat the last row and column until both sides are multiples of step and at least `smallest`."""
    height, width = (max(side + -side % step, smallest) - side for side in hu.shape[-2:])
    return F.pad(hu, (0, width, 0, height), mode="replicate") if height or width else hu


def start_convolutions(module: nn.Module) -> None:
    """Kaiming: without batch norm torch's own small start would hide the noise behind ten layers."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def double_conv(channels_in: int, channels_out: int, *, norm: bool = False) -> nn.Sequential:
    """Two 3x3 convolutions with ReLU. norm: batch norm before each ReLU."""
    layers: list[nn.Module] = []
    for count in (channels_in, channels_out):
        layers.append(nn.Conv2d(count, channels_out, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(channels_out))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Levels(NamedTuple):
    """The convolutions of a U-Net: encoders from fine to coarse, then ups and decoders back to fine."""

    encoders: nn.ModuleList
    ups: nn.ModuleList
    decoders: nn.ModuleList


def unet_levels(channels: int, widths: Sequence[int], *, norm: bool = False) -> Levels:
    """Convolutions for pictures of `channels`, with widths[0] channels at the finest level and so on.

    norm: as for double_conv."""
    inputs = [channels, *widths[:-1]]
    encoders = nn.ModuleList(double_conv(i, o, norm=norm) for i, o in zip(inputs, widths, strict=True))
    ups = nn.ModuleList(
        nn.ConvTranspose2d(deep, flat, 2, stride=2)
        for flat, deep in zip(widths[-2::-1], widths[:0:-1], strict=True)
    )
    decoders = nn.ModuleList(double_conv(2 * flat, flat, norm=norm) for flat in widths[-2::-1])
    return Levels(encoders, ups, decoders)


def unet_features(
    x: torch.Tensor,
    levels: Levels,
    after: Callable[[torch.Tensor, int], torch.Tensor] = lambda x, _block: x,
) -> torch.Tensor:
    """(B, channels, H, W) -> (B, widths[0], H, W), sides being multiples of 2 per level.

    after(x, number) is what is done behind each encoder and decoder, counted from 0.
    Source: Ronneberger et al. 2015."""
    skips: list[torch.Tensor] = []
    for block, encoder in enumerate(levels.encoders):
        x = after(encoder(F.max_pool2d(x, 2) if skips else x), block)
        skips.append(x)
    skips.pop()
    for block, (up, decoder) in enumerate(
        zip(levels.ups, levels.decoders, strict=True), len(levels.encoders)
    ):
        x = after(decoder(torch.cat([up(x), skips.pop()], dim=1)), block)
    return x
