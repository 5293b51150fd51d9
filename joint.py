"""A denoiser and a classifier as one network, trained together on the answer."""

from __future__ import annotations

import torch
from torch import nn

from classifiers import Classifier
from denoisers import Denoiser


class JointClassifier(nn.Module):
    """A classifier that sees what a denoiser makes of the slice: low dose (B, slices, H, W) HU -> logits.

    It is called and asked as a classifier is. Raises ValueError for a denoiser that has to be told the noise
    level, which a classifier never is, and for a classifier that sees neighbours, of which the denoiser gives
    none."""

    def __init__(self, denoiser: Denoiser, classifier: Classifier) -> None:
        super().__init__()
        if denoiser.dose_aware:
            raise ValueError("denoiser: must not need the noise level (train one without --dose-aware)")
        if classifier.slices != 1:
            raise ValueError(f"classifier: sees {classifier.slices} slices, must see 1")
        self.denoiser, self.classifier = denoiser, classifier
        self.classes, self.windows, self.slices = classifier.classes, classifier.windows, denoiser.slices

    @property
    def head(self) -> nn.Linear:
        return self.classifier.head

    def forward(
        self, hu: torch.Tensor, *, denoised: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, classes) logits; with denoised=True also the image (B, 1, H, W) HU that they are of."""
        image = self.denoiser(hu)
        logits = self.classifier(image)
        return (logits, image) if denoised else logits

    def features(self, hu: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(self.denoiser(hu))

    def embed(self, hu: torch.Tensor) -> torch.Tensor:
        return self.classifier.embed(self.denoiser(hu))

    def cam_layers(self) -> dict[int, nn.Module]:
        return self.classifier.cam_layers()
