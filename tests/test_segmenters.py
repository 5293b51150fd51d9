"""The contract of every segmenter, what they begin with, and what `segment` makes of their answers."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import classifiers
import inference
import losses
import stage
from anatomy import LESION_CLASSES
from classifiers import TIMM_NETWORKS, WINDOWS, pretrained
from inference import lesion_mask, lesion_probabilities, load_segmenter, segment
from models import DENOISERS, SEGMENTERS, build_model
from segmenters import CLASSES, LESION_SHARE

SHORT_RESNET = {"timm_kwargs": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}}
SHORT_CONVNEXT = {"timm_kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}}
ENCODERS = {
    "resnet50": SHORT_RESNET,
    "convnext-tiny": SHORT_CONVNEXT,
    "densenet121": {"timm_kwargs": {"block_config": [1, 1, 1, 1], "growth_rate": 16}},
    "efficientnet-b0": {},
    "seresnext50": SHORT_RESNET,
}
TINY = {"unet": {"widths": [4, 8, 16]}, "timm-unet": {"encoder": "efficientnet-b0"}}
MORE = {
    "lesions": {"classes": list(LESION_CLASSES)},
    "three": WINDOWS["three"],
    "2.5d": {"slices": 3},
}
# Every network, each in the forms of its input and output, and every kind of encoder
FORMS = {name: (name, TINY[name]) for name in SEGMENTERS}
FORMS |= {
    f"{name}-{form}": (name, TINY[name] | kwargs) for name in SEGMENTERS for form, kwargs in MORE.items()
}
FORMS |= {encoder: ("timm-unet", {"encoder": encoder} | kwargs) for encoder, kwargs in ENCODERS.items()}


def build(form):
    torch.manual_seed(0)
    name, kwargs = FORMS[form]
    return build_model(name, kind="segmenter", **kwargs)


@functools.cache
def network(form):
    """A network in eval mode, away from its start: timm begins the last norm of each branch with 0."""
    model = build(form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def batch(model, *shape, count=2, spread=60.0):
    generator = torch.Generator().manual_seed(1)
    return 40 + spread * torch.randn(count, model.slices, *shape, generator=generator)


# ---------------------------------------------------------------- the contract of every segmenter


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 47), (64, 32)])
def test_every_segmenter_gives_finite_logits_of_every_pixel_for_any_size(form, shape):
    model = network(form)
    with torch.inference_mode():
        out = model(batch(model, *shape))
    assert out.shape == (2, 7 if len(model.classes) == 6 else 1, *shape)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_every_segmenter_refuses_other_neighbours(form):
    model = network(form)
    more = torch.zeros(2, model.slices + 1, 32, 32)
    for wrong in (more, more[0]):
        with pytest.raises(ValueError, match=f"must be \\(batch, {model.slices}, rows, columns"):
            model(wrong)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_of_every_segmenter_learns(form):
    model = build(form)
    model.load_state_dict(network(form).state_dict())
    model.train()(batch(model, 64, 64)).square().mean().backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_every_segmenter_repeats_itself_in_eval_and_treats_slices_apart(form):
    model = network(form)
    hu = batch(model, 32, 32, count=3)
    with torch.inference_mode():
        out = model(hu)
        assert torch.equal(out, model(hu))
        alone = torch.cat([model(one[None]) for one in hu])
    torch.testing.assert_close(out, alone, atol=1e-4, rtol=1e-3)  # kernels differ with the batch size


@pytest.mark.parametrize("form", FORMS)
def test_every_segmenter_sees_its_own_windows_and_nothing_beyond(form):
    model = network(form)
    hu = batch(model, 40, 40, spread=200.0)
    lowest = min(center - width / 2 for center, width in model.windows)
    highest = max(center + width / 2 for center, width in model.windows)
    with torch.inference_mode():
        assert torch.equal(model(hu), model(hu.clamp(lowest, highest)))
        assert not torch.equal(model(hu), model(hu.clamp(lowest + 20, highest)))


@pytest.mark.parametrize("form", FORMS)
def test_every_segmenter_begins_with_the_share_of_lesion_that_it_believes(form):
    model = build(form)
    nn.init.zeros_(model.head.weight)
    with torch.inference_mode():
        logits = model.eval()(batch(model, 32, 32))
    found = logits.sigmoid() if len(model.classes) == 1 else logits.softmax(1)[:, 1:].sum(1)
    torch.testing.assert_close(found, torch.full_like(found, LESION_SHARE))


@pytest.mark.parametrize("form", FORMS)
def test_every_segmenter_comes_back_from_a_checkpoint(form, tmp_path):
    model = network(form)
    name, kwargs = FORMS[form]
    facts = json.loads(json.dumps({"name": name, "kwargs": kwargs}))
    content = {"format": checkpoints.FORMAT, "stage": "segmenter", "model": facts}
    checkpoints.save(tmp_path / "s.pt", content | {"state": model.state_dict()})
    loaded, _ = load_segmenter(tmp_path / "s.pt")
    model.to(memory_format=torch.channels_last)  # as load_network leaves it
    hu = batch(model, 40, 40)
    with torch.inference_mode():
        assert torch.equal(loaded(hu), model(hu))
    for fact in ("classes", "windows", "slices", "channels"):
        assert getattr(loaded, fact) == getattr(model, fact)


def test_a_segmenter_and_a_denoiser_of_one_name_are_told_apart_by_their_kind():
    assert set(SEGMENTERS) & set(DENOISERS)
    assert isinstance(build_model("unet", kind="segmenter"), SEGMENTERS["unet"])
    assert isinstance(build_model("unet"), DENOISERS["unet"])
    with pytest.raises(ValueError, match="model 'nafnet': must be one of unet, timm-unet"):
        build_model("nafnet", kind="segmenter")


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize(
    "kwargs", [{"slices": 2}, {"windows": [[40, 0]]}, {"classes": ["stroke"]}, {"classes": ["a", "b"]}]
)
def test_what_no_segmenter_can_be_is_refused(name, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        build_model(name, kind="segmenter", **TINY[name] | kwargs)


def test_an_encoder_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match="encoder 'vgg': must be one of resnet50, "):
        build_model("timm-unet", kind="segmenter", encoder="vgg")


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("loss", losses.SEGMENTATION_LOSSES)
@pytest.mark.parametrize("classes", CLASSES)
def test_a_segmenter_learns_a_planted_bright_blob_in_a_few_steps(loss, classes):
    rng = np.random.default_rng(0)
    hu = torch.from_numpy(rng.normal(30, 4, (12, 1, 24, 24)).astype(np.float32))
    mask = torch.zeros(12, 1, 24, 24, dtype=torch.uint8)
    for number in range(8):  # the other four have none
        top, left = rng.integers(2, 14, 2)
        place = (number, 0, slice(top, top + 8), slice(left, left + 8))
        hu[place] += 35
        mask[place] = 3
    torch.manual_seed(0)
    model = build_model("unet", kind="segmenter", widths=[8, 16], classes=list(CLASSES[classes]))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        losses.SEGMENTATION_LOSSES[loss](model(hu), mask).backward()
        optimizer.step()
    found = segment(model.eval(), hu[:, 0].numpy(), threshold=0.5)
    wanted = np.minimum(mask[:, 0].numpy(), 1 if classes == "binary" else 3)
    assert not found[8:].any()
    agree = (found == wanted) & (wanted > 0)
    assert 2 * agree.sum() / ((found > 0).sum() + (wanted > 0).sum()) > 0.9


# ---------------------------------------------------------------- weights to begin with


@pytest.mark.parametrize("encoder", ENCODERS)
def test_pretrained_encoder_takes_a_file_of_timms_names_but_for_head_and_unused_parts(encoder, tmp_path):
    kwargs = {"encoder": encoder, "slices": 3} | ENCODERS[encoder]
    timm = classifiers.timm_package(encoder)
    own = kwargs.get("timm_kwargs", {})
    whole = timm.create_model(TIMM_NETWORKS[encoder], num_classes=5, **own)
    state = {
        key: torch.randn_like(value) if value.is_floating_point() else value
        for key, value in whole.state_dict().items()
    }
    torch.save(state, tmp_path / "w.pth")
    model = build_model("timm-unet", kind="segmenter", **kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pretrained(model, tmp_path / "w.pth")
    for key, value in model.net.state_dict().items():
        if key != f"{model.first_conv}.weight":
            assert torch.equal(value, state[key]), key
    for key, value in model.state_dict().items():
        if not key.startswith("net."):
            assert torch.equal(value, before[key]), key


def test_pretrained_encoder_refuses_the_file_of_another_network(tmp_path):
    model = build_model("timm-unet", kind="segmenter", **FORMS["resnet50"][1])
    torch.save({"conv1.weight": torch.zeros(16, 3, 7, 7)}, tmp_path / "w.pth")
    with pytest.raises(stage.InputError, match=r"w\.pth: \d+ weights do not fit"):
        pretrained(model, tmp_path / "w.pth")


# ---------------------------------------------------------------- segment


class Planted(nn.Module):
    """Says what the middle slice holds: logits = HU, and of class k those of HU = k hundred."""

    def __init__(self, slices=1, outputs=1):
        super().__init__()
        self.slices, self.outputs, self.anchor = slices, outputs, nn.Parameter(torch.zeros(1))

    def forward(self, hu):
        middle = hu[:, self.slices // 2 : self.slices // 2 + 1]
        if self.outputs == 1:
            return middle + self.anchor
        return 50 * (1 - (middle / 100 - torch.arange(self.outputs)[:, None, None]).abs())


def test_segment_of_one_class_is_1_from_the_threshold_on():
    volume = np.array([[[-1.0, 0.0, 1.0]]], np.float32)
    assert segment(Planted(), volume).tolist() == [[[0, 1, 1]]]
    assert segment(Planted(), volume, threshold=0.6).tolist() == [[[0, 0, 1]]]
    assert segment(Planted(), volume, threshold=0.2).tolist() == [[[1, 1, 1]]]
    assert segment(Planted(), volume).dtype == np.uint8


def test_segment_of_classes_gives_the_values_of_a_mask():
    volume = np.arange(7, dtype=np.float32).reshape(1, 1, 7) * 100
    assert segment(Planted(outputs=7), volume).ravel().tolist() == list(range(7))


def test_lesion_mask_asks_for_any_lesion_and_then_for_the_likeliest():
    found = np.array([0.3, 0.3, 0.05]).reshape(1, 3, 1, 1)
    assert lesion_mask(found + [[[[0]], [[0.01]], [[0]]]], 0.5).item() == 2
    assert lesion_mask(found, 0.7).item() == 0


def test_segment_works_in_batches_and_with_neighbours_of_the_same_series(monkeypatch):
    class Last(Planted):
        def forward(self, hu):
            return hu[:, -1:] - 0.5 + self.anchor

    volume = np.zeros((5, 4, 4), np.float32)
    volume[2], volume[4] = 1, 1
    series_of = np.array([0, 0, 1, 1, 1])
    found = segment(Last(slices=3), volume, series_of)
    assert found.any((1, 2)).tolist() == [False, False, False, True, True]
    monkeypatch.setitem(inference.PIXELS_AT_ONCE, "cpu", 32)
    parts = list(lesion_probabilities(Last(slices=3), volume, series_of))
    assert [(some.start, some.stop) for some, _ in parts] == [(0, 2), (2, 4), (4, 5)]
    whole = np.concatenate([part for _, part in parts])
    np.testing.assert_array_equal(lesion_mask(whole), found)
    assert whole.shape == (5, 1, 4, 4)
    assert whole[4, 0, 0, 0] == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_segment_takes_one_slice_of_odd_size():
    model = network("unet-2.5d")
    volume = np.random.default_rng(0).normal(40, 20, (1, 37, 51)).astype(np.int16)
    found = segment(model, volume, threshold=0.01)
    assert found.shape == (1, 37, 51)
    assert set(np.unique(found)) <= {0, 1}
