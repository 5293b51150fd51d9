import math

import pytest
import torch

from losses import LESION_WEIGHT, LOSSES, masked_bce_loss, rmse_loss


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_near_zero_for_the_target_and_has_a_finite_gradient_there(name):
    target = torch.randn(2, 1, 9, 11) * 50
    output = target.clone().requires_grad_()
    loss = LOSSES[name](output, target, torch.zeros_like(target, dtype=torch.uint8))
    loss.backward()
    assert loss.item() < 2e-3
    assert output.grad.isfinite().all()


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
