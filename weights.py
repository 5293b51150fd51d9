"""Weights that were trained elsewhere: whether they fit, and how they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import stage


def misfits(network: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of weights that the network or the state lacks, or that have another shape there."""
    wanted = network.state_dict()
    return [
        key
        for key in {**wanted, **state}
        if key not in state or key not in wanted or state[key].shape != wanted[key].shape
    ]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A file of weights by name. Raises InputError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise stage.InputError(f"{path}: no such file (a file of weights is needed)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 torch's own text would advise an unsafe load
        raise stage.InputError(f"{path}: not a file of weights, or it holds more than numbers") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise stage.InputError(f"{path}: not a plain file of weights (a dict of tensors is needed)")
    return state


def load_weights(network: nn.Module, state: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Load every weight by name and shape. Raises InputError naming the first that do not fit."""
    wrong = misfits(network, state)
    if wrong:
        raise stage.InputError(
            f"{source}: {len(wrong)} weights do not fit, {', '.join(wrong[:3])}"
            f"{' ...' if len(wrong) > 3 else ''} (another network's file?)"
        )
    network.load_state_dict(state)
