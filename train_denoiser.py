"""Stage 3: train a denoiser on pairs of a slice and its low dose; score one alone, or export its slices.

Reads:   <data>/{train,val}/
Writes:  <out>/<name>.pt, .last.pt, .jsonl, .card.json, and with --keep-every .epoch<k>.pt, with --csv .csv,
         with --tensorboard .tb/, with --samples .samples/epoch_<k>_dose_<d>.png (low | output | target);
         with --model student also <name>.teacher.pt and its files
         --evaluate: <results>/denoiser/<name>/metrics_summary.csv, .json, dose_<d>/<series>_<slice>.png
         --export-denoised: <out>/<split>/<series>/ as prepared data, or <out>/<split>/sample_00000/*.npz
Example: python train_denoiser.py --epochs 50 --batch-size 8
         python train_denoiser.py --model nafnet --width 32 --dose-model projection --per-dose --seeds 1 2 3
         python train_denoiser.py --model student --encoder nafnet --epochs_teacher 100 --epochs_student 150
         torchrun --nproc_per_node=8 train_denoiser.py --batch-size 64
         python train_denoiser.py --evaluate saved_models/denoiser.pt
         python train_denoiser.py --evaluate bm3d --dose-model projection --doses 0.1
         python train_denoiser.py --export-denoised --export-split test --doses 0.1 --dose-model projection

--evaluate and --export-denoised do not train. Beside their own options they read --data, --dose-model,
--doses, --seed (of the noise) and --device, --evaluate also --size, --export-denoised also --out (default:
denoised_dataset), and no others. Dose model, doses and size are as the checkpoint was trained unless given;
an export without --doses denoises the slices as they are."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import anatomy
import checkpoints
import denoised
import metrics
import stage
import training
from autoencoders import AUTOENCODER_WINDOW, AUTOENCODERS, adopt_decoder
from batches import Batch, crop, mirror, neighbours, to_tensor
from dataset import BRAIN_WINDOW, SPLITS, Pack, load_pack, native_size
from denoisers import SOFT_WINDOW
from display import to_grey
from inference import denoise, load_denoiser
from losses import LOSSES, PERCEPTUAL, AnatomyAwareLoss, Loss, tissue_bias
from low_dose import LowDose, check_doses
from models import CLASSICAL, DENOISERS, PRESETS, build_model
from weights import freeze

VALIDATION_SEED = 0  # of the noise in validation: the same in every epoch and run
WIDTHS = [64, 128, 256]  # of the paper on simulated low dose for stroke
# which options shape which network
SHAPED_BY = {
    "unet": ("widths", "window", "slices", "dose_aware"),
    "nafnet": ("width", "window", "slices", "dose_aware"),
    "redcnn": ("width", "window", "slices", "dose_aware"),
    "autoencoder": ("width", "encoder", "window", "slices", "dose_aware"),
    "student": ("width", "encoder", "window", "slices", "dose_aware"),
}
STUDENT_ERRORS = ("l1", "charbonnier", "rmse", "tissue-weighted")  # in HU, as its other terms are scaled
# weights of the student's objective: option -> argument of AnatomyAwareLoss, meaning
STUDENT_WEIGHTS = {
    "lam_lat": ("lam_lat", "latent of the student against the teacher's"),
    "lam_rec": ("lam_rec", "L1 + alpha (1 - SSIM) of the output"),
    "alpha_ssim": ("alpha", "1 - SSIM beside L1, of teacher and student"),
    "lam_grad": ("b1", "L1 of the Sobel gradients"),
    "lam_msssim": ("b2", "1 - MS-SSIM"),
    "lam_perc": ("g1", "perceptual network"),
    "lam_feat": ("w_d", "four feature maps against the teacher's"),
}


def _words(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    training.add_run_options(parser, name="denoiser", epochs=50, batch_size=8, lr=1e-3, samples=True)
    training.add_dose_options(parser, training.DOSE_MODEL)
    training.add_noise_option(parser)
    parser.add_argument(
        "--per-dose", action="store_true", help="one network for each dose, <name>.dose<d>, not one for all"
    )
    parser.add_argument(
        "--loss",
        choices=sorted(LOSSES),
        help=f"objective (default: rmse); of a student what stands for L1: {', '.join(STUDENT_ERRORS)} "
        f"(default: {STUDENT_ERRORS[0]})",
    )
    parser.add_argument(
        "--bias-weight",
        type=stage.positive_float,
        help="beside it, of the mean error in HU of brain, CSF and lesions in each slice (default: none)",
    )
    parser.add_argument(
        "--target",
        choices=("clean", "noisy", "truth"),
        default="clean",
        help="noisy: a second noise realisation, as in Noise2Noise; truth: without the scan's own noise, "
        "which phantoms have (default: clean)",
    )
    parser.add_argument("--crop", type=stage.positive_int, help="train on crops of this side (default: none)")
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        choices=[*sorted(DENOISERS), *(name for name, (model, _) in PRESETS.items() if model in DENOISERS)],
        default="unet",
        help="a network, or one at a size for small (-cpu) or large machines (-gpu) (default: unet)",
    )
    group.add_argument("--widths", type=stage.positive_int, nargs="+", help="unet: channels per level")
    group.add_argument("--width", type=stage.positive_int, help="the others: channels at full resolution")
    group.add_argument(
        "--encoder", choices=sorted(AUTOENCODERS), help="autoencoder, student (default: nafnet)"
    )
    group.add_argument("--slices", type=stage.positive_int, help="3, 5, ...: neighbours as further channels")
    group.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("CENTER", "WIDTH"),
        help=f"in HU that it sees (default: {_words(SOFT_WINDOW)}, beyond which it is logarithmic; "
        f"autoencoder, student: {_words(AUTOENCODER_WINDOW)}, beyond which they pass on what comes)",
    )
    group.add_argument(
        "--dose-aware",
        action=argparse.BooleanOptionalAction,
        help="tell the network the noise level (default: student only; the ablation is --no-dose-aware)",
    )
    group = parser.add_argument_group("student (teacher first, on full dose; then an encoder for low dose)")
    group.add_argument("--epochs-teacher", type=stage.positive_int, help="(default: 100)")
    group.add_argument("--epochs-student", type=stage.positive_int, help="(default: 150)")
    group.add_argument("--teacher", type=Path, help="a trained teacher: only the student is trained")
    defaults = AnatomyAwareLoss.__init__.__kwdefaults__
    for option, (name, meaning) in STUDENT_WEIGHTS.items():
        group.add_argument(
            f"--{option.replace('_', '-')}", type=float, help=f"{meaning} (default: {defaults[name]:g})"
        )
    group.add_argument(
        "--perceptual", choices=sorted(PERCEPTUAL), help="network of --lam-perc (default: vgg19)"
    )
    group.add_argument("--perceptual-weights", type=Path, help="its weights (default: downloaded)")
    group = parser.add_argument_group("a trained denoiser, instead of training")
    names = ", ".join(CLASSICAL)
    group.add_argument("--evaluate", metavar="CKPT", help=f"score this checkpoint alone, or one of {names}")
    group.add_argument("--split", choices=SPLITS, help="that --evaluate scores (default: test)")
    group.add_argument("--results", type=Path, help="of --evaluate (default: results)")
    group.add_argument("--export-denoised", action="store_true", help="write a split denoised, to --out")
    group.add_argument("--export-split", choices=SPLITS, help="which")
    group.add_argument(
        "--checkpoint", help=f"that denoises it, or one of {names} (default: saved_models/denoiser.pt)"
    )
    group.add_argument(
        "--export-layout",
        choices=sorted(denoised.LAYOUTS),
        help="as prepared data, or as the earlier system's samples (default: dataset)",
    )
    return parser


# the options of each mode that does not train
MODES = {
    "evaluate": ("split", "results"),
    "export_denoised": ("export_split", "checkpoint", "export_layout"),
}


def training_only(args: argparse.Namespace) -> argparse.Namespace:
    """The options without those of MODES, which decide nothing in a training.

    Raises InputError for one whose mode is not asked for, and for both modes at once."""
    if args.evaluate and args.export_denoised:
        raise stage.InputError("--evaluate, --export-denoised: one at a time (leave one of them out)")
    for mode, options in MODES.items():
        for option in options:
            if not getattr(args, mode) and getattr(args, option) is not None:
                raise stage.InputError(
                    f"--{option.replace('_', '-')}: only with --{mode.replace('_', '-')} (leave it out)"
                )
    own = {*MODES, *(option for options in MODES.values() for option in options)}
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in own})


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Score one denoiser alone."""
    denoised.evaluate(
        args.evaluate,
        data=args.data,
        split=args.split or "test",
        results=args.results or Path("results"),
        size=args.size,
        dose_model=args.dose_model,
        doses=args.doses,
        seed=args.seed,
        device=training.pick_device(args.device),
        command=command,
    )


def export_denoised(args: argparse.Namespace) -> None:
    """Write a split denoised. Raises InputError for what cannot be exported."""
    if args.export_split is None:
        raise stage.InputError(f"--export-split: missing (give one of {', '.join(SPLITS)})")
    if args.doses is not None and len(args.doses) > 1:
        raise stage.InputError("--doses: an export has one dose (give one, and another --out for another)")
    models = get_parser().get_default("out")
    denoised.export(
        args.checkpoint or str(models / "denoiser.pt"),
        data=args.data,
        split=args.export_split,
        out=Path("denoised_dataset") if args.out == models else args.out,  # checkpoints lie there, not slices
        layout=args.export_layout or "dataset",
        dose_model=args.dose_model,
        dose=None if args.doses is None else args.doses[0],
        seed=args.seed,
        device=training.pick_device(args.device),
    )


def shape(args: argparse.Namespace, size: int) -> tuple[str, dict]:
    """(network, its own arguments), from the options and what they leave from the preset.

    Raises InputError for an option that another network has."""
    model, preset = PRESETS.get(args.model, (args.model, {}))
    known = {name for names in SHAPED_BY.values() for name in names}
    kwargs = {name: getattr(args, name) for name in sorted(known) if getattr(args, name) is not None}
    for name in kwargs:
        if name not in SHAPED_BY[model]:
            takes = ", ".join(other for other, names in SHAPED_BY.items() if name in names)
            raise stage.InputError(f"--{name.replace('_', '-')}: only for --model {takes} (leave it out)")
    kwargs = preset | kwargs
    has_encoder = "encoder" in SHAPED_BY[model]
    kwargs.setdefault("window", list(AUTOENCODER_WINDOW if has_encoder else SOFT_WINDOW))
    if not (math.isfinite(sum(kwargs["window"])) and kwargs["window"][1] > 0):
        raise stage.InputError(
            f"--window {_words(kwargs['window'])}: must be finite, and its width above 0 HU"
        )
    if model == "unet":
        kwargs.setdefault("widths", WIDTHS)
    if model == "nafnet" or (has_encoder and AUTOENCODERS[kwargs.get("encoder", "nafnet")].pooling):
        kwargs["pool_size"] = args.crop or size  # its attention averages over what it was trained on
    return model, kwargs


# ---------------------------------------------------------------- validation and pictures


class FullDose:
    """Stands where others have a LowDose, for a teacher: it sees full-dose slices and gives them back.

    images: (N, H, W) HU."""

    doses = (1.0,)

    def __init__(self, images: np.ndarray):
        self.images = images

    def evaluation(self, rows: np.ndarray, doses: Sequence[float], seed: int) -> np.ndarray:  # noqa: ARG002
        return self.images[rows].astype(np.float32)

    def levels(self, rows: np.ndarray, doses: Sequence[float]) -> np.ndarray:  # noqa: ARG002
        return np.zeros(len(rows), np.float32)


class Scored(NamedTuple):
    """What a network sees of the validation slices, and the (N, H, W) HU that its output is scored against:
    the noise-free truth where there is one, else the slice before simulation; of a teacher its input."""

    low_dose: LowDose | FullDose
    reference: np.ndarray


class Validation:
    """Slices of a pack as a network sees them, each at one dose in turn, and what they are scored against."""

    def __init__(self, pack: Pack, scored: Scored):
        low_dose, self.reference = scored
        self.pack, self.doses = pack, low_dose.doses
        rows = np.arange(len(pack))
        turns = [self.doses[row % len(self.doses)] for row in rows]
        self.noisy = low_dose.evaluation(rows, turns, VALIDATION_SEED)
        self.levels = low_dose.levels(rows, turns)
        self.inside = pack.masks(anatomy.MASKS[anatomy.DEFAULT_MASK])
        self.before = self._rmse(self.noisy)

    def _rmse(self, images: np.ndarray) -> float:
        values = [
            metrics.rmse_hu(image, self.reference[row], self.inside[row]) for row, image in enumerate(images)
        ]
        means = metrics.patient_means(np.array(values), self.pack.patient_ids())
        return float(means.mean()) if len(means) else math.nan

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """HU-RMSE inside the brain, denoised and noisy."""
        denoised = denoise(model, self.noisy, self.levels, self.pack.series_of)
        return {"rmse_hu": self._rmse(denoised), "rmse_hu_noisy": self.before}


def sampler(pack: Pack, scored: Scored) -> Callable[[torch.nn.Module], dict[str, np.ndarray]]:
    """samples(model) -> for each dose low | output | target in the brain window, (H, 3 W) uint8.

    Each dose shows the middle slice of another scan, as far as there are so many."""
    middles = [int(np.median(np.flatnonzero(pack.series_of == one))) for one in range(len(pack.series))]
    low_dose, doses = scored.low_dose, scored.low_dose.doses
    chosen = [middles[place % len(middles)] for place in range(len(doses))]
    reference = scored.reference[chosen]

    def samples(model: torch.nn.Module) -> dict[str, np.ndarray]:
        rows = neighbours(pack.series_of, model.slices)[chosen]
        repeated = np.repeat(doses, model.slices)
        noisy = low_dose.evaluation(rows.ravel(), repeated, VALIDATION_SEED)
        groups, middle = np.repeat(np.arange(len(doses)), model.slices), model.slices // 2
        denoised = denoise(model, noisy, low_dose.levels(rows.ravel(), repeated), groups)
        triplets = [noisy[middle :: model.slices], denoised[middle :: model.slices], reference]
        return {
            f"dose_{dose:g}": to_grey(triplet, *BRAIN_WINDOW)
            for dose, triplet in zip(doses, np.concatenate(triplets, axis=2), strict=True)
        }

    return samples


# ---------------------------------------------------------------- runs


class Data:
    """What all networks of one command learn from: packs, low dose, and batches as networks see them."""

    def __init__(self, args: argparse.Namespace, device: torch.device, doses: list[float]):
        self.args, size = args, args.size or native_size(args.data)
        self.train, self.val = (load_pack(args.data, split, size) for split in ("train", "val"))
        if args.crop is not None and args.crop > size:
            raise stage.InputError(f"--crop {args.crop}: slices have {size} x {size} pixels (choose less)")
        dose_model = args.dose_model or training.DOSE_MODEL
        self.low = LowDose(self.train, dose_model, doses, training.noise_realisations(args, device))
        clean = self.val.image if self.val.truth is None else self.val.truth
        self.scored = Scored(LowDose(self.val, dose_model, doses), clean)
        if args.target == "noisy" and self.low.model.simulate is None:
            raise stage.InputError("--target noisy: real low dose has one realisation only (leave it out)")
        if args.target == "truth" and self.train.truth is None:
            raise stage.InputError(
                f"--target truth: {args.data} has no noise-free slices, as phantoms alone have (leave it out)"
            )

    def views(
        self, batch: Batch, slices: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(low with neighbours, noise SDs, target, full dose) of a batch, mirrored and cropped alike.

        With --target truth the full dose has no noise either."""
        full, low, doses = self.low.pair(batch, mirror, slices)
        if self.args.target == "truth":
            full = mirror(self.truth(batch), batch.moves)
        target = full
        if self.args.target == "noisy":
            others = [stage.stable_seed("second", seed) for seed in batch.seeds]
            target = self.low.simulate(full, batch.rows, doses, others)
        sigma = torch.tensor(self.low.levels(batch.rows, doses), dtype=torch.float32, device=full.device)
        low, target, full = (self.cropped(images, batch) for images in (low, target, full))
        return low, sigma, target, full

    def cropped(self, images: torch.Tensor, batch: Batch) -> torch.Tensor:
        return images if self.args.crop is None else crop(images, batch.seeds, self.args.crop)

    def truth(self, batch: Batch) -> torch.Tensor:
        return to_tensor(self.train.truth[batch.rows], batch.hu.device)

    def full(self, batch: Batch) -> torch.Tensor:
        """The full-dose slices of a batch as views has them."""
        slices = self.truth(batch) if self.args.target == "truth" else batch.hu
        return self.cropped(mirror(slices, batch.moves), batch)

    def mask(self, batch: Batch) -> torch.Tensor | None:
        """Its lesion masks, where there are any."""
        return None if batch.mask is None else self.cropped(mirror(batch.mask, batch.seeds), batch)


def fit(
    args: argparse.Namespace,
    data: Data,
    device: torch.device,
    *,
    model: str,
    kwargs: dict,
    loss_fn: training.LossFunction,
    scored: Scored | None = None,
    start: Callable[[torch.nn.Module], None] = lambda _model: None,
    parents: dict | None = None,
    seen: tuple[str, ...] = (),
) -> Path | None:
    """Train one network and say how good it is. scored: by what (None: low dose). start: what is done to it
    before. Returns its checkpoint."""
    scored = data.scored if scored is None else scored

    def make_model() -> torch.nn.Module:
        network = build_model(model, **kwargs)
        start(network)
        return network

    done = training.run(
        args,
        data.train,
        data.val,
        options=training.pick_options(args, device),
        make_model=make_model,
        loss_fn=loss_fn,
        make_validate=lambda: Validation(data.val, scored),
        facts={
            "stage": "denoiser",
            "model": {"name": model, "kwargs": kwargs},
            "dose_model": data.low.name,
            "doses": data.low.doses,
            "parents": parents or {},
        },
        seen=seen,
        select=("rmse_hu", "min"),
        device=device,
        samples=sampler(data.val, scored) if args.samples or args.tensorboard else None,
    )
    if done is None:
        return None
    path, best = done
    before = f" (noisy {metrics.shown(best['rmse_hu_noisy'], 2)} HU)" if best["rmse_hu_noisy"] else ""
    stage.say(
        f"{path}: epoch {best['epoch']}, validation RMSE inside the {anatomy.DEFAULT_MASK} "
        f"{metrics.shown(best['rmse_hu'], 2)} HU{before}"
    )
    return path


def train_plain(args: argparse.Namespace, data: Data, device: torch.device) -> None:
    """One network that learns its target from low dose."""
    model, kwargs = shape(args, data.train.size)
    name = args.loss or "rmse"
    loss, slices = LOSSES[name], kwargs.get("slices", 1)
    if name == "lesion-mse" and data.train.mask is None:
        raise stage.InputError("--loss lesion-mse: these data have no lesion masks (choose another)")

    def loss_fn(network: training.Network, batch: Batch) -> torch.Tensor:
        low, sigma, target, _ = data.views(batch, slices)
        output, mask = network(low, sigma), data.mask(batch)
        if args.bias_weight is None:
            return loss(output, target, mask)
        return loss(output, target, mask) + args.bias_weight * tissue_bias(output, target, mask)

    fit(args, data, device, model=model, kwargs=kwargs, loss_fn=loss_fn)


def train_student(args: argparse.Namespace, data: Data, device: torch.device) -> None:
    """Teacher on full dose, unless there is one; then an encoder for low dose before its frozen decoder.

    Source: "Anatomy-Aware CT Scan Denoising"."""
    _, kwargs = shape(args, data.train.size)
    kwargs = {"encoder": "nafnet", "dose_aware": True} | kwargs
    given = {name: getattr(args, option) for option, (name, _) in STUDENT_WEIGHTS.items()}
    weights = AnatomyAwareLoss.__init__.__kwdefaults__ | {k: v for k, v in given.items() if v is not None}
    perceptual = None
    if weights["g1"]:
        perceptual = PERCEPTUAL[args.perceptual or "vgg19"](args.perceptual_weights).to(device)
    elif args.perceptual or args.perceptual_weights:
        raise stage.InputError("--perceptual, --perceptual-weights: --lam-perc 0 leaves them unused")
    error = LOSSES[args.loss or STUDENT_ERRORS[0]]
    objective = AnatomyAwareLoss(perceptual, kwargs["window"], error, **weights)
    path = args.teacher or train_teacher(args, data, device, kwargs, objective.reconstruction)
    if path is None:  # another process than the first: what that one wrote is there, as all have finished
        path = args.out / f"{args.name}.teacher.pt"
    teacher, facts = load_denoiser(path, device)
    if facts["model"]["name"] != "autoencoder":
        raise stage.InputError(f"{path}: is a {facts['model']['name']}; --teacher needs an autoencoder")
    if teacher.dose_aware or teacher.slices != 1:
        raise stage.InputError(
            f"{path}: a teacher sees one slice and no dose (train it without --dose-aware, --slices)"
        )
    freeze(teacher)

    def loss_fn(network: training.Network, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        low, sigma, target, full = data.views(batch, kwargs.get("slices", 1))
        with torch.no_grad(), training.autocast(device, training.pick_precision(args.precision, device)):
            wanted = teacher.encode(full)
        terms = objective.terms(network(low, sigma, encoded=True), wanted, target, data.mask(batch))
        return objective.total(terms), terms

    def start(model: torch.nn.Module) -> None:
        try:
            adopt_decoder(model, teacher)
        except ValueError as error:
            raise stage.InputError(f"{path}: {error} (train another teacher)") from None

    fit(
        argparse.Namespace(**{**vars(args), "epochs": args.epochs_student or 150}),
        data,
        device,
        model="student",
        kwargs=kwargs,
        loss_fn=loss_fn,
        start=start,
        parents={"teacher": {"path": path.name, "sha256": checkpoints.file_sha256(path)}},
        seen=tuple(facts["trained_on"]),
    )


def train_teacher(
    args: argparse.Namespace, data: Data, device: torch.device, kwargs: dict, objective: Loss
) -> Path | None:
    """An autoencoder that gives full-dose slices back; its decoder is the student's."""
    own = {name: value for name, value in kwargs.items() if name not in ("dose_aware", "slices")}

    def loss_fn(network: training.Network, batch: Batch) -> torch.Tensor:
        full = data.full(batch)
        return objective(network(full), full, data.mask(batch))

    images = data.val.truth if args.target == "truth" else data.val.image
    changed = {"name": f"{args.name}.teacher", "epochs": args.epochs_teacher or 100}
    return fit(
        argparse.Namespace(**{**vars(args), **changed}),
        data,
        device,
        model="autoencoder",
        kwargs=own,
        loss_fn=loss_fn,
        scored=Scored(FullDose(images), images),
    )


def is_student(args: argparse.Namespace) -> bool:
    """Whether the anatomy-aware system is asked for, which has two stages."""
    return PRESETS.get(args.model, (args.model,))[0] == "student"


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect. Raises InputError."""
    own = [
        "epochs_teacher",
        "epochs_student",
        "teacher",
        "perceptual",
        "perceptual_weights",
        *STUDENT_WEIGHTS,
    ]
    if not is_student(args):
        unused = [name for name in own if getattr(args, name) is not None]
        if unused:
            raise stage.InputError(
                f"--{unused[0].replace('_', '-')}: only for --model student (leave it out)"
            )
    elif args.bias_weight is not None:
        raise stage.InputError("--bias-weight: the student has no such term (leave it out)")
    elif args.loss is not None and args.loss not in STUDENT_ERRORS:
        raise stage.InputError(
            f"--loss {args.loss}: a student has other terms too (choose one of {', '.join(STUDENT_ERRORS)})"
        )
    elif args.teacher is not None and args.epochs_teacher is not None:
        raise stage.InputError("--epochs-teacher: with --teacher none is trained (leave one of them out)")


def each_run(
    args: argparse.Namespace, doses: list[float]
) -> Iterator[tuple[argparse.Namespace, list[float]]]:
    """The networks asked for: with --seeds one a seed, with --per-dose one a dose."""
    for one in training.each_seed(args):
        if not args.per_dose:
            yield one, doses
            continue
        for dose in doses:
            name = f"{one.name}.dose{dose:g}"
            yield argparse.Namespace(**{**vars(one), "name": name, "doses": [dose]}), [dose]


def main(argv: list[str] | None = None) -> None:
    given = get_parser().parse_args(argv)
    args = training_only(given)
    if given.evaluate:
        evaluate(given, " ".join(["train_denoiser.py", *(sys.argv[1:] if argv is None else argv)]))
        return
    if given.export_denoised:
        export_denoised(given)
        return
    check_options(args)
    device = training.pick_device(args.device)
    doses = check_doses(args.dose_model or training.DOSE_MODEL, args.doses)
    for one, some in each_run(args, doses):
        data = Data(one, device, some)
        (train_student if is_student(one) else train_plain)(one, data, device)


if __name__ == "__main__":
    stage.run(main)
