"""What a checkpoint is: a file that says what it holds, survives a kill, and opens without running code.

A checkpoint is a dict of tensors and JSON types:

    format, stage, model {name, kwargs with the window}, state, parameters, size, config, seed, versions,
    split_hash, trained_on [patient ids, those of its parents too], parents {role: {path, sha256}},
    validation {metric: value}; classifiers and segmenters also task, classes, input, thresholds {level, or
    "lesion": {value, sure, least_ml, origin}}; segmenters also volume_rule {value in ml, origin}"""

from __future__ import annotations

import hashlib
import io
import platform
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import stage
from models import build_model
from weights import misfits

FORMAT = 1
TRAINED_BY = {
    "denoiser": "train_denoiser.py",
    "classifier": "train_classifier.py",
    "segmenter": "train_segmenter.py",
}


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions that decide a result."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def finished(folder: Path, prefix: str) -> list[Path]:
    """The checkpoints below folder whose names begin with prefix, sorted; not those of a run under way, of
    single epochs (--keep-every), or of the networks that a run of several stages trains on its way."""
    found = Path(folder).glob(f"{prefix}*.pt")
    part = re.compile(r"\.(last|epoch\d+|teacher|cnn|fold\d+)\.pt")
    return sorted(path for path in found if not part.fullmatch("".join(path.suffixes[-2:])))


def save(path: Path, content: dict) -> None:
    """Write a checkpoint atomically: whoever reads path sees the old one or the new one, whole."""
    memory = io.BytesIO()  # written by us, so that a full disk is an OSError and not torch's own error
    torch.save(content, memory)
    with stage.atomic_write(path, "wb") as file:
        file.write(memory.getbuffer())


def load(path: Path, kind: str, *, remedy: str | None = None) -> dict:
    """Read a checkpoint. kind: "denoiser", "classifier", "segmenter", or "resume" for a <name>.last.pt.

    Raises InputError, in one line, if it is missing, empty, damaged (CRC), no checkpoint at all, unsafe to
    open, of another format, or of another kind."""
    path = Path(path)
    if not path.is_file():
        remedy = remedy or f"run {TRAINED_BY.get(kind, 'the training stage')} first"
        raise stage.InputError(f"{path}: no such checkpoint ({remedy})")
    if path.stat().st_size == 0:
        raise stage.InputError(f"{path}: empty checkpoint (train again)")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        raise stage.InputError(f"{path}: {_guess(path)}") from None
    except (NotImplementedError, RuntimeError, UnicodeDecodeError, ValueError):
        raise stage.InputError(f"{path}: damaged checkpoint (train again)") from None
    if damaged is not None:
        raise stage.InputError(f"{path}: checksum mismatch in {damaged} (the file is damaged, train again)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 torch's own text would advise an unsafe load
        raise stage.InputError(
            f"{path}: refused, it is no checkpoint of this project or holds more than numbers"
        ) from None
    if not isinstance(content, dict) or "format" not in content or "stage" not in content:
        raise stage.InputError(f"{path}: not a checkpoint of this project (train one with its stages)")
    if content["format"] != FORMAT:
        raise stage.InputError(
            f"{path}: checkpoint format {content['format']}, this version reads {FORMAT} (train again)"
        )
    if content["stage"] != kind:
        article = "an unfinished training" if content["stage"] == "resume" else f"a {content['stage']}"
        raise stage.InputError(f"{path}: is {article}; a {kind} is needed")
    return content


def _guess(path: Path) -> str:
    start = path.read_bytes()[:64].lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "not a checkpoint but a Git LFS pointer (fetch the file itself)"
    if start.startswith(b"<"):
        return "not a checkpoint but a web page (download it again)"
    if start.startswith(b"PK"):
        return "truncated checkpoint (train again)"
    return "not a checkpoint"


def load_network(path: Path, kind: str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """Build the network of a checkpoint, in eval mode on device, and return it with the checkpoint's facts.

    Every parameter must match by name and shape. Raises InputError as load does, and naming the first
    parameters that do not fit."""
    content = load(path, kind)
    try:
        model = build_model(content["model"]["name"], kind=kind, **content["model"]["kwargs"])
        state = content.pop("state")
    except (KeyError, TypeError, ValueError) as error:
        raise stage.InputError(f"{path}: no network of this version, {error} (train again)") from None
    wrong = misfits(model, state)
    if wrong:
        raise stage.InputError(
            f"{path}: does not fit {content['model']['name']}: {', '.join(wrong[:3])}"
            f"{' ...' if len(wrong) > 3 else ''} (train again)"
        )
    model.load_state_dict(state)
    # channels last is how processors and GPUs like convolutions: a fifth to a third faster
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), content


def write_card(path: Path, content: dict) -> None:
    """Write the model card of a checkpoint: everything that it knows but the weights, as JSON."""
    stage.write_json(path, {key: value for key, value in content.items() if key != "state"})
