"""What denoiser and segmenter share: padding, and the levels of a U-Net."""

import pytest
import torch

from unet import Levels, double_conv, pad, unet_features, unet_levels


@pytest.mark.parametrize(
    ("shape", "step", "wanted"), [((5, 8), 4, (8, 8)), ((8, 16), 8, (8, 16)), ((1, 1), 2, (2, 2))]
)
def test_pad_repeats_the_last_row_and_column_up_to_the_next_multiple(shape, step, wanted):
    image = torch.rand(2, 1, *shape)
    padded = pad(image, step)
    assert padded.shape[2:] == wanted
    assert torch.equal(padded[..., : shape[0], : shape[1]], image)
    assert torch.equal(padded[..., -1, : shape[1]], image[..., -1, :])
    assert torch.equal(padded[..., : shape[0], -1], image[..., -1])


@pytest.mark.parametrize("norm", [False, True])
def test_double_conv_has_batch_norm_where_it_is_asked_and_a_bias_where_not(norm):
    kinds = [type(layer).__name__ for layer in double_conv(1, 2, norm=norm)]
    assert kinds == (["Conv2d", "BatchNorm2d", "ReLU"] if norm else ["Conv2d", "ReLU"]) * 2
    assert (double_conv(1, 2, norm=norm)[0].bias is None) == norm


def test_unet_features_have_the_size_of_the_picture_and_see_every_level():
    torch.manual_seed(0)
    levels = unet_levels(3, [4, 8, 16])
    picture, seen = torch.rand(2, 3, 16, 24, requires_grad=True), []

    def after(x, block):
        seen.append((block, tuple(x.shape[1:])))
        return x

    out = unet_features(picture, levels, after)
    assert out.shape == (2, 4, 16, 24)
    shapes = [(4, 16, 24), (8, 8, 12), (16, 4, 6), (8, 8, 12), (4, 16, 24)]
    assert seen == list(enumerate(shapes))
    out.sum().backward()
    assert all(parameter.grad.any() for parts in levels for parameter in parts.parameters())


def test_unet_of_one_level_is_one_block_without_skips():
    levels = unet_levels(1, [4])
    picture = torch.rand(1, 1, 7, 7)
    assert not len(levels.ups)
    assert torch.equal(unet_features(picture, Levels(*levels)), levels.encoders[0](picture))
