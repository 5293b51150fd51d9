import argparse
import importlib
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import denoisers
from inference import denoise
from models import CLASSICAL, DENOISERS, PRESETS, build_model
from stage import InputError
from tests.toy_denoisers import FORMS, RESIDUAL, TINY, network, parameters, scan, sigmas
from tiling import tile_side, tiled

# ---------------------------------------------------------------- the contract of every denoiser


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (2, 33, 50)])
def test_every_denoiser_gives_one_finite_slice_of_any_shape(form, shape):
    model = network(form)
    hu = scan(model, *shape[1:], batch=shape[0])
    with torch.inference_mode():
        out = model(hu, torch.full((shape[0],), 9.0))
    assert out.shape == (shape[0], 1, *shape[1:])
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_every_denoiser_gives_float32_under_autocast_near_its_own_full_precision(form):
    model = network(form)
    hu, sigma = scan(model, 32, 32), sigmas(5, 20)
    with torch.inference_mode():
        whole = model(hu, sigma)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(hu, sigma)
    assert half.dtype == torch.float32
    change = whole - model_input_part(form, hu)
    # bfloat16 has 8 bits: some per cent of what the network adds, after a dozen layers
    assert (half - whole).square().mean().sqrt() < 0.06 * change.square().mean().sqrt() + 0.01


def model_input_part(form, hu):
    """What of the output is the input as it came, and no work of the network."""
    middle = hu[:, hu.shape[1] // 2][:, None]
    return middle if FORMS[form][0] in RESIDUAL else torch.zeros_like(middle)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_of_every_denoiser_learns(form):
    model = network(form).train()
    model(scan(model, 32, 48), sigmas(5, 20)).square().mean().backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_every_denoiser_repeats_itself_in_eval_and_treats_slices_apart(form):
    model = network(form)
    hu, sigma = scan(model, 24, 40, batch=3), sigmas(4, 9, 25)
    with torch.inference_mode():
        out = model(hu, sigma)
        assert torch.equal(out, model(hu, sigma))
        alone = torch.cat([model(hu[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(out, alone, atol=1e-2, rtol=1e-4)  # kernels differ with the batch size


@pytest.mark.parametrize("form", FORMS)
def test_every_denoiser_comes_back_from_a_checkpoint(form, tmp_path):
    model = network(form)
    name, kwargs = FORMS[form]
    model_facts = {"name": name, "kwargs": json.loads(json.dumps(kwargs))}
    content = {"format": checkpoints.FORMAT, "stage": "denoiser", "model": model_facts}
    checkpoints.save(tmp_path / "d.pt", content | {"state": model.state_dict()})
    loaded, _ = checkpoints.load_network(tmp_path / "d.pt", "denoiser")
    model.to(memory_format=torch.channels_last)  # as load_network leaves it
    hu, sigma = scan(model, 24, 24), sigmas(5, 20)
    assert torch.equal(loaded(hu, sigma), model(hu, sigma))
    assert (loaded.slices, loaded.dose_aware, loaded.window) == (model.slices, model.dose_aware, model.window)


@pytest.mark.parametrize("form", FORMS)
def test_a_denoiser_hears_the_noise_level_exactly_if_it_is_dose_aware(form):
    model = network(form)
    hu = scan(model, 24, 24)
    if not model.dose_aware:
        assert torch.equal(model(hu, sigmas(5, 5)), model(hu))
        return
    low, high = model(hu, sigmas(5, 5)), model(hu, sigmas(5, 20))
    torch.testing.assert_close(low[0], high[0])
    assert (low[1] - high[1]).abs().max() > 1e-3
    for wrong in (None, sigmas(5), torch.tensor(5.0)):
        with pytest.raises(ValueError, match="sigma_hu"):
            model(hu, wrong)


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form][1].get("dose_aware")])
def test_a_dose_between_two_others_gives_a_result_between_theirs(form):
    model = network(form)
    hu = scan(model, 24, 24)
    with torch.inference_mode():
        results = [model(hu, torch.full((2,), sigma)) for sigma in (0.0, 4.0, 4.1, 4.2, 26.0)]
    assert all(result.isfinite().all() for result in results)
    step = (results[2] - results[1]).square().mean().sqrt()
    assert (results[3] - results[1]).square().mean().sqrt() < 3 * step
    assert step < (results[4] - results[1]).square().mean().sqrt()


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_of_several_slices_reads_all_and_denoises_the_middle_one(name):
    model = network(f"{name}-2.5d")
    hu = scan(model, 24, 24).requires_grad_()
    out = model(hu)
    assert out.shape == (2, 1, 24, 24)
    out.square().sum().backward()
    assert (hu.grad.abs().amax(dim=(0, 2, 3)) > 0).all()
    for channels in (1, 2, 5):
        with pytest.raises(ValueError, match="3"):
            model(torch.zeros(2, channels, 24, 24))
    with pytest.raises(ValueError, match="odd"):
        build_model(name, **TINY[name] | {"slices": 2})


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form][0] in RESIDUAL])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 64)])
def test_an_untrained_residual_denoiser_returns_the_slice_it_was_asked_for(form, shape):
    name, kwargs = FORMS[form]
    model = build_model(name, **kwargs).eval()
    hu = scan(model, *shape, spread=500.0)
    assert torch.equal(model(hu, sigmas(5, 20)), hu[:, model.slices // 2][:, None])


@pytest.mark.parametrize("name", RESIDUAL)
def test_no_residual_denoiser_saturates_at_either_end(name):
    torch.manual_seed(0)
    model = build_model(name, **TINY[name]).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flat = torch.full((1, 1, 32, 32), 0.0)
    results = [model(flat + level).mean().item() for level in (-1024, 3071)]
    assert results[0] < -200
    assert results[1] > 1500


# ---------------------------------------------------------------- each of them


def test_unet_of_the_papers_widths_has_three_levels_of_two_convolutions():
    model = build_model("unet")
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == 2 * 3 + 2 * 2 + 1
    assert [encoder[2].out_channels for encoder in model.encoders] == [64, 128, 256]


def test_unet_keeps_the_parameter_names_of_earlier_checkpoints():
    layers = [
        *(f"encoders.{level}.{layer}" for level in range(3) for layer in (0, 2)),
        *(f"ups.{level}" for level in range(2)),
        *(f"decoders.{level}.{layer}" for level in range(2) for layer in (0, 2)),
        "head",
    ]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(build_model("unet", **TINY["unet"]).state_dict()) == names


def test_layer_norm_2d_is_that_of_torch_over_the_channels():
    torch.manual_seed(0)
    norm = denoisers.LayerNorm2d(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 5, 4)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    wanted = (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), wanted)
    assert norm(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_naf_block_is_the_papers_formula():
    torch.manual_seed(0)
    block = denoisers.NAFBlock(4, pool_size=None)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 4, 6, 7)
    y = block.conv2(block.conv1(block.norm1(x)))
    y = y[:, :4] * y[:, 4:]
    y = y * block.attention(y.mean((2, 3), keepdim=True))
    middle = x + block.beta[:, 0] * block.conv3(y)
    z = block.conv4(block.norm2(middle))
    z = z[:, :4] * z[:, 4:]
    torch.testing.assert_close(block(x), middle + block.gamma[:, 0] * block.conv5(z))


def test_untrained_naf_block_is_the_identity():
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(denoisers.NAFBlock(4, pool_size=8)(x), x)


def test_window_means_of_a_ramp_are_the_ramp_at_the_windows_centres():
    x = torch.arange(64.0).expand(1, 1, 48, 64)
    means = denoisers.spread(denoisers.window_means(x, 16), (48, 64), 16)
    assert means.shape == x.shape
    # a window of 16 pixels has no middle pixel, and near the border it stays inside
    wanted = (torch.arange(64.0) + 0.5).clamp(7.5, 55.5)
    torch.testing.assert_close(means[0, 0, 20], wanted, atol=1e-4, rtol=0)


def test_window_means_of_a_training_crop_are_its_mean():
    x = torch.randn(2, 3, 16, 16)
    for size in (16, 40, None):
        assert torch.equal(denoisers.window_means(x, size), x.mean((2, 3), keepdim=True))


def test_window_maxima_are_those_of_the_windows_of_the_means():
    x = torch.randn(2, 3, 48, 40)
    found = denoisers.window_maxima(x, 16)
    assert found.shape == denoisers.window_means(x, 16).shape
    rows, columns = (
        [round(start) for start in np.linspace(0, side - 16, count)] for side, count in ((48, 9), (40, 7))
    )
    for (i, top), (j, left) in itertools.product(enumerate(rows), enumerate(columns)):
        assert torch.equal(found[:, :, i, j], x[:, :, top : top + 16, left : left + 16].amax((2, 3)))


def test_window_maxima_of_a_training_crop_are_its_maximum():
    x = torch.randn(2, 3, 16, 12)
    for size in (16, 40):
        assert torch.equal(denoisers.window_maxima(x, size), x.amax((2, 3), keepdim=True))


def nafnet_error_of_a_crop(pool_size):
    """RMS difference in a crop's inside between denoising it alone and as a part of a slice with more air,
    as a share of what denoising changes there."""
    side, inside = 96, (..., slice(16, 80), slice(16, 80))  # beyond the reach of the crop's own border
    kwargs = {"width": 4, "enc_blocks": [1], "middle_blocks": 1, "dec_blocks": [1], "pool_size": pool_size}
    model = build_model("nafnet", **kwargs).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hu = torch.full((1, 1, 3 * side, 3 * side), -1000.0)
    hu[..., side // 2 : -side // 2, side // 2 : -side // 2] = torch.randn(2 * side, 2 * side) * 30 + 40
    crop = hu[..., side:-side, side:-side]
    with torch.inference_mode():
        part, alone = model(hu)[..., side:-side, side:-side], model(crop)
    return ((part - alone)[inside].square().mean() / (alone - crop)[inside].square().mean()).sqrt().item()


def test_nafnet_on_a_large_slice_does_what_it_learned_on_crops():
    local, everywhere = nafnet_error_of_a_crop(96), nafnet_error_of_a_crop(None)
    assert local < 0.03
    assert everywhere > 5 * local


def test_nafnet_refuses_uneven_levels():
    with pytest.raises(ValueError, match="as many levels"):
        build_model("nafnet", enc_blocks=[1, 1], dec_blocks=[1])


def test_nafnet_of_width_16_costs_less_than_a_fifth_of_red_cnn():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(name, **kwargs):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            build_model(name, **kwargs)(torch.zeros(1, 1, 96, 96))  # at 512 x 512 RED-CNN loses less border
        return counter.get_total_flops()

    assert flops("nafnet", width=16) < flops("redcnn") / 5
    assert flops("nafnet", width=32) < flops("redcnn") / 5


def test_redcnn_has_the_layers_of_the_paper():
    model = build_model("redcnn")
    kernels = [module.weight.shape for module in (*model.convs, *model.deconvs, model.head)]
    assert kernels == [(96, 1, 5, 5)] + [(96, 96, 5, 5)] * 8 + [(96, 1, 5, 5)]


# ---------------------------------------------------------------- without learning


@pytest.mark.parametrize("name", CLASSICAL)
def test_every_classical_denoiser_halves_white_noise_and_keeps_the_mean(name):
    if name == "bm3d":
        pytest.importorskip("bm3d")
    model = build_model(name)
    rng = np.random.default_rng(0)
    truth = torch.full((1, 1, 32, 40), 30.0)
    truth[:, :, 8:24, 12:28] = 70
    noise = torch.from_numpy(rng.standard_normal((1, 1, 32, 40)).astype(np.float32))
    out = model(truth + 8 * noise, sigmas(8))
    assert out.dtype == torch.float32
    assert (out - truth).square().mean().sqrt() < 0.5 * 8
    assert (out - truth).mean().abs() < 0.1 * 8


def test_a_classical_denoiser_takes_each_slice_at_its_own_noise():
    hu, sigma = torch.randn(2, 1, 32, 32) * 10 + 40, sigmas(2, 20)
    model = build_model("tv")
    out = model(hu, sigma)
    for i in range(2):
        assert torch.equal(out[i : i + 1], model(hu[i : i + 1], sigma[i : i + 1]))
    assert out[0].std() > 2 * out[1].std()


@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_denoisers_have_no_parameters_and_need_the_noise(name):
    if name == "bm3d":
        pytest.importorskip("bm3d")
    model = build_model(name)
    assert not list(model.parameters())
    assert (model.slices, model.dose_aware) == (1, True)
    for wrong in (None, sigmas(1, 2)):
        with pytest.raises(ValueError, match="sigma_hu"):
            model(torch.zeros(1, 1, 16, 16), wrong)


@pytest.mark.parametrize("name", ["nlm", "tv"])
def test_classical_denoisers_leave_what_is_beyond_their_window_as_it_was(name):
    hu = torch.randn(1, 1, 24, 24) * 30 + 1500
    torch.testing.assert_close(build_model(name)(hu, sigmas(30)), hu, atol=1e-3, rtol=0)


def test_classical_strength_takes_effect():
    hu, sigma = torch.randn(1, 1, 32, 32) * 10 + 40, sigmas(10)
    weak, strong = (build_model("tv", strength=strength)(hu, sigma) for strength in (0.5, 2.0))
    assert strong.std() < weak.std()


def test_a_missing_package_is_named_in_one_line(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"bm3d: .*pip install bm3d"):
        build_model("bm3d")


# ---------------------------------------------------------------- tiles


class Local(nn.Module):
    """Reaches `reach` pixels far and pads with zeros, so that every border is wrong that deep."""

    def __init__(self, reach):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 2 * reach + 1, padding=reach, bias=False)
        self.calls = []

    def forward(self, hu, sigma_hu=None):  # noqa: ARG002
        self.calls.append(tuple(hu.shape[-2:]))
        return self.conv(hu)


@pytest.mark.parametrize("shape", [(100, 131), (64, 200), (150, 48), (65, 64), (64, 64), (30, 30)])
def test_tiles_of_a_local_network_join_without_a_seam(shape):
    torch.manual_seed(0)
    model = Local(reach=5)
    hu = torch.randn(2, 1, *shape) * 100
    with torch.inference_mode():
        whole, joined = model(hu), tiled(model, hu, tile=64, overlap=16)
    # the convolution of another shape sums in another order: no more than that
    torch.testing.assert_close(joined, whole, atol=1e-4, rtol=1e-5)
    assert all(rows <= 64 and columns <= 64 for rows, columns in model.calls[1:])


def test_tiles_of_a_pointwise_network_join_bit_for_bit():
    hu = torch.randn(1, 1, 130, 90)
    assert torch.equal(tiled(lambda x, _sigma: x * 3, hu, tile=32, overlap=16), hu * 3)


def test_a_network_that_reaches_too_far_leaves_a_seam_in_the_test_above():
    model = Local(reach=24)
    hu = torch.randn(1, 1, 128, 128) * 100
    with torch.inference_mode():
        assert (tiled(model, hu, tile=64, overlap=16) - model(hu)).abs().max() > 1


def test_tiles_fade_into_each_other_without_a_step():
    def numbered(hu, sigma_hu, seen=[]):  # noqa: B006 counts the tiles
        seen.append(0)
        return torch.full_like(hu, 10.0 * len(seen))

    out = tiled(numbered, torch.zeros(1, 1, 16, 96), tile=64, overlap=32)[0, 0, 0]
    assert out[0] == 10
    assert out[-1] == 20
    assert (out.diff() >= 0).all()
    assert out.diff().max() < 2  # 10 in all, over a dozen pixels


def test_a_slice_that_fits_in_a_tile_is_given_to_the_network_whole():
    model = network("nafnet-dose")
    hu, sigma = scan(model, 48, 40), sigmas(5, 20)
    with torch.inference_mode():
        assert torch.equal(tiled(model, hu, sigma, tile=64, overlap=16), model(hu, sigma))


@pytest.mark.parametrize("form", ["unet", "nafnet", "redcnn-2.5d", "student-nafnet-dose"])
def test_tiles_of_a_network_are_near_the_whole_slice(form):
    model = network(form)
    hu, sigma = scan(model, 160, 144), sigmas(5, 20)
    with torch.inference_mode():
        whole, joined = model(hu, sigma), tiled(model, hu, sigma, tile=96, overlap=48)
    assert joined.shape == whole.shape
    change = (whole - model_input_part(form, hu)).square().mean().sqrt()
    assert (joined - whole).square().mean().sqrt() < 0.05 * change


def test_denoise_in_tiles_never_shows_the_network_more_than_a_tile_and_joins_them():
    model = Local(4)
    model.slices = 1
    volume = scan(model, 150, 200, batch=3)[:, 0].numpy()
    whole = denoise(model, volume, 5.0)
    model.calls.clear()
    tiles = denoise(model, volume, 5.0, tile=64)
    assert max(max(shape) for shape in model.calls) == 64
    np.testing.assert_allclose(tiles, whole, atol=1e-4)


@pytest.mark.parametrize("words", ["100", "0", "-64"])
def test_a_side_that_no_tile_can_have_is_refused_on_the_command_line(words):
    with pytest.raises(argparse.ArgumentTypeError):
        tile_side(words)
    assert tile_side("128") == 128


@pytest.mark.parametrize(("tile", "overlap"), [(64, 0), (64, 48), (100, 16), (64, 20)])
def test_tiles_that_cannot_be_joined_are_refused(tile, overlap):
    with pytest.raises(ValueError, match="multiples of 16"):
        tiled(Local(1), torch.zeros(1, 1, 128, 128), tile=tile, overlap=overlap)


# ---------------------------------------------------------------- presets


def test_every_denoiser_has_a_preset_for_cpu_and_gpu_and_every_preset_can_be_built():
    for size in ("cpu", "gpu"):
        named = {model for name, (model, _) in PRESETS.items() if name.endswith(f"-{size}")}
        assert named == set(DENOISERS)
    with torch.device("meta"):  # shapes without memory
        for model, kwargs in PRESETS.values():
            assert json.loads(json.dumps(kwargs)) == kwargs
            assert parameters(build_model(model, **kwargs)) > 1000


def test_build_model_of_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="resnet18"):
        build_model("vgg")
