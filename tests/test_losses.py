import math
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

import anatomy
import losses
import phantom
from autoencoders import Encoded
from losses import (
    LESION_WEIGHT,
    LOSSES,
    SEGMENTATION_LOSSES,
    AnatomyAwareLoss,
    masked_bce_loss,
    rmse_loss,
)
from stage import InputError


def images(*shape, seed=0, spread=50.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * spread + 40


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_near_zero_for_the_target_and_has_a_finite_gradient_there(name):
    target = torch.randn(2, 1, 9, 11) * 50
    output = target.clone().requires_grad_()
    loss = LOSSES[name](output, target, torch.zeros_like(target, dtype=torch.uint8))
    loss.backward()
    assert loss.item() < 2e-3
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_scalar_that_grows_with_the_error_and_falls_along_its_gradient(name):
    target, mask = images(2, 1, 32, 24), torch.zeros(2, 1, 32, 24)
    noise = images(2, 1, 32, 24, seed=1) - 40
    output = (target + noise).requires_grad_()
    loss = LOSSES[name](output, target, mask)
    assert loss.shape == ()
    assert LOSSES[name](target + 2 * noise, target, mask) > loss
    loss.backward()
    assert output.grad.isfinite().all()
    step = 0.1 * noise.norm() / output.grad.norm()
    assert LOSSES[name](output - step * output.grad, target, mask) < loss


def test_rmse_loss_weighs_a_noisy_slice_by_its_rms_not_its_square():
    target = torch.zeros(2, 1, 10, 10)
    output = torch.stack([torch.full((1, 10, 10), 3.0), torch.full((1, 10, 10), 30.0)])
    assert rmse_loss(output, target, None).item() == pytest.approx(16.5, abs=1e-4)


def test_lesion_mse_adds_ten_times_the_error_inside_the_mask():
    target, output = torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)
    mask = torch.zeros(1, 1, 10, 10, dtype=torch.uint8)
    mask[..., :2, :5], output[..., :2, :5] = 3, 2.0
    loss = LOSSES["lesion-mse"](output, target, mask)
    assert loss.item() == pytest.approx(4 * 10 / 100 + LESION_WEIGHT * 4)


def test_lesion_mse_without_lesion_is_mse_and_without_masks_an_error():
    target, output = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2.0)
    assert LOSSES["lesion-mse"](output, target, torch.zeros(1, 1, 4, 4)).item() == pytest.approx(4)
    with pytest.raises(ValueError, match="no lesion masks"):
        LOSSES["lesion-mse"](output, target, None)


def test_l1_and_charbonnier_of_a_constant_error_are_its_size():
    target = images(1, 1, 8, 8)
    assert LOSSES["l1"](target - 3, target, None).item() == pytest.approx(3, abs=1e-4)
    wanted = math.sqrt(9 + losses.CHARBONNIER_HU**2) - losses.CHARBONNIER_HU
    assert LOSSES["charbonnier"](target - 3, target, None).item() == pytest.approx(wanted, abs=1e-4)


def test_l1_ssim_of_two_flat_images_is_that_of_the_formula():
    target, output = torch.full((1, 1, 20, 30), 0.0), torch.full((1, 1, 20, 30), 200.0)
    luminance = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    for alpha in (0.5, 0.2):
        found = losses.reconstruction_loss(output, target, None, alpha=alpha).item()
        assert found == pytest.approx(0.2 + alpha * (1 - luminance), abs=1e-4)


def test_reconstruction_loss_is_over_its_window_and_of_the_error_that_it_is_given():
    target, output = torch.full((1, 1, 20, 30), 0.0), torch.full((1, 1, 20, 30), 20.0)
    window = (50.0, 100.0)
    luminance = (2 * 0 * 0.2 + 1e-4) / (0**2 + 0.2**2 + 1e-4)
    found = losses.reconstruction_loss(output, target, None, window=window).item()
    assert found == pytest.approx(0.4 + 0.5 * (1 - luminance), abs=1e-4)
    mask = torch.zeros(1, 1, 20, 30)
    for error in (losses.rmse_loss, losses.lesion_mse_loss):
        mask[..., :4] = 1
        found = losses.reconstruction_loss(output, target, mask, error=error, alpha=0.0, window=window).item()
        assert found == pytest.approx(error(output, target, mask).item() / 50, rel=1e-5)


# ---------------------------------------------------------------- anatomy in the loss


def test_tissue_weighted_loss_is_the_weighted_rms():
    target = torch.zeros(1, 1, 2, 4)
    tissues = torch.tensor([anatomy.TISSUES[name] for name in ("air", "bone", "csf", "brain")] * 2)
    tissues = tissues.view(1, 1, 2, 4).to(torch.uint8)
    errors = torch.tensor([100.0, 20.0, 3.0, 5.0]).repeat(2).view(1, 1, 2, 4)
    weights = {"air": 0.0, "skin": 9.0, "bone": 0.5, "csf": 1.0, "brain": 2.0}
    wanted = math.sqrt((0.5 * 400 + 9 + 2 * 25) / 3.5)
    found = losses.tissue_weighted_loss(errors, target, None, tissues, weights)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    lesion = torch.zeros(1, 1, 2, 4, dtype=torch.uint8)
    lesion[..., 3] = 4  # the brain's column
    heavy = 2 * LESION_WEIGHT
    wanted = math.sqrt((0.5 * 400 + 9 + heavy * 25) / (1.5 + heavy))
    found = losses.tissue_weighted_loss(errors, target, lesion, tissues, weights)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_tissue_weighted_loss_counts_brain_more_than_bone_and_air():
    target = torch.full((1, 1, 24, 72), -1000.0)
    target[..., 24:48], target[..., 48:] = 30, 900

    def loss_of_error_in(columns):
        output = target.clone()
        output[..., 8:16, columns] += 10
        return LOSSES["tissue-weighted"](output, target, None).item()

    air, brain, bone = (loss_of_error_in(slice(start, start + 8)) for start in (8, 32, 56))
    assert brain > 1.9 * bone > 1.9 * 1.9 * air


def test_tissue_bias_adds_the_mean_errors_of_brain_csf_and_each_kind_of_lesion():
    target = torch.full((2, 1, 24, 72), -1000.0)  # air, CSF, brain
    target[..., 24:48], target[..., 48:] = 6, 36
    mask = torch.zeros(2, 1, 24, 72, dtype=torch.uint8)
    mask[0, :, :12, 60:] = 5
    output = target.clone()
    output[..., :16] += 500  # air may be as it likes
    csf, brain, lesion = (mask == 0) & (target == 6), (mask == 0) & (target == 36), mask == 5
    output[csf] += 3
    output[lesion] -= 8
    output += torch.where(torch.arange(24)[:, None] % 2 == 0, 2, -2)  # an error whose mean is 0
    wanted = 0.0
    for index in range(2):
        for place, error in ((csf, 3), (brain, 0), (lesion, 8)):
            pixels = int(place[index].sum())
            wanted += error * pixels / (pixels + losses.SHRINK_PX) / 2
    # one column on each side of a step has a mean of its own class in 3 x 3 pixels
    assert losses.tissue_bias(output, target, mask).item() == pytest.approx(wanted, rel=0.05)
    assert losses.tissue_bias(target, target, mask).item() == 0
    no_mask = losses.tissue_bias(output, target, None).item()
    assert 0 < no_mask < losses.tissue_bias(output, target, mask).item()


def test_tissues_by_hu_name_the_tissues_of_a_noisy_slice():
    levels = {"air": -1000, "skin": -100, "csf": 6, "brain": 36, "bone": 700}
    hu = torch.tensor(list(levels.values())).float().repeat_interleave(12).expand(1, 1, 20, 60)
    found = losses.tissues_by_hu(hu + 4 * torch.randn(hu.shape, generator=torch.Generator().manual_seed(0)))
    for place, name in enumerate(levels):
        inner = found[0, 0, 2:-2, 12 * place + 2 : 12 * place + 10]
        assert (inner == anatomy.TISSUES[name]).float().mean() > 0.98, name


def test_tissue_map_is_that_of_anatomy_and_tissues_by_hu_agree_with_it_in_the_brain():
    scan = phantom.generate_phantom(5, size=160, slices=3, noise_hu=0.0, lesions=[])
    hu = torch.from_numpy(scan.truth).float()[:, None]
    found = losses.tissue_map(hu, scan.spacing_mm[1])
    wanted = np.concatenate(
        [anatomy.tissue_classes(image[None], (1.0, *scan.spacing_mm[1:])) for image in scan.truth]
    )
    assert np.array_equal(found[:, 0].numpy(), wanted)
    inside = torch.isin(found, torch.tensor([anatomy.TISSUES["brain"], anatomy.TISSUES["csf"]]))
    by_hu = losses.tissues_by_hu(hu)
    assert inside.float().mean() > 0.1
    assert torch.isin(by_hu[inside], torch.tensor([2, 3])).float().mean() > 0.95
    weights = losses.TISSUE_WEIGHTS
    assert weights["brain"] == weights["csf"] == max(weights.values())


# ---------------------------------------------------------------- structural similarity


def unit_images(*shape, seed):
    return images(*shape, seed=seed, spread=0.2) - 39.5


def test_ssim_map_is_that_of_scikit_image_away_from_the_border():
    target = unit_images(1, 1, 40, 52, seed=0)
    output = 0.5 * target + 0.3 * unit_images(1, 1, 40, 52, seed=1)
    _, wanted = structural_similarity(
        output[0, 0].double().numpy(),
        target[0, 0].double().numpy(),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    found = losses.ssim_maps(output, target)[0][0, 0].numpy()
    np.testing.assert_allclose(found[5:-5, 5:-5], wanted[5:-5, 5:-5], atol=1e-4)


def test_ssim_and_ms_ssim_of_a_multiple_are_those_of_the_formula_where_the_constants_vanish():
    target = 1e3 * unit_images(2, 1, 96, 80, seed=0)
    exponents = losses.MS_SSIM_WEIGHTS[:3]  # of the contrast; the luminance has the last one only
    for factor in (0.5, 0.8):
        part = 2 * factor / (1 + factor**2)  # contrast and luminance alike
        wanted = part ** (1 + exponents[-1] / sum(exponents))
        assert losses.ssim(factor * target, target).item() == pytest.approx(part**2, abs=1e-3)
        assert losses.ms_ssim(factor * target, target).item() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("side", [8, 11, 40, 130])
def test_ms_ssim_of_flat_images_is_the_luminance_of_its_coarsest_scale(side):
    output, target = torch.full((1, 1, side, side), 0.2), torch.full((1, 1, side, side), 0.7)
    exponents = losses.MS_SSIM_WEIGHTS[: {8: 1, 11: 1, 40: 2, 130: 4}[side]]
    luminance = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    wanted = luminance ** (exponents[-1] / sum(exponents))
    assert losses.ms_ssim(output, target).item() == pytest.approx(wanted, abs=1e-4)


def test_ms_ssim_of_opposite_images_is_almost_0_with_a_finite_gradient():
    target = unit_images(2, 1, 64, 64, seed=0)
    output = (1 - target).requires_grad_()
    found = losses.ms_ssim(output, target)
    found.backward()
    assert 0 < found < 0.3
    assert output.grad.isfinite().all()


def test_structural_similarity_is_the_same_under_autocast():
    target, output = unit_images(1, 1, 64, 64, seed=0), unit_images(1, 1, 64, 64, seed=1)
    wanted = losses.ssim(output, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.ssim(output, target), wanted)


# ---------------------------------------------------------------- terms of the anatomy-aware system


def test_gradient_loss_of_a_ramp_is_its_slope():
    ramp = 3 * torch.arange(12.0).expand(1, 1, 9, 12)
    # along columns 3 everywhere, along rows 0: the mean of both is half
    assert losses.gradient_loss(ramp, torch.zeros_like(ramp)).item() == pytest.approx(1.5)
    assert losses.gradient_loss(ramp + 7, ramp).item() == pytest.approx(0, abs=1e-6)


def test_distillation_loss_is_the_sum_over_maps_and_teaches_one_way():
    student = [torch.full((1, 2, 4, 4), 3.0, requires_grad=True) for _ in range(2)]
    teacher = [torch.full((1, 2, 4, 4), value, requires_grad=True) for value in (1.0, 2.0)]
    loss = losses.distillation_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(4 + 1)
    assert all(feature.grad is not None for feature in student)
    assert all(feature.grad is None for feature in teacher)


class Doubler(nn.Module):
    """A perceptual network of which everything is known: the slice twice and four times."""

    def forward(self, hu):
        return [2 * losses.scaled(hu), 4 * losses.scaled(hu)]


def test_perceptual_loss_is_the_sum_over_maps():
    target = images(1, 1, 4, 4)
    found = losses.perceptual_loss(Doubler(), target + 200, target).item()
    assert found == pytest.approx(0.2**2 + 0.4**2, rel=1e-4)


def student_and_teacher():
    target = images(2, 1, 32, 32)
    latent, features = images(2, 3, 4, 4), [images(2, 2, 8, 8, seed=i) for i in range(4)]
    student = Encoded(target + 200, latent + 2, [feature + 3 for feature in features])
    return student, (latent, features), target


def test_anatomy_aware_loss_is_the_weighted_sum_of_its_terms():
    student, teacher, target = student_and_teacher()
    loss = AnatomyAwareLoss(Doubler())
    found = {name: term.item() for name, term in loss.terms(student, teacher, target).items()}
    flat = losses.reconstruction_loss(student.output, target, None).item()
    wanted = {
        "latent": 4,
        "reconstruction": flat,
        "gradient": 0,
        "ms_ssim": 1 - losses.ms_ssim(losses.scaled(student.output), losses.scaled(target)).item(),
        "perceptual": 0.2,
        "features": 4 * 9,
    }
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    total = 4 + flat + 0.1 * (wanted["gradient"] + wanted["ms_ssim"] + wanted["perceptual"]) + 36
    assert loss(student, teacher, target).item() == pytest.approx(total, rel=1e-5)


def test_anatomy_aware_loss_is_over_the_window_of_its_networks_and_of_the_error_that_it_is_given():
    student, teacher, target = student_and_teacher()
    student = student._replace(output=target + images(2, 1, 32, 32, seed=9))
    wide, narrow = (AnatomyAwareLoss(g1=0, window=window) for window in ((0, 2000), (0, 200)))
    wide, narrow = (loss.terms(student, teacher, target) for loss in (wide, narrow))
    assert narrow["gradient"].item() == pytest.approx(10 * wide["gradient"].item(), rel=1e-4)
    assert narrow["ms_ssim"] > wide["ms_ssim"]
    assert narrow["latent"] == wide["latent"]
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, :8] = 1
    loss = AnatomyAwareLoss(g1=0, error=losses.tissue_weighted_loss, alpha=0)
    found = loss.terms(student, teacher, target, mask)["reconstruction"].item()
    assert found == pytest.approx(losses.tissue_weighted_loss(student.output, target, mask).item() / 1000)
    assert found != loss.terms(student, teacher, target)["reconstruction"].item()


@pytest.mark.parametrize(
    ("argument", "term"),
    [
        ("lam_lat", "latent"),
        ("lam_rec", "reconstruction"),
        ("b1", "gradient"),
        ("b2", "ms_ssim"),
        ("g1", "perceptual"),
        ("w_d", "features"),
    ],
)
def test_every_weight_of_the_anatomy_aware_loss_scales_its_own_term(argument, term):
    student, teacher, target = student_and_teacher()
    student = student._replace(output=student.output + images(2, 1, 32, 32, seed=9))
    none = dict.fromkeys(("lam_lat", "lam_rec", "b1", "b2", "g1", "w_d"), 0.0)
    alone = AnatomyAwareLoss(Doubler(), **none | {argument: 3.0})
    value = AnatomyAwareLoss(Doubler()).terms(student, teacher, target)[term]
    assert set(alone.terms(student, teacher, target)) == {term}
    assert alone(student, teacher, target).item() == pytest.approx(3 * value.item())
    assert value > 0


def test_anatomy_aware_loss_without_a_perceptual_network_is_refused_unless_its_weight_is_0():
    with pytest.raises(ValueError, match="perceptual"):
        AnatomyAwareLoss()
    student, teacher, target = student_and_teacher()
    assert AnatomyAwareLoss(g1=0)(student, teacher, target).isfinite()
    with pytest.raises(ValueError, match="all weights are 0"):
        AnatomyAwareLoss(lam_lat=0, lam_rec=0, b1=0, b2=0, g1=0, w_d=0)


# ---------------------------------------------------------------- perceptual networks


@pytest.fixture(scope="module")
def public_files(tmp_path_factory):
    """Files as the public ones are keyed, with random weights."""
    from torchvision.models import resnet50, vgg

    folder = tmp_path_factory.mktemp("weights")
    layers = vgg.make_layers(vgg.cfgs["E"], batch_norm=False)
    state = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, folder / "vgg19.pt")
    network = resnet50(weights=None)
    backbone = nn.Sequential(*list(network.children())[:9])
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    torch.save(state, folder / "radimagenet.pt")
    return folder, {"vgg19": layers.eval(), "radimagenet": backbone.eval()}


@pytest.mark.parametrize("name", losses.PERCEPTUAL)
def test_perceptual_networks_compute_what_the_public_weights_say(name, public_files):
    folder, oracles = public_files
    network, oracle = losses.PERCEPTUAL[name](folder / f"{name}.pt"), oracles[name]
    hu = images(1, 1, 32, 32, spread=300.0)
    x = ((hu + 1000) / 2000).expand(-1, 3, -1, -1)
    with torch.no_grad():
        if name == "vgg19":
            mean, sd = (torch.tensor(v)[:, None, None] for v in (losses.IMAGENET_MEAN, losses.IMAGENET_SD))
            wanted = [oracle[:36]((x - mean) / sd)]
        else:
            wanted = [oracle[:end](2 * x - 1) for end in (5, 6, 7)]
        found = network(hu)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", losses.PERCEPTUAL)
def test_perceptual_networks_are_frozen_and_pass_the_gradient_to_the_slice(name, public_files):
    network = losses.PERCEPTUAL[name](public_files[0] / f"{name}.pt")
    nn.Sequential(network).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    hu = images(1, 1, 32, 32).requires_grad_()
    losses.perceptual_loss(network, hu, images(1, 1, 32, 32, seed=1)).backward()
    assert hu.grad.abs().max() > 0
    assert not any(value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def change_weights(path: Path, name: str, tmp_path: Path, change) -> Path:
    state = torch.load(path / f"{name}.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize("name", losses.PERCEPTUAL)
def test_perceptual_weights_load_whole_or_are_refused_by_name(name, public_files, tmp_path):
    first = {"vgg19": "features.0.weight", "radimagenet": "backbone.0.weight"}[name]
    ours = {"vgg19": "features.0.weight", "radimagenet": "conv1.weight"}[name]
    changes = {
        ours: lambda state: state.pop(first),
        "surprise": lambda state: state.update({"surprise.weight": torch.zeros(1)}),
        f"{ours} ": lambda state: state.update({first: torch.zeros(1)}),
    }
    for named, change in changes.items():
        with pytest.raises(InputError, match=named.strip()) as caught:
            losses.PERCEPTUAL[name](change_weights(public_files[0], name, tmp_path, change))
        assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(public_files):
    with pytest.raises(InputError, match=r"conv1\.weight, bn1\.weight, bn1\.bias \.\.\."):
        losses.RadImageNetFeatures(public_files[0] / "vgg19.pt")


def test_counters_of_batch_norm_may_be_missing_from_radimagenets_file(public_files, tmp_path):
    def drop(state):
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]

    path = change_weights(public_files[0], "radimagenet", tmp_path, drop)
    assert len(losses.RadImageNetFeatures(path)(torch.zeros(1, 1, 32, 32))) == 3


@pytest.mark.parametrize("content", [b"", b"<html>", "list"])
def test_a_file_that_holds_no_weights_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "x.pt"
    if content == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    for build in losses.PERCEPTUAL.values():
        with pytest.raises(InputError, match="weights"):
            build(path)
        with pytest.raises(InputError, match="no such file"):
            build(tmp_path / "none.pt")


def test_radimagenet_without_a_file_says_where_to_get_it():
    with pytest.raises(InputError, match="RadImageNet"):
        losses.RadImageNetFeatures()


def test_vgg19_without_a_file_and_without_a_network_says_so_in_one_line(monkeypatch, tmp_path):
    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(InputError, match="cannot be downloaded.*no route") as caught:
        losses.VGG19Features()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- classifiers


def test_masked_bce_leaves_unknown_targets_out_of_value_and_gradient():
    logits = torch.tensor([[0.3], [-2.0], [5.0]], requires_grad=True)
    targets = torch.tensor([[1.0], [0.0], [math.nan]])
    loss = masked_bce_loss(logits, targets)
    loss.backward()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:2], targets[:2])
    assert loss.item() == pytest.approx(expected.item())
    assert logits.grad[2].item() == 0


def test_masked_bce_of_nothing_known_is_zero_with_a_gradient():
    logits = torch.randn(3, 1, requires_grad=True)
    loss = masked_bce_loss(logits, torch.full((3, 1), math.nan))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 1))


def test_masked_bce_pos_weight_multiplies_the_positives():
    logits, targets = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
    weighted = masked_bce_loss(logits, targets, torch.tensor([3.0]))
    assert weighted.item() == pytest.approx((3 + 1) / 2 * math.log(2))


# ---------------------------------------------------------------- segmentation


def logits_of(p):
    return torch.logit(torch.as_tensor(p, dtype=torch.float64)).float()


def lesion(*pixels, shape=(4, 5), value=1):
    """A mask (1, 1, H, W) with some pixels of one class."""
    mask = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    for row, column in pixels:
        mask[0, 0, row, column] = value
    return mask


def certain(mask, outputs):
    """Logits (B, outputs, H, W) that say the mask with all but certainty."""
    wanted = mask[:, 0].long()
    if outputs == 1:
        return 60.0 * (wanted > 0)[:, None] - 30
    return 60.0 * torch.nn.functional.one_hot(wanted, outputs).movedim(-1, 1)


@pytest.mark.parametrize("outputs", [1, 7])
@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_every_segmentation_loss_is_near_zero_for_the_truth_and_grows_with_the_error(name, outputs):
    mask = torch.cat([lesion((1, 1), (1, 2), value=2), lesion(), lesion((3, 3), value=6)])
    right, loss = certain(mask, outputs), SEGMENTATION_LOSSES[name]
    assert 0 <= loss(right, mask).item() < 1e-6
    steps = [loss((1 - share) * right - share * right, mask).item() for share in (0.0, 0.4, 0.5, 0.6, 1.0)]
    assert steps == sorted(steps)
    assert steps[-1] > 0.5


@pytest.mark.parametrize("outputs", [1, 7])
@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_every_segmentation_loss_falls_along_its_gradient_and_treats_images_apart(name, outputs):
    mask = torch.cat([lesion((1, 1), (1, 2), value=2), lesion()])
    logits, loss = images(2, outputs, 4, 5, spread=1.0).sub_(40).requires_grad_(), SEGMENTATION_LOSSES[name]
    value = loss(logits, mask)
    value.backward()
    assert value.shape == ()
    assert logits.grad.isfinite().all()
    with torch.no_grad():
        assert loss(logits - 0.1 * logits.grad, mask) < value
        alone = [loss(logits[place : place + 1], mask[place : place + 1]) for place in (0, 1)]
    torch.testing.assert_close(value.detach(), torch.stack(alone).mean())


def test_bce_dice_of_one_probability_everywhere_is_its_closed_form():
    p, mask = 0.3, lesion((0, 0), (0, 1), (2, 2))
    dice = (2 * p * 3 + 1) / (p * 20 + 3 + 1)
    bce = -(3 * math.log(p) + 17 * math.log(1 - p)) / 20
    found = losses.bce_dice_loss(logits_of(np.full((1, 1, 4, 5), p)), mask)
    assert found.item() == pytest.approx(0.5 * bce + 0.5 * (1 - dice), rel=1e-6)


def test_bce_dice_of_an_image_without_lesion_is_the_share_called_lesion_and_its_cross_entropy():
    for p in (1e-6, 0.3, 0.9):
        found = losses.bce_dice_loss(logits_of(np.full((1, 1, 4, 5), p)), lesion())
        assert found.item() == pytest.approx(-0.5 * math.log(1 - p) + 0.5 * p, rel=1e-4)


def test_tversky_of_one_probability_everywhere_is_its_closed_form():
    p, mask = 0.3, lesion((0, 0), (0, 1), (2, 2))
    index = (p * 3 + 0.5) / (p * 3 + 0.3 * p * 17 + 0.7 * (1 - p) * 3 + 0.5)
    logits = logits_of(np.full((1, 1, 4, 5), p))
    assert losses.tversky_loss(logits, mask).item() == pytest.approx(1 - index, rel=1e-6)


def test_tversky_with_halves_is_dice_and_by_default_minds_missed_pixels_more():
    mask = lesion((1, 1), (1, 2))
    logits = images(1, 1, 4, 5, spread=1.0) - 40
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, (mask > 0).float())
    dice = 2 * losses.bce_dice_loss(logits, mask) - bce
    torch.testing.assert_close(losses.tversky_loss(logits, mask, 0.5, 0.5), dice)
    missed, false = certain(lesion((1, 1)), 1), certain(lesion((1, 1), (1, 2), (1, 3)), 1)
    assert losses.tversky_loss(missed, mask) > losses.tversky_loss(false, mask)


def test_focal_without_gamma_is_the_cross_entropy_and_with_it_weighs_by_the_error():
    mask = lesion((1, 1), (1, 2), value=2)
    for outputs in (1, 7):
        logits = images(1, outputs, 4, 5, spread=1.0) - 40
        if outputs == 1:
            entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, (mask > 0).float())
        else:
            entropy = torch.nn.functional.cross_entropy(logits, mask[:, 0].long())
        torch.testing.assert_close(losses.focal_loss(logits, mask, 0.0), entropy)
    p = 0.3
    wanted = -(2 * 0.7**2 * math.log(p) + 18 * 0.3**2 * math.log(1 - p)) / 20
    found = losses.focal_loss(logits_of(np.full((1, 1, 4, 5), p)), mask)
    assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_dice_of_classes_is_the_mean_over_those_that_the_image_has():
    mask = lesion((0, 0), (0, 1), value=1) + lesion((2, 2), value=4)
    found = lesion((0, 0), (0, 1), value=1)  # the first is right, the second missed
    value = losses.tversky_loss(certain(found, 7), mask, 0.5, 0.5)
    assert value.item() == pytest.approx((0 + 0.5 / (0.5 + 0.5)) / 2, rel=1e-6)
    swapped = lesion((0, 0), (0, 1), value=4) + lesion((2, 2), value=1)
    of_first, of_second = 1.5 / (1.5 + 0.5), 1.5 / (1.5 + 0.5)  # (1 + 2) / 2 errors each, and no hit
    value = losses.tversky_loss(certain(swapped, 7), mask, 0.5, 0.5)
    assert value.item() == pytest.approx((of_first + of_second) / 2, rel=1e-6)


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_lesion_of_unknown_kind_is_a_lesion_to_a_binary_network_and_nothing_to_one_of_classes(name):
    loss = SEGMENTATION_LOSSES[name]
    known, unknown = lesion((1, 1), (1, 2)), lesion((1, 1), (1, 2), value=255)
    logits = images(1, 1, 4, 5, spread=1.0) - 40
    assert torch.equal(loss(logits, known), loss(logits, unknown))
    of_classes = (images(1, 7, 4, 5, spread=1.0) - 40).requires_grad_()
    loss(of_classes, unknown).backward()
    assert not of_classes.grad[..., 1, 1:3].any()
    assert of_classes.grad[..., 0, 0].any()
    everywhere = torch.full_like(known, 255)
    assert loss(of_classes, everywhere).item() == 0
