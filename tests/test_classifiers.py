import pytest
import torch

from models import CLASSIFIERS, build_model

TINY = {"resnet18": {"width": 4}}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_can_be_built_tiny_and_learns_one_step(name):
    torch.manual_seed(0)
    model = build_model(name, **TINY[name])
    out = model(torch.randn(2, 1, 32, 32) * 100)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


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
