import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import explain
from display import radiological, to_grey
from explain import METHODS, grad_cam, scan_grad_cam
from models import SEQUENCE_MODELS, build_model
from sequences import Reading
from stage import InputError
from tests import test_sequences
from tests.test_classifiers import FORMS, network

# Layers by what they do with the place of their positions: (layers, stride, centre of the first in pixels)
GRIDS = {
    "padded": ([(3, 2, 1)] * 3, 8, 0.0),
    "patches": ([(8, 8, 0)], 8, 3.5),
    "patches of patches": ([(4, 4, 0), (2, 2, 0)], 8, 3.5),
    "unpadded": ([(3, 2, 0)] * 3, 8, 7.0),
    "averages behind": ([(7, 2, 3), (3, 2, 1), (2, 2, 0)], 8, 2.0),
    "too much padding": ([(1, 4, 1)], 4, -1.0),
    "no stride": ([(3, 1, 1)], 1, 0.0),
}


class Slices(nn.Module):
    """A network whose heat is known: convolutions, a mean over the positions, a linear layer."""

    slices = 1

    def __init__(self, convolutions, head, classes=("a", "b"), offset_hu=0.0, behind=None):
        super().__init__()
        self.classes, self.offset_hu = classes, offset_hu
        self.convolutions, self.behind = convolutions, behind or nn.Identity()
        self.head = nn.Linear(*reversed(head.shape))
        self.head.weight.data, self.head.bias.data = head.clone(), torch.arange(1.0, len(head) + 1)

    def cam_layers(self):
        strides = [layer.stride[0] for layer in self.convolutions if isinstance(layer, nn.Conv2d)]
        return {int(np.prod(strides)): self.convolutions}

    def forward(self, hu):
        return self.head(self.behind(self.convolutions(hu - self.offset_hu)).mean((2, 3)))


def convolutions(layers):
    """Positive weights, so that no part of a receptive field cancels another."""
    found = [nn.Conv2d(1, 1, kernel, stride, padding, bias=False) for kernel, stride, padding in layers]
    for layer in found:
        nn.init.constant_(layer.weight, 1 / layer.kernel_size[0] ** 2)
    return nn.Sequential(*found)


def above_and_below():
    """Channel 0 is max(0, hu - 40), channel 1 max(0, 40 - hu); class a sees the first, b the second."""
    signs = nn.Conv2d(1, 2, 1, bias=False)
    signs.weight.data = torch.tensor([1.0, -1.0])[:, None, None, None]
    return Slices(nn.Sequential(signs, nn.ReLU()), torch.tensor([[2.0, -1.0], [-0.5, 3.0]]), offset_hu=40.0)


class MeanOfSlices(nn.Module):
    """The simplest network for scans: its logits are the means over the slices of those of its CNN."""

    def __init__(self, cnn, detach=False):
        super().__init__()
        self.cnn, self.classes, self.slices, self.detach = cnn, cnn.classes, cnn.slices, detach

    def forward(self, hu, mask, slices_at_once=None):
        with torch.no_grad():  # as around a frozen part
            logits = torch.cat([self.cnn(some) for some in hu[mask].split(slices_at_once)])[None]
        if self.detach:
            logits = logits.detach()
        return Reading(logits.mean(dim=1), logits)


def noise(*shape, seed=0):
    return 40 + 30 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trace(model):
    """All that asking a model for heat could change in it."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    return hooks, modes, gradients, wanted


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(33, 47), (64, 64)])
def test_heat_of_a_linear_head_is_the_weighted_map_in_logits(method, shape):
    hu = noise(3, 1, *shape)
    above, below = (hu - 40).relu()[:, 0], (40 - hu).relu()[:, 0]
    for name, expected in (("a", 2 * above - below), ("b", 3 * below - 0.5 * above)):
        heat = grad_cam(above_and_below(), hu, name, stride=1, method=method, score="logit")
        assert heat.dtype == np.float32
        np.testing.assert_allclose(heat, expected.relu(), rtol=1e-4, atol=1e-3)  # sums of float32 over a map


def test_mean_heat_is_the_logit_less_its_bias_where_all_of_it_is_positive():
    model, hu = above_and_below(), 40 + noise(2, 1, 33, 40).abs()
    heat = grad_cam(model, hu, "a", stride=1, score="logit")
    np.testing.assert_allclose(heat.mean((1, 2)), (model(hu)[:, 0] - 1).detach(), rtol=1e-4)


def test_heat_doubles_when_the_head_doubles():
    model, hu = network("resnet18"), noise(2, 1, 49, 64)
    heat = grad_cam(model, hu, "b", score="logit")
    doubled = copy.deepcopy(model)
    doubled.head.weight.mul_(2)
    assert heat.max() > 0
    np.testing.assert_allclose(grad_cam(doubled, hu, "b", score="logit"), 2 * heat, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bias", [-4.0, 0.0, 4.0, 40.0])
def test_heat_of_evidence_is_that_of_the_logit_times_the_probability(bias):
    model, hu = copy.deepcopy(network("resnet18")), noise(2, 1, 49, 64)
    model.head.bias.data[1] += bias
    with torch.no_grad():
        probability = model(hu)[:, 1].sigmoid()[:, None, None].numpy()
    of_logit = grad_cam(model, hu, "b", score="logit")
    assert of_logit.any()
    np.testing.assert_allclose(
        grad_cam(model, hu, "b"), of_logit * probability, rtol=1e-4, atol=1e-6 * of_logit.max()
    )


def test_heat_of_evidence_is_dark_where_the_network_rules_the_class_out():
    model, hu = above_and_below(), noise(1, 1, 40, 40)
    model.head.bias.data[0] -= 60
    assert grad_cam(model, hu, "a", stride=1, score="logit").max() > 100
    assert grad_cam(model, hu, "a", stride=1).max() < 1e-6


@pytest.mark.parametrize("score", explain.SCORES)
def test_heat_of_a_scan_is_asked_of_the_score_of_the_scan(score):
    model, hu = test_sequences.network("cnn-bilstm"), noise(3, 1, 40, 47)
    with torch.no_grad():
        probability = model(hu[None], torch.ones(1, 3, dtype=torch.bool)).scan[0, 0].sigmoid().item()
    factor = {"logit": 1, "evidence": probability}[score]
    of_logit = scan_grad_cam(model, hu, "a", stride=4, score="logit")
    heat = scan_grad_cam(model, hu, "a", stride=4, score=score)
    np.testing.assert_allclose(heat, factor * of_logit, rtol=1e-4, atol=1e-6 * of_logit.max())


def test_heat_is_of_the_map_as_it_was_before_the_network_changed_it_in_place():
    layer = nn.Conv2d(1, 1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    model = Slices(nn.Sequential(layer), torch.full((1, 1), -2.0), ("a",), 40.0, nn.ReLU6(inplace=True))
    hu = 40 + torch.linspace(-10, 20, 33 * 40).view(1, 1, 33, 40)
    passed = ((hu > 40) & (hu < 46)).float()
    heat = grad_cam(model, hu, "a", stride=1, score="logit")[
        0
    ]  # of the negative values, though ReLU6 hides them
    np.testing.assert_allclose(heat, (-2 * passed.mean() * (hu - 40)).relu()[0, 0], rtol=1e-3, atol=1e-4)
    assert not grad_cam(model, hu, "a", stride=1, method="hires-cam").any()  # it asks what had an effect


def test_heat_of_one_slice_does_not_depend_on_how_hot_another_is():
    model, hu = above_and_below(), noise(2, 1, 40, 40)
    alone = grad_cam(model, hu[:1], "a", stride=1)
    hu[1] *= 100
    np.testing.assert_allclose(grad_cam(model, hu, "a", stride=1)[:1], alone, rtol=1e-6)


def test_a_constant_slice_stays_dark_where_a_spot_glows():
    edges = nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate", bias=False)
    edges.weight.data = torch.full((1, 1, 3, 3), -1.0)
    edges.weight.data[..., 1, 1] = 8
    model = Slices(nn.Sequential(edges), torch.ones(1, 1), ("a",))
    hu = torch.full((2, 1, 40, 40), 35.0)
    hu[1, 0, 20, 10] = 60
    heat = grad_cam(model, hu, "a", stride=1, score="logit")
    assert heat[0].max() == 0
    assert np.unravel_index(heat[1].argmax(), (40, 40)) == (20, 10)
    assert heat[1].max() == pytest.approx(8 * 25)


# ---------------------------------------------------------------- where the heat lies


@pytest.mark.parametrize("name", GRIDS)
def test_the_first_centre_is_the_middle_of_what_the_position_sees(name):
    layers, stride, expected = GRIDS[name]
    model = Slices(convolutions(layers), torch.ones(1, 1), ("a",))
    assert explain.first_centre_px(model, stride) == expected
    hu = torch.zeros(1, 1, 96, 96, requires_grad=True)
    model.convolutions(hu)[0, 0, 5, 4].backward()
    rows, columns = hu.grad[0, 0].nonzero(as_tuple=True)
    assert (rows.min() + rows.max()) / 2 == expected + 5 * stride
    assert (columns.min() + columns.max()) / 2 == expected + 4 * stride


def test_the_first_centres_of_known_networks():
    for name, expected in (("resnet18", 0), ("densenet121", 2), ("convnext-tiny", 3.5), ("seresnext50", 0)):
        assert explain.first_centre_px(network(name), 8) == expected


@pytest.mark.parametrize("name", ["padded", "unpadded", "averages behind", "too much padding"])
def test_heat_of_a_spot_peaks_on_the_spot_and_only_if_aligned(name):
    layers, stride, first = GRIDS[name]
    model = Slices(convolutions(layers), torch.ones(1, 1), ("a",))
    place = (int(first + 5 * stride), int(first + 3 * stride))
    hu = torch.zeros(1, 1, 91, 77)
    hu[0, 0, place[0], place[1]] = 1000
    heat = grad_cam(model, hu, "a", stride=stride)[0]
    assert np.unravel_index(heat.argmax(), heat.shape) == place
    stretched = grad_cam(model, hu, "a", stride=stride, aligned=False)[0]
    assert np.unravel_index(stretched.argmax(), heat.shape) != place


def test_alignment_makes_no_difference_where_patches_fill_the_slice():
    model, hu = network("convnext-tiny"), noise(2, 1, 64, 96)
    heat = grad_cam(model, hu, "a")
    assert heat.max() > 0
    np.testing.assert_allclose(heat, grad_cam(model, hu, "a", aligned=False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_every_classifier_has_finite_heat_of_any_size_at_every_stride(form):
    model = network(form)
    hu = noise(2, model.slices, 65, 71)
    for stride in model.cam_layers():
        heat = grad_cam(model, hu, "a", stride=stride)
        assert heat.shape == (2, 65, 71)
        assert np.isfinite(heat).all() and heat.min() >= 0
    finest = [grad_cam(model, hu, name, stride=4) for name in model.classes]
    assert any(heat.any() for heat in finest)
    assert not np.array_equal(finest[0], finest[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("shape", [(64, 64), (65, 83)])
def test_heat_equals_pytorch_grad_cam_after_its_normalisation(method, stride, shape):
    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = copy.deepcopy(network("resnet18")).requires_grad_(True)
    model.head.weight.data *= 100  # far above the 1e-7 that the library adds to what it divides by
    hu = noise(3, 1, *shape)
    oracle = {"grad-cam": library.GradCAM, "hires-cam": library.HiResCAM}[method]
    bright = 0
    for number, name in enumerate(model.classes):
        with oracle(model, [model.cam_layers()[stride]]) as cam:
            expected = cam(hu, [targets.ClassifierOutputTarget(number)] * len(hu))
        heat = grad_cam(model, hu, name, stride=stride, method=method, score="logit", aligned=False)
        heat = heat - heat.min((1, 2), keepdims=True)
        found = heat / np.maximum(heat.max((1, 2), keepdims=True), 1e-12)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        bright += found.max() > 0
    assert bright


def test_a_classifier_behind_a_denoiser_has_heat_in_the_slices_own_pixels():
    torch.manual_seed(0)
    classifier = {"name": "resnet18", "kwargs": {"width": 4, "classes": ["a", "b"]}}
    denoiser = {"name": "unet", "kwargs": {"widths": [4, 8]}}
    model, hu = build_model("joint", denoiser=denoiser, classifier=classifier).eval(), noise(2, 1, 65, 71)
    with torch.no_grad():
        image = model.denoiser(hu)
    heats = [grad_cam(model, hu, name, stride=4) for name in "ab"]
    assert np.maximum(*heats).any()
    for name, heat in zip("ab", heats, strict=True):
        np.testing.assert_allclose(heat, grad_cam(model.classifier, image, name, stride=4), rtol=1e-5)


# ---------------------------------------------------------------- how it is asked


def test_a_class_is_asked_by_name_or_number():
    model, hu = network("resnet18"), noise(1, 1, 40, 40)
    np.testing.assert_array_equal(grad_cam(model, hu, "b"), grad_cam(model, hu, 1))


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_heat_does_not_depend_on_the_batch(batch_size):
    model, hu = network("resnet18"), noise(5, 1, 40, 47)
    whole = grad_cam(model, hu, "a", batch_size=5)
    np.testing.assert_allclose(grad_cam(model, hu, "a", batch_size=batch_size), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_class": "c"}, "class 'c': must be one of a, b, or its number"),
        ({"target_class": 2}, "class 2: must be one of a, b, or its number"),
        ({"target_class": -1}, "class -1: must be one of a, b, or its number"),
        ({"stride": 8}, "stride 8: must be one of 1"),
        ({"method": "cam"}, "method 'cam': must be one of grad-cam, hires-cam"),
        ({"score": "p"}, "score 'p': must be one of evidence, logit"),
    ],
)
def test_what_is_not_there_is_refused_with_the_choices(wrong, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        grad_cam(above_and_below(), noise(1, 1, 40, 40), **{"target_class": "a", "stride": 1} | wrong)


def test_heat_is_the_same_frozen_or_not_in_training_inference_mode_or_autocast():
    model = copy.deepcopy(network("resnet18"))
    model.dropout.p = 0.5
    hu = noise(3, 1, 40, 47)
    frozen = grad_cam(model, hu, "a")
    model.requires_grad_(True).train()
    np.testing.assert_array_equal(grad_cam(model, hu, "a"), frozen)
    with torch.inference_mode():
        np.testing.assert_array_equal(grad_cam(model, hu.clone(), "a"), frozen)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(grad_cam(model, hu, "a"), frozen)
    with torch.no_grad():
        np.testing.assert_array_equal(grad_cam(model, hu, "a"), frozen)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_is_even_when_it_fails(fails):
    model = copy.deepcopy(network("resnet18")).requires_grad_(True).train()
    model.layer1.eval().requires_grad_(False)  # partly frozen, as in a fine-tuning
    before, weights = trace(model), {key: value.clone() for key, value in model.state_dict().items()}
    hu = noise(2, 1, 40, 40)
    if fails:
        with pytest.raises(ValueError, match="32 rows"):
            grad_cam(model, hu[..., :20], "a")
    else:
        grad_cam(model, hu, "a")
    assert trace(model) == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])


# ---------------------------------------------------------------- scans


def test_heat_of_a_mean_over_slices_is_that_of_each_slice_divided_by_their_number():
    cnn, hu = above_and_below(), noise(5, 1, 40, 47)
    heat = scan_grad_cam(MeanOfSlices(cnn), hu, "a", stride=1, score="logit", batch_size=2)
    np.testing.assert_allclose(
        heat, grad_cam(cnn, hu, "a", stride=1, score="logit") / 5, rtol=1e-4, atol=1e-4
    )


def test_a_network_that_detaches_its_slices_is_named_and_not_dark():
    with pytest.raises(ValueError, match="detaches"):
        scan_grad_cam(MeanOfSlices(above_and_below(), detach=True), noise(2, 1, 40, 40), "a", stride=1)


@pytest.mark.parametrize("form", test_sequences.FORMS)
@pytest.mark.parametrize("slices", [1, 4])
def test_every_network_for_scans_has_heat_in_every_slice(form, slices):
    model = test_sequences.network(form)
    before = trace(model)
    hu = noise(slices, model.slices, 65, 71)
    finest = [scan_grad_cam(model, hu, name, stride=4) for name in model.classes]
    for heat in finest:
        assert heat.shape == (slices, 65, 71)
        assert np.isfinite(heat).all() and heat.min() >= 0
    assert np.maximum(*finest).any((1, 2)).all()
    assert not np.array_equal(*finest)
    assert trace(model) == before
    parts = scan_grad_cam(model, hu, "a", stride=4, batch_size=3)
    np.testing.assert_allclose(parts, finest[0], rtol=1e-3, atol=1e-5 * max(1, finest[0].max()))


def test_what_the_bilstm_makes_of_a_slice_comes_from_the_others_too():
    model = test_sequences.network("two-stage")
    hu = noise(4, 1, 40, 47)
    heat = np.maximum(*(scan_grad_cam(model, hu, name, of_slice=1, stride=4) for name in model.classes))
    assert heat.any((1, 2)).all()


def test_heat_of_a_slices_own_head_is_the_cnns_and_nowhere_else():
    model = test_sequences.network("cnn-bilstm")
    hu = noise(4, 1, 40, 47)
    heat = scan_grad_cam(model, hu, "b", of_slice=2, stride=4)
    own = grad_cam(model.cnn, hu[2:3], "b", stride=4)[0]
    assert own.max() > 0
    np.testing.assert_allclose(heat[2], own, rtol=1e-4, atol=1e-5 * own.max())
    assert not heat[[0, 1, 3]].any()
    with pytest.raises(InputError, match=r"slice 4: must be in 0 \.\. 3"):
        scan_grad_cam(model, hu, "b", of_slice=4)


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_cudnn_is_as_it_was_after_a_scan(name):
    before = torch.backends.cudnn.enabled
    scan_grad_cam(test_sequences.network(name), noise(2, 1, 40, 40), "a")
    assert torch.backends.cudnn.enabled == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_heat_on_a_gpu_is_that_of_the_cpu(name):
    model, hu = test_sequences.network(name), noise(3, 1, 64, 64)
    expected = scan_grad_cam(model, hu, "a"), grad_cam(model.cnn, hu, "a")
    model.cuda()
    for found, heat in zip(
        (scan_grad_cam(model, hu, "a"), grad_cam(model.cnn, hu, "a")), expected, strict=True
    ):
        np.testing.assert_allclose(found, heat, rtol=1e-2, atol=1e-2 * heat.max())  # TF32 in convolutions


# ---------------------------------------------------------------- scores


def test_uniform_heat_scores_the_share_of_the_mask():
    mask = np.zeros((20, 30), bool)
    mask[3:9, 5:15] = True
    assert explain.energy_in_mask(np.ones((20, 30)), mask) == pytest.approx(0.1)
    assert explain.pointing_game(np.ones((20, 30)), mask) == pytest.approx(0.1)


def test_energy_is_the_share_of_the_heat_inside():
    heat, mask = np.zeros((9, 7)), np.zeros((9, 7), np.uint8)
    mask[2, 3] = 255
    heat[2, 3], heat[8, 0] = 3, 1
    assert explain.energy_in_mask(heat, mask) == 0.75


def test_pointing_counts_the_maximum_within_the_tolerance():
    heat, mask = np.zeros((20, 20)), np.zeros((20, 20), np.uint8)
    mask[5:10, 5:10] = 2
    heat[7, 7], heat[13, 12] = 1, 2  # the second lies (4, 3) from the corner (9, 9)
    assert [explain.pointing_game(heat, mask, tolerance) for tolerance in (0, 4.9, 5)] == [0, 0, 1]
    heat[7, 7] = 3
    assert explain.pointing_game(heat, mask) == 1


def test_without_lesion_or_heat_there_is_no_score():
    heat, mask = np.ones((5, 5)), np.ones((5, 5), bool)
    assert np.isnan(explain.energy_in_mask(heat, ~mask))
    assert np.isnan(explain.pointing_game(heat, ~mask))
    assert np.isnan(explain.energy_in_mask(0 * heat, mask))
    assert explain.pointing_game(0 * heat, mask) == 0


def matched_filter(seed=3):
    """A pattern of 9 x 9 hidden in noise, and a network that looks for it: slices, masks, network."""
    rng = np.random.default_rng(seed)
    pattern = rng.normal(size=(9, 9))
    pattern /= np.sqrt(np.square(pattern).sum())
    hu, masks = rng.normal(size=(12, 1, 64, 64)), np.zeros((12, 64, 64), bool)
    for slice_hu, mask, (row, column) in zip(hu, masks, rng.integers(0, 55, (12, 2)), strict=True):
        mask[row : row + 9, column : column + 9] = True
        slice_hu[0, mask] += 7 * pattern.ravel()  # the noise of 4096 places reaches 4
    search = nn.Conv2d(1, 1, 9, padding=4, bias=False)
    search.weight.data = torch.from_numpy(pattern).float()[None, None]
    return torch.from_numpy(hu).float(), masks, Slices(nn.Sequential(search), torch.ones(1, 1), ("a",))


def pointing(model, hu, masks):
    heats = grad_cam(model, hu, "a", stride=1)
    return np.mean([explain.pointing_game(heat, mask) for heat, mask in zip(heats, masks, strict=True)])


def test_what_was_learnt_points_and_random_weights_point_at_chance():
    hu, masks, model = matched_filter()
    assert pointing(model, hu, masks) == 1
    chance = masks.mean()  # 2 %
    found = np.mean([pointing(explain.randomised(model, seed), hu, masks) for seed in range(20)])
    assert found < chance + 0.2  # a random filter of 81 weights holds a ninth of the pattern, give or take


def test_heat_of_random_weights_is_another():
    hu, _, model = matched_filter()
    heat = grad_cam(model, hu, "a", stride=1)[0]
    ranks = []
    for seed in range(10):
        other = grad_cam(explain.randomised(model, seed), hu, "a", stride=1)[0]
        ranks.append(explain.change(heat, other).rank_correlation)
    assert np.nanmean(np.abs(ranks)) < 0.2


@pytest.mark.parametrize("form", ["resnet18", "convnext-tiny"])
def test_randomised_draws_every_layer_anew_by_its_seed_and_leaves_the_rest_alone(form):
    model = network(form)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again, other = (explain.randomised(model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for (key, value), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, same)
        assert not torch.equal(value, weights[key]), key
        assert value.ndim < 2 or not torch.equal(value, different)
        assert not value.requires_grad
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])


def blob(row, column, height=1.0):
    rows, columns = np.mgrid[:60, :50]
    return height * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 18)


def test_change_of_the_same_of_twice_and_of_shifted_heat():
    heat = blob(25, 20)
    assert explain.change(heat, heat) == pytest.approx((1, 1, 0, 1))
    assert explain.change(heat, 2 * heat) == pytest.approx((1, 1, 0, 2))
    shifted = explain.change(heat, blob(28, 24))
    assert shifted.shift_px == pytest.approx(5, abs=1e-3)
    assert shifted.ratio == pytest.approx(1, abs=1e-3)
    assert 0 < shifted.correlation < 1


def test_change_to_or_from_darkness_has_no_centre():
    heat, dark = blob(25, 20), np.zeros((60, 50))
    assert np.isnan(explain.change(dark, heat)).all()
    to_dark = explain.change(heat, dark)
    assert to_dark.ratio == 0
    assert np.isnan(to_dark[:3]).all()


# ---------------------------------------------------------------- pictures


def test_overlay_without_heat_or_opacity_is_the_slice_in_grey():
    hu, heat = np.linspace(-20, 100, 33 * 47).reshape(33, 47), blob(10, 10, 50)[:33, :47]
    grey = np.repeat(to_grey(hu, 40, 80)[..., None], 3, axis=2)
    np.testing.assert_array_equal(explain.overlay(hu, 0 * heat[:, :1]), grey)
    np.testing.assert_array_equal(explain.overlay(hu, np.full((33, 47), 99.0), opacity=0), grey)
    assert not np.array_equal(explain.overlay(hu, np.full((33, 47), 99.0)), grey)


def test_overlay_keeps_one_scale_for_all_slices():
    hu, heat = np.full((4, 4), 30.0), np.arange(16.0).reshape(4, 4)
    alone = explain.overlay(hu, heat, full_heat=20)
    hot = explain.overlay(np.hstack([hu, hu]), np.hstack([heat, 10 * heat]), full_heat=20)
    np.testing.assert_array_equal(hot[:, :4], alone)
    full = explain.overlay(hu, np.full((4, 4), 20.0), full_heat=20)
    np.testing.assert_array_equal(full, explain.overlay(hu, np.full((4, 4), 500.0), full_heat=20))


def test_colours_grow_lighter_with_heat():
    lightness = explain.heat_rgb(np.linspace(0, 1, 50)) @ [0.2126, 0.7152, 0.0722]  # Rec. 709
    assert (np.diff(lightness) > 0).all()
    assert lightness[0] < 0.01 and lightness[-1] > 0.9


@pytest.mark.parametrize("wrong", [{"opacity": 1.5}, {"opacity": -0.1}, {"full_heat": 0}])
def test_overlay_refuses_what_makes_no_picture(wrong):
    with pytest.raises(InputError, match="must be"):
        explain.overlay(np.zeros((4, 4)), np.zeros((4, 4)), **wrong)


@pytest.mark.parametrize("turn", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_a_written_overlay_is_radiological_and_square(tmp_path, turn):
    hu, heat, affine = np.zeros((60, 50)), blob(12, 9, 100), np.diag([*turn, 1, 1])
    path = explain.write_overlay(tmp_path / "new" / "a.png", hu, heat, affine, "stroke", full_heat=10)
    picture = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"), float)
    assert picture.shape == (512, 512, 3)
    colour = np.ptp(picture, axis=2)
    colour[460:] = 0  # the scale
    rows, columns = np.mgrid[:512, :512]
    expected = np.zeros((60, 60))
    expected[:, 5:55] = radiological(heat, affine)
    found = [(colour * axis).sum() / colour.sum() / 512 * 60 for axis in (rows, columns)]
    wanted = [(expected * axis).sum() / expected.sum() for axis in np.mgrid[:60, :60]]
    assert found == pytest.approx(wanted, abs=1.5)


def test_a_written_overlay_outlines_the_lesions_and_names_the_scale(tmp_path):
    hu, heat, lesions = np.zeros((64, 64)), np.zeros((64, 64)), np.zeros((64, 64), np.uint8)
    lesions[20:30, 20:30] = 2
    plain, outlined, other = (
        explain.write_overlay(tmp_path / f"{number}.png", hu, heat, np.eye(4), "a", **kwargs).read_bytes()
        for number, kwargs in enumerate(({}, {"lesions": lesions}, {"full_heat": 5.0}))
    )
    picture = np.asarray(Image.open(io.BytesIO(outlined)).convert("RGB"))
    assert (picture[160, 150:160] == (240, 80, 60)).all(axis=1).any()  # at the lesion's left edge
    assert plain != outlined and plain != other


def test_interpolation_of_a_stretched_map_is_torchs():
    layers, stride, _ = GRIDS["patches"]
    model = Slices(convolutions(layers), torch.ones(1, 1), ("a",))
    hu = noise(2, 1, 64, 40)
    expected = F.interpolate(F.avg_pool2d(hu, 8).relu(), (64, 40), mode="bilinear")[:, 0]
    np.testing.assert_allclose(grad_cam(model, hu, "a", stride=stride), expected, rtol=1e-4, atol=1e-3)


def test_grad_cam_of_what_has_no_feature_maps_is_refused():
    with pytest.raises(InputError, match="StatisticsClassifier: has no feature maps"):
        grad_cam(build_model("statistics").eval(), torch.zeros(1, 1, 32, 32), "stroke")
