"""Every network of the project by its name: the registries that the stages and the app read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autoencoders import AUTOENCODERS, Autoencoder, student
from classical import CLASSICAL_METHODS, ClassicalDenoiser
from classifiers import BASELINES, CLASSIFIERS
from denoisers import NAFNetDenoiser, REDCNNDenoiser, UNetDenoiser
from joint import JointClassifier
from segmenters import SEGMENTERS
from sequences import CNNBiLSTM, TwoStage

DENOISERS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNetDenoiser,
    "nafnet": NAFNetDenoiser,
    "redcnn": REDCNNDenoiser,
    "autoencoder": Autoencoder,
    "student": student,
}
CLASSICAL: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(ClassicalDenoiser, name) for name in CLASSICAL_METHODS
}
SEQUENCE_MODELS: dict[str, Callable[..., nn.Module]] = {"cnn-bilstm": CNNBiLSTM, "two-stage": TwoStage}


def _system_presets(size: str, widths: dict[str, int]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Teachers and students of the anatomy-aware system. wo-dose and the Baseline AE do not know the dose.

    Their window is that of the brain with room for its noise, not the system's own 2000 HU, in which all that
    the brain holds is a thirtieth of the range."""
    window = {"window": [40.0, 200.0]}
    kwargs = {kind: {"encoder": kind, "width": width} | window for kind, width in widths.items()}
    teachers = {f"autoencoder-{kind}-{size}": ("autoencoder", kwargs[kind]) for kind in widths}
    students = {
        f"student-{kind}-{size}": ("student", kwargs[kind] | {"dose_aware": kind != "baseline"})
        for kind in widths
    }
    blind = {f"student-wo-dose-{size}": ("student", kwargs["nafnet"] | {"dose_aware": False})}
    return {**teachers, **students, **blind}


# On a CPU two levels did better than three at the same cost, in trainings of 4000 crops
NAFNET_CPU = {"width": 16, "enc_blocks": [1, 2], "middle_blocks": 4, "dec_blocks": [1, 2]}
NAFNET_GPU = {"width": 32, "enc_blocks": [2, 2, 4], "middle_blocks": 6, "dec_blocks": [2, 2, 2]}

# Sizes for a benchmark: (model, kwargs). cpu: tens of training images of 128 x 128 per second on one core;
# gpu: the papers' widths.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet-cpu": ("unet", {"widths": [16, 32, 64]}),
    "unet-gpu": ("unet", {"widths": [64, 128, 256]}),
    "nafnet-cpu": ("nafnet", NAFNET_CPU),
    "nafnet-gpu": ("nafnet", NAFNET_GPU),
    "nafnet-dose-cpu": ("nafnet", NAFNET_CPU | {"dose_aware": True}),
    "nafnet-dose-gpu": ("nafnet", NAFNET_GPU | {"dose_aware": True}),
    "redcnn-cpu": ("redcnn", {"width": 32}),
    "redcnn-gpu": ("redcnn", {"width": 96}),
    **_system_presets("cpu", dict.fromkeys(AUTOENCODERS, 16)),
    **_system_presets("gpu", {name: kind.width for name, kind in AUTOENCODERS.items()}),
}


def joint(denoiser: Mapping[str, Any], classifier: Mapping[str, Any]) -> JointClassifier:
    """Both as a checkpoint has them: {"name": of its registry, "kwargs": its own}."""
    return JointClassifier(*(build_model(part["name"], **part["kwargs"]) for part in (denoiser, classifier)))


def build_model(name: str, /, kind: str | None = None, **kwargs: Any) -> nn.Module:
    """Build a network by its name in one of the registries. Raises ValueError naming the choices.

    kind: "denoiser", "classifier" or "segmenter", as checkpoints have it; None: one of the first two, whose
    names differ, while a segmenter may be called as a denoiser is."""
    registries = {
        "denoiser": {**DENOISERS, **CLASSICAL},
        "classifier": {**CLASSIFIERS, **BASELINES, **SEQUENCE_MODELS, "joint": joint},
        "segmenter": SEGMENTERS,
    }
    networks = registries["denoiser"] | registries["classifier"] if kind is None else registries[kind]
    if name not in networks:
        raise ValueError(f"model {name!r}: must be one of {', '.join(networks)}")
    return networks[name](**kwargs)
