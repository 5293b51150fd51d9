"""The networks that classify slices, and the weights that they can begin with.

Networks take HU and keep their own windows, so that no caller can apply others. A classifier is called as
`model(hu)`: hu (B, S, H, W) HU with S = model.slices neighbouring slices, the middle one of which is
classified, H and W of any size from SMALLEST_PX on. It returns (B, classes) float32 logits."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import stage
from dataset import BRAIN_WINDOW, THREE_WINDOWS, window_hu
from weights import load_weights, read_weights

SMALLEST_PX = 32  # side of a slice of which a network with 32 pixels to a feature still has one feature
CAM_STRIDES = (4, 8, 16, 32)  # pixels of the slice to one of a feature map, as all networks here have them

# Over RSNA's training slices in dataset.THREE_WINDOWS, as 0..1. Source: Burduja et al. 2020
THREE_WINDOWS_MEAN, THREE_WINDOWS_SD = (0.1738, 0.1433, 0.1970), (0.3161, 0.2850, 0.3111)

# What --windows stands for, as arguments of SliceReader
WINDOWS = {
    "brain": {"windows": [list(BRAIN_WINDOW)]},
    "three": {
        "windows": [list(window) for window in THREE_WINDOWS],
        "mean": list(THREE_WINDOWS_MEAN),
        "sd": list(THREE_WINDOWS_SD),
    },
}

# ---------------------------------------------------------------- what all that read slices share


class SliceReader(nn.Module):
    """What sees slices through windows and says something of the middle one.

    classes: what it tells apart. windows: (centre, width) in HU, each a channel of the network's picture.
    slices: odd, neighbours that it sees; the channels are the windows of the first slice, then those of the
    next. mean, sd: of the windowed slice (0..1), for each window or one for all; with 0.5 and 0.5 the network
    sees -1..1. Raises ValueError for what no network can be built of, and for a batch of other slices or of
    too small ones."""

    smallest_px = 1

    # Weights of RGB pictures fit `backbone` with another first convolution, another head, and without the
    # parts that are not used; timm's name of them, and the names of these layers
    backbone: nn.Module
    timm_name: str
    first_conv: str
    first_head: str
    unused: frozenset[str] = frozenset()

    def __init__(
        self,
        classes: Sequence[str],
        windows: Sequence[Sequence[float]] = (BRAIN_WINDOW,),
        slices: int = 1,
        mean: float | Sequence[float] = 0.5,
        sd: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        if slices < 1 or slices % 2 == 0:
            raise ValueError(f"slices {slices}: must be odd, as the middle one is read")
        if not windows or any(len(window) != 2 or window[1] <= 0 for window in windows):
            raise ValueError(f"windows {windows}: must be pairs of centre and width, the width above 0")
        self.classes, self.slices = tuple(classes), slices
        self.windows = tuple(tuple(window) for window in windows)
        self.channels = slices * len(self.windows)
        for name, value in (("mean", mean), ("sd", sd)):
            values = list(value) if isinstance(value, Sequence) else [value]
            if len(values) not in (1, len(self.windows)) or (name == "sd" and min(values) <= 0):
                raise ValueError(f"{name} {value}: must be one number, or one for each window, an sd above 0")
            # of the kwargs and not of the weights, whose names stay those of the files that others trained
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False
            )

    def normalised(self, hu: torch.Tensor) -> torch.Tensor:
        """The network's picture: (B, slices, H, W) HU -> (B, slices x windows, H, W), slice after slice."""
        if hu.ndim != 4 or hu.shape[1] != self.slices or min(hu.shape[2:]) < self.smallest_px:
            raise ValueError(
                f"input {tuple(hu.shape)}: must be (batch, {self.slices}, rows, columns), "
                f"of {self.smallest_px} rows and columns at least"
            )
        seen = torch.stack([window_hu(hu.float(), *window) for window in self.windows], dim=2)
        return ((seen - self.mean) / self.sd).flatten(1, 2)


class Classifier(SliceReader, ABC):
    """What every classifier is: a picture of the slices, its features, an embedding, a head.

    dropout: share of the embedding that training hides from the head. kwargs: as for SliceReader.
    forward(hu) is head(dropout(embed(hu))). Raises ValueError as SliceReader does. Training with batch norm
    needs two slices at SMALLEST_PX."""

    smallest_px = SMALLEST_PX
    head: nn.Linear  # from the embedding to the logits

    def __init__(self, classes: Sequence[str] = ("stroke",), dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(classes, **kwargs)
        self.dropout = nn.Dropout(dropout)

    @abstractmethod
    def features(self, hu: torch.Tensor) -> torch.Tensor:
        """The last feature map: (B, slices, H, W) HU -> (B, C, h, w)."""

    @abstractmethod
    def embed(self, hu: torch.Tensor) -> torch.Tensor:
        """What the head sees: (B, slices, H, W) HU -> (B, head.in_features)."""

    @abstractmethod
    def cam_layers(self) -> dict[int, nn.Module]:
        """Stride in pixels -> the module whose output is that stage's feature map, from fine to coarse."""

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.embed(hu))).float()


# ---------------------------------------------------------------- ResNet-18


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


class ResNetClassifier(Classifier):
    """ResNet-18, with torchvision's names of parameters.

    width: channels of the first stage, doubled in each of the next three; 64 in the paper, fewer for small
    machines. kwargs: as for Classifier. Source: He et al. 2016."""

    timm_name, first_conv, first_head = "resnet18.tv_in1k", "conv1", "fc"

    def __init__(self, width: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv1 = nn.Conv2d(self.channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for number, stride in enumerate((1, 2, 2, 2), start=1):
            first = _BasicBlock(widths[number - 1], widths[number], stride)
            second = _BasicBlock(widths[number], widths[number], 1)
            setattr(self, f"layer{number}", nn.Sequential(first, second))
        self.fc = nn.Linear(8 * width, len(self.classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def head(self) -> nn.Linear:
        return self.fc

    @property
    def backbone(self) -> nn.Module:
        return self

    def features(self, hu: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(self.normalised(hu))), inplace=True))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def embed(self, hu: torch.Tensor) -> torch.Tensor:
        return self.features(hu).mean((2, 3))

    def cam_layers(self) -> dict[int, nn.Module]:
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        return dict(zip(CAM_STRIDES, layers, strict=True))


# ---------------------------------------------------------------- networks of timm

# By what a user types: timm's network and the weights to begin with, both part of timm's name
TIMM_NETWORKS = {
    "resnet50": "resnet50.a1_in1k",
    "convnext-tiny": "convnext_tiny.in12k_ft_in1k",
    "convnext-base": "convnext_base.fb_in22k_ft_in1k",
    "densenet121": "densenet121.ra_in1k",
    "efficientnet-b0": "efficientnet_b0.ra_in1k",
    "efficientnet-b4": "efficientnet_b4.ra2_in1k",
    "resnext101": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k",  # begun on 940 million pictures
    "seresnext50": "seresnext50_32x4d.racm_in1k",
    "seresnext101": "seresnext101_32x8d.ah_in1k",
}


def timm_package(name: str) -> Any:
    """The package, imported by who needs it: it takes longer to load than the rest of the project."""
    try:
        import timm
    except ImportError as error:
        raise stage.InputError(f"{name}: needs the package timm, {error} (pip install timm)") from None
    return timm


class TimmClassifier(Classifier):
    """A network of timm's, with a head of ours.

    name: one of TIMM_NETWORKS. timm_kwargs: of that network's own constructor, e.g. {"drop_path_rate": 0.2},
    or depths and dims for a ConvNeXt of another size. kwargs: as for Classifier.
    Raises InputError without timm, ValueError for another name."""

    def __init__(self, name: str, timm_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if name not in TIMM_NETWORKS:
            raise ValueError(f"network {name!r}: must be one of {', '.join(TIMM_NETWORKS)}")
        self.timm_name = TIMM_NETWORKS[name]
        create = timm_package(name).create_model
        # num_classes 0: ends in the pooled embedding, behind the last norm of those that have one there
        self.net = create(self.timm_name, in_chans=self.channels, num_classes=0, **(timm_kwargs or {}))
        self.head = nn.Linear(self.net.num_features, len(self.classes))
        self.first_conv = self.net.pretrained_cfg["first_conv"]
        self.first_head = self.net.pretrained_cfg["classifier"]

    @property
    def backbone(self) -> nn.Module:
        return self.net

    def features(self, hu: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(self.normalised(hu))

    def embed(self, hu: torch.Tensor) -> torch.Tensor:
        return self.net.forward_head(self.features(hu), pre_logits=True)

    def cam_layers(self) -> dict[int, nn.Module]:
        stages = {entry["reduction"]: entry["module"] for entry in self.net.feature_info}
        return {stride: self.net.get_submodule(stages[stride]) for stride in CAM_STRIDES}


CLASSIFIERS: dict[str, Callable[..., Classifier]] = {
    "resnet18": ResNetClassifier,
    **{name: functools.partial(TimmClassifier, name) for name in TIMM_NETWORKS},
}

# ---------------------------------------------------------------- what a network has to beat

HEAD_HU = -500.0  # halfway between air and tissue


class StatisticsClassifier(SliceReader):
    """Logistic regression on mean, SD and median of each window inside the head: no network at all.

    The baseline of an earlier system, behind BM3D. kwargs: as for Classifier. A slice without a head has the
    statistics of the lower end of the window. Training standardises by batch, reading by all batches."""

    def __init__(self, classes: Sequence[str] = ("stroke",), **kwargs: Any) -> None:
        super().__init__(classes, **kwargs)
        self.scale = nn.BatchNorm1d(3 * self.channels, affine=False, momentum=None)
        self.head = nn.Linear(3 * self.channels, len(self.classes))

    def embed(self, hu: torch.Tensor) -> torch.Tensor:
        """(B, slices, H, W) HU -> (B, 3 x channels): means, SDs and medians, not yet standardised."""
        seen = self.normalised(hu).flatten(2)
        inside = (hu > HEAD_HU).repeat_interleave(len(self.windows), dim=1).flatten(2)
        inside |= ~inside.any(2, keepdim=True)
        count = inside.sum(2)
        mean = (seen * inside).sum(2) / count
        variance = (torch.square(seen - mean[..., None]) * inside).sum(2) / count
        median = seen.masked_fill(~inside, torch.nan).nanmedian(2).values
        return torch.cat([mean, variance.clamp_min(1e-12).sqrt(), median], dim=1)

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale(self.embed(hu))).float()


BASELINES: dict[str, Callable[..., SliceReader]] = {"statistics": StatisticsClassifier}

# ---------------------------------------------------------------- weights to begin with


def pretrained(model: SliceReader, weights: Path | None = None) -> None:
    """Begin with weights of RGB pictures: all but those of the head, which stays as it is.

    weights: a file with timm's names (torchvision's are the same for the ResNets), whole or without its head;
    None: timm's own, downloaded once and kept under HF_HOME. The first convolution is fitted to the model's
    channels. Raises InputError if they cannot be had, or naming the first that do not fit."""
    source = model.timm_name if weights is None else weights
    state = _download(model.timm_name) if weights is None else read_weights(weights)
    own = model.backbone.state_dict()
    head = (f"{model.first_head}.weight", f"{model.first_head}.bias")
    state = {key: value for key, value in state.items() if key not in head and key not in model.unused}
    state |= {key: own[key] for key in head if key in own}
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):  # files from before torch 0.4.1 lack this counter
            state.setdefault(key, value)
    first = f"{model.first_conv}.weight"
    if first in state and state[first].ndim == 4:
        state[first] = fit_channels(state[first], model.channels)
    load_weights(model.backbone, state, source)


def fit_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """A first convolution for another number of channels: (C, in, k, k) -> (C, channels, k, k).

    Where channels is a multiple of `in` the filters repeat, so that the three windows of each slice meet the
    three colours; else all channels share their sum. The response to a grey picture stays the same."""
    if channels % weight.shape[1]:
        weight = weight.sum(dim=1, keepdim=True)
    times = channels // weight.shape[1]
    return weight.repeat(1, times, 1, 1) / times


def _download(name: str) -> dict[str, torch.Tensor]:
    create = timm_package(name).create_model
    stage.log.info("%s: downloading its weights, unless they are kept here already", name)
    try:
        return create(name, pretrained=True).state_dict()
    except Exception as error:  # noqa: BLE001 the hub, its HTTP client and timm each have errors of their own
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise stage.InputError(
            f"{name}: its weights cannot be downloaded, {reason} (give a file with --weights)"
        ) from None
