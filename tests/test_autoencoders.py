"""The anatomy-aware system: its sizes, its start, its skips, and the decoder that a student leaves alone."""

import copy

import pytest
import torch
from torch import nn

import autoencoders
from models import build_model
from tests.toy_denoisers import network, parameters, scan, sigmas
from weights import freeze


def test_baseline_autoencoder_has_the_size_of_the_earlier_one():
    model = build_model("autoencoder", encoder="baseline")
    assert parameters(model.encoder) / 1e6 == pytest.approx(7.05, abs=0.01)
    assert parameters(model.decoder) / 1e6 == pytest.approx(10.08, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "latent", "channels"),
    [
        ("baseline", (512, 16), (64, 128, 256, 512)),
        ("nafnet", (512, 8), (32, 64, 128, 256)),
        ("resnet", (256, 8), (32, 64, 128, 256)),
        ("unet", (256, 8), (32, 64, 128, 256)),
    ],
)
def test_encoders_give_a_latent_and_four_feature_maps_from_fine_to_coarse(kind, latent, channels):
    model = build_model("autoencoder", encoder=kind).eval()
    with torch.inference_mode():
        found, features = model.encode(torch.zeros(1, 1, 32, 48))
        output = model.decode(found, features)
    assert found.shape == (1, latent[0], 32 // latent[1], 48 // latent[1])
    assert [tuple(f.shape) for f in features] == [
        (1, count, 32 >> level, 48 >> level) for level, count in enumerate(channels)
    ]
    assert output.shape == (1, 1, 32, 48)


@pytest.mark.parametrize("kind", autoencoders.AUTOENCODERS)
def test_autoencoder_forward_is_encode_and_decode_and_tells_both_on_request(kind):
    model = network(f"student-{kind}-dose")
    hu, sigma = scan(model, 32, 32), sigmas(5, 20)
    with torch.inference_mode():
        found = model(hu, sigma, encoded=True)
        latent, features = model.encode(hu, sigma)
        torch.testing.assert_close(found.output, model.decode(latent, features))
        assert torch.equal(found.output, model(hu, sigma))
    assert torch.equal(found.latent, latent)
    assert all(torch.equal(a, b) for a, b in zip(found.features, features, strict=True))


@pytest.mark.parametrize("kind", autoencoders.AUTOENCODERS)
def test_only_the_unets_decoder_uses_the_skips(kind):
    model = network(f"student-{kind}")
    latent, features = model.encode(scan(model, 32, 32))
    changed = [feature + 1 for feature in features]
    same = torch.equal(model.decode(latent, features), model.decode(latent, changed))
    assert same == (kind != "unet")


def test_autoencoder_passes_on_what_is_beyond_its_window():
    model = network("autoencoder")
    inside = torch.full((1, 1, 16, 16), 1000.0)
    torch.testing.assert_close(model(inside + 1500), model(inside) + 1500)
    torch.testing.assert_close(model(-inside - 24), model(-inside) - 24)


CARRYING = ("nafnet", "resnet", "unet")  # kinds whose layers can carry a slice


@pytest.mark.parametrize("window", [(0.0, 2000.0), (40.0, 200.0)])
@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("more", [{}, {"slices": 3, "dose_aware": True}], ids=["plain", "2.5d-dose"])
def test_an_untrained_autoencoder_returns_its_input_in_bfloat16_too(kind, window, more):
    torch.manual_seed(0)
    width = autoencoders.IDENTITY_WIDTH
    model = build_model("autoencoder", encoder=kind, width=width, window=window, **more).eval()
    hu = scan(model, 31, 45, spread=300.0)
    middle, brain = model.middle(hu), (model.middle(hu) - 40).abs() < 40
    with torch.inference_mode():
        torch.testing.assert_close(model(hu, sigmas(5, 20)), middle, atol=1e-3, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(hu, sigmas(5, 20)) - middle)[brain].abs().max() < 0.5


@pytest.mark.parametrize("kind", CARRYING)
def test_every_layer_of_an_autoencoder_learns_from_its_start(kind):
    torch.manual_seed(0)
    model = build_model("student", encoder=kind, width=autoencoders.IDENTITY_WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for _ in range(3):  # what starts at zero holds back what lies before it for a step or two
        optimizer.zero_grad()
        model(scan(model, 32, 32), sigmas(5, 20)).square().mean().backward()
        optimizer.step()
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not still


@pytest.mark.parametrize("kind", autoencoders.AUTOENCODERS)
def test_an_autoencoder_compiles_as_one_graph(kind):
    model = network(f"student-{kind}-dose")
    found = torch._dynamo.explain(model)(scan(model, 32, 32), sigmas(5, 20))
    assert found.graph_break_count == 0, [reason.reason for reason in found.break_reasons]


def test_autoencoder_refuses_an_unknown_encoder_and_an_idle_pool_size():
    with pytest.raises(ValueError, match="baseline, nafnet"):
        build_model("autoencoder", encoder="vit")
    with pytest.raises(ValueError, match="no use"):
        build_model("autoencoder", encoder="baseline", pool_size=64)


def test_dose_conditioning_is_in_the_students_encoder_only():
    plain, aware = (build_model("student", width=4, dose_aware=aware) for aware in (False, True))
    more = set(aware.state_dict()) - set(plain.state_dict())
    assert more
    assert all(name.startswith(("noise_level.", "encoder.")) for name in more)
    assert build_model("student", width=4).dose_aware


@pytest.mark.parametrize("kind", autoencoders.AUTOENCODERS)
def test_a_student_trained_behind_its_teachers_decoder_leaves_it_bit_for_bit(kind):
    teacher, student = network(f"student-{kind}", seed=1), network(f"student-{kind}-dose", seed=2)
    autoencoders.adopt_decoder(student, teacher)
    before = copy.deepcopy(teacher.decoder.state_dict())
    encoder = copy.deepcopy(student.encoder.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.1)
    student.train()
    for _ in range(2):
        optimizer.zero_grad()
        student(scan(student, 32, 32), sigmas(5, 20)).square().mean().backward()
        optimizer.step()
    after = student.decoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(not torch.equal(student.encoder.state_dict()[name], encoder[name]) for name in encoder)
    latent, features = teacher.encode(scan(teacher, 16, 16))
    assert torch.equal(student.decode(latent, features), teacher.decode(latent, features))


def test_adopt_decoder_refuses_a_teacher_of_another_kind():
    student = build_model("student", width=4)
    for other in ({"encoder": "resnet"}, {"width": 8}, {"window": [0.0, 1000.0]}, {"pool_size": 64}):
        with pytest.raises(ValueError, match="same encoder kind"):
            autoencoders.adopt_decoder(student, build_model("autoencoder", **{"width": 4} | other))


def test_frozen_module_stays_in_eval_with_its_buffers_when_its_parent_trains():
    part = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5)))
    whole = nn.Sequential(freeze(part), nn.BatchNorm2d(2))
    for parent in (whole, copy.deepcopy(whole), nn.SyncBatchNorm.convert_sync_batchnorm(whole)):
        parent.train()
        part = parent[0]
        assert parent[1].training
        assert not any(module.training for module in part.modules())
        before = copy.deepcopy(part.state_dict())
        part[1].train()
        part(torch.randn(4, 1, 5, 5))
        assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_cbam_sees_in_a_large_slice_what_it_saw_in_crops():
    torch.manual_seed(0)
    attention = autoencoders.CBAM(16, pool_size=32)
    for weight in attention.mlp.parameters():
        nn.init.normal_(weight, std=0.5)
    crop = torch.randn(1, 16, 32, 32)
    bright = nn.functional.pad(crop, (32, 32, 32, 32), value=50.0)  # decides a maximum over the whole slice
    inside = (..., 15, 15)  # the pixel whose window is the crop
    alone, part = attention(crop)[inside], attention(bright)[..., 32:64, 32:64][inside]
    torch.testing.assert_close(part, alone, rtol=0.02, atol=0.02)
    everywhere = autoencoders.CBAM(16, pool_size=96)
    everywhere.load_state_dict(attention.state_dict())
    assert (everywhere(bright)[..., 32:64, 32:64][inside] - alone).abs().max() > 0.1
