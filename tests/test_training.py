import copy
import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import runs
import stage
import train_denoiser
import training
from batches import Batches
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


def add_noise(batch):
    """Noise of its own for each slice, so that it does not matter how slices are put into batches."""
    noise = [torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in batch.seeds]
    return batch.hu + 20 * torch.stack(noise)[:, None]


def mse(network, batch):
    return (network(add_noise(batch)) - batch.hu).square().mean()


def fit(folder, *, loss_fn=mse, validate=None, resume=False, overwrite=False, **changes):
    """Train a tiny network. changes: options of training, and model, batch_size, pictures, config."""
    torch.manual_seed(0)
    model = changes.pop("model", None) or build_model("unet", widths=[4, 8])
    batches = Batches(FakePack(), batch_size=changes.pop("batch_size", 4), seed=1, device=CPU)
    pictures, config = changes.pop("pictures", None), changes.pop("config", {})
    options = training.Options(**{"epochs": 3, "lr": 1e-2, **changes})
    validate = validate or (lambda model: {"rmse": next(model.parameters()).abs().sum().item()})
    with runs.open_run(folder, "net", resume=resume, overwrite=overwrite, place=runs.World()) as paths:
        best = training.fit(
            model,
            loss_fn,
            batches,
            lambda: validate,
            options=options,
            facts={"stage": "denoiser", "model": {"name": "unet", "kwargs": {"widths": [4, 8]}}},
            paths=paths,
            config={"epochs": options.epochs, **config},
            select=("rmse", "max"),
            device=CPU,
            samples=pictures,
        )
    return SimpleNamespace(best=best, paths=paths, model=model)


def weights(path, which="model"):
    return checkpoints.load(path, "resume")[which]


def kept(path):
    return checkpoints.load(path, "denoiser")["state"]


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def close(one, two, rtol=1e-3, atol=1e-5):
    return all(torch.allclose(one[key], two[key], rtol=rtol, atol=atol) for key in one)


def log_of(paths):
    return [json.loads(line) for line in paths.log.read_text().splitlines()]


# ---------------------------------------------------------------- learning, and keeping the best


def test_fit_learns_and_writes_what_the_next_stage_reads(tmp_path):
    run = fit(tmp_path, epochs=20)
    lines = log_of(run.paths)
    assert [line["epoch"] for line in lines] == list(range(1, 21))
    assert lines[-1]["train_loss"] < 0.8 * lines[0]["train_loss"]
    _, facts = checkpoints.load_network(run.paths.best, "denoiser")
    assert facts["validation"] == run.best
    card = json.loads(run.paths.card.read_text())
    assert card["parameters"] == sum(parameter.numel() for parameter in run.model.parameters())


def test_fit_keeps_the_best_epoch_on_validation(tmp_path):
    scores = iter([1.0, 5.0, 2.0])
    run = fit(tmp_path, validate=lambda _: {"rmse": next(scores)}, keep_every=1)
    assert run.best["epoch"] == 2
    assert equal(kept(run.paths.best), kept(run.paths.epoch(2)))
    assert not equal(kept(run.paths.best), weights(run.paths.last))


def test_fit_whose_metric_is_never_a_number_keeps_the_last_epoch(tmp_path):
    run = fit(tmp_path, validate=lambda _: {"rmse": float("nan")}, early_stopping=1)
    assert run.best == {"rmse": None, "epoch": 3}


def test_fit_keeps_every_nth_epoch_loadable_as_the_best_one_is(tmp_path):
    run = fit(tmp_path, epochs=5, keep_every=2)
    assert sorted(path.name for path in tmp_path.glob("*.epoch*")) == ["net.epoch2.pt", "net.epoch4.pt"]
    _, facts = checkpoints.load_network(run.paths.epoch(4), "denoiser")
    assert facts["validation"]["epoch"] == 4
    assert not equal(kept(run.paths.epoch(2)), kept(run.paths.epoch(4)))


def test_fit_stops_early_without_a_better_epoch_and_stays_stopped(tmp_path, caplog):
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    run = fit(tmp_path, epochs=9, early_stopping=2, validate=lambda _: {"rmse": next(scores)})
    assert run.best["epoch"] == 2
    assert len(log_of(run.paths)) == 4
    with caplog.at_level("INFO"):
        again = fit(tmp_path, epochs=9, early_stopping=2, resume=True)
    assert again.best == run.best
    assert "already trained for 4 epochs" in caplog.text


def test_fit_logs_the_terms_of_a_loss_as_means_of_the_epoch(tmp_path):
    seen = []

    def loss_fn(network, batch):
        error = network(add_noise(batch)) - batch.hu
        seen.append(error.abs().mean().item())
        return error.square().mean(), {"mae": error.abs().mean(), "share": 0.25}

    run = fit(tmp_path, epochs=1, loss_fn=loss_fn, accumulate=2)
    (line,) = log_of(run.paths)
    assert line["train_mae"] == pytest.approx(np.mean(seen), rel=1e-5)
    assert line["train_share"] == 0.25
    assert equal(weights(run.paths.last), weights(fit(tmp_path / "plain", epochs=1, accumulate=2).paths.last))


def test_network_of_several_inputs_and_outputs_gives_each_in_float32(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 3, 1)

        def forward(self, hu, dose):
            out = self.conv(hu) * dose
            return out, out.mean(dim=(2, 3))

    def loss_fn(network, batch):
        out, mean = network(batch.hu, torch.ones(()))
        assert out.dtype == mean.dtype == torch.float32
        return out.square().mean() + mean.square().mean()

    fit(tmp_path, epochs=1, model=Two(), loss_fn=loss_fn, precision=torch.bfloat16)


# ---------------------------------------------------------------- how the weights move


def test_learning_rate_warms_up_then_follows_its_schedule():
    make = {"epochs": 1, "lr": 3.0}
    cosine, step, constant = (
        [training.learning_rate(at, 200, training.Options(schedule=name, **make)) for at in range(200)]
        for name in ("cosine", "step", "constant")
    )
    for rates in (cosine, step, constant):
        assert rates[:10] == pytest.approx([3.0 * (at + 1) / 10 for at in range(10)])
    assert cosine[10:] == pytest.approx([1.5 * (1 + math.cos(math.pi * at / 190)) for at in range(190)])
    assert step[10:] == pytest.approx([3.0] * 95 + [0.3] * 48 + [0.03] * 47)
    assert constant[10:] == [3.0] * 190
    assert training.learning_rate(0, 1, training.Options(**make)) == 3.0
    cold = training.Options(warmup=0.0, schedule="constant", **make)
    assert {training.learning_rate(at, 50, cold) for at in range(50)} == {3.0}


def test_fit_uses_and_logs_the_learning_rate_of_the_schedule(tmp_path):
    paths = {name: fit(tmp_path / name, schedule=name).paths for name in training.SCHEDULES}
    assert len({float(weights(path.last)["head.bias"]) for path in paths.values()}) == 3
    last = {name: log_of(path)[-1]["lr"] for name, path in paths.items()}
    assert last["cosine"] < 1e-3
    assert (last["step"], last["constant"]) == pytest.approx((1e-4, 1e-2))


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 4), (4, 2)])
def test_fit_accumulating_batches_does_as_one_batch_of_them_all(tmp_path, batch_size, accumulate):
    whole = fit(tmp_path / "whole", batch_size=8)
    parts = fit(tmp_path / "parts", batch_size=batch_size, accumulate=accumulate)
    one, two = (weights(run.paths.last) for run in (whole, parts))
    assert close(one, two)
    losses = [[line["train_loss"] for line in log_of(run.paths)] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not close(one, weights(fit(tmp_path / "small", batch_size=batch_size).paths.last))


def test_fit_accumulating_more_than_an_epoch_has_is_refused(tmp_path):
    with pytest.raises(stage.InputError, match="--accumulate 7: an epoch has 6 batches of 4"):
        fit(tmp_path, accumulate=7)


def test_weight_decay_of_adamw_shrinks_what_has_no_gradient_and_adam_without_it_is_the_same(tmp_path):
    torch.manual_seed(0)
    before = {key: value.clone() for key, value in build_model("unet", widths=[4, 8]).state_dict().items()}
    still = fit(tmp_path / "still", loss_fn=lambda n, b: 0 * n(b.hu).sum(), weight_decay=0.1, clip_norm=1e9)
    options = training.Options(epochs=3, lr=1e-2)
    shrunk = math.prod(1 - 0.1 * training.learning_rate(at, 18, options) for at in range(18))
    after = weights(still.paths.last)
    assert close(after, {key: shrunk * value for key, value in before.items()}, rtol=1e-5)
    runs = {
        (name, decay): weights(
            fit(tmp_path / f"{name}{decay}", optimizer=name, weight_decay=decay).paths.last
        )
        for name in training.OPTIMIZERS
        for decay in (0.0, 0.3)
    }
    assert close(runs["adam", 0.0], runs["adamw", 0.0], rtol=1e-5)
    assert not close(runs["adam", 0.3], runs["adamw", 0.3])
    assert not close(runs["adam", 0.3], runs["adam", 0.0])


def learner(tmp_path, model, **changes):
    return training.Learner(
        model,
        training.Options(**{"epochs": 1, "lr": 1e-2, **changes}),
        paths=runs.run_paths(tmp_path, "net"),
        config={},
        device=CPU,
        place=runs.World(),
    )


def batch_of(count=4):
    return next(Batches(FakePack(), batch_size=count, seed=1, device=CPU).epoch(0))


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clip_norm_limits_the_gradient_and_nothing_else(tmp_path, limit):
    model = torch.nn.Conv2d(1, 1, 3)
    run = learner(tmp_path, model, clip_norm=limit)
    loss_fn = lambda network, batch: network(batch.hu).square().mean()  # noqa: E731
    batch = batch_of()
    expected = torch.autograd.grad(loss_fn(run.network, batch), list(model.parameters()))
    norm = torch.stack([part.norm() for part in expected]).norm()
    run.step(loss_fn, [batch], 1e-2, 0)
    for parameter, part in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, part * min(1, limit / norm), rtol=1e-4, atol=1e-6)
    assert norm > 0.5


def test_accumulated_gradient_is_that_of_the_mean_over_all_batches(tmp_path):
    gradients = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(1, 1, 3, padding=1)
        run = learner(tmp_path, model, clip_norm=1e9)
        batches = list(Batches(FakePack(), batch_size=size, seed=1, device=CPU).epoch(0))[: 8 // size]
        run.step(mse, batches, 1e-2, 0)
        gradients.append(model.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_ema_validates_and_keeps_the_average_of_the_weights_by_its_formula(tmp_path):
    trail, seen = [], []

    def loss_fn(network, batch):
        trail.append([value.detach().clone() for value in network.__self__.model.parameters()])
        return mse(network, batch)

    def validate(model):
        assert not model.training
        seen.append([value.detach().clone() for value in model.parameters()])
        return {"rmse": float(len(seen))}

    run = fit(tmp_path, loss_fn=loss_fn, validate=validate, ema=0.8)
    trail.append(list(weights(run.paths.last).values()))
    average = trail[0]
    for done, values in enumerate(trail[1:]):
        decay = min(0.8, (1 + done) / (10 + done))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, values, strict=True)]
    for found in (seen[-1], kept(run.paths.best).values(), weights(run.paths.last, "averaged").values()):
        for one, two in zip(found, average, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    plain = weights(fit(tmp_path / "plain").paths.last)
    assert equal(weights(run.paths.last), plain)  # the average does not steer the training
    assert not close(weights(run.paths.last, "averaged"), plain)


def test_ema_copies_the_statistics_of_batch_norm_and_leaves_frozen_weights_as_they_are(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.Conv2d(2, 1, 1))
    frozen = model[2].requires_grad_(False).weight.clone()
    run = fit(tmp_path, epochs=1, model=model, ema=0.7)
    assert torch.equal(kept(run.paths.best)["1.running_mean"], model[1].running_mean)
    assert torch.equal(kept(run.paths.best)["2.weight"], frozen)


def test_fit_gives_the_network_its_channels_last(tmp_path):
    seen = []
    model = torch.nn.Conv2d(3, 5, 3, padding=1)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].stride()[1]))
    fit(tmp_path, epochs=1, model=model, loss_fn=lambda n, b: n(b.hu.repeat(1, 3, 1, 1)).square().mean())
    assert set(seen) == {1}
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- precision


def test_fit_computes_in_mixed_precision_only_what_goes_through_the_network(tmp_path):
    seen = []

    def loss_fn(network, batch):
        seen.append((torch.is_autocast_enabled("cpu"), (batch.hu[0, 0] @ batch.hu[0, 0]).dtype))
        return network(batch.hu).square().mean()

    fit(tmp_path, epochs=1, loss_fn=loss_fn, precision=torch.bfloat16)
    assert set(seen) == {(False, torch.float32)}


def test_fit_in_bf16_learns_as_in_fp32(tmp_path):
    losses = [
        [line["train_loss"] for line in log_of(fit(tmp_path / str(precision), precision=precision).paths)]
        for precision in (torch.float32, torch.bfloat16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_fp16_leaves_out_a_step_that_overflows_and_ends_a_run_that_always_does(tmp_path):
    model = torch.nn.Conv2d(1, 1, 3)
    run = learner(tmp_path, model, precision=torch.float16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    overflow = lambda network, batch: network(batch.hu).sum() * 1e34  # noqa: E731
    run.step(overflow, [batch_of()], 1e-2, 0)
    assert equal(model.state_dict(), before)
    assert run.scaler.get_scale() < 2**16
    run.step(lambda network, batch: network(batch.hu).mean() / 100, [batch_of()], 1e-2, 1)
    assert not equal(model.state_dict(), before)
    with pytest.raises(stage.StageError, match="gradient"):
        for _ in range(40):
            run.step(overflow, [batch_of()], 1e-2, 2)


def test_pick_precision_of_fp16_on_the_cpu_is_refused():
    assert training.pick_precision("fp32", CPU) == torch.float32
    assert training.pick_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(stage.InputError, match="needs a GPU"):
        training.pick_precision("fp16", CPU)


def test_pick_compile_is_on_by_itself_on_a_gpu_only_and_refused_without_a_compiler(monkeypatch, tmp_path):
    cuda = torch.device("cuda")
    monkeypatch.setattr(training.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda _: object())
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(training.sysconfig, "get_path", lambda _: str(tmp_path))
    found = {
        name: [training.pick_compile(name, device) for device in (CPU, cuda)] for name in ("auto", "off")
    }
    assert found == {"auto": [False, True], "off": [False, False]}
    assert training.pick_compile("on", CPU)
    monkeypatch.setattr(training.shutil, "which", lambda _: None)
    assert not training.pick_compile("auto", cuda)
    with pytest.raises(stage.InputError, match=r"--compile on: needs a C\+\+ compiler"):
        training.pick_compile("on", CPU)


@pytest.mark.slow
def test_fit_compiled_learns_the_same(tmp_path):
    try:
        training.pick_compile("on", CPU)
    except stage.InputError as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    start = torch.nn.Conv2d(1, 1, 3, padding=1)
    seen = []
    start.register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    runs = [fit(tmp_path / str(on), epochs=1, compile=on, model=copy.deepcopy(start)) for on in (False, True)]
    assert set(seen) == {False, True}
    assert close(*(weights(run.paths.last) for run in runs))
    assert weights(runs[0].paths.last).keys() == weights(runs[1].paths.last).keys()


@pytest.mark.parametrize("name", ["cuda:99", "mps", "tpu", "cuda:x"])
def test_pick_device_refuses_what_is_not_there(name):
    with pytest.raises(stage.InputError, match=f"--device {name}"):
        training.pick_device(name)


# ---------------------------------------------------------------- going on after a stop

KINDS = {
    "plain": {},
    "averaged": {"ema": 0.9, "early_stopping": 9},
    "accumulated": {"accumulate": 2, "batch_size": 2, "optimizer": "adam", "schedule": "step"},
    "bf16": {"precision": torch.bfloat16},
}


@pytest.fixture
def hang_up_ends():
    """SIGHUP as in a terminal, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up_ends")
@pytest.mark.parametrize("kind", KINDS)
def test_fit_interrupted_anywhere_and_resumed_ends_with_the_same_weights(tmp_path, kind):
    whole = fit(tmp_path / "whole", **KINDS[kind])
    for stop in (2, 6, 11):
        count = 0

        def loss_fn(network, batch, stop=stop):
            nonlocal count
            count += 1
            if count == stop * KINDS[kind].get("accumulate", 1):
                signal.raise_signal(signal.SIGHUP if stop == 2 else signal.SIGINT)
            return mse(network, batch)

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            fit(folder, loss_fn=loss_fn, **KINDS[kind])
        resumed = fit(folder, resume=True, **KINDS[kind])
        assert equal(weights(resumed.paths.last), weights(whole.paths.last))
        assert equal(kept(resumed.paths.best), kept(whole.paths.best))
        one, two = log_of(whole.paths), log_of(resumed.paths)
        assert [line["train_loss"] for line in one] == [line["train_loss"] for line in two]


def test_fit_of_a_network_with_dropout_resumes_exactly(tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Dropout(), torch.nn.Conv2d(4, 1, 1)
        )

    def loss_fn(network, batch):
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        calls.append(batch.rows)
        return mse(network, batch)

    calls = [None] * 8
    whole = fit(tmp_path / "whole", model=make(), loss_fn=loss_fn)
    calls = []
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", model=make(), loss_fn=loss_fn)
    torch.manual_seed(99)
    resumed = fit(tmp_path / "cut", model=make(), resume=True)
    assert equal(weights(resumed.paths.last), weights(whole.paths.last))


def in_child(work):
    """Run work() in a process of its own; its exit code, or less the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_after(lines, folder, **changes):
    """Train, and die by kill -9 before the given line of ours is run. Returns how many lines were run."""
    ours = {module.__file__ for module in (training, runs, checkpoints, stage)}
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename not in ours:
            return None
        if event == "line":
            count += 1
            if count == lines:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        fit(folder, **changes)
    finally:
        sys.settrace(None)
    return count


def sha256_of(path, which):
    digest = hashlib.sha256()
    for key, value in sorted(weights(path, which).items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_fit_killed_at_any_line_and_resumed_ends_with_the_same_weights(tmp_path):
    changes = {"epochs": 2, "batch_size": 8, "ema": 0.9, "keep_every": 1, "csv": True}
    lines = killed_after(-1, tmp_path / "whole", **changes)
    expected = [sha256_of(tmp_path / "whole" / "net.last.pt", which) for which in ("model", "averaged")]
    best = kept(tmp_path / "whole" / "net.pt")
    begun = 0
    for place in range(1, lines, lines // 12):
        folder = tmp_path / str(place)
        assert in_child(lambda folder=folder, place=place: killed_after(place, folder, **changes)) == -9
        begun += (folder / "net.last.pt").exists()
        run = fit(folder, resume=True, **changes)
        assert [sha256_of(run.paths.last, which) for which in ("model", "averaged")] == expected
        assert equal(kept(run.paths.best), best)
        assert [line["epoch"] for line in log_of(run.paths)] == [1, 2]
        assert not list(folder.glob(".*.tmp.*"))
    assert begun > 8


class HalfWritten:
    """A file that a kill -9 meets in the middle of a write."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number", [1, 2, 4, 5])  # last, then best, card, and last again of the first epoch
def test_fit_killed_inside_a_write_and_resumed_ends_with_the_same_weights(tmp_path, number, monkeypatch):
    expected = fit(tmp_path / "whole", epochs=2)
    real, calls = stage.atomic_write, []

    @contextmanager
    def atomic_write(path, mode="w"):
        calls.append(path)
        with real(path, mode) as file:
            yield HalfWritten(file) if len(calls) == number else file

    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "atomic_write", atomic_write)
        assert in_child(lambda: fit(folder, epochs=2)) == -9
    assert len(list(folder.glob(".*.tmp.*"))) == 1
    run = fit(folder, epochs=2, resume=True)
    assert equal(weights(run.paths.last), weights(expected.paths.last))
    assert not list(folder.glob(".*.tmp.*"))


def test_fit_of_a_finished_run_trains_nothing_and_says_so(tmp_path, caplog):
    first = fit(tmp_path)
    before = first.paths.best.read_bytes()
    with caplog.at_level("INFO"):
        again = fit(tmp_path, resume=True, csv=True)
    assert again.best == first.best
    assert again.paths.best.read_bytes() == before
    assert "nothing to do" in caplog.text
    assert len(again.paths.csv.read_text().splitlines()) == 1 + 3


def test_fit_refuses_an_existing_run_unless_told(tmp_path):
    first = fit(tmp_path, epochs=1)
    with pytest.raises(stage.InputError, match="--resume"):
        fit(tmp_path, epochs=1)
    fit(tmp_path, epochs=1, overwrite=True)
    assert first.paths.best.exists()


def test_overwrite_deletes_all_of_the_old_run_and_nothing_of_another(tmp_path):
    fit(tmp_path, epochs=3, keep_every=1, csv=True)
    mine = [tmp_path / "net.samples", tmp_path / "net.tb"]
    others = [tmp_path / name for name in ("net.seed1.epoch1.pt", "net.seed1.csv", ".net.seed1.pt.tmp.7")]
    for path in mine:
        path.mkdir()
    for path in others:
        path.touch()
    fit(tmp_path, epochs=1, overwrite=True)
    assert not any(path.exists() for path in (*mine, tmp_path / "net.csv", *tmp_path.glob("net.epoch*")))
    assert all(path.exists() for path in others)


def test_fit_resumed_with_another_configuration_names_what_changed(tmp_path):
    fit(tmp_path, epochs=1, config={"lr": 0.1, "seed": 3})
    with pytest.raises(stage.InputError, match=r"lr 0\.1 -> 0\.2") as refused:
        fit(tmp_path, epochs=1, config={"lr": 0.2, "seed": 3}, resume=True)
    assert "seed" not in str(refused.value)


def config_of(*more):
    return training.run_config(train_denoiser.get_parser().parse_args(more))


@pytest.mark.parametrize(
    "option",
    [
        *("--optimizer adam", "--weight-decay 0.1", "--schedule step", "--warmup 0.2", "--clip-norm 2"),
        *("--accumulate 2", "--ema 0.9", "--early-stopping 3", "--compile on", "--precision fp32"),
        *("--batch_size 3", "--early_stopping 3", "--weight_decay 0.1", "--clip_norm 2"),
    ],
)
def test_an_option_that_changes_the_result_is_part_of_the_configuration(option):
    assert config_of(*option.split()) != config_of()


@pytest.mark.parametrize("option", ["--csv", "--tensorboard", "--samples", "--keep_every 2", "--seeds 1 2"])
def test_an_option_that_does_not_change_the_result_is_none(option):
    assert config_of(*option.split()) == config_of()


def test_second_run_on_the_same_output_is_refused(tmp_path):
    def loss_fn(model, batch):
        with pytest.raises(stage.StageError, match="in use") as refused:
            fit(tmp_path, resume=True)
        assert refused.value.exit_code == stage.EXIT_LOCKED
        return model(batch.hu).square().mean()

    fit(tmp_path, epochs=1, loss_fn=loss_fn)


def test_resume_without_its_state_does_not_replace_the_checkpoint(tmp_path):
    first = fit(tmp_path, epochs=1)
    first.paths.last.unlink()
    before = first.paths.best.read_bytes()
    with pytest.raises(stage.InputError, match="cannot go on"):
        fit(tmp_path, epochs=1, resume=True)
    assert first.paths.best.read_bytes() == before
    with pytest.raises(stage.InputError, match="choose one"):
        fit(tmp_path, epochs=1, resume=True, overwrite=True)


# ---------------------------------------------------------------- faults


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


def test_fit_stops_on_a_gradient_that_is_not_finite_before_it_spoils_the_weights(tmp_path):
    def loss_fn(network, batch):
        return network(batch.hu).square().mean().sqrt() * 0  # the slope of a root at 0 is infinite

    with pytest.raises(stage.StageError, match="gradient nan"):
        fit(tmp_path, loss_fn=lambda network, batch: loss_fn(lambda hu: network(hu) - network(hu), batch))
    assert not (tmp_path / "net.pt").exists()


def fail_of_memory():
    torch.empty(2**52)


def fail_of(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (fail_of_memory, "--accumulate"),
        (fail_of(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), "--accumulate"),
        (fail_of(MemoryError()), "--accumulate"),
        (fail_of(RuntimeError("CUDA error: unspecified launch failure\nmore")), "launch failure (--resume"),
    ],
)
def test_fit_out_of_memory_or_of_a_gpu_says_so_in_a_line_and_can_go_on(tmp_path, fail, words):
    calls = []

    def loss_fn(network, batch):
        calls.append(None)
        if len(calls) == 9:
            fail()
        return mse(network, batch)

    with pytest.raises(stage.StageError) as failed:
        fit(tmp_path, loss_fn=loss_fn)
    assert failed.value.exit_code == stage.EXIT_FAILED
    assert words in str(failed.value)
    assert "\n" not in str(failed.value)
    assert checkpoints.load(tmp_path / "net.last.pt", "resume")["state"]["epoch"] == 1
    resumed = fit(tmp_path, resume=True)
    assert equal(weights(resumed.paths.last), weights(fit(tmp_path / "whole").paths.last))


def test_fit_does_not_hide_a_fault_of_ours(tmp_path):
    with pytest.raises(RuntimeError, match="mat1|size"):
        fit(tmp_path, loss_fn=lambda network, batch: network(batch.hu[0, 0] @ batch.hu[0, :, :3]))


# ---------------------------------------------------------------- what a run tells


def grey_and_colour(model):
    level = int(next(model.parameters()).abs().sum()) % 200
    grey = np.full((4, 6), level, np.uint8)
    return {"dose_5": grey, "colour": np.stack([grey, grey + 1, grey + 2], axis=-1)}


def test_log_tells_speed_memory_and_the_time_that_is_left(tmp_path):
    lines = log_of(fit(tmp_path).paths)
    for line in lines:
        assert line["images_per_s"] > 0
        assert 0.05 < line["memory_gb"] < 100
        assert "gpu_memory_gb" not in line
    left = [line["seconds_left"] for line in lines]
    assert left[0] > 0
    assert left[-1] == 0


def test_csv_has_the_numbers_of_the_json_lines_after_a_resume_too(tmp_path):
    def loss_fn(network, batch):
        calls.append(None)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return mse(network, batch)

    calls = []
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, loss_fn=loss_fn, csv=True)
    run = fit(tmp_path, resume=True, csv=True)
    lines = log_of(run.paths)
    with run.paths.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == lines
    assert len(rows) == 3


def test_samples_are_written_after_every_epoch_as_they_are(tmp_path):
    run = fit(tmp_path, epochs=2, samples=True, pictures=grey_and_colour)
    names = sorted(path.name for path in run.paths.samples.iterdir())
    assert names == [f"epoch_00{k}_{key}.png" for k in (1, 2) for key in ("colour", "dose_5")]
    for name, picture in grey_and_colour(run.model).items():
        found = np.asarray(Image.open(run.paths.samples / f"epoch_002_{name}.png"))
        np.testing.assert_array_equal(found, picture)


def test_without_their_options_nothing_but_the_json_lines_is_written(tmp_path):
    fit(tmp_path, epochs=1, pictures=grey_and_colour)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"net.pt", "net.last.pt", "net.card.json", "net.jsonl", ".net.lock"}


def test_tensorboard_has_the_scalars_and_pictures_of_each_epoch_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = fit(tmp_path, tensorboard=True, pictures=grey_and_colour)
    lines = log_of(run.paths)
    # a run that was killed after it told of epoch 3 and before it saved it tells of it again
    again = runs.Report(run.paths, 2, 3, csv=False, tensorboard=True, samples=False)
    lines[2] = {**lines[2], "rmse": 7.0}
    again.write(lines[2], True, {})
    events = reader.EventAccumulator(str(run.paths.board))
    events.Reload()
    for name in ("train_loss", "rmse", "lr", "memory_gb"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(
            [line[name] for line in lines]
        )
    assert set(events.Tags()["images"]) == {"dose_5", "colour"}
    assert not run.paths.samples.exists()


def test_tensorboard_without_its_package_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda _: None)
    args = train_denoiser.get_parser().parse_args(["--tensorboard"])
    with pytest.raises(stage.InputError, match="pip install tensorboard"):
        training.pick_options(args, CPU)


def test_pick_options_takes_every_option_of_the_command_line():
    words = (
        "--epochs 7 --lr 0.5 --accumulate 3 --optimizer adam --weight-decay 0.1 --schedule step --warmup 0.2"
    )
    words += " --clip-norm 2 --ema 0.9 --early-stopping 4 --precision bf16 --compile off --keep-every 6"
    args = train_denoiser.get_parser().parse_args([*words.split(), "--csv", "--samples"])
    found = training.pick_options(args, CPU)
    expected = (7, 0.5, 3, "adam", 0.1, "step", 0.2, 2.0, 0.9, 4, torch.bfloat16, False, 6, True, False, True)
    assert tuple(found) == expected
    default = training.pick_options(train_denoiser.get_parser().parse_args([]), CPU)
    assert default == training.Options(50, 1e-3, precision=default.precision)
    with pytest.raises(stage.InputError, match="--ema 1"):
        training.pick_options(train_denoiser.get_parser().parse_args(["--ema", "1"]), CPU)


# ---------------------------------------------------------------- from the command line

TINY = ("--widths", 4, 8, "--precision", "fp32", "--device", "cpu", "--batch-size", 4)


def denoiser(data, out, *more):
    train_denoiser.main([str(word) for word in ("--data", data, "--out", out, *TINY, *more)])


def test_seeds_train_runs_that_differ_and_resume_does_only_what_is_missing(split_data, tmp_path):
    out = tmp_path / "out"
    denoiser(split_data, out, "--epochs", 1, "--seeds", 1, 2)
    one, two = (out / f"denoiser.seed{seed}.pt" for seed in (1, 2))
    assert not (out / "denoiser.pt").exists()
    assert checkpoints.load(one, "denoiser")["seed"] == 1
    assert not close(kept(one), kept(two))
    expected, before = kept(two), one.stat().st_mtime_ns
    for path in out.glob("denoiser.seed2.*"):
        path.unlink()
    denoiser(split_data, out, "--epochs", 1, "--seeds", 1, 2, "--resume")
    assert one.stat().st_mtime_ns == before
    assert equal(kept(two), expected)
    denoiser(split_data, tmp_path / "alone", "--epochs", 1, "--seed", 2)
    assert equal(kept(tmp_path / "alone" / "denoiser.pt"), expected)
    with pytest.raises(stage.InputError, match="--seeds 1 1: one is given twice"):
        denoiser(split_data, out, "--seeds", 1, 1)


def test_train_resumed_with_other_options_names_those_that_change_the_result(split_data, tmp_path):
    denoiser(split_data, tmp_path, "--epochs", 1)
    with pytest.raises(stage.InputError, match=r"ema 0\.0 -> 0\.9") as refused:
        denoiser(split_data, tmp_path, "--epochs", 1, "--resume", "--ema", 0.9, "--csv", "--keep-every", 1)
    assert "csv" not in str(refused.value)
    assert "keep" not in str(refused.value)


def test_train_denoiser_shows_low_dose_output_and_target_side_by_side(split_data, tmp_path):
    denoiser(split_data, tmp_path, "--epochs", 1, "--samples", "--doses", 1, 40)
    names = sorted(path.name for path in (tmp_path / "denoiser.samples").iterdir())
    assert names == ["epoch_001_dose_1.png", "epoch_001_dose_40.png"]
    errors = []
    for name in names:
        picture = np.asarray(Image.open(tmp_path / "denoiser.samples" / name)).astype(float)
        assert picture.shape == (48, 3 * 48)
        low, _, target = np.split(picture, 3, axis=1)
        errors.append(np.abs(low - target).mean())
    assert errors[0] > 2 * errors[1]


EPOCHS = 15  # more than a second: long enough to be killed in the middle
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
def test_train_killed_and_resumed_ends_with_the_same_weights(split_data, tmp_path):
    finish(train(split_data, tmp_path / "whole", "--epochs", EPOCHS))
    out = tmp_path / "cut"
    process = train(split_data, out, "--epochs", EPOCHS)
    while not (out / "denoiser.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoints.load(out / "denoiser.last.pt", "resume")["state"]["epoch"] < EPOCHS
    finish(train(split_data, out, "--epochs", EPOCHS, "--resume"))
    assert equal(*(weights(folder / "denoiser.last.pt") for folder in (out, tmp_path / "whole")))


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
def test_two_processes_train_the_same_networks_as_one(split_data, tmp_path):
    more = ("--epochs", 2, "--ema", 0.8, "--early-stopping", 5, "--seeds", 1, 2)
    denoiser(split_data, tmp_path / "one", *more, "--batch-size", 8)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    arguments = ["--data", split_data, "--out", tmp_path / "two", *TINY, *more, "--accumulate", 2]
    command = [str(part) for part in (*launch, ROOT / "train_denoiser.py", *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation RMSE") == 2  # the first process alone reports, once for each seed
    for seed in (1, 2):
        one, two = (tmp_path / name / f"denoiser.seed{seed}.last.pt" for name in ("one", "two"))
        for which in ("model", "averaged"):
            assert close(weights(one, which), weights(two, which))
        losses = [
            [json.loads(line)["train_loss"] for line in path.with_name(f"denoiser.seed{seed}.jsonl").open()]
            for path in (one, two)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
