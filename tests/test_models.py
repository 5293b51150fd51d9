import pytest
import torch

from models import CLASSIFIERS, DENOISERS, build_model

TINY = {"unet": {"widths": [4, 8, 16]}, "resnet18": {"width": 4}}


@pytest.mark.parametrize("name", [*DENOISERS, *CLASSIFIERS])
def test_every_network_can_be_built_tiny_and_learns_one_step(name):
    torch.manual_seed(0)
    model = build_model(name, **TINY[name])
    out = model(torch.randn(2, 1, 32, 32) * 100)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 64), (128, 101)])
def test_every_denoiser_keeps_any_shape_and_starts_as_the_identity(name, shape):
    hu = torch.randn(2, 1, *shape) * 500
    out = build_model(name, **TINY[name]).eval()(hu)
    torch.testing.assert_close(out, hu)


@pytest.mark.parametrize("name", DENOISERS)
def test_no_denoiser_saturates_at_either_end(name):
    torch.manual_seed(0)
    model = build_model(name, **TINY[name]).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flat = torch.full((1, 1, 16, 16), 0.0)
    results = [model(flat + level).mean().item() for level in (-1024, 3071)]
    assert results[0] < -200
    assert results[1] > 1500


def test_unet_of_the_papers_widths_has_three_levels_of_two_convolutions():
    model = build_model("unet")
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == 2 * 3 + 2 * 2 + 1
    assert [encoder[2].out_channels for encoder in model.encoders] == [64, 128, 256]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("shape", [(33, 47), (128, 128)])
def test_every_classifier_gives_one_logit_per_class_for_any_size(name, shape):
    model = build_model(name, classes=["a", "b", "c"], **TINY[name]).eval()
    assert model(torch.randn(2, 1, *shape)).shape == (2, 3)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_sees_its_own_window_and_nothing_beyond(name):
    model = build_model(name, **TINY[name], window=(40.0, 80.0)).eval()
    hu = torch.randn(2, 1, 40, 40) * 200
    torch.testing.assert_close(model(hu), model(hu.clamp(0, 80)))


def test_resnet18_has_the_parameters_of_torchvisions_with_one_channel():
    torchvision = pytest.importorskip("torchvision")
    oracle = torchvision.models.resnet18(num_classes=1)
    oracle.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    ours = build_model("resnet18")
    ours.load_state_dict(oracle.state_dict())
    ours.window = (0.0, 2.0)
    x = torch.rand(1, 1, 64, 64) * 2 - 1  # what the first convolution sees: (x - 0 + 1) / 2 * 2 - 1 = x
    torch.testing.assert_close(ours.eval()(x), oracle.eval()(x))


def test_build_model_of_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="resnet18"):
        build_model("vgg")
