"""Training objectives. LOSSES holds the denoiser losses by the name used on the command line."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

LESION_WEIGHT = 10.0  # of the lesion mask's own MSE, as the paper on simulated low dose for stroke has it


def mse_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """Mean squared error in HU^2. output, target: (B, 1, H, W) HU."""
    return F.mse_loss(output, target)


def rmse_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """Root mean squared error of each slice in HU, then the mean over slices.

    Under MSE the few slices of the lowest dose own the gradient; here every dose counts for what it is."""
    return ((output - target).square().mean(dim=(1, 2, 3)) + 1e-6).sqrt().mean()


def lesion_mse_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """MSE plus LESION_WEIGHT x the MSE over the lesion's own pixels, in HU^2; without lesion plain MSE.

    mask: (B, 1, H, W), above 0 inside a lesion. Raises ValueError where the data have no masks."""
    if mask is None:
        raise ValueError("--loss lesion-mse: these data have no lesion masks (choose mse or rmse)")
    squared = (output - target).square()
    inside = mask > 0
    if not inside.any():
        return squared.mean()
    return squared.mean() + LESION_WEIGHT * squared[inside].mean()


def masked_bce_loss(
    logits: torch.Tensor, targets: torch.Tensor, pos_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross-entropy over the known targets. logits, targets: (B, classes), NaN where unknown.

    Returns 0, still attached to the network, if nothing in the batch is known."""
    known = ~targets.isnan()
    losses = F.binary_cross_entropy_with_logits(
        logits, targets.nan_to_num(), pos_weight=pos_weight, reduction="none"
    )
    return (losses * known).sum() / known.sum().clamp_min(1)


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
LOSSES: dict[str, Loss] = {"rmse": rmse_loss, "mse": mse_loss, "lesion-mse": lesion_mse_loss}
