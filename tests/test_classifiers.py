import functools
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import classifiers
from classifiers import CAM_STRIDES, SMALLEST_PX, fit_channels, pretrained
from dataset import BRAIN_WINDOW, THREE_WINDOWS, window_hu
from models import CLASSIFIERS, build_model
from stage import InputError

SHORT_RESNET = {"timm_kwargs": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}}
SHORT_CONVNEXT = {"timm_kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}}
TINY = {
    "resnet18": {"width": 4},
    "resnet50": SHORT_RESNET,
    "convnext-tiny": SHORT_CONVNEXT,
    "convnext-base": SHORT_CONVNEXT,
    "densenet121": {"timm_kwargs": {"block_config": [1, 1, 1, 1], "growth_rate": 16}},
    "efficientnet-b0": {},
    "efficientnet-b4": {},
    "resnext101": SHORT_RESNET,
    "seresnext50": SHORT_RESNET,
    "seresnext101": SHORT_RESNET,
}
THREE = {
    "windows": [list(window) for window in THREE_WINDOWS],
    "mean": list(classifiers.THREE_WINDOWS_MEAN),
    "sd": list(classifiers.THREE_WINDOWS_SD),
}
# Every network as the stages can ask for it, and one of each implementation in the forms of its input
FORMS = {name: (name, TINY[name]) for name in CLASSIFIERS}
FORMS |= {
    f"{name}-{form}": (name, TINY[name] | kwargs)
    for name in ("resnet18", "convnext-tiny")
    for form, kwargs in {"three": THREE, "2.5d": {"slices": 3}, "both": THREE | {"slices": 3}}.items()
}


@functools.cache
def network(form, classes=("a", "b", "c")):
    """A network in eval mode, away from its start: timm begins the last norm of each branch with 0."""
    torch.manual_seed(0)
    name, kwargs = FORMS[form]
    model = build_model(name, classes=list(classes), **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def fresh(form):
    """The same in training, with the statistics of batch norm that it was built with."""
    name, kwargs = FORMS[form]
    model = build_model(name, classes=["a", "b", "c"], **kwargs)
    model.load_state_dict(network(form).state_dict())
    return model.train()


def batch(model, *shape, count=2, spread=60.0):
    generator = torch.Generator().manual_seed(1)
    return 40 + spread * torch.randn(count, model.slices, *shape, generator=generator)


# ---------------------------------------------------------------- the contract of every classifier


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(SMALLEST_PX, SMALLEST_PX), (33, 47), (64, 96)])
def test_every_classifier_gives_one_finite_logit_per_class_for_any_size(form, shape):
    model = network(form)
    with torch.inference_mode():
        out = model(batch(model, *shape))
    assert out.shape == (2, 3)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_every_classifier_refuses_a_slice_too_small_for_one_feature_and_other_neighbours(form):
    model = network(form)
    small = batch(model, SMALLEST_PX - 1, 64)
    more = torch.zeros(2, model.slices + 1, 64, 64)
    for wrong in (small, more, more[0]):
        with pytest.raises(ValueError, match=f"must be \\(batch, {model.slices}, rows, columns"):
            model(wrong)


@pytest.mark.parametrize("form", FORMS)
def test_every_classifier_is_its_head_on_its_embedding_of_its_features(form):
    model = network(form)
    hu = batch(model, 64, 96)
    with torch.inference_mode():
        features, embedding = model.features(hu), model.embed(hu)
        assert features.shape[2:] == (2, 3)
        assert embedding.shape == (2, model.head.in_features)
        assert torch.equal(model.head(embedding), model(hu))
    assert isinstance(model.head, nn.Linear)
    assert model.head.out_features == 3


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_of_every_classifier_learns(form):
    model = fresh(form)
    model(batch(model, 64, 64)).square().mean().backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_every_classifier_repeats_itself_in_eval_and_treats_slices_apart(form):
    model = network(form)
    hu = batch(model, 64, 64, count=3)
    with torch.inference_mode():
        out = model(hu)
        assert torch.equal(out, model(hu))
        alone = torch.cat([model(one[None]) for one in hu])
    torch.testing.assert_close(out, alone, atol=1e-4, rtol=1e-3)  # kernels differ with the batch size


@pytest.mark.parametrize("form", FORMS)
def test_every_classifier_sees_its_own_windows_and_nothing_beyond(form):
    model = network(form)
    hu = batch(model, 40, 40, spread=200.0)
    lowest = min(center - width / 2 for center, width in model.windows)
    highest = max(center + width / 2 for center, width in model.windows)
    with torch.inference_mode():
        assert torch.equal(model(hu), model(hu.clamp(lowest, highest)))
        assert not torch.equal(model(hu), model(hu.clamp(lowest + 20, highest)))


@pytest.mark.parametrize("form", FORMS)
def test_every_classifier_shows_grad_cam_its_stages_from_fine_to_coarse(form):
    model, seen = fresh(form).eval().requires_grad_(False), {}

    def keep(stride):
        def hook(module, inputs, output):
            seen[stride] = output
            return output.requires_grad_() if output.is_leaf else output

        return hook

    assert tuple(model.cam_layers()) == CAM_STRIDES
    for stride, layer in model.cam_layers().items():
        layer.register_forward_hook(keep(stride))
    logits = model(batch(model, 96, 64))
    maps = [seen[stride] for stride in CAM_STRIDES]
    for stride, gradient in zip(CAM_STRIDES, torch.autograd.grad(logits[:, 1].sum(), maps), strict=True):
        assert gradient.shape[2:] == (96 // stride, 64 // stride)
        assert gradient.any()


@pytest.mark.parametrize("form", FORMS)
def test_every_classifier_comes_back_from_a_checkpoint(form, tmp_path):
    model = network(form)
    name, kwargs = FORMS[form]
    facts = json.loads(json.dumps({"name": name, "kwargs": kwargs | {"classes": ["a", "b", "c"]}}))
    content = {"format": checkpoints.FORMAT, "stage": "classifier", "model": facts}
    checkpoints.save(tmp_path / "c.pt", content | {"state": model.state_dict()})
    loaded, _ = checkpoints.load_network(tmp_path / "c.pt", "classifier")
    model.to(memory_format=torch.channels_last)  # as load_network leaves it
    hu = batch(model, 40, 40)
    with torch.inference_mode():
        assert torch.equal(loaded(hu), model(hu))
    for fact in ("classes", "windows", "slices", "channels"):
        assert getattr(loaded, fact) == getattr(model, fact)


# ---------------------------------------------------------------- windows, neighbours, normalisation


def test_a_classifier_sees_minus_1_to_1_over_the_brain_window_unless_told_otherwise():
    model = build_model("resnet18", width=4)
    hu = torch.tensor([-1000.0, 0, 20, 40, 80, 3000]).expand(1, 1, 32, 6).repeat(1, 1, 1, 6)
    wanted = torch.tensor([-1.0, -1, -0.5, 0, 1, 1]).expand(1, 1, 32, 6).repeat(1, 1, 1, 6)
    assert torch.equal(model.normalised(hu), wanted)
    assert model.windows == (BRAIN_WINDOW,)


def test_the_channels_are_the_windows_of_each_slice_in_turn():
    model = network("resnet18-both")
    hu = batch(model, 32, 32, spread=200.0)
    seen = model.normalised(hu)
    assert seen.shape == (2, 9, 32, 32)
    for place in range(3):
        for number, window in enumerate(THREE_WINDOWS):
            mean, sd = classifiers.THREE_WINDOWS_MEAN[number], classifiers.THREE_WINDOWS_SD[number]
            wanted = (window_hu(hu[:, place], *window) - mean) / sd
            torch.testing.assert_close(seen[:, 3 * place + number], wanted)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"slices": 2},
        {"slices": 0},
        {"windows": []},
        {"windows": [[40, 0]]},
        {"windows": [[40]]},
        {"mean": [0.1, 0.2]},
        {"windows": THREE["windows"], "sd": [0.1, 0.2]},
        {"sd": 0.0},
    ],
)
def test_what_no_classifier_can_see_is_refused(kwargs):
    with pytest.raises(ValueError, match=next(reversed(kwargs))):
        build_model("resnet18", width=4, **kwargs)


def test_dropout_hides_its_share_of_the_embedding_in_training_alone():
    torch.manual_seed(0)
    model = build_model("resnet18", width=4, dropout=0.5)
    hu = batch(model, 32, 32)
    model.train()
    assert not torch.equal(model(hu), model(hu))
    model.eval()
    assert torch.equal(model(hu), model.head(model.embed(hu)))
    assert build_model("resnet18", width=4).dropout.p == 0


def test_resnet18_computes_what_torchvisions_does_with_the_same_names_of_parameters():
    torchvision = pytest.importorskip("torchvision")
    oracle = torchvision.models.resnet18(num_classes=1)
    oracle.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    ours = build_model("resnet18", windows=[(0.0, 2.0)])  # sees (x - 0 + 1) / 2 * 2 - 1 = x
    ours.load_state_dict(oracle.state_dict())
    x = torch.rand(1, 1, 64, 64) * 2 - 1
    torch.testing.assert_close(ours.eval()(x), oracle.eval()(x))


# ---------------------------------------------------------------- timm

# in millions, one channel, without the head: of the published networks, less two of the first filters' three
# channels and the 1000 classes
MILLIONS = {
    "resnet50": 23.50,
    "convnext-tiny": 27.82,
    "convnext-base": 87.56,
    "densenet121": 6.95,
    "efficientnet-b0": 4.01,
    "efficientnet-b4": 17.55,
    "resnext101": 86.74,
    "seresnext50": 25.50,
    "seresnext101": 91.51,
}


@pytest.mark.parametrize("name", classifiers.TIMM_NETWORKS)
def test_every_network_of_timm_has_its_published_size(name):
    with torch.device("meta"):
        model = build_model(name)
    assert sum(value.numel() for value in model.net.parameters()) / 1e6 == pytest.approx(
        MILLIONS[name], abs=0.005
    )


@pytest.mark.parametrize("name", ["convnext-base", "resnext101"])
def test_the_largest_networks_take_a_step_that_lowers_their_loss(name):
    torch.manual_seed(0)
    model = build_model(name, **THREE)
    hu, targets = batch(model, 64, 64), torch.tensor([[0.0], [1.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(hu), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_without_timm_its_networks_are_refused_in_one_line_and_resnet18_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"^convnext-tiny: needs the package timm.*pip install timm\)$"):
        build_model("convnext-tiny")
    build_model("resnet18", width=4)


def test_a_network_that_timm_has_and_we_do_not_is_refused_by_name():
    with pytest.raises(ValueError, match="vgg19.*must be one of resnet50"):
        classifiers.TimmClassifier("vgg19")


# ---------------------------------------------------------------- weights to begin with

# by form: the network of RGB pictures that its weights come from
ORIGINALS = {
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", SHORT_RESNET["timm_kwargs"]),
    "convnext-tiny": ("convnext_tiny", SHORT_CONVNEXT["timm_kwargs"]),
    "densenet121": ("densenet121", TINY["densenet121"]["timm_kwargs"]),
    "efficientnet-b0": ("efficientnet_b0", {}),
}
RGB_TINY = TINY | {"resnet18": {"width": 64}}  # the only width of the public file


@functools.cache
def original(name):
    """A network for RGB pictures and 1000 classes, whose batch norms have seen some."""
    torch.manual_seed(0)
    kind, kwargs = ORIGINALS[name]
    if name == "resnet18":
        model = pytest.importorskip("torchvision").models.resnet18()
    else:
        model = pytest.importorskip("timm").create_model(kind, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def weights_of(name, path, change=lambda state: state):
    """Its file of weights, changed."""
    torch.save(change(dict(original(name).state_dict())), path)
    return path


def embedding_of(name, picture):
    """Of a picture in RGB: what the last layer of the original sees."""
    seen = []
    model = original(name)
    head = model.fc if name == "resnet18" else model.get_classifier()
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(picture)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize(("windows", "slices"), [(1, 1), (1, 3), (3, 1), (3, 3), (1, 5)])
def test_with_weights_of_rgb_pictures_a_grey_picture_is_seen_as_before(name, windows, slices, tmp_path):
    model = build_model(name, windows=[[0.0, 2.0]] * windows, slices=slices, **RGB_TINY[name])
    pretrained(model, weights_of(name, tmp_path / "w.pth"))
    generator = torch.Generator().manual_seed(2)
    grey = torch.rand(2, 1, 64, 64, generator=generator) * 2 - 1  # a window of -1..1: normalised to itself
    with torch.inference_mode():
        ours = model.eval().embed(grey.expand(-1, slices, -1, -1))
        theirs = embedding_of(name, grey.expand(-1, 3, -1, -1))
    # sums in another order, through up to 80 layers
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_weights_for_three_colours_are_the_same_for_three_windows():
    weight = torch.randn(5, 3, 7, 7)
    assert torch.equal(fit_channels(weight, 3), weight)
    assert torch.equal(fit_channels(weight, 1), weight.sum(1, keepdim=True))
    assert torch.equal(fit_channels(weight, 6)[:, 3:], weight / 2)
    assert fit_channels(weight, 5).shape == (5, 5, 7, 7)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("with_head", [True, False])
def test_the_head_stays_as_it_is_whether_the_file_has_one_or_not(name, with_head, tmp_path):
    model = build_model(name, classes=["a", "b"], **RGB_TINY[name])
    before = {key: value.clone() for key, value in model.head.state_dict().items()}
    path = weights_of(name, tmp_path / "w.pth", lambda state: state if with_head else headless(state))
    pretrained(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.head.state_dict().items())
    assert torch.equal(model.backbone.bn1.weight, original(name).bn1.weight)


def headless(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def safetensors_file(state, path):
    pytest.importorskip("safetensors.torch").save_file(state, path)


WRAPPINGS = {
    "w.safetensors": safetensors_file,
    "state_dict.pth": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model.pt": lambda state, path: torch.save({"model": state}, path),
    "ddp.pth": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "both.pth": lambda state, path: torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}}, path
    ),
    "old.pth": lambda state, path: torch.save(
        {k: v for k, v in state.items() if "num_batches" not in k}, path
    ),
}


@pytest.mark.parametrize("file", WRAPPINGS)
def test_weights_load_out_of_the_wrappers_in_common_use(file, tmp_path):
    WRAPPINGS[file](dict(original("resnet50").state_dict()), tmp_path / file)
    model = build_model("resnet50", **RGB_TINY["resnet50"])
    pretrained(model, tmp_path / file)
    own, theirs = model.net.state_dict(), original("resnet50").state_dict()
    equal = [
        torch.equal(own[key], theirs[key])
        for key in own
        if "num_batches" not in key and key != "conv1.weight"
    ]
    assert len(equal) > 50
    assert all(equal)


def without_two(state):
    return {key: value for key, value in state.items() if key not in ("bn1.weight", "layer1.0.conv1.weight")}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_two, "2 weights do not fit, bn1.weight, layer1.0.conv1.weight"),
        (lambda state: state | {"ema.decay": torch.ones(1)}, "1 weights do not fit, ema.decay"),
        (lambda state: state | {"fc2.weight": torch.ones(2, 2)}, "1 weights do not fit, fc2.weight"),
        (lambda state: state | {"bn1.bias": torch.ones(3)}, "1 weights do not fit, bn1.bias"),
        (
            lambda state: state | {"conv1.weight": torch.ones(64, 3, 3, 3)},
            "1 weights do not fit, conv1.weight",
        ),
        (lambda state: state | {"conv1.weight": torch.ones(64)}, "1 weights do not fit, conv1.weight"),
        (lambda state: {f"net.{key}": value for key, value in state.items()}, r"\.\.\. \(another network"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_none_is_loaded(name, change, words, tmp_path):
    model = build_model(name, **RGB_TINY[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"w.pth: .*{words}"):
        pretrained(model, weights_of(name, tmp_path / "w.pth", change))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("width", [32, 128])
def test_the_public_weights_fit_no_resnet18_of_another_width(width, tmp_path):
    with pytest.raises(InputError, match="weights do not fit, conv1.weight, bn1.weight, bn1.bias"):
        pretrained(build_model("resnet18", width=width), weights_of("resnet18", tmp_path / "w.pth"))


@pytest.mark.parametrize("file", ["none.pth", "text.pth", "text.safetensors", "numbers.pth"])
def test_a_file_without_weights_is_refused_in_one_line(file, tmp_path):
    if file.startswith("text"):
        (tmp_path / file).write_text("no weights")
    if file.startswith("numbers"):
        torch.save({"state_dict": {"lr": 1.0}}, tmp_path / file)
    with pytest.raises(InputError, match=rf"{file}: .*weights") as caught:
        pretrained(build_model("resnet18", width=4), tmp_path / file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "convnext-tiny"])
def test_without_a_connection_pretrained_names_the_way_with_a_file_in_one_line(name, monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = (
        r"^(resnet18|convnext_tiny)\.\w+: its weights cannot be downloaded, .*\(give a file with --weights\)$"
    )
    with pytest.raises(InputError, match=words):
        pretrained(build_model(name, **TINY[name]))


def test_weights_without_a_file_are_timms_own_of_the_tag_in_the_table(monkeypatch):
    import timm

    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return original("efficientnet-b0")

    model = build_model("efficientnet-b0")
    monkeypatch.setattr(timm, "create_model", create)
    pretrained(model)
    assert asked == [("efficientnet_b0.ra_in1k", True)]
    assert torch.equal(model.net.bn1.running_mean, original("efficientnet-b0").bn1.running_mean)


@pytest.mark.parametrize("name", classifiers.TIMM_NETWORKS.values())
def test_every_name_of_weights_is_one_that_timm_can_download(name):
    config = pytest.importorskip("timm.models").get_pretrained_cfg(name, allow_unregistered=False)
    assert config.tag == name.partition(".")[2]
    assert config.hf_hub_id or config.url
    assert config.input_size[0] == 3


# ---------------------------------------------------------------- what a network has to beat


def test_statistics_are_mean_sd_and_median_inside_the_head():
    model = build_model("statistics", windows=[[40, 80]], mean=0, sd=1)
    hu = torch.full((2, 1, 5, 7), -1000.0)
    hu[0, 0, 1, :5] = torch.tensor([8.0, 16.0, 24.0, 40.0, 72.0])  # 0.1, 0.2, 0.3, 0.5, 0.9 of the window
    found = model.embed(hu)
    values = np.array([0.1, 0.2, 0.3, 0.5, 0.9])
    np.testing.assert_allclose(found[0], [values.mean(), values.std(), 0.3], rtol=1e-5)
    np.testing.assert_allclose(found[1], 0, atol=1e-5)  # a slice without a head


def test_statistics_have_a_row_for_each_window_and_neighbour():
    model = build_model("statistics", classes=["a", "b"], windows=[[40, 80], [80, 200]], slices=3)
    hu = torch.randn(4, 3, 33, 35) * 50 + 40
    assert model.embed(hu).shape == (4, 18)
    assert model(hu).shape == (4, 2)
    assert not torch.equal(model(hu), model(hu.flip(1)))


def test_statistics_learn_what_logistic_regression_learns():
    torch.manual_seed(0)
    model = build_model("statistics", windows=[[40, 80]])
    level = torch.rand(64) * 40
    hu = level[:, None, None, None] + 5 * torch.randn(64, 1, 16, 16)
    targets = (level > 20).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(hu)[:, 0], targets).backward()
        optimizer.step()
    called = model.eval()(hu)[:, 0] > 0
    assert (called == (targets == 1)).float().mean() > 0.95
