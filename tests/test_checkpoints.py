import os
import pickle
import subprocess
import sys
import time

import pytest
import torch

import checkpoints
import stage
from models import build_model


def denoiser_content(**changes):
    model = build_model("unet", widths=[4, 8])
    content = {
        "format": checkpoints.FORMAT,
        "stage": "denoiser",
        "model": {"name": "unet", "kwargs": {"widths": [4, 8]}},
        "state": model.state_dict(),
        "size": 32,
    }
    return content | changes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "denoiser.pt"


def test_load_network_gives_back_the_weights_frozen_and_in_eval_mode(path):
    content = denoiser_content()
    checkpoints.save(path, content)
    model, facts = checkpoints.load_network(path, "denoiser")
    assert facts["size"] == 32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, content["state"][key])


def refused(path, kind="denoiser"):
    with pytest.raises(stage.InputError) as caught:
        checkpoints.load_network(path, kind)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "weights_only" not in text
    assert "\n" not in text
    return text


def test_load_of_a_missing_file_names_the_stage_that_writes_it(path):
    assert "train_denoiser.py" in refused(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"hello", "not a checkpoint"),
    ],
)
def test_load_of_what_is_no_checkpoint_says_what_it_is(path, content, words):
    path.write_bytes(content)
    assert words in refused(path)


def test_load_of_a_truncated_file_is_refused(path):
    checkpoints.save(path, denoiser_content())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated" in refused(path)


def test_load_of_a_flipped_bit_is_refused(path):
    checkpoints.save(path, denoiser_content())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1  # the middle of the file lies in a tensor
    path.write_bytes(raw)
    assert "checksum" in refused(path)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_load_never_runs_code(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save({"format": 1, "stage": "denoiser", "bomb": Bomb()}, path)
    assert "refused" in refused(path)
    path.write_bytes(pickle.dumps(Bomb()))
    refused(path)
    assert not (path.parent / "canary").exists()


def test_load_of_another_kind_names_both(path):
    checkpoints.save(path, denoiser_content())
    text = refused(path, "classifier")
    assert "is a denoiser" in text
    assert "a classifier is needed" in text


def test_load_of_another_format_is_refused(path):
    checkpoints.save(path, denoiser_content(format=99))
    assert "format 99" in refused(path)


def test_load_of_other_weights_names_the_first_that_do_not_fit(path):
    checkpoints.save(path, denoiser_content(model={"name": "unet", "kwargs": {"widths": [8, 8]}}))
    assert "encoders.0.0.weight" in refused(path)


def test_load_of_foreign_tensors_is_refused(path):
    torch.save({"weight": torch.zeros(3)}, path)
    assert "not a checkpoint of this project" in refused(path)


def test_everything_that_versions_says_may_be_loaded_safely(path):
    torch.save(checkpoints.versions(), path)
    assert torch.load(path, weights_only=True)["torch"] == torch.__version__


WRITER = """
import sys, torch, checkpoints
path = sys.argv[1]
content = {"format": 1, "stage": "denoiser", "state": {"w": torch.zeros(1_000_000)}}
checkpoints.save(path, content)
print("ready", flush=True)
while True:
    content["state"]["w"] += 1
    checkpoints.save(path, content)
"""


@pytest.mark.slow
def test_save_killed_at_any_moment_leaves_a_whole_checkpoint(path):
    for trial in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.013 * trial)
        process.kill()
        process.wait()
        values = checkpoints.load(path, "denoiser")["state"]["w"].unique()
        assert len(values) == 1


def test_finished_leaves_out_runs_under_way_and_single_epochs(tmp_path):
    names = ["classifier.pt", "classifier.seed1.pt", "classifier_noisy.pt"]
    for name in [
        *names,
        "classifier.last.pt",
        "classifier.seed1.last.pt",
        "classifier.epoch3.pt",
        "denoiser.pt",
    ]:
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints.finished(tmp_path, "classifier")] == names
    assert checkpoints.finished(tmp_path / "none", "classifier") == []
