"""The audit: a clean data set passes, and each planted fault is found and named."""

import json

import numpy as np
import pytest
from PIL import Image

import check_dataset
import prepare_dataset
import stage
from dataset import all_series, load_pack, series_folders
from slice_files import read_npz, write_npz
from volumes import ASSUMED_HU


def audit(data, out, *more):
    check_dataset.main(["--data", str(data), "--out", str(out), *more])


def spoil(data, change, split="train", number=0):
    path = series_folders(data, split)[number] / "metadata.json"
    metadata = stage.read_json(path, "")
    change(metadata)
    stage.write_json(path, metadata)
    return metadata


def found(data, out, words):
    with pytest.raises(stage.StageError, match=words) as failed:
        audit(data, out)
    assert failed.value.exit_code == 1
    return json.loads((out / "audit.json").read_text())["spoiling"]


def test_audit_of_clean_data_passes_and_counts_everything(split_data, tmp_path, capsys):
    audit(split_data, tmp_path, "--contact-sheets", "2")
    facts = json.loads((tmp_path / "audit.json").read_text())["facts"]
    assert facts["patients"] == 14
    assert facts["slices"] == 14 * 6
    assert sum(facts["series"].values()) == 14
    assert "Nothing found" in capsys.readouterr().out
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 2
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_audit_finds_an_identical_image_on_two_sides(split_data, tmp_path):
    one = stage.read_json(series_folders(split_data, "train")[0] / "metadata.json", "")

    def copy(metadata):
        metadata["slices"][1]["sha256"] = one["slices"][2]["sha256"]

    spoil(split_data, copy, "test")
    lines = found(split_data, tmp_path, "two sides")["on two sides of the split"]
    assert len(lines) == 1
    assert one["slices"][2]["sha256"]["image"][:12] in lines[0]


def test_audit_finds_a_patient_on_two_sides_and_under_two_sources(split_data, tmp_path):
    one = stage.read_json(series_folders(split_data, "train")[0] / "metadata.json", "")
    spoil(split_data, lambda m: m.update(patient_id=one["patient_id"], source="bhsd"), "test")
    spoiling = found(split_data, tmp_path, "two sides.*two sources")
    assert one["patient_id"] in spoiling["the same patient under two sources"][0]


@pytest.mark.parametrize(
    ("classes", "labels", "words"),
    [
        ([0, 5], {"subdural": 0, "any": 1}, "mask shows subdural"),
        ([0], {"subdural": 1, "any": 1}, "label says subdural"),
        ([0, 2], {"intraparenchymal": None, "any": 0}, "mask shows a haemorrhage"),
        ([0, 255], {}, "mask shows a lesion"),
    ],
)
def test_audit_finds_a_mask_that_contradicts_its_labels(split_data, tmp_path, classes, labels, words):
    def change(metadata):
        entry = metadata["slices"][3]
        entry["labels"] = dict.fromkeys(entry["labels"], 0) | labels
        entry["mask_classes"] = classes
        metadata["labels"] = dict.fromkeys(metadata["labels"], 1)

    spoil(split_data, change)
    lines = found(split_data, tmp_path, "labels and mask disagree")["labels and mask disagree"]
    assert any(words in line and "slice 3" in line for line in lines)


def test_audit_finds_labels_that_contradict_each_other(split_data, tmp_path):
    def change(metadata):
        metadata["slices"][0]["labels"] |= dict.fromkeys(metadata["slices"][0]["labels"], 0) | {"any": 1}
        metadata["slices"][0]["mask_classes"] = None

    spoil(split_data, change)
    spoiling = found(split_data, tmp_path, "contradict each other")
    assert "any is 1" in spoiling["labels that contradict each other"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(spacing_mm=[5.0, 40.0, 40.0]), "pixel spacing 40"),
        (lambda m: m.update(noise_hu=80.0), "noise of 80.0 HU"),
    ],
)
def test_audit_finds_impossible_geometry_and_noise(split_data, tmp_path, change, words):
    spoil(split_data, change)
    lines = found(split_data, tmp_path, "not HU, or odd")["values that are not HU, or odd geometry"]
    assert any(words in line for line in lines)


def test_audit_finds_values_that_are_not_hu(split_data, tmp_path):
    folder = next(iter(all_series(split_data)))
    for path in folder.glob("*/image.npz"):
        np.savez(path, np.load(path)["arr_0"] + np.int16(1024))
    lines = found(split_data, tmp_path, "not HU")["values that are not HU, or odd geometry"]
    assert folder.name in lines[0]


def test_audit_leaves_values_alone_that_somebody_vouched_for_and_lists_them(split_data, tmp_path):
    folder = next(iter(all_series(split_data)))
    for path in folder.glob("*/image.npz"):
        write_npz(path, read_npz(path) + np.int16(1024))
    metadata = stage.read_json(folder / "metadata.json", "")
    for entry in metadata["slices"]:
        entry["repairs"] = [ASSUMED_HU]
    stage.write_json(folder / "metadata.json", metadata)
    audit(split_data, tmp_path)
    facts = json.loads((tmp_path / "audit.json").read_text())["facts"]
    assert facts["repairs"] == {ASSUMED_HU: 6}


@pytest.mark.parametrize("compress", [False, True])
def test_audit_finds_a_packed_cache_that_has_changed_or_is_cut_off(split_data, tmp_path, compress):
    for split in ("train", "val", "test"):
        load_pack(split_data, split, 24, compress)
    noise = split_data / "cache" / "train-24-noise-x"  # another folder of the cache is none of a pack's
    noise.mkdir()
    stage.write_json(noise / "index.json", {"key": "x"})
    audit(split_data, tmp_path)
    ending = "slices" if compress else "npy"
    changed = split_data / "cache" / "train-24" / f"image.{ending}"
    data = bytearray(changed.read_bytes())
    data[-5] ^= 8
    changed.write_bytes(data)
    cut = split_data / "cache" / "val-24" / f"mask.{ending}"
    cut.write_bytes(cut.read_bytes()[:-5])
    lines = found(split_data, tmp_path, "damaged packed caches")["damaged packed caches"]
    uid = load_pack(split_data, "train", 24).series[-1]["series_uid"]
    assert len(lines) == 2
    assert f"train-24: image of series {uid} has changed" in lines[0]
    assert "val-24: mask is damaged" in lines[1]


def test_audit_names_painted_files_that_were_left_out(tmp_path, capsys):
    grey = np.random.default_rng(0).integers(0, 255, (2, 32, 32), np.uint8)
    for number, image in enumerate(grey):
        place = tmp_path / "in" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(place)
    red = np.stack([grey[0], grey[0] // 2, grey[0] // 2], axis=-1)
    Image.fromarray(red).save(tmp_path / "in" / "painted.png")
    (tmp_path / "in" / "OVERLAY").mkdir()
    Image.fromarray(red).save(tmp_path / "in" / "OVERLAY" / "0.png")
    data = tmp_path / "data"
    prepare_dataset.main(["--source", "png", "--input", tmp_path / "in", "--out", data, "--workers", 1])
    audit(data, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "audit.json").read_text())["facts"]
    assert facts["slices"] == 2 and facts["rejected"] == {"painted": 2}
    assert sorted(facts["painted_files_left_out"]) == [
        str(tmp_path / "in" / "OVERLAY" / "0.png"),
        str(tmp_path / "in" / "painted.png"),
    ]
    assert "painted files left out: 2, e.g. " in capsys.readouterr().out


def test_audit_of_nothing_says_what_to_run(tmp_path):
    with pytest.raises(stage.InputError, match=r"prepare_dataset\.py"):
        audit(tmp_path, tmp_path / "out")
    with pytest.raises(stage.InputError, match="no such folder"):
        audit(tmp_path / "nowhere", tmp_path / "out")
