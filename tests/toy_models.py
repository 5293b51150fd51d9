"""Checkpoints of networks whose answers are known: for what is done with the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import checkpoints
from models import build_model
from segmenters import SEGMENTERS, Segmenter

BRIGHT_HU = 57.5
SIZE = 48


class BrightSegmenter(Segmenter):
    """Calls lesion what is brighter than BRIGHT_HU, bone too."""

    step = 1

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(windows=[(BRIGHT_HU, 25.0)], **kwargs)
        self.head = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.head.weight, 10.0)  # of -1..1 in the window
        nn.init.zeros_(self.head.bias)

    def features(self, picture: torch.Tensor) -> torch.Tensor:
        return picture


@pytest.fixture
def bright(monkeypatch):
    """BrightSegmenter can be built by its name."""
    monkeypatch.setitem(SEGMENTERS, "bright", BrightSegmenter)


def write_models(
    folder: Path, *, threshold: float | None = 0.0, rule_ml: float | None = 1.0, **segmenter: Any
) -> Path:
    """denoiser.pt, classifier.pt and segmenter.pt; the last needs `bright`. segmenter: more facts of it.

    threshold: of the scan, 0 calls every scan a stroke and 2 none. rule_ml: the segmenter's volume rule."""
    common = {"format": checkpoints.FORMAT, "size": SIZE, "parents": {}, "trained_on": [], "doses": []}
    common |= {"dose_model": "calibrated", "split_hash": "abc", "seed": 1}
    asked = {"value": threshold, "origin": "given"}
    kinds = {
        "denoiser": ("unet", {"widths": [2, 4]}, {}),
        "classifier": (
            "resnet18",
            {"classes": ["stroke"], "width": 2},
            {"task": "stroke", "classes": ["stroke"], "thresholds": {"slice": asked, "scan": asked}},
        ),
        "segmenter": (
            "bright",
            {},
            {
                "task": "lesion",
                "classes": ["lesion"],
                "thresholds": {"lesion": {"value": 0.5, "origin": "given"}},
                "volume_rule": {"value": rule_ml, "origin": "given"},
            },
        ),
    }
    torch.manual_seed(0)
    for kind, (name, kwargs, facts) in kinds.items():
        network = build_model(name, kind=kind, **kwargs)
        content = {"stage": kind, "model": {"name": name, "kwargs": kwargs}, "state": network.state_dict()}
        more = segmenter if kind == "segmenter" else {}
        checkpoints.save(folder / f"{kind}.pt", common | content | {"input": "clean"} | facts | more)
    return folder
