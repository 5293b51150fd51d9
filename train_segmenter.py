"""Stage 5: train a network that outlines lesions on clean, low-dose or denoised slices; score one.

Reads:   <data>/{train,val}/ with lesion masks, and --denoiser for --input denoised
Writes:  <out>/<name>.pt, .last.pt, .jsonl, .card.json, and with --keep-every .epoch<k>.pt, with --csv .csv,
         with --tensorboard .tb/, with --samples .samples/epoch_<k>_<series>.png (slice | found | true)
         --evaluate: <results>/segmenter/<name>/metrics.csv, .json, cases.csv, of several classes classes.csv,
         and as PNG Dice by dose and size, and below clean/ and dose_<d>/ Bland-Altman plots and some slices
Example: python train_segmenter.py --epochs 50 --batch-size 8
         python train_segmenter.py --model timm-unet --encoder efficientnet-b4 --pretrained --windows three
         python train_segmenter.py --classes lesions --name segmenter_lesions
         python train_segmenter.py --input denoised --dose-model projection --name segmenter_denoised
         python train_segmenter.py --evaluate saved_models/segmenter.pt
         python train_segmenter.py --evaluate saved_models/segmenter.pt --dose-model projection --doses 0.1

--evaluate does not train. Beside its own options it takes --data, --denoiser, --dose-model, --doses, --seed
(of noise and bootstrap) and --device, and no others. Every scan is segmented as it is, and at each dose with
and without the denoiser: the given one, that which the segmenter was trained behind, or denoiser.pt beside
it. Doses are by default those of its training, else of the denoiser's."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import checkpoints
import lesions
import metrics
import segmented
import stage
import training
from batches import Batch, jitter_window
from classifiers import TIMM_NETWORKS, WINDOWS, pretrained
from dataset import BRAIN_WINDOW, SPLITS, Pack, load_pack, native_size
from display import FOUND_RGB, TRUE_RGB, paint, to_grey
from inference import lesion_mask, lesion_probabilities, load_segmenter, segment
from lesion_reading import outline_lesions
from losses import SEGMENTATION_LOSSES
from models import SEGMENTERS, build_model
from reading_inputs import INPUTS, asked_for, check_input_options, make_inputs
from segmenters import CLASSES

WIDTHS = [32, 64, 128, 256]  # half of Ronneberger's, and a level less: heads are smaller pictures
ENCODER = "efficientnet-b4"  # of the earlier system
# Of the slices of an epoch: as many that teach what a lesion is as slices that teach what none is
FOREGROUND_SHARE = 0.5
# Among which validation chooses, all three together: the probability at a lesion's edge, that which some of
# it must have, and how much of it
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SURE = (0.3, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
LEAST_ML = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)  # the smallest bleeds that readers measure are tenths of a ml
CLEAN_SHARE = 0.95  # of normal scans without a lesion voxel: an outline in each would be read by nobody
THRESHOLD = 0.5  # where it cannot
SAMPLES = 4  # pictures of an epoch


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    training.add_run_options(
        parser, name="segmenter", epochs=50, batch_size=8, lr=1e-3, weight_decay=0.01, samples=True
    )
    parser.add_argument(
        "--classes",
        choices=CLASSES,
        default="binary",
        help="lesion or not, or which of the six kinds (default: binary)",
    )
    parser.add_argument("--input", choices=INPUTS, default="clean", help="what it learns on (default: clean)")
    parser.add_argument("--denoiser", type=Path, help="for --input denoised (default: denoiser.pt in --out)")
    parser.add_argument(
        "--finetune", type=Path, help="begin with the weights of this segmenter, e.g. on noisy slices"
    )
    parser.add_argument(
        "--loss", choices=sorted(SEGMENTATION_LOSSES), default="bce-dice", help="(default: bce-dice)"
    )
    parser.add_argument(
        "--foreground-share",
        type=stage.fraction,
        default=FOREGROUND_SHARE,
        help="of the slices drawn those with a lesion; 0: all slices as they come "
        f"(default: {FOREGROUND_SHARE})",
    )
    parser.add_argument(
        "--window-jitter",
        type=stage.fraction,
        default=0.0,
        help="windows off by up to this share of 80 HU in training (default: 0)",
    )
    parser.add_argument(
        "--threshold",
        type=stage.fraction,
        help="probability from which on a pixel is lesion (default: chosen on val)",
    )
    group = parser.add_argument_group("network")
    group.add_argument("--model", choices=sorted(SEGMENTERS), default="unet", help="(default: unet)")
    group.add_argument(
        "--widths",
        type=stage.positive_int,
        nargs="+",
        help=f"unet: channels per level (default: {' '.join(map(str, WIDTHS))})",
    )
    group.add_argument("--encoder", choices=sorted(TIMM_NETWORKS), help=f"timm-unet (default: {ENCODER})")
    group.add_argument("--pretrained", action="store_true", help="timm-unet: weights of natural images")
    group.add_argument("--weights", type=Path, help="file of these weights (default: timm's download)")
    group.add_argument("--windows", choices=WINDOWS, default="brain", help="as channels (default: brain)")
    group.add_argument("--slices", type=stage.positive_int, default=1, help="3, 5, ...: with neighbours")
    training.add_dose_options(parser, training.DOSE_MODEL)
    training.add_noise_option(parser)
    group = parser.add_argument_group("a trained segmenter, instead of training")
    group.add_argument("--evaluate", type=Path, metavar="CKPT", help="score this checkpoint alone")
    group.add_argument("--split", choices=SPLITS, help="that is scored (default: test)")
    group.add_argument("--results", type=Path, help="(default: results)")
    return parser


# the options of the mode that does not train, and those that training has as well
MODES = {"evaluate": ("split", "results")}
SHARED = ("data", "denoiser", "dose_model", "doses", "seed", "device", "debug")


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Score one segmenter alone."""
    segmented.evaluate(
        args.evaluate,
        denoiser=args.denoiser,
        data=args.data,
        split=args.split or "test",
        results=args.results or Path("results"),
        dose_model=args.dose_model,
        doses=args.doses,
        seed=args.seed,
        device=training.pick_device(args.device),
        command=command,
    )


ONLY_FOR = {"widths": "unet", "encoder": "timm-unet", "pretrained": "timm-unet", "weights": "timm-unet"}


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect. Raises InputError."""
    check_input_options(args)
    for option, model in ONLY_FOR.items():
        if getattr(args, option) and args.model != model:
            raise stage.InputError(f"--{option}: only for --model {model} (leave it out)")
    if args.weights is not None and not args.pretrained:
        raise stage.InputError("--weights: give --pretrained too, or leave it out")
    if args.pretrained and args.finetune is not None:
        raise stage.InputError("--pretrained: --finetune begins with other weights (leave it out)")


# ---------------------------------------------------------------- what is known of the lesions


def lesion_kinds(pack: Pack, split: str) -> np.ndarray:
    """(N, 256) bool: which values the mask of each slice holds. Raises InputError without masks."""
    if pack.mask is None:
        raise stage.InputError(
            f"{split}: not every series has a lesion mask (prepare data with masks, or move the others away)"
        )
    return np.array([np.bincount(mask.ravel(), minlength=256) > 0 for mask in pack.mask])


def lesion_slices(pack: Pack, split: str, classes: str) -> np.ndarray:
    """(N,) bool, the slices that show what is to be learnt.

    Raises InputError if train has nothing of it, or but one of several classes."""
    kinds = lesion_kinds(pack, split)
    names = CLASSES[classes]
    known = kinds[:, 1:] if classes == "binary" else kinds[:, 1 : len(names) + 1]
    found = known.any(1)
    what = "no lesion" if classes == "binary" else "no lesion of a known class"
    if split == "train" and not found.any():
        raise stage.InputError(f"train: {what} in any mask at this size (other data, or a larger --size)")
    if split == "train" and classes != "binary" and known.any(0).sum() == 1:
        raise stage.InputError(
            f"--classes {classes}: train has lesions of one class only, {names[known.any(0).argmax()]} "
            "(take --classes binary)"
        )
    if split == "val" and not found.any():
        stage.log.warning("val holds %s: no Dice to choose by, the last epoch is kept", what)
    return found


def sampling_weights(foreground: np.ndarray, share: float) -> np.ndarray | None:
    """(N,) weights with which that share of the slices drawn is foreground; None: all slices as they come."""
    if share == 0 or foreground.all():
        return None
    counts = np.array([(~foreground).sum(), foreground.sum()])
    return (np.array([1 - share, share]) / counts)[foreground.astype(int)]


# ---------------------------------------------------------------- validation and pictures


def scan_parts(pack: Pack) -> list[np.ndarray]:
    """The rows of each series."""
    return [np.flatnonzero(pack.series_of == number) for number in range(len(pack.series))]


def mean_known(values: np.ndarray) -> np.ndarray:
    """Means of the columns over what is not NaN; NaN where nothing is known. values: (N, ...)."""
    known = ~np.isnan(values)
    return np.where(known.any(0), np.nansum(values, axis=0) / known.sum(0).clip(1), math.nan)


def dice_of_classes(truth: np.ndarray, found: np.ndarray, count: int) -> list[float]:
    """Dice of each of count classes, NaN for those that are not there. Unknown kinds count for nothing."""
    known = truth != lesions.UNKNOWN_KIND
    return [
        lesions.dice(truth == value, (found == value) & known) if (truth == value).any() else math.nan
        for value in range(1, count + 1)
    ]


def volume_rule(diseased: np.ndarray, volumes_ml: np.ndarray, source: str) -> dict[str, Any]:
    """From which volume in ml on an outline speaks for a lesion: value, None where none does, and origin.

    diseased: (scans,) bool. volumes_ml: (scans,) outlined. source: what was outlined, in words. Where a
    classifier says otherwise, predict.py flags it."""
    value = metrics.youden_threshold(diseased.astype(float), volumes_ml)
    called = volumes_ml >= value
    # NaN with scans of one kind only; no better than chance where nothing is outlined, or anything
    if math.isnan(value) or called[diseased].mean() <= called[~diseased].mean():
        return {"value": None, "origin": "no volume tells scans with a lesion from those without on val"}
    return {"value": value, "origin": f"largest Youden index of outlined volumes of scans on val, {source}"}


class Validation:
    """What a segmenter is chosen by: its overlap with the lesions of whole scans.

    images: (N, H, W) HU of the pack as the network is to see them. threshold: None to choose it. source: what
    the images are, in words."""

    def __init__(self, pack: Pack, images: np.ndarray, threshold: float | None, source: str):
        self.pack, self.images, self.source = pack, images, source
        thresholds = THRESHOLDS if threshold is None else (threshold,)
        self.tried = [
            (edge, sure, least_ml)
            for edge in thresholds
            for sure in sorted({edge, *(one for one in SURE if one > edge)})
            for least_ml in LEAST_ML
        ]
        self.origin = f"largest mean Dice on val with {CLEAN_SHARE:.0%} of normal scans clean, {source}"
        if threshold is not None:
            self.origin = f"value: --threshold; sure and least_ml: {self.origin}"

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """dice (mean over scans with a lesion), false_positive_ml and clean (on scans without), thresholds,
        volume_rule.

        Of several classes also dice_<class>, over scans that show it, and dice_mean, over classes."""
        scans = scan_parts(self.pack)
        truth_ml = np.array([self._truth_ml(number, rows) for number, rows in enumerate(scans)])[:, None]
        tried = np.array([self._tried_ml(model, number, rows) for number, rows in enumerate(scans)])
        found_ml, shared_ml = tried[..., 0], tried[..., 1]  # (scans, rules)
        diseased = truth_ml > 0
        dice = np.where(diseased, 2 * shared_ml / np.maximum(truth_ml + found_ml, 1e-12), math.nan)
        false_ml = np.where(diseased, math.nan, found_ml)
        means = mean_known(dice)
        clean = mean_known(np.where(diseased, math.nan, found_ml == 0))
        place, origin = self._choose(means, clean)
        rule = dict(zip(("value", "sure", "least_ml"), self.tried[place], strict=True)) | {"origin": origin}
        false_positive_ml = mean_known(false_ml[:, place])
        found = {"dice": means[place], "false_positive_ml": false_positive_ml, "clean": clean[place]}
        if len(model.classes) > 1:
            values = mean_known(
                np.array(
                    [self._dice_of_classes(model, rule, number, rows) for number, rows in enumerate(scans)]
                )
            )
            found |= {f"dice_{name}": value for name, value in zip(model.classes, values, strict=True)}
            found["dice_mean"] = mean_known(values)
        found = {name: float(value) for name, value in found.items()}
        return found | {
            "thresholds": {"lesion": rule},
            "volume_rule": volume_rule(diseased[:, 0], found_ml[:, place], self.source),
        }

    def _truth_ml(self, number: int, rows: np.ndarray) -> float:
        return lesions.volume_ml(self.pack.mask[rows] > 0, self.pack.spacing_mm(number))

    def _tried_ml(self, model: nn.Module, number: int, rows: np.ndarray) -> list[tuple[float, float]]:
        """Of a scan, by each rule: how many ml it finds, and how many of them are lesion."""
        truth, spacing_mm = self.pack.mask[rows] > 0, self.pack.spacing_mm(number)
        parts = lesion_probabilities(model, self.images[rows])
        probabilities = np.concatenate([found for _, found in parts])
        any_lesion, found = probabilities.sum(1), []
        for edge, rules in itertools.groupby(self.tried, key=lambda rule: rule[0]):
            component_at = lesions.components(lesion_mask(probabilities, edge))
            size_ml, shared_ml = (
                lesions.sure_ml(component_at, of, spacing_mm) for of in (component_at > 0, truth)
            )
            for sure, least in itertools.groupby(rules, key=lambda rule: rule[1]):
                held_ml = lesions.sure_ml(component_at, any_lesion >= sure, spacing_mm)
                kept = [lesions.believed(held_ml, least_ml) for _, _, least_ml in least]
                found += [(size_ml[one].sum(), shared_ml[one].sum()) for one in kept]
        return found

    def _dice_of_classes(
        self, model: nn.Module, rule: dict[str, Any], number: int, rows: np.ndarray
    ) -> list[float]:
        mask = outline_lesions(model, rule, self.images[rows], self.pack.spacing_mm(number))
        return dice_of_classes(self.pack.mask[rows], mask, len(model.classes))

    def _choose(self, means: np.ndarray, clean: np.ndarray) -> tuple[int, str]:
        """Which rule, and why: of equally good ones that with the threshold nearest to the middle.

        means: mean Dice of scans with a lesion, clean: share of others that stay so, by each rule. Where no
        rule leaves enough of them clean, it is the one that leaves most."""
        middle = abs(np.array(self.tried)[:, 0] - THRESHOLD)
        if np.isnan(means).all() and len(means) > 1:
            return int(middle.argmin()), "val has no lesion to choose it by"
        spoilt = np.nan_to_num(CLEAN_SHARE - clean).clip(0)  # unknown without normal scans: not asked
        return int(np.lexsort((middle, -means, spoilt))[0]), self.origin


def sampler(pack: Pack, images: Callable[[], np.ndarray]) -> Callable[[nn.Module], dict[str, np.ndarray]]:
    """samples(model) -> of some scans, slice | found | true of the slice with most lesion, (H, 3 W, 3) uint8.

    Scans with a lesion come first. Every class counts alike, at THRESHOLD."""
    area = np.array([np.count_nonzero(mask) for mask in pack.mask])
    parts = sorted(scan_parts(pack), key=lambda rows: -area[rows].max())[:SAMPLES]

    def samples(model: nn.Module) -> dict[str, np.ndarray]:
        shown = {}
        for rows in parts:
            place = int(area[rows].argmax())
            found = segment(model, images()[rows], threshold=THRESHOLD)[place]
            grey = np.repeat(to_grey(images()[rows[place]], *BRAIN_WINDOW)[..., None], 3, axis=2)
            masks = (
                (np.zeros(grey.shape[:2], bool), FOUND_RGB),
                (found > 0, FOUND_RGB),
                (pack.mask[rows[place]] > 0, TRUE_RGB),
            )
            uid = pack.series[pack.series_of[rows[place]]]["series_uid"]
            shown[uid] = np.concatenate([paint(grey, mask, rgb) for mask, rgb in masks], axis=1)
        return shown

    return samples


# ---------------------------------------------------------------- a run


def network_of(args: argparse.Namespace) -> dict[str, Any]:
    """Name and arguments of the network that the options ask for, as a checkpoint has them."""
    kwargs = {"classes": list(CLASSES[args.classes]), **WINDOWS[args.windows]}
    if args.slices != 1:
        kwargs["slices"] = args.slices
    own = {"widths": args.widths or WIDTHS} if args.model == "unet" else {"encoder": args.encoder or ENCODER}
    return {"name": args.model, "kwargs": kwargs | own}


def train(args: argparse.Namespace) -> None:
    """One network. Raises InputError for what does not go together."""
    device = training.pick_device(args.device)
    asked = asked_for(args, device)
    facts, seen = asked.facts, asked.seen
    size = args.size or native_size(args.data)
    packs = {split: load_pack(args.data, split, size) for split in ("train", "val")}
    foreground = {split: lesion_slices(pack, split, args.classes) for split, pack in packs.items()}
    weights = sampling_weights(foreground["train"], args.foreground_share)
    inputs = make_inputs(args, asked, packs, device)
    model = network_of(args)
    loss, state = SEGMENTATION_LOSSES[args.loss], None
    if args.finetune is not None:
        network, parent = load_segmenter(args.finetune)
        if parent["model"] != model:
            raise stage.InputError(
                f"--finetune {args.finetune}: is {parent['model']}, to be trained is {model}"
            )
        state, seen = network.state_dict(), [*seen, *parent["trained_on"]]
        sha256 = checkpoints.file_sha256(args.finetune)
        facts["parents"]["finetune"] = {"path": args.finetune.name, "sha256": sha256}

    def loss_fn(network: training.Network, batch: Batch) -> torch.Tensor:
        hu, _ = inputs["train"].draw(batch, args.slices)
        return loss(network(jitter_window(hu, batch.moves, args.window_jitter)), inputs["train"].mask(batch))

    def make_model() -> nn.Module:
        network = build_model(model["name"], kind="segmenter", **model["kwargs"])
        if state is not None:
            network.load_state_dict(state)
        elif args.pretrained:
            pretrained(network, args.weights)
        return network

    images = functools.cache(inputs["val"].fixed)
    source = inputs["val"].describe()
    done = training.run(
        args,
        packs["train"],
        packs["val"],
        options=training.pick_options(args, device),
        make_model=make_model,
        loss_fn=loss_fn,
        make_validate=lambda: Validation(packs["val"], images(), args.threshold, source),
        facts={
            "stage": "segmenter",
            "model": model,
            "task": "lesion",
            "classes": model["kwargs"]["classes"],
            **facts,
        },
        seen=seen,
        select=("dice" if args.classes == "binary" else "dice_mean", "max"),
        device=device,
        samples=sampler(packs["val"], images) if args.samples or args.tensorboard else None,
        weights=weights,
    )
    if done is not None:
        path, best = done
        stage.say(
            f"{path}: epoch {best['epoch']}, validation Dice {metrics.shown(best['dice'])} of scans with a "
            f"lesion, {metrics.shown(best['false_positive_ml'], 2)} ml called lesion on scans without "
            f"({args.classes}, {args.input} input)"
        )


def main(argv: list[str] | None = None) -> None:
    given = get_parser().parse_args(argv)
    training_args = stage.training_only(given, stage.given_options(get_parser(), argv), MODES, SHARED)
    if given.evaluate:
        evaluate(given, " ".join(["train_segmenter.py", *map(str, sys.argv[1:] if argv is None else argv)]))
        return
    check_options(training_args)
    for args in training.each_seed(training_args):
        train(args)


if __name__ == "__main__":
    stage.run(main)
