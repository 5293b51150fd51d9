import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoints
import stage
import training
from dataset import Batches
from models import build_model
from tests.conftest import ROOT

CPU = torch.device("cpu")


class FakePack:
    """Flat images in memory: all that a denoiser has to learn is to average."""

    mask = None

    def __init__(self, count=24):
        levels = np.random.default_rng(0).integers(-100, 100, (count, 1, 1)).astype(np.int16)
        self.image = np.broadcast_to(levels, (count, 16, 16)).copy()

    def __len__(self):
        return len(self.image)


def fit(folder, *, epochs=3, loss_fn=None, validate=None, resume=False, overwrite=False, **changes):
    precision = changes.pop("precision", torch.float32)
    torch.manual_seed(0)
    model = build_model("unet", widths=[4, 8])
    batches = Batches(FakePack(), batch_size=4, seed=1, device=CPU)

    def mse(model, batch):
        generator = torch.Generator().manual_seed(batch.seeds[0])
        noisy = batch.hu + 20 * torch.randn(batch.hu.shape, generator=generator)
        return (model(noisy) - batch.hu).square().mean()

    with training.open_run(
        folder, "net", resume=resume, overwrite=overwrite, place=training.World()
    ) as paths:
        best = training.fit(
            model,
            loss_fn or mse,
            batches,
            validate or (lambda model: {"rmse": next(model.parameters()).abs().sum().item()}),
            facts={"stage": "denoiser", "model": {"name": "unet", "kwargs": {"widths": [4, 8]}}},
            paths=paths,
            config={"epochs": epochs, **changes},
            epochs=epochs,
            lr=1e-2,
            select=("rmse", "max"),
            device=CPU,
            precision=precision,
        )
    return SimpleNamespace(best=best, paths=paths, model=model)


def weights(path):
    return checkpoints.load(path, "resume")["model"]


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_fit_learns_and_writes_what_the_next_stage_reads(tmp_path):
    run = fit(tmp_path, epochs=20)
    lines = [json.loads(line) for line in run.paths.log.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 21))
    assert lines[-1]["train_loss"] < 0.8 * lines[0]["train_loss"]
    _, facts = checkpoints.load_network(run.paths.best, "denoiser")
    assert facts["validation"] == run.best
    card = json.loads(run.paths.card.read_text())
    assert card["parameters"] == sum(parameter.numel() for parameter in run.model.parameters())


def test_fit_keeps_the_best_epoch_on_validation(tmp_path):
    scores = iter([1.0, 5.0, 2.0])
    run = fit(tmp_path, validate=lambda _: {"rmse": next(scores)})
    assert run.best["epoch"] == 2
    best = checkpoints.load(run.paths.best, "denoiser")["state"]
    assert not equal(best, {key: value for key, value in weights(run.paths.last).items()})


def test_fit_whose_metric_is_never_a_number_keeps_the_last_epoch(tmp_path):
    run = fit(tmp_path, validate=lambda _: {"rmse": float("nan")})
    assert run.best == {"rmse": None, "epoch": 3}


def test_fit_interrupted_anywhere_and_resumed_ends_with_the_same_weights(tmp_path):
    whole = fit(tmp_path / "whole")
    expected = weights(whole.paths.last)
    for stop in (2, 6, 11):
        count = 0

        def loss_fn(model, batch, stop=stop):
            nonlocal count
            count += 1
            if count == stop:
                signal.raise_signal(signal.SIGINT)
            generator = torch.Generator().manual_seed(batch.seeds[0])
            noisy = batch.hu + 20 * torch.randn(batch.hu.shape, generator=generator)
            return (model(noisy) - batch.hu).square().mean()

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            fit(folder, loss_fn=loss_fn)
        resumed = fit(folder, resume=True)
        assert equal(weights(resumed.paths.last), expected)
        logged = [json.loads(line) for line in resumed.paths.log.read_text().splitlines()]
        same = [json.loads(line) for line in whole.paths.log.read_text().splitlines()]
        assert [line["train_loss"] for line in logged] == [line["train_loss"] for line in same]


def test_fit_killed_between_its_two_files_goes_on(tmp_path, monkeypatch):
    expected = weights(fit(tmp_path / "whole").paths.last)
    save, calls = checkpoints.save, []

    def killed(path, content):
        calls.append(path.name)
        if calls == ["net.last.pt", "net.pt", "net.last.pt"]:
            raise RuntimeError("killed")
        save(path, content)

    monkeypatch.setattr(checkpoints, "save", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut")
    assert equal(weights(fit(tmp_path / "cut", resume=True).paths.last), expected)


def test_fit_of_a_finished_run_trains_nothing_and_says_so(tmp_path, caplog):
    first = fit(tmp_path)
    before = first.paths.best.read_bytes()
    with caplog.at_level("INFO"):
        again = fit(tmp_path, resume=True)
    assert again.best == first.best
    assert again.paths.best.read_bytes() == before
    assert "nothing to do" in caplog.text


def test_fit_refuses_an_existing_run_unless_told(tmp_path):
    first = fit(tmp_path, epochs=1)
    with pytest.raises(stage.InputError, match="--resume"):
        fit(tmp_path, epochs=1)
    fit(tmp_path, epochs=1, overwrite=True)
    assert first.paths.best.exists()


def test_fit_resumed_with_another_configuration_names_what_changed(tmp_path):
    fit(tmp_path, epochs=1, lr=0.1, seed=3)
    with pytest.raises(stage.InputError, match=r"lr 0\.1 -> 0\.2") as refused:
        fit(tmp_path, epochs=1, lr=0.2, seed=3, resume=True)
    assert "seed" not in str(refused.value)


def test_fit_stops_on_a_loss_that_is_not_finite_naming_step_and_slices(tmp_path):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch.rows.tolist())
        loss = model(batch.hu).square().mean()
        return loss * float("nan") if len(calls) == 9 else loss

    with pytest.raises(stage.StageError, match="epoch 2, step 3") as stopped:
        fit(tmp_path, loss_fn=loss_fn)
    assert str(calls[-1]) in str(stopped.value)
    checkpoints.load_network(tmp_path / "net.pt", "denoiser")


def test_second_run_on_the_same_output_is_refused(tmp_path):
    def loss_fn(model, batch):
        with pytest.raises(stage.StageError, match="in use") as refused:
            fit(tmp_path, resume=True)
        assert refused.value.exit_code == stage.EXIT_LOCKED
        return model(batch.hu).square().mean()

    fit(tmp_path, epochs=1, loss_fn=loss_fn)


def test_fit_computes_in_mixed_precision_only_what_goes_through_the_network(tmp_path):
    seen = []

    def loss_fn(network, batch):
        seen.append((torch.is_autocast_enabled("cpu"), (batch.hu[0, 0] @ batch.hu[0, 0]).dtype))
        return network(batch.hu).square().mean()

    fit(tmp_path, epochs=1, loss_fn=loss_fn, precision=torch.bfloat16)
    assert set(seen) == {(False, torch.float32)}


def test_fit_stops_on_a_gradient_that_is_not_finite_before_it_spoils_the_weights(tmp_path):
    def loss_fn(network, batch):
        return network(batch.hu).square().mean().sqrt() * 0  # the slope of a root at 0 is infinite

    with pytest.raises(stage.StageError, match="gradient nan"):
        fit(tmp_path, loss_fn=lambda network, batch: loss_fn(lambda hu: network(hu) - network(hu), batch))
    assert not (tmp_path / "net.pt").exists()


def test_resume_without_its_state_does_not_replace_the_checkpoint(tmp_path):
    first = fit(tmp_path, epochs=1)
    first.paths.last.unlink()
    before = first.paths.best.read_bytes()
    with pytest.raises(stage.InputError, match="cannot go on"):
        fit(tmp_path, epochs=1, resume=True)
    assert first.paths.best.read_bytes() == before
    with pytest.raises(stage.InputError, match="choose one"):
        fit(tmp_path, epochs=1, resume=True, overwrite=True)


def test_open_run_clears_what_a_killed_write_left(tmp_path):
    leftover = tmp_path / ".net.pt.tmp.123"
    leftover.write_bytes(b"half")
    fit(tmp_path, epochs=1)
    assert not leftover.exists()


def test_learning_rate_warms_up_then_falls_to_zero():
    factors = [training.learning_rate(step, 200) for step in range(200)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1
    assert all(one >= two for one, two in zip(factors[10:], factors[11:], strict=False))
    assert factors[-1] < 1e-3
    assert training.learning_rate(0, 1) == 1


@pytest.mark.parametrize("name", ["cuda:99", "mps", "tpu", "cuda:x"])
def test_pick_device_refuses_what_is_not_there(name):
    with pytest.raises(stage.InputError, match=f"--device {name}"):
        training.pick_device(name)


def test_pick_precision_of_fp16_on_the_cpu_is_refused():
    assert training.pick_precision("fp32", CPU) == torch.float32
    assert training.pick_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(stage.InputError, match="needs a GPU"):
        training.pick_precision("fp16", CPU)


# ---------------------------------------------------------------- as processes


TINY = ("--widths", 4, 8, "--precision", "fp32", "--device", "cpu", "--batch-size", 4)
EPOCHS = 30  # about two seconds: long enough to be killed in the middle
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # bitwise repeats need the same number of threads


def train(data, out, *more):
    command = [sys.executable, ROOT / "train_denoiser.py", "--data", data, "--out", out, *TINY, *more]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([str(part) for part in command], text=True, env=ONE_THREAD, **pipes)


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


@pytest.mark.slow
def test_train_killed_at_any_moment_and_resumed_ends_with_the_same_weights(split_data, tmp_path):
    finish(train(split_data, tmp_path / "whole", "--epochs", EPOCHS))
    expected = weights(tmp_path / "whole" / "denoiser.last.pt")
    for trial in range(3):
        out = tmp_path / str(trial)
        process = train(split_data, out, "--epochs", EPOCHS)
        while not (out / "denoiser.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.05 * trial)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert checkpoints.load(out / "denoiser.last.pt", "resume")["state"]["epoch"] < EPOCHS
        finish(train(split_data, out, "--epochs", EPOCHS, "--resume"))
        assert equal(weights(out / "denoiser.last.pt"), expected)


@pytest.mark.slow
def test_train_interrupted_saves_and_exits_130_in_one_line(split_data, tmp_path):
    process = train(split_data, tmp_path, "--epochs", 500)
    while not (tmp_path / "denoiser.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 130)
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]
    assert checkpoints.load(tmp_path / "denoiser.last.pt", "resume")["state"]["epoch"] >= 1


@pytest.mark.slow
def test_two_processes_train_the_same_network_as_one(split_data, tmp_path):
    finish(train(split_data, tmp_path / "one", "--epochs", 2))
    arguments = ["--data", split_data, "--out", tmp_path / "two", *TINY, "--epochs", 2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [str(part) for part in (*launch, ROOT / "train_denoiser.py", *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation RMSE") == 1  # the first process alone reports
    one, two = (weights(tmp_path / name / "denoiser.last.pt") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)
