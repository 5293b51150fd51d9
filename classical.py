"""Denoisers without learning, behind the interface of the networks."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

import stage
from dataset import window_hu

# Centre and width in HU in which the classical denoisers work; what lies beyond is added again as it came.
# Wide enough for noise around all soft tissue, and the steps of the skull stay small: BM3D was 2 to 5 % worse
# on the whole range (RMSE inside the brain of phantoms, white and FBP noise of 6 to 25 HU).
CLASSICAL_WINDOW = (40.0, 400.0)


class ClassicalDenoiser(nn.Module):
    """A denoiser without parameters behind the interface of the networks: slice by slice, on the CPU.

    method: a name in CLASSICAL_METHODS. strength: the method's filter per noise SD (None: its default, best
    for white noise on phantoms; noise whose neighbours are correlated may want more). forward needs sigma_hu,
    the SD of white noise, of each slice. Raises InputError if the package of the method is not installed."""

    slices, dose_aware = 1, True

    def __init__(
        self, method: str, strength: float | None = None, window: Sequence[float] = CLASSICAL_WINDOW
    ):
        super().__init__()
        package, self.denoise, usual = CLASSICAL_METHODS[method]
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            name = package.split(".")[0]
            raise stage.InputError(f"{method}: the package {name} is missing (pip install {name})") from None
        self.strength, self.window = usual if strength is None else strength, tuple(window)

    def forward(self, hu: torch.Tensor, sigma_hu: torch.Tensor | None = None) -> torch.Tensor:
        if hu.ndim != 4 or hu.shape[1] != 1:
            raise ValueError(f"input {tuple(hu.shape)}: must be (batch, 1, rows, columns)")
        if sigma_hu is None or sigma_hu.shape != hu.shape[:1]:
            raise ValueError(f"sigma_hu: must be the noise SD in HU of each of the {len(hu)} slices")
        scaled = window_hu(hu.detach().float(), *self.window)
        slices = [
            self.denoise(image.cpu().numpy(), float(sigma) / self.window[1], self.strength)
            for image, sigma in zip(scaled[:, 0], sigma_hu, strict=True)
        ]
        change = torch.from_numpy(np.stack(slices)[:, None]).to(scaled) - scaled
        return hu.float() + change * self.window[1]


def _bm3d(image: np.ndarray, sigma: float, strength: float) -> np.ndarray:
    """Source: Dabov et al. 2007; Mäkinen et al. 2020. strength: factor of the noise SD."""
    from bm3d import bm3d

    return bm3d(image, strength * sigma)


def _nlm(image: np.ndarray, sigma: float, strength: float) -> np.ndarray:
    """Source: Buades et al. 2005, as in scikit-image. strength: cut-off distance per noise SD."""
    from skimage.restoration import denoise_nl_means

    # patches of 5 in a neighbourhood of 15 pixels: the sizes of the paper's fast version
    return denoise_nl_means(image, 5, 7, h=strength * sigma, sigma=sigma, fast_mode=True)


def _tv(image: np.ndarray, sigma: float, strength: float) -> np.ndarray:
    """Source: Rudin et al. 1992; Chambolle 2004, as in scikit-image. strength: weight per noise SD."""
    from skimage.restoration import denoise_tv_chambolle

    return denoise_tv_chambolle(image, weight=strength * sigma)


# Strengths that did best inside the brain of phantoms, over white noise of 6, 12 and 25 HU
CLASSICAL_METHODS = {
    "bm3d": ("bm3d", _bm3d, 1.0),
    "nlm": ("skimage.restoration", _nlm, 0.7),
    "tv": ("skimage.restoration", _tv, 1.0),
}
