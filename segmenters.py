"""The networks that outline lesions.

Networks take HU and keep their own windows, so that no caller can apply others. A segmenter is called as
`model(hu)`: hu (B, S, H, W) HU with S = model.slices neighbouring slices, the middle one of which is
segmented, of any H and W. It returns float32 logits: (B, 1, H, W) of a lesion of whatever kind, for a
sigmoid; or (B, 1 + classes, H, W) of no lesion and of each class, for a softmax."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from anatomy import LESION_CLASSES
from classifiers import SMALLEST_PX, TIMM_NETWORKS, SliceReader, timm_package
from unet import Levels, double_conv, pad, start_convolutions, unet_features, unet_levels

# By what a user types; in the second, class k is value k + 1 of a mask
CLASSES = {"binary": ("lesion",), "lesions": LESION_CLASSES}
LESION_SHARE = 0.01  # of the pixels, which a network believes before training. Source: Lin et al. 2017

# ---------------------------------------------------------------- what segmenters share


class Segmenter(SliceReader, ABC):
    """What every segmenter is: a picture of the slices, features at their size, a head for each pixel.

    classes: ("lesion",) or LESION_CLASSES. kwargs: as for SliceReader. Raises ValueError as SliceReader does,
    and for other classes. Training with batch norm needs two slices where they have `step` pixels a side."""

    step: int  # both sides of what `features` sees are multiples of this

    def __init__(self, classes: Sequence[str] = CLASSES["binary"], **kwargs: Any) -> None:
        super().__init__(classes, **kwargs)
        if self.classes not in CLASSES.values():
            known = " or ".join(", ".join(names) for names in CLASSES.values())
            raise ValueError(f"classes {', '.join(self.classes)}: must be {known}")

    def _start_head(self, channels: int) -> None:
        """The last layer, which says before training that LESION_SHARE of the pixels is lesion."""
        odds = LESION_SHARE / (1 - LESION_SHARE) / len(self.classes)
        binary = len(self.classes) == 1
        self.head = nn.Conv2d(channels, 1 if binary else 1 + len(self.classes), 1)
        nn.init.normal_(self.head.weight, std=0.01)  # Lin et al. 2017
        nn.init.constant_(self.head.bias, math.log(odds))
        if not binary:
            nn.init.zeros_(self.head.bias[0])

    @abstractmethod
    def features(self, picture: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W), sides being multiples of step -> (B, head.in_channels, H, W)."""

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.features(pad(self.normalised(hu), self.step)))
        return logits[..., : hu.shape[-2], : hu.shape[-1]].float()


# ---------------------------------------------------------------- U-Net


class UNetSegmenter(Segmenter):
    """The U-Net of the denoisers, with batch norm and a head for lesions.

    widths: channels per level, halved in resolution from one to the next. kwargs: as for Segmenter.
    Source: Ronneberger et al. 2015."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # without batch norm it had not found a lesion when with it the Dice was 0.35 (phantoms, 350 steps)
        self.encoders, self.ups, self.decoders = unet_levels(self.channels, widths, norm=True)
        self.step = 2 ** len(self.ups)
        start_convolutions(self)
        self._start_head(widths[0])

    def features(self, picture: torch.Tensor) -> torch.Tensor:
        return unet_features(picture, Levels(self.encoders, self.ups, self.decoders))


# ---------------------------------------------------------------- U-Net around a network of timm's

DECODER_WIDTHS = (256, 128, 64, 32, 16)  # from coarse to fine: the encoder, not these, has the knowledge


class TimmUNetSegmenter(Segmenter):
    """A network of timm's as the encoder of a U-Net; the finest skip is the picture itself.

    encoder: one of TIMM_NETWORKS. timm_kwargs: of that network's own constructor. kwargs: as for Segmenter.
    Raises InputError without timm, ValueError for another encoder. Source: Ronneberger et al. 2015; with
    pretrained encoders Iglovikov and Shvets 2018 (TernausNet)."""

    step = SMALLEST_PX

    def __init__(
        self, encoder: str = "efficientnet-b4", timm_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if encoder not in TIMM_NETWORKS:
            raise ValueError(f"encoder {encoder!r}: must be one of {', '.join(TIMM_NETWORKS)}")
        self.timm_name = TIMM_NETWORKS[encoder]
        create = timm_package(encoder).create_model
        self.net = create(self.timm_name, in_chans=self.channels, num_classes=0, **(timm_kwargs or {}))
        self.first_conv = self.net.pretrained_cfg["first_conv"]
        self.first_head = self.net.pretrained_cfg["classifier"]
        whole = set(self.net.state_dict())
        self.levels = list(range(len(self.net.feature_info)))
        self.net.prune_intermediate_layers(self.levels, prune_norm=True, prune_head=True)
        self.unused = frozenset(whole - set(self.net.state_dict()))
        skips = [self.channels, *(level["num_chs"] for level in self.net.feature_info)]
        widths = DECODER_WIDTHS[-len(self.levels) :]
        self.decoders = nn.ModuleList(
            double_conv(deep + skip, width, norm=True)
            for deep, skip, width in zip((skips[-1], *widths), skips[-2::-1], widths, strict=False)
        )
        self._start_head(widths[-1])

    @property
    def backbone(self) -> nn.Module:
        return self.net

    def features(self, picture: torch.Tensor) -> torch.Tensor:
        maps = self.net.forward_intermediates(picture, indices=self.levels, intermediates_only=True)
        x, *skips = [*maps[::-1], picture]
        for decoder, skip in zip(self.decoders, skips, strict=True):
            up = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = decoder(torch.cat([up, skip], dim=1))
        return x


SEGMENTERS: dict[str, Callable[..., Segmenter]] = {"unet": UNetSegmenter, "timm-unet": TimmUNetSegmenter}
