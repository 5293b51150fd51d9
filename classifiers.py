"""The networks that classify slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dataset import BRAIN_WINDOW, window_hu


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
