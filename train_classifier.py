"""Stage 4: train a classifier of slices, or of whole scans, on clean, low-dose or denoised slices; score one.

Reads:   <data>/{train,val}/, and --denoiser for --input denoised and joint
Writes:  <out>/<name>.pt, .last.pt, .jsonl, .card.json, and with --keep-every .epoch<k>.pt, with --csv .csv,
         with --tensorboard .tb/; two-stage also <name>.cnn*.pt and <name>.features/
         --evaluate: <results>/classifier/<name>/metrics.csv, .json, predictions.csv, predictions_binary.csv,
         scans.csv, of subtypes RSNA's submission.csv, and figures as PNG
Example: python train_classifier.py --task stroke --input clean --epochs 40 --batch-size 32
         python train_classifier.py --task stroke --input noisy --name classifier_noisy
         python train_classifier.py --task subtypes --model cnn-bilstm --name scan_classifier
         python train_classifier.py --evaluate saved_models/scan_classifier.pt
         python train_classifier.py --evaluate saved_models/classifier.pt --dose-model projection --doses 0.1

--evaluate does not train. Beside its own options it takes --data, --dose-model, --doses, --seed (of noise
and bootstrap) and --device, and no others; the rest is as the checkpoint was trained. A classifier of clean
slices is scored on these, and where doses are given on noisy ones as well. Where it sees several doses, the
figures and submission.csv lie in clean/ and dose_<d>/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import checkpoints
import classified
import metrics
import stage
import training
import two_stage
from answers import Validation, known_targets, sampling
from batches import Batch, ScanBatches, jitter_window, padded
from classifiers import WINDOWS, pretrained
from dataset import LABELS, SPLITS, TASKS, Pack, Task, load_pack, native_size
from explain import METHODS
from inference import Probabilities, load_classifier, read
from losses import masked_bce_loss, masked_cross_entropy_loss, rmse_loss
from models import BASELINES, CLASSIFIERS, SEQUENCE_MODELS, build_model
from reading_inputs import INPUTS, ReadingInputs, asked_for, check_input_options, make_inputs

WIDTH = 64  # of ResNet-18 in the paper
BATCH_SIZE, SCANS = 32, 4  # slices, and scans, of a batch
JOINT_WEIGHT = 0.02  # of the image's RMSE, 5 HU of which then weigh as a tenth of an undecided answer
SEQUENCE = {"epochs": 30, "lr": 1e-3}  # of the second step of two-stage
FOLDS, COMPONENTS, AUXILIARY = 3, 120, 0.5


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    training.add_run_options(
        parser, name="classifier", epochs=40, batch_size=BATCH_SIZE, lr=1e-3, weight_decay=0.05
    )
    parser.add_argument("--task", choices=sorted(TASKS), default="stroke", help="question (default: stroke)")
    parser.add_argument(
        "--input", choices=(*INPUTS, "joint"), default="clean", help="what it learns on (default: clean)"
    )
    parser.add_argument(
        "--denoiser", type=Path, help="for --input denoised and joint (default: denoiser.pt in --out)"
    )
    parser.add_argument(
        "--joint-weight",
        type=stage.fraction,
        help=f"joint: of the image's RMSE in HU beside the answer (default: {JOINT_WEIGHT})",
    )
    parser.add_argument(
        "--finetune", type=Path, help="begin with the weights of this classifier, e.g. on noisy slices"
    )
    parser.add_argument(
        "--balance",
        choices=("sampler", "pos-weight", "none"),
        default="sampler",
        help="against rare positives: draw them more often, weigh them more, or neither (default: sampler)",
    )
    parser.add_argument(
        "--assume-absent",
        nargs="+",
        choices=LABELS,
        default=[],
        help="labels whose unknown values count as 0, e.g. ischemia on RSNA; kept in the checkpoint",
    )
    parser.add_argument(
        "--label-smoothing", type=stage.fraction, default=0.0, help="share of the truth (default: 0)"
    )
    parser.add_argument(
        "--window-jitter",
        type=stage.fraction,
        default=0.0,
        help="windows off by up to this share of 80 HU in training (default: 0)",
    )
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        choices=(*sorted(CLASSIFIERS), *BASELINES, *SEQUENCE_MODELS),
        default="resnet18",
        help="of slices, or of whole scans: cnn-bilstm, two-stage; statistics: logistic regression on mean, "
        "SD and median of the slice, to be beaten (default: resnet18)",
    )
    group.add_argument(
        "--backbone", choices=sorted(CLASSIFIERS), help="of a network of scans (default: resnet18)"
    )
    group.add_argument("--width", type=stage.positive_int, help=f"resnet18: first stage (default: {WIDTH})")
    group.add_argument("--windows", choices=WINDOWS, default="brain", help="as channels (default: brain)")
    group.add_argument("--slices", type=stage.positive_int, default=1, help="3, 5, ...: with neighbours")
    group.add_argument("--dropout", type=stage.fraction, default=0.0, help="before the head (default: 0)")
    group.add_argument("--pretrained", action="store_true", help="begin with weights of natural images")
    group.add_argument("--weights", type=Path, help="file of these weights (default: timm's download)")
    group = parser.add_argument_group("scans (cnn-bilstm end to end; two-stage after Burduja et al.)")
    group.add_argument("--scans", type=stage.positive_int, help=f"of a batch (default: {SCANS})")
    group.add_argument(
        "--scan-length", type=stage.positive_int, help="in training, slices in uniform steps (default: all)"
    )
    group.add_argument(
        "--auxiliary-loss-weight",
        type=stage.fraction,
        help=f"lambda: (1 - lambda) L_scan + lambda L_slice (default: {AUXILIARY})",
    )
    group.add_argument("--hidden", type=stage.positive_int, help="states of the BiLSTM (default: 256)")
    group.add_argument(
        "--max-skip",
        action="store_true",
        default=None,
        help="add the largest logit of the slices to those of the scan: begins as the max rule",
    )
    group.add_argument(
        "--cnn",
        type=Path,
        help="trained classifier of slices: cnn-bilstm begins with it, two-stage keeps it (default: none; "
        "two-stage trains one first)",
    )
    group.add_argument(
        "--folds", type=stage.positive_int, help=f"two-stage: for its probabilities (default: {FOLDS})"
    )
    group.add_argument(
        "--components", type=stage.positive_int, help=f"two-stage: of the PCA (default: {COMPONENTS})"
    )
    group.add_argument(
        "--epochs-sequence", type=stage.positive_int, help=f"two-stage (default: {SEQUENCE['epochs']})"
    )
    group.add_argument(
        "--lr-sequence", type=stage.positive_float, help=f"two-stage (default: {SEQUENCE['lr']:g})"
    )
    training.add_dose_options(parser, training.DOSE_MODEL)
    training.add_noise_option(parser)
    group = parser.add_argument_group("a trained classifier, instead of training")
    group.add_argument("--evaluate", type=Path, metavar="CKPT", help="score this checkpoint alone")
    group.add_argument("--split", choices=SPLITS, help="that is scored (default: test)")
    group.add_argument("--results", type=Path, help="(default: results)")
    group.add_argument(
        "--mirrored", action="store_true", help="the mean with the mirrored slices (test-time augmentation)"
    )
    group.add_argument(
        "--gradcam",
        nargs="?",
        const="grad-cam",
        choices=METHODS,
        help="show where it looks, scored against the lesion masks (default method: grad-cam)",
    )
    return parser


# the options of the mode that does not train, and those that training has as well
MODES = {"evaluate": ("split", "results", "mirrored", "gradcam")}
SHARED = ("data", "dose_model", "doses", "seed", "device", "debug")


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Score one classifier alone."""
    classified.evaluate(
        args.evaluate,
        data=args.data,
        split=args.split or "test",
        results=args.results or Path("results"),
        dose_model=args.dose_model,
        doses=args.doses,
        seed=args.seed,
        mirrored=args.mirrored,
        gradcam=args.gradcam,
        device=training.pick_device(args.device),
        command=command,
    )


# which options belong to what only
ONLY_FOR = {
    "scans": SEQUENCE_MODELS,
    "scan_length": SEQUENCE_MODELS,
    "auxiliary_loss_weight": SEQUENCE_MODELS,
    "hidden": SEQUENCE_MODELS,
    "max_skip": SEQUENCE_MODELS,
    "backbone": SEQUENCE_MODELS,
    "cnn": SEQUENCE_MODELS,
    "folds": ("two-stage",),
    "components": ("two-stage",),
    "epochs_sequence": ("two-stage",),
    "lr_sequence": ("two-stage",),
}


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect. Raises InputError."""

    def refuse(option: str, reason: str) -> None:
        raise stage.InputError(f"--{option.replace('_', '-')}: {reason} (leave it out)")

    for option, models in ONLY_FOR.items():
        if getattr(args, option) is not None and args.model not in models:
            refuse(option, f"only for --model {' and '.join(models)}")
    check_input_options(args)
    if args.joint_weight is not None and args.input != "joint":
        refuse("joint_weight", "only for --input joint")
    if args.input == "joint" and args.window_jitter:
        refuse("window_jitter", "would hide from the denoiser what it is trained for")
    if args.input == "joint" and args.model in SEQUENCE_MODELS:
        raise stage.InputError(f"--input joint: for networks of slices, not {args.model} (choose another)")
    if args.model == "cnn-bilstm" and args.batch_size != BATCH_SIZE:
        refuse("batch_size", "cnn-bilstm learns from whole scans, see --scans")
    cnn = args.backbone or "resnet18" if args.model in SEQUENCE_MODELS else args.model
    if args.width is not None and cnn != "resnet18":
        refuse("width", "only for resnet18")
    for option in ("pretrained", "dropout"):
        if getattr(args, option) and args.model in BASELINES:
            refuse(option, f"{args.model} is no network")
    if args.weights is not None and not args.pretrained:
        raise stage.InputError("--weights: give --pretrained too, or leave it out")
    if args.pretrained and args.finetune is not None:
        refuse("pretrained", "--finetune begins with other weights")
    if args.cnn is not None:
        for option in ("backbone", "width", "finetune"):
            if getattr(args, option) is not None:
                refuse(option, "--cnn is what it is")
        if args.pretrained:
            refuse("pretrained", "--cnn is what it is")
        for option, none in (("windows", "brain"), ("slices", 1)):
            if getattr(args, option) != none:
                refuse(option, "--cnn is what it is")


# ---------------------------------------------------------------- runs


class Run(NamedTuple):
    """What all networks of one command have in common. denoiser: (network, facts), where there is one."""

    args: argparse.Namespace
    device: torch.device
    train: Pack
    val: Pack
    targets: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> (of slices, of scans)
    inputs: dict[str, ReadingInputs]  # split -> what the network is to see
    denoiser: tuple[nn.Module, dict] | None
    facts: dict  # of the checkpoints, without stage and model
    seen: list[str]

    @property
    def task(self) -> Task:
        return TASKS[self.args.task]

    def loss(self, pos_weight: torch.Tensor | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """loss(logits, targets), of slices or of scans."""
        function = masked_cross_entropy_loss if self.task.exclusive else masked_bce_loss
        weights = None if self.task.weights is None else torch.tensor(self.task.weights, device=self.device)
        pos_weight = None if pos_weight is None else pos_weight.to(self.device)
        smoothing = self.args.label_smoothing
        return lambda logits, targets: function(
            logits, targets, pos_weight, weights=weights, smoothing=smoothing
        )

    def fit(self, args: argparse.Namespace, select: tuple[str, str], **more: Any) -> Path | None:
        """Train one network and say how good it is. more: as for training.run. Returns its checkpoint."""
        facts = self.facts | more.pop("facts")
        done = training.run(
            args,
            more.pop("train", self.train),
            self.val,
            options=training.pick_options(args, self.device),
            facts=facts,
            seen=[*self.seen, *more.pop("seen", ())],
            select=select,
            device=self.device,
            **more,
        )
        if done is None:
            return None
        path, best = done
        stage.say(
            f"{path}: epoch {best['epoch']}, validation AUC {metrics.shown(best['auc'])} per slice, "
            f"{metrics.shown(best['auc_scan'])} per scan ({self.args.task}, {self.args.input} input)"
        )
        return path


def with_options(args: argparse.Namespace, **changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changed})


def prepare(args: argparse.Namespace) -> Run:
    """Data, targets and inputs of one command. Raises InputError for what does not go together."""
    device = training.pick_device(args.device)
    asked = asked_for(args, device)
    size = args.size or native_size(args.data)
    packs = {split: load_pack(args.data, split, size) for split in ("train", "val")}
    targets = {
        split: known_targets(
            pack, split, args.task, args.assume_absent, of_scans=args.model in SEQUENCE_MODELS
        )
        for split, pack in packs.items()
    }
    facts = asked.facts | {
        "task": args.task,
        "classes": list(TASKS[args.task].classes),
        "assume_absent": args.assume_absent,
    }
    return Run(
        args,
        device,
        packs["train"],
        packs["val"],
        targets,
        make_inputs(args, asked, packs, device),
        asked.denoiser,
        facts,
        asked.seen,
    )


def cnn_kwargs(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The arguments of the classifier of slices that the options ask for."""
    kwargs = {"classes": list(TASKS[args.task].classes), **WINDOWS[args.windows]}
    if args.slices != 1:
        kwargs["slices"] = args.slices
    if args.dropout:
        kwargs["dropout"] = args.dropout
    if name == "resnet18":
        kwargs["width"] = args.width or WIDTH
    return kwargs


def start_from(path: Path, model: dict) -> tuple[dict, dict]:
    """(weights, facts) of the classifier to begin with. Raises InputError if it is another network."""
    network, facts = load_classifier(path)
    if facts["model"] != model:
        raise stage.InputError(f"--finetune {path}: is {facts['model']}, to be trained is {model}")
    return network.state_dict(), facts


def load_cnn(run: Run, path: Path) -> tuple[nn.Module, dict]:
    """(network, facts) of --cnn. Raises InputError if it is no classifier of slices for this task."""
    cnn, facts = load_classifier(path, run.device)
    if facts["classes"] != list(run.task.classes) or facts["model"]["name"] not in CLASSIFIERS:
        raise stage.InputError(
            f"--cnn {path}: has classes {', '.join(facts['classes'])} and network {facts['model']['name']}; "
            f"a classifier of slices for --task {run.args.task} is needed"
        )
    return cnn, facts


class Start(NamedTuple):
    """What a network begins with: load(network), and what its checkpoint says of it."""

    load: Callable[[nn.Module], None]
    parents: dict
    seen: list[str]


def pick_start(args: argparse.Namespace, model: dict) -> Start:
    """Of --finetune, --pretrained, or nothing."""
    if args.finetune is not None:
        state, facts = start_from(args.finetune, model)
        parent = {"path": args.finetune.name, "sha256": checkpoints.file_sha256(args.finetune)}
        return Start(
            lambda network: network.load_state_dict(state), {"finetune": parent}, facts["trained_on"]
        )
    if args.pretrained:
        return Start(lambda network: pretrained(getattr(network, "cnn", network), args.weights), {}, [])
    return Start(lambda _network: None, {}, [])


def train_slices(
    run: Run, args: argparse.Namespace, model: dict | None = None, keep: np.ndarray | None = None
) -> Path | None:
    """One classifier of slices. model: name and kwargs (default: what the options ask for). keep: (N,) bool,
    the training slices to learn from (default: all)."""
    joint = args.input == "joint"
    model = model or {"name": args.model, "kwargs": cnn_kwargs(args, args.model)}
    start = pick_start(args, model)
    if joint:
        parts = {"denoiser": run.denoiser[1]["model"], "classifier": model}
        model = {"name": "joint", "kwargs": parts}
    seen = run.denoiser[0].slices if joint else model["kwargs"].get("slices", 1)
    slices = run.targets["train"][0]
    used = slices if keep is None else np.where(keep[:, None], slices, np.nan)
    balance = sampling(run.task, used, args.balance)
    loss = run.loss(balance.pop("pos_weight"))
    weight = JOINT_WEIGHT if args.joint_weight is None else args.joint_weight

    def loss_fn(network: training.Network, batch: Batch) -> Any:
        hu, full = run.inputs["train"].draw(batch, seen)
        if joint:
            logits, image = network(hu, denoised=True)
            terms = {"answer": loss(logits, batch.targets), "image": rmse_loss(image, full, None)}
            return terms["answer"] + weight * terms["image"], terms
        return loss(network(jitter_window(hu, batch.moves, args.window_jitter)), batch.targets)

    def make_model() -> nn.Module:
        network = build_model(model["name"], **model["kwargs"])
        if joint:
            network.denoiser.load_state_dict(run.denoiser[0].state_dict())
        start.load(network.classifier if joint else network)
        return network

    def make_validate() -> Validation:
        images, source = run.inputs["val"].fixed(), run.inputs["val"].describe()
        return Validation(
            run.task, run.targets["val"], lambda network: read(network, images, run.val.series_of), source
        )

    return run.fit(
        args,
        ("auc_mean" if len(run.task.classes) > 1 else "auc", "max"),
        make_model=make_model,
        loss_fn=loss_fn,
        make_validate=make_validate,
        facts={"stage": "classifier", "model": model, "parents": run.facts["parents"] | start.parents},
        seen=start.seen,
        targets=slices,
        **balance,
    )


def sequence_loss(run: Run, pos_weight: torch.Tensor | None) -> Callable:
    """loss(reading, batch) -> ((1 - lambda) L_scan + lambda L_slice, both)."""
    share = AUXILIARY if run.args.auxiliary_loss_weight is None else run.args.auxiliary_loss_weight
    loss = run.loss(pos_weight)

    def of_reading(reading: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scan, slices = reading
        terms = {
            "scan": loss(scan, batch.scan_targets),
            "slice": loss(slices[batch.present], batch.targets),
        }
        return (1 - share) * terms["scan"] + share * terms["slice"], terms

    return of_reading


def scan_batches(run: Run) -> dict[str, Any]:
    """What training.run needs for batches of whole scans, and pos_weight."""
    slices, scans = run.targets["train"]
    balance = sampling(run.task, scans, run.args.balance)
    more = {"scan_targets": scans, "targets": slices, "length": run.args.scan_length}
    return balance | more | {"make_batches": ScanBatches, "batch_size": run.args.scans or SCANS}


def sequence_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the network behind the CNN."""
    given = {name: getattr(args, name) for name in ("hidden", "max_skip")}
    return {name: value for name, value in given.items() if value is not None}


def train_end_to_end(run: Run, args: argparse.Namespace) -> Path | None:
    """CNN and BiLSTM together, from whole scans."""
    backbone = args.backbone or "resnet18"
    classes = list(run.task.classes)
    cnn, begun = {"name": backbone, "kwargs": cnn_kwargs(args, backbone)}, None
    if args.cnn is not None:
        begun, facts = load_cnn(run, args.cnn)
        cnn = facts["model"]
    model = {
        "name": args.model,
        "kwargs": {"cnn": cnn, "classes": classes, "dropout": args.dropout} | sequence_kwargs(args),
    }
    start = pick_start(args, model)
    if begun is not None:
        parent = {"path": args.cnn.name, "sha256": checkpoints.file_sha256(args.cnn)}
        start = Start(
            lambda network: network.cnn.load_state_dict(begun.state_dict()),
            {"cnn": parent},
            facts["trained_on"],
        )
    batches = scan_batches(run)
    loss = sequence_loss(run, batches.pop("pos_weight"))

    def loss_fn(network: training.Network, batch: Batch) -> Any:
        hu, _ = run.inputs["train"].draw(batch, cnn["kwargs"].get("slices", 1))
        hu = jitter_window(hu, batch.moves, args.window_jitter)
        return loss(network(padded(hu, batch.present), batch.present), batch)

    def make_model() -> nn.Module:
        network = build_model(model["name"], **model["kwargs"])
        start.load(network)
        return network

    def make_validate() -> Validation:
        images, source = run.inputs["val"].fixed(), run.inputs["val"].describe()
        share = AUXILIARY if args.auxiliary_loss_weight is None else args.auxiliary_loss_weight
        return Validation(
            run.task,
            run.targets["val"],
            lambda network: read(network, images, run.val.series_of),
            source,
            share,
        )

    return run.fit(
        args,
        ("loss", "min"),
        make_model=make_model,
        loss_fn=loss_fn,
        make_validate=make_validate,
        facts={"stage": "classifier", "model": model, "parents": run.facts["parents"] | start.parents},
        seen=start.seen,
        **batches,
    )


# options of two-stage that decide nothing before its BiLSTM: with others, the CNNs that are there still serve
OF_SEQUENCE = (
    *("scans", "scan_length", "auxiliary_loss_weight", "hidden", "max_skip"),
    *("components", "epochs_sequence", "lr_sequence"),
)


def train_two_stage(run: Run, args: argparse.Namespace) -> Path | None:
    """A CNN, unless there is one, CNNs of folds, embeddings and their PCA, and the BiLSTM over these."""
    before = with_options(args, **dict.fromkeys(OF_SEQUENCE))
    count, components = args.folds or FOLDS, args.components or COMPONENTS
    folds = two_stage.folds_of(run.train, count, args.seed)
    if args.cnn is not None:
        path, one = args.cnn, load_cnn(run, args.cnn)[1]["model"]
    else:
        backbone = args.backbone or "resnet18"
        one = {"name": backbone, "kwargs": cnn_kwargs(args, backbone)}
        path = train_slices(run, with_options(before, name=f"{args.name}.cnn"), one)
    paths = [
        train_slices(run, with_options(before, name=f"{args.name}.cnn.fold{number}"), one, folds != number)
        for number in range(count)
    ]
    names = [f"{args.name}.cnn.fold{number}.pt" for number in range(count)]
    path = path or args.out / f"{args.name}.cnn.pt"  # another process than the first: it lies there by now
    paths = [found or args.out / name for found, name in zip(paths, names, strict=True)]
    cnn, facts = load_classifier(path, run.device)
    model = {
        "name": "two-stage",
        "kwargs": {
            "cnn": facts["model"],
            "classes": list(run.task.classes),
            "components": components,
            **sequence_kwargs(args),
        },
    }
    hashes = [checkpoints.file_sha256(one) for one in (path, *paths)]
    folder = args.out / f"{args.name}.features"

    def asked(split: str, pack: Pack) -> two_stage.Said:
        key = [hashes[0], pack.key, run.inputs[split].describe(), run.facts["parents"]]

        def ask() -> dict[str, np.ndarray]:
            return two_stage.ask(cnn, run.inputs[split].fixed(), pack.series_of)._asdict()

        return two_stage.Said(**two_stage.kept(folder / f"{split}.npz", key, ask))

    def ask_folds() -> dict[str, np.ndarray]:
        images, networks = run.inputs["train"].fixed(), [load_classifier(one, run.device)[0] for one in paths]
        return {"probabilities": two_stage.out_of_fold(networks, folds, images, run.train.series_of)}

    said = {"train": asked("train", run.train), "val": asked("val", run.val)}
    key = [hashes, run.train.key, run.inputs["train"].describe(), run.facts["parents"]]
    held_out = two_stage.kept(folder / "out_of_fold.npz", key, ask_folds)
    said["train"] = said["train"]._replace(**held_out)
    pca = two_stage.fit_pca(said["train"].embeddings, components)
    features = {split: pca.features(words) for split, words in said.items()}
    batches = scan_batches(run)
    loss = sequence_loss(run, batches.pop("pos_weight"))

    def loss_fn(network: training.Network, batch: Batch) -> Any:
        return loss(network(padded(batch.hu[:, 0], batch.present), batch.present), batch)

    def make_model() -> nn.Module:
        network = build_model(model["name"], **model["kwargs"])
        network.cnn.load_state_dict(cnn.state_dict())
        network.set_pca(*pca)
        return network

    def reading(network: nn.Module) -> Probabilities:
        return two_stage.read_features(network, features["val"], run.val.series_of)

    share = AUXILIARY if args.auxiliary_loss_weight is None else args.auxiliary_loss_weight
    source = run.inputs["val"].describe()
    parent = {"path": path.name, "sha256": hashes[0]}
    return run.fit(
        with_options(
            args,
            epochs=args.epochs_sequence or SEQUENCE["epochs"],
            lr=args.lr_sequence or SEQUENCE["lr"],
        ),
        ("loss", "min"),
        train=two_stage.with_features(run.train, features["train"]),
        make_model=make_model,
        loss_fn=loss_fn,
        make_validate=lambda: Validation(run.task, run.targets["val"], reading, source, share),
        facts={"stage": "classifier", "model": model, "parents": run.facts["parents"] | {"cnn": parent}},
        seen=facts["trained_on"],
        **batches,
    )


TRAIN = {"cnn-bilstm": train_end_to_end, "two-stage": train_two_stage}


def main(argv: list[str] | None = None) -> None:
    given = get_parser().parse_args(argv)
    training_args = stage.training_only(given, stage.given_options(get_parser(), argv), MODES, SHARED)
    if given.evaluate:
        evaluate(given, " ".join(["train_classifier.py", *map(str, sys.argv[1:] if argv is None else argv)]))
        return
    check_options(training_args)
    for args in training.each_seed(training_args):
        TRAIN.get(args.model, train_slices)(prepare(args), args)


if __name__ == "__main__":
    stage.run(main)
