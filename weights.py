"""Weights that were trained elsewhere: whether they fit, how they are loaded, and how they are kept."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import stage

WRAPPERS = ("state_dict", "model")  # keys under which trainers keep the weights, beside their own counters
DDP_PREFIX = "module."  # of every name, if the network was saved inside DistributedDataParallel


def misfits(network: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of weights that the network or the state lacks, or that have another shape there."""
    wanted = network.state_dict()
    return [
        key
        for key in {**wanted, **state}
        if key not in state or key not in wanted or state[key].shape != wanted[key].shape
    ]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A file of weights by name, .safetensors or torch's own, out of the wrappers that are in common use.

    Raises InputError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise stage.InputError(f"{path}: no such file (a file of weights is needed)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise stage.InputError(f"{path}: {error} (pip install safetensors, or give a .pth file)") from None
    except Exception:  # noqa: BLE001 torch's own text would advise an unsafe load
        raise stage.InputError(f"{path}: not a file of weights, or it holds more than numbers") from None
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise stage.InputError(f"{path}: not a plain file of weights (a dict of tensors is needed)")
    if all(key.startswith(DDP_PREFIX) for key in state):
        return {key.removeprefix(DDP_PREFIX): value for key, value in state.items()}
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


def freeze(module: nn.Module) -> nn.Module:
    """Make a module a constant: no gradients, and eval mode whatever its parent's train() says.

    Without the second, BatchNorm would go on changing its running statistics. Returns the module."""
    module.eval().requires_grad_(False)
    for part in module.modules():
        part.train = types.MethodType(_stay, part)
    return module


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001
    return module
