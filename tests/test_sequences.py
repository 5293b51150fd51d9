import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
from models import CLASSIFIERS, SEQUENCE_MODELS, build_model
from sequences import BiLSTM, lengths_of
from tests.test_classifiers import TINY

CLASSES = ["a", "b"]
CNN = {"name": "resnet18", "kwargs": {"width": 4}}
STACKED = {"name": "convnext-tiny", "kwargs": TINY["convnext-tiny"] | {"slices": 3}}
SMALL = {
    "cnn-bilstm": {"embedding": 12, "hidden": 6},
    "two-stage": {"components": 5, "hidden": 6, "layers": 2},
}
FORMS = {name: (name, {"cnn": CNN, **SMALL[name]}) for name in SEQUENCE_MODELS}
FORMS |= {f"{name}-2.5d": (name, {"cnn": STACKED, **SMALL[name]}) for name in SEQUENCE_MODELS}
FORMS["cnn-bilstm-deep"] = ("cnn-bilstm", {"cnn": CNN, **SMALL["cnn-bilstm"], "layers": 2, "dropout": 0.2})
FORMS |= {f"{name}-skip": (name, {"cnn": CNN, **SMALL[name], "max_skip": True}) for name in SEQUENCE_MODELS}
LENGTHS = (2, 5, 1, 4)


def network(form):
    """A tiny network away from its start, with principal components where it has some."""
    torch.manual_seed(0)
    name, kwargs = FORMS[form]
    model = build_model(name, classes=CLASSES, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    if name == "two-stage":
        model.set_pca(torch.randn(model.cnn.head.in_features), torch.randn_like(model.pca_components))
    return model.eval()


def scans(model, lengths=LENGTHS, longest=None, fill=0.0, size=(33, 40)):
    """(hu, mask) of scans of these lengths, the padding full of `fill`."""
    longest = longest or max(lengths)
    generator = torch.Generator().manual_seed(1)
    hu = torch.full((len(lengths), longest, model.slices, *size), fill)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        hu[row, :length] = 40 + 60 * torch.randn(length, model.slices, *size, generator=generator)
    return hu, mask


# ---------------------------------------------------------------- the contract of every network for scans


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(1,), (3,), LENGTHS])
def test_every_network_gives_finite_logits_of_scans_and_slices_of_any_number(form, lengths):
    model = network(form)
    with torch.inference_mode():
        reading = model(*scans(model, lengths, size=(33, 47)))
    assert reading.scan.shape == (len(lengths), 2)
    assert reading.slices.shape == (len(lengths), max(lengths), 2)
    for logits in reading:
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("fill", "more"), [(1e9, 0), (-3000.0, 3), (torch.nan, 0), (torch.inf, 7)])
def test_what_stands_in_the_padding_and_how_much_changes_no_bit(form, fill, more):
    def learnt(hu, mask):
        """The reading, the gradients and the statistics of batch norm after a step of training."""
        model = network(form).train()
        torch.manual_seed(3)  # of the dropout
        reading = model(hu, mask)
        loss = reading.scan.square().mean() + reading.slices[mask].square().mean()
        loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
        return reading, gradients, dict(model.named_buffers())

    model = network(form)
    hu, mask = scans(model)
    filled, wider = scans(model, longest=max(LENGTHS) + more, fill=fill)
    assert not torch.equal(filled[:, : max(LENGTHS)], hu)
    plain, gradients, statistics = learnt(hu, mask)
    changed, changed_gradients, changed_statistics = learnt(filled, wider)
    assert torch.equal(changed.scan, plain.scan)
    assert torch.equal(changed.slices[wider], plain.slices[mask])
    assert torch.equal(changed.slices[~wider], torch.zeros_like(changed.slices[~wider]))
    assert all(torch.equal(changed_gradients[key], value) for key, value in gradients.items())
    assert all(torch.equal(changed_statistics[key], value) for key, value in statistics.items())
    with torch.inference_mode():
        assert torch.equal(model(filled, wider).scan, model(hu, mask).scan)


@pytest.mark.parametrize("form", FORMS)
def test_every_scan_is_read_apart_from_the_others(form):
    model = network(form)
    hu, mask = scans(model)
    with torch.inference_mode():
        together = model(hu, mask)
        for row, length in enumerate(LENGTHS):
            alone = model(hu[row : row + 1, :length], mask[row : row + 1, :length])
            # kernels differ with the batch size
            torch.testing.assert_close(alone.scan[0], together.scan[row], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone.slices[0], together.slices[row, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_slices_in_parts_are_read_as_all_at_once(form):
    model = network(form)
    hu, mask = scans(model)
    with torch.inference_mode():
        for at_once in (1, 5, 100):
            for part, whole in zip(model(hu, mask, slices_at_once=at_once), model(hu, mask), strict=True):
                torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_with_max_skip_a_network_begins_as_the_max_rule(name):
    torch.manual_seed(0)
    model = build_model(name, classes=CLASSES, cnn=CNN, **SMALL[name], max_skip=True).eval()
    if name == "two-stage":
        model.set_pca(torch.randn(model.cnn.head.in_features), torch.randn_like(model.pca_components))
    hu, mask = scans(model, fill=torch.nan)
    with torch.inference_mode():
        reading = model(hu, mask)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(reading.scan[row], reading.slices[row, :length].amax(dim=0))
    model(hu, mask).scan.sum().backward()
    head = model.head if name == "cnn-bilstm" else model.reader.scan_head
    assert head.weight.grad.abs().sum() > 0  # and goes on from there


def test_parts_are_refused_where_batch_norm_would_learn_from_them():
    model = network("cnn-bilstm").train()
    with pytest.raises(ValueError, match="slices_at_once 2: only in eval mode"):
        model(*scans(model), slices_at_once=2)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_slices_matters_to_the_scan(form):
    model = network(form)
    hu, mask = scans(model, (5,))
    with torch.inference_mode():
        assert not torch.allclose(model(hu, mask).scan, model(hu.flip(1), mask).scan, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns_but_for_a_frozen_cnn(form):
    model = network(form).train()
    hu, mask = scans(model)
    reading = model(hu, mask)
    (reading.scan.square().mean() + reading.slices.square().mean()).backward()
    frozen = {key for key, _ in model.named_parameters() if key.startswith("cnn.") and "two" in form}
    idle = [
        key
        for key, value in model.named_parameters()
        if key not in frozen and (value.grad is None or not value.grad.any())
    ]
    assert not idle
    assert all(value.grad is None for key, value in model.named_parameters() if key in frozen)


@pytest.mark.parametrize("form", FORMS)
def test_every_network_comes_back_from_a_checkpoint(form, tmp_path):
    model = network(form)
    name, kwargs = FORMS[form]
    facts = json.loads(json.dumps({"name": name, "kwargs": kwargs | {"classes": CLASSES}}))
    content = {"format": checkpoints.FORMAT, "stage": "classifier", "model": facts}
    checkpoints.save(tmp_path / "s.pt", content | {"state": model.state_dict()})
    loaded, _ = checkpoints.load_network(tmp_path / "s.pt", "classifier")
    model.to(memory_format=torch.channels_last)  # as load_network leaves it
    hu, mask = scans(model)
    with torch.inference_mode():
        for one, other in zip(loaded(hu, mask), model(hu, mask), strict=True):
            assert torch.equal(one, other)
    for fact in ("classes", "slices", "windows"):
        assert getattr(loaded, fact) == getattr(model, fact) == getattr(model.cnn, fact)


@pytest.mark.parametrize("form", FORMS)
def test_every_network_gives_float32_under_autocast_near_its_own_full_precision(form):
    model = network(form)
    hu, mask = scans(model)
    with torch.inference_mode():
        whole = model(hu, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(hu, mask)
    for one, other in zip(half, whole, strict=True):
        assert one.dtype == torch.float32
        # bfloat16 has 8 bits: some per cent after a dozen layers
        assert (one - other).square().mean().sqrt() < 0.06 * other.square().mean().sqrt() + 0.01


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mask",
    [
        [[True, False, True], [True, True, True]],
        [[False, True, True], [True, True, True]],
        [[True, True, True], [False, False, False]],
        [[1, 1, 1], [1, 1, 0]],
        [True, True],
    ],
)
def test_a_mask_with_gaps_or_empty_scans_is_refused(form, mask):
    model = network(form)
    with pytest.raises(ValueError, match="^mask"):
        model(torch.zeros(2, 3, model.slices, 32, 32), torch.tensor(mask))


@pytest.mark.parametrize("form", FORMS)
def test_slices_that_do_not_fit_the_mask_are_refused(form):
    model = network(form)
    for shape in ((2, 4, model.slices, 32, 32), (2, 3, 32, 32)):
        with pytest.raises(
            ValueError, match=r"^input .* must be \(scans, slices, neighbours, rows, columns\)"
        ):
            model(torch.zeros(shape), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_a_cnn_of_another_name_or_of_other_classes_is_refused(name):
    with pytest.raises(ValueError, match="cnn 'unet': must be one of resnet18"):
        build_model(name, cnn={"name": "unet", "kwargs": {}})
    other = {"name": "resnet18", "kwargs": {"width": 4, "classes": ["c"]}}
    with pytest.raises(
        ValueError, match=r"cnn: its classes \('c',\) must be those of the scan, \('a', 'b'\)"
    ):
        build_model(name, cnn=other, classes=CLASSES)


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
@pytest.mark.parametrize("cnn", CLASSIFIERS)
def test_every_classifier_serves_every_network_for_scans(name, cnn):
    with torch.device("meta"):
        model = build_model(name, cnn={"name": cnn, "kwargs": {}}, classes=CLASSES)
    assert type(model.cnn) is type(build_model(cnn, **TINY[cnn]))
    assert model.cnn.classes == ("a", "b")


def test_lengths_of_counts_the_slices_of_each_scan():
    _, mask = scans(network("cnn-bilstm"))
    assert lengths_of(mask).tolist() == list(LENGTHS)


# ---------------------------------------------------------------- BiLSTM


def test_the_bilstm_ends_where_each_scan_ends_and_begins():
    torch.manual_seed(0)
    model = BiLSTM(3, 4, 1, 0.0)
    x = torch.randn(3, 6, 3)
    lengths = torch.tensor([2, 6, 3])
    outputs, final = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(final[row, :4], outputs[row, length - 1, :4])  # forward: at the last slice
        torch.testing.assert_close(final[row, 4:], outputs[row, 0, 4:])  # backward: at the first
        assert not outputs[row, length:].any()


def test_the_final_state_still_hears_a_slice_16_before_the_end():
    torch.manual_seed(0)
    ours = BiLSTM(8, 32, 1, 0.0)
    theirs = copy.deepcopy(ours)
    theirs.lstm = nn.LSTM(8, 32, batch_first=True, bidirectional=True)

    def heard(model):
        x = torch.randn(16, 17, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(x, torch.full((16,), 17))[1][:, :32].square().sum().backward()
        return x.grad[:, 0].norm() / x.grad[:, -1].norm()

    assert heard(ours) > 0.02
    assert heard(ours) > 20 * heard(theirs)


def test_dropout_of_a_single_layer_warns_of_nothing(recwarn):
    BiLSTM(3, 4, 1, 0.5)
    assert not recwarn.list


# ---------------------------------------------------------------- CNN-BiLSTM


def test_the_slices_of_the_cnn_bilstm_are_those_of_its_cnn_alone():
    model = network("cnn-bilstm")
    hu, mask = scans(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(hu, mask).slices[mask], model.cnn(hu[mask]))


def test_a_trained_classifier_can_begin_a_cnn_bilstm():
    cnn = build_model("resnet18", classes=CLASSES, width=4)
    model = build_model(
        "cnn-bilstm", cnn={"name": "resnet18", "kwargs": {"classes": CLASSES, "width": 4}}, classes=CLASSES
    )
    model.cnn.load_state_dict(cnn.state_dict())
    hu = 40 + 60 * torch.randn(2, 1, 32, 32)
    assert torch.equal(model.eval().cnn(hu), cnn.eval()(hu))


def test_the_cnn_bilstm_learns_scans_by_one_slice_of_six():
    torch.manual_seed(0)
    model = build_model("cnn-bilstm", cnn=CNN, embedding=16, hidden=16).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mask = torch.ones(8, 6, dtype=torch.bool)

    def draw(generator):
        hu = 30 + 5 * torch.randn(8, 6, 1, 32, 32, generator=generator)
        targets = (torch.arange(8) % 2).float()[:, None]
        place = torch.randint(6, (8,), generator=generator)
        hu[torch.arange(8), place, 0, 8:20, 8:20] += 30 * targets[:, :, None]  # blood, 12 pixels wide
        return hu, targets

    generator = torch.Generator().manual_seed(1)
    for _ in range(80):  # 1 s; right from step 50 on for two seeds
        hu, targets = draw(generator)
        loss = nn.functional.binary_cross_entropy_with_logits(model(hu, mask).scan, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hu, targets = draw(torch.Generator().manual_seed(9))
    with torch.inference_mode():
        assert ((model.eval()(hu, mask).scan > 0) == (targets > 0)).all()


# ---------------------------------------------------------------- two stages


@pytest.mark.parametrize("form", ["two-stage", "two-stage-2.5d"])
def test_the_cnn_of_two_stages_stays_as_it_is_whatever_trains_around_it(form):
    model = network(form)
    before = copy.deepcopy(model.cnn.state_dict())
    around = nn.Sequential(model).train()
    optimizer = torch.optim.AdamW(around.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(*scans(model)).scan.sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.cnn.state_dict().items())
    assert not any(part.training for part in model.cnn.modules())
    assert model.reader.training


def test_the_features_are_scikit_learns_principal_components_and_the_probabilities():
    from sklearn.decomposition import PCA

    model = network("two-stage")
    hu = 40 + 60 * torch.randn(20, 1, 40, 40, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        embeddings = model.cnn.embed(hu)
        oracle = PCA(5, svd_solver="full").fit(embeddings.numpy().astype(np.float64))
        model.set_pca(torch.from_numpy(oracle.mean_), torch.from_numpy(oracle.components_))
        features = model.features_of(hu)
        wanted = torch.from_numpy(oracle.transform(embeddings.numpy())).float()
        scale = float(wanted.abs().max())
        torch.testing.assert_close(features[:, :5], wanted, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(features[:, 5:], model.cnn(hu).sigmoid())
    assert features.shape == (20, 7)


def test_features_that_were_worked_out_before_are_read_as_the_slices_themselves():
    model = network("two-stage")
    hu, mask = scans(model)
    features = torch.full((*mask.shape, 7), torch.nan)
    with torch.inference_mode():
        features[mask] = model.features_of(hu[mask])
        for cached, whole in zip(model.read(features, mask), model(hu, mask), strict=True):
            torch.testing.assert_close(cached, whole)


def test_the_probabilities_skip_the_bilstm():
    model = network("two-stage")
    with torch.no_grad():
        for parameter in model.reader.bilstm.parameters():
            parameter.zero_()
    features = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 4, dtype=torch.bool)
    other = features.clone()
    other[:, :, :5] += 1  # the components, which only the BiLSTM sees
    assert torch.equal(model.read(features, mask).slices, model.read(other, mask).slices)
    other[:, 2, 5:] += 1
    changed = (model.read(features, mask).slices != model.read(other, mask).slices).any(dim=2)
    assert changed.tolist() == [[False, False, True, False]]


def test_two_stages_are_refused_before_their_components_are_known():
    model = build_model("two-stage", classes=CLASSES, **FORMS["two-stage"][1])
    with pytest.raises(ValueError, match=r"principal components: are not known yet .*set_pca"):
        model.features_of(torch.zeros(1, 1, 32, 32))


def test_components_that_do_not_fit_are_refused():
    model = network("two-stage")
    for mean, components in ((torch.zeros(3), torch.zeros(5, 32)), (torch.zeros(32), torch.zeros(4, 32))):
        with pytest.raises(ValueError, match=r"^pca_.* must be \("):
            model.set_pca(mean, components)
    for count in (0, 33):
        with pytest.raises(ValueError, match=f"components {count}: must be in 1 .. 32"):
            build_model("two-stage", cnn=CNN, components=count)
    with pytest.raises(ValueError, match=r"features .* must be \(scans, slices, 7\)"):
        model.read(torch.zeros(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))


def test_the_second_stage_has_burdujas_sizes():
    cnn = {"name": "resnext101", "kwargs": {"classes": list("abcdef")}}
    with torch.device("meta"):
        model = build_model("two-stage", cnn=cnn, classes=list("abcdef"))
    lstm = model.reader.bilstm.lstm
    assert (lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.dropout) == (126, 256, 3, 0.3)
    assert model.pca_components.shape == (120, 2048)
    assert model.reader.dropout.p == 0.5
    assert model.reader.slice_head.in_features == 2 * 256 + 6
