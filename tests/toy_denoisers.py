"""Every denoiser at a tiny size, in every form that the stages can ask for."""

from __future__ import annotations

import torch

from autoencoders import AUTOENCODERS
from models import DENOISERS, build_model

TINY = {
    "unet": {"widths": [4, 8, 16]},
    "nafnet": {"width": 4, "enc_blocks": [1, 1], "middle_blocks": 1, "dec_blocks": [1, 1], "pool_size": 32},
    "redcnn": {"width": 4},
    "autoencoder": {"width": 4, "pool_size": 32},
    "student": {"width": 4, "pool_size": 32, "dose_aware": False},
}
RESIDUAL = ("unet", "nafnet", "redcnn")  # they predict the noise, and none of it before training
FORMS = {
    **{name: (name, TINY[name]) for name in DENOISERS},
    **{
        f"student-{kind}": ("student", {"width": 4, "encoder": kind, "dose_aware": False})
        for kind in AUTOENCODERS
    },
    "nafnet-global": ("nafnet", TINY["nafnet"] | {"pool_size": None}),
}
FORMS |= {f"{key}-dose": (name, kwargs | {"dose_aware": True}) for key, (name, kwargs) in FORMS.items()}
FORMS |= {f"{name}-2.5d": (name, TINY[name] | {"slices": 3}) for name in DENOISERS}


def network(form, seed=0):
    """A tiny network away from its start, where whole branches are zero."""
    torch.manual_seed(seed)
    name, kwargs = FORMS[form]
    model = build_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def scan(model, *shape, batch=2, spread=60.0):
    generator = torch.Generator().manual_seed(1)
    return 40 + spread * torch.randn(batch, model.slices, *shape, generator=generator)


def sigmas(*values):
    return torch.tensor(values, dtype=torch.float32)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())
