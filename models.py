"""Every network of the project, and the registries that the stages and the app read.

Networks take HU and keep their own window, so that no caller can apply another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dataset import soft_window_hu, window_hu

SOFT_WINDOW = (40.0, 100.0)  # centre and width in HU: linear over the brain, blood and CSF
BRAIN_WINDOW = (40.0, 80.0)  # centre and width in HU: the window in which head CT is read


def _double_conv(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNetDenoiser(nn.Module):
    """U-Net that predicts the noise of a slice and takes it away.

    widths: channels per level, (64, 128, 256) in the paper. Input and output (B, 1, H, W) HU of any H and W:
    the slice is padded to a multiple of the coarsest level and cropped again. It is seen through a window
    without ends and the noise is unbounded, so nothing saturates; an untrained network returns its input.
    Source: Ronneberger et al. 2015; the residual form is Zhang et al. 2017 (DnCNN)."""

    def __init__(
        self, widths: Sequence[int] = (64, 128, 256), window: tuple[float, float] = SOFT_WINDOW
    ) -> None:
        super().__init__()
        self.window = tuple(window)
        inputs = [1, *widths[:-1]]
        self.encoders = nn.ModuleList(_double_conv(i, o) for i, o in zip(inputs, widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(deep, flat, 2, stride=2)
            for flat, deep in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.decoders = nn.ModuleList(_double_conv(2 * flat, flat) for flat in widths[-2::-1])
        self.head = nn.Conv2d(widths[0], 1, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                # without batch norm the usual small start would hide the noise behind ten layers
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        height, width = hu.shape[-2:]
        step = 2 ** len(self.ups)
        x = F.pad(hu, (0, -width % step, 0, -height % step), mode="replicate")
        x = soft_window_hu(x, *self.window)
        skips = []
        for encoder in self.encoders[:-1]:
            x = encoder(x)
            skips.append(x)
            x = self.pool(x)
        x = self.encoders[-1](x)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat([up(x), skips.pop()], dim=1))
        noise_hu = self.head(x).float() * (self.window[1] / 2)
        return hu - noise_hu[..., :height, :width]


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut; parameters named as in torchvision."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNetClassifier(nn.Module):
    """ResNet-18 with one input channel: (B, 1, H, W) HU -> (B, classes) logits.

    classes: names of the outputs. window: centre and width that the slice is seen through. width: channels
    of the first stage, doubled in each of the next three; 64 in the paper, fewer for small machines.
    Source: He et al. 2016."""

    def __init__(
        self,
        classes: Sequence[str] = ("stroke",),
        window: tuple[float, float] = BRAIN_WINDOW,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.classes, self.window = tuple(classes), tuple(window)
        self.conv1 = nn.Conv2d(1, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for number, stride in enumerate((1, 2, 2, 2), start=1):
            first = _BasicBlock(widths[number - 1], widths[number], stride)
            second = _BasicBlock(widths[number], widths[number], 1)
            setattr(self, f"layer{number}", nn.Sequential(first, second))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, len(self.classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        x = window_hu(hu, *self.window) * 2 - 1  # -1..1: zero-mean input for the first convolution
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1)).float()


DENOISERS: dict[str, Callable[..., nn.Module]] = {"unet": UNetDenoiser}
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"resnet18": ResNetClassifier}


def build_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by its name in one of the registries. Raises ValueError naming the choices."""
    networks = {**DENOISERS, **CLASSIFIERS}
    if name not in networks:
        raise ValueError(f"model {name!r}: must be one of {', '.join(networks)}")
    return networks[name](**kwargs)
