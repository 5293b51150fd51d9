"""Stage 3: train a denoiser on pairs of a slice and its simulated low dose.

Reads:   <data>/{train,val}/
Writes:  <out>/<name>.pt, .last.pt, .jsonl, .card.json
Example: python train_denoiser.py --epochs 50 --batch-size 8
         torchrun --nproc_per_node=8 train_denoiser.py --batch-size 64"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

import anatomy
import metrics
import stage
import training
from dataset import (
    Batch,
    Pack,
    check_doses,
    evaluation_input,
    load_pack,
    low_dose,
    mirror,
    native_size,
    random_doses,
)
from inference import denoise
from losses import LOSSES
from models import DENOISERS, SOFT_WINDOW, build_model

VALIDATION_SEED = 0  # of the noise in validation: the same in every epoch and run


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    training.add_run_options(parser, name="denoiser", epochs=50, batch_size=8, lr=1e-3)
    parser.add_argument("--model", choices=sorted(DENOISERS), default="unet", help="network (default: unet)")
    parser.add_argument(
        "--widths",
        type=stage.positive_int,
        nargs="+",
        default=[64, 128, 256],
        help="channels per level of the U-Net (default: 64 128 256)",
    )
    parser.add_argument("--loss", choices=sorted(LOSSES), default="rmse", help="objective (default: rmse)")
    training.add_dose_options(parser, training.DOSE_MODEL)
    return parser


def validator(pack: Pack, dose_model: str, doses: list[float]) -> Callable[[torch.nn.Module], dict]:
    """validate(model) -> HU-RMSE inside the brain, denoised and noisy, each slice at one dose in turn.

    Scored against the noise-free truth where there is one, else against the slice before simulation."""
    rows = np.arange(len(pack))
    noisy = evaluation_input(
        pack, rows, dose_model, [doses[row % len(doses)] for row in rows], VALIDATION_SEED
    )
    reference = pack.image if pack.truth is None else pack.truth
    inside = pack.masks(anatomy.MASKS[anatomy.DEFAULT_MASK])
    patients = pack.patient_ids()

    def rmse(images: np.ndarray) -> float:
        values = [metrics.rmse_hu(images[row], reference[row], inside[row]) for row in rows]
        means = metrics.patient_means(np.array(values), patients)
        return float(means.mean()) if len(means) else math.nan

    before = rmse(noisy)
    return lambda model: {"rmse_hu": rmse(denoise(model, noisy)), "rmse_hu_noisy": before}


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = training.pick_device(args.device)
    precision = training.pick_precision(args.precision, device)
    dose_model = args.dose_model or training.DOSE_MODEL
    doses = check_doses(dose_model, args.doses)
    size = args.size or native_size(args.data)
    train, val = (load_pack(args.data, split, size) for split in ("train", "val"))
    loss = LOSSES[args.loss]
    if args.loss == "lesion-mse" and train.mask is None:
        raise stage.InputError("--loss lesion-mse: these data have no lesion masks (choose rmse or mse)")

    def loss_fn(network: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> torch.Tensor:
        full = mirror(batch.hu, batch.seeds)
        mask = None if batch.mask is None else mirror(batch.mask, batch.seeds)
        low = low_dose(full, dose_model, random_doses(batch.seeds, doses), batch.seeds)
        return loss(network(low), full, mask)

    kwargs = {"widths": args.widths, "window": list(SOFT_WINDOW)}
    done = training.run(
        args,
        train,
        val,
        make_model=lambda: build_model(args.model, **kwargs),
        loss_fn=loss_fn,
        make_validate=lambda: validator(val, dose_model, doses),
        facts={
            "stage": "denoiser",
            "model": {"name": args.model, "kwargs": kwargs},
            "dose_model": dose_model,
            "doses": doses,
            "parents": {},
        },
        select=("rmse_hu", "min"),
        device=device,
        precision=precision,
    )
    if done is not None:
        path, best = done
        stage.say(
            f"{path}: epoch {best['epoch']}, validation RMSE inside the {anatomy.DEFAULT_MASK} "
            f"{metrics.shown(best['rmse_hu'], 2)} HU (noisy {metrics.shown(best['rmse_hu_noisy'], 2)} HU)"
        )


if __name__ == "__main__":
    stage.run(main)
