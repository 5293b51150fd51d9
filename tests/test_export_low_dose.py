import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import export_low_dose
import stage
from array_sets import MU_AIR_PER_M, MU_MAX_PER_M, MU_WATER_PER_M, load_array
from artifacts import ARTIFACTS, scan_seed
from batches import to_tensor
from dataset import load_pack, read_metadata, read_slices, series_folders
from dose import LODOPAB_SCAN
from low_dose import LowDose, evaluation_seed, simulate_scan
from scans import READERS, read_scan
from tests.conftest import ROOT


def call(data, out, *args):
    export_low_dose.main([str(arg) for arg in ("--data", data, "--out", out, "--workers", 1, *args)])


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def scans_of(source, folder):
    jobs, rejected = READERS[source].discover(folder)
    assert {entry.code for entry in rejected} <= {"other_file", "filler"}
    return [read_scan(job) for job in jobs]


def expected(folder, model, dose, seed=0):
    """(S, H, W) float32 HU of a prepared series, simulated in one go."""
    metadata = read_metadata(folder)
    count = metadata["shape"][0]
    seeds = [evaluation_seed(seed, folder.name, index, model, dose) for index in range(count)]
    return simulate_scan(
        read_slices(folder, "image", count),
        model,
        [dose] * count,
        seeds,
        spacing_mm=metadata["spacing_mm"],
        noise_hu=metadata["noise_hu"] or math.nan,
    )


def read(hu):
    """What the readers keep of float HU."""
    return np.rint(hu).clip(-1024, 3071).astype(np.int16)


def stored(path):
    with np.load(path) as archive:
        return archive["arr_0"]


# ---------------------------------------------------------------- npz


def test_npz_holds_what_was_simulated_and_the_reader_gets_it_back(split_data, tmp_path):
    out = tmp_path / "out"
    call(split_data, out, "--format", "npz", "--doses", 0.25, 0.1, "--seed", 7)
    series = series_folders(split_data, "test")
    assert {path.name for path in (out / "test").iterdir()} == {folder.name for folder in series}
    for folder in series:
        for dose in (0.25, 0.1):
            whole = np.rint(expected(folder, "projection", dose, 7)).astype(np.int16)
            found = [stored(out / "test" / folder.name / f"{i:05d}" / f"low_{dose}.npz") for i in range(6)]
            np.testing.assert_array_equal(found, whole)
    scans = {scan.hu.tobytes(): scan for scan in scans_of("npz", out)}
    assert len(scans) == len(series)
    for folder in series:
        scan = scans[read_slices(folder, "image", 6).tobytes()]
        assert scan.split == "test"
        np.testing.assert_array_equal(scan.mask > 0, read_slices(folder, "mask", 6) > 0)


def test_npz_of_one_patient_stay_one_patient(split_data, tmp_path):
    first, second = series_folders(split_data, "test")[:2]
    for folder in (first, second):
        metadata = read_metadata(folder)
        stage.write_json(folder / "metadata.json", metadata | {"patient_id": "one"})
    call(split_data, tmp_path / "out", "--format", "npz", "--doses", 0.5)
    patients = [scan.patient_id for scan in scans_of("npz", tmp_path / "out")]
    assert len(set(patients)) == len(patients) - 1


@pytest.mark.parametrize("model", ["calibrated", "poisson"])
def test_npz_of_lambda_models_is_the_noise_of_the_study(split_data, tmp_path, model):
    call(split_data, tmp_path / "out", "--format", "npz", "--dose-model", model, "--doses", 5, "--seed", 3)
    pack = load_pack(split_data, "test", 48)
    rows = np.flatnonzero(pack.series_of == 0)
    study = LowDose(pack, model, [5.0]).evaluation(rows, [5.0] * len(rows), 3)
    folder = tmp_path / "out" / "test" / pack.series[0]["series_uid"]
    found = [stored(folder / f"{index:05d}" / "low_lambda5.npz") for index in range(len(rows))]
    np.testing.assert_array_equal(found, np.rint(study))


def test_npz_goes_beyond_the_range_of_a_scan_but_not_of_its_type(split_data, tmp_path):
    # at lambda 0.002 one photon more is 40,000 HU
    call(split_data, tmp_path / "out", "--format", "npz", "--dose-model", "poisson", "--doses", 0.002)
    low = np.stack([stored(path) for path in (tmp_path / "out").rglob("low_lambda0.002.npz")])
    assert low.dtype == np.int16
    assert low.max() == 2**15 - 1


def test_measured_low_doses_are_exported_as_they_are(split_data, tmp_path):
    for folder in series_folders(split_data, "test"):
        metadata = read_metadata(folder)
        for index, image in enumerate(read_slices(folder, "image", 6)):
            np.savez_compressed(folder / f"{index:05d}" / "low_0.25.npz", arr_0=image + np.int16(7))
        stage.write_json(folder / "metadata.json", metadata | {"low_doses": ["0.25"]})
    arguments = ["--format", "npz", "--dose-model", "measured", "--doses"]
    call(split_data, tmp_path / "out", *arguments, 0.25, 1)
    for folder in series_folders(split_data, "test"):
        place = tmp_path / "out" / "test" / folder.name / "00002"
        np.testing.assert_array_equal(stored(place / "low_0.25.npz"), stored(place / "image.npz") + 7)
        np.testing.assert_array_equal(stored(place / "low_1.npz"), stored(place / "image.npz"))
    with pytest.raises(stage.InputError, match=r"no real low dose of 0\.1, only 0\.25"):
        call(split_data, tmp_path / "other", *arguments, 0.1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["motion", "rings"])
def test_artifact_is_the_same_difference_at_every_dose(split_data, tmp_path, name):
    doses = ["--format", "pairs", "--dose-model", "calibrated", "--doses", 20, 5]
    call(split_data, tmp_path / "clean", *doses)
    call(split_data, tmp_path / "spoilt", *doses, "--artifact", name, "--severity", 0.5)
    folder = series_folders(split_data, "test")[0]
    hu = to_tensor(read_slices(folder, "image", 6))
    pixel_mm = read_metadata(folder)["spacing_mm"][1]
    added = ARTIFACTS[name](hu, 0.5, [scan_seed(0, folder.name)] * 6, pixel_mm) - hu
    for index in range(6):
        for low in ("LDCT_lambda20_hu.npy", "LDCT_lambda5_hu.npy"):
            clean, spoilt = (
                load_array(tmp_path / kind / "test" / f"sample_{index:05d}" / low)
                for kind in ("clean", "spoilt")
            )
            np.testing.assert_allclose(spoilt - clean, added[index, 0], atol=2e-3)


# ---------------------------------------------------------------- pairs


def test_pairs_hold_what_was_simulated_and_the_reader_gets_it_back(split_data, tmp_path):
    out = tmp_path / "out"
    call(split_data, out, "--format", "pairs", "--doses", 0.25, 0.1)
    series = series_folders(split_data, "test")
    scans = {scan.hu.tobytes(): scan for scan in scans_of("pairs", out)}
    assert len(scans) == 6 * len(series)
    patients = set()
    for number, folder in enumerate(series):
        full = read_slices(folder, "image", 6)
        for dose, name in ((0.25, "LDCT_25_hu.npy"), (0.1, "LDCT_10_hu.npy")):
            simulated = expected(folder, "projection", dose)
            for index in range(6):
                sample = out / "test" / f"sample_{6 * number + index:05d}"
                low = np.load(sample / name)
                assert low.dtype == np.float32
                np.testing.assert_array_equal(low, simulated[index])
                scan = scans[full[index : index + 1].tobytes()]
                np.testing.assert_array_equal(scan.low[f"{dose:g}"][0], read(simulated[index]))
                assert scan.split == "test"
                patients.add(scan.patient_id)
    assert len(patients) == len(series)


def test_pairs_bring_pictures_of_low_full_and_difference(split_data, tmp_path):
    call(split_data, tmp_path / "out", "--format", "pairs", "--doses", 0.5, 0.1)
    with Image.open(tmp_path / "out" / "test" / "sample_00003" / "preview.png") as image:
        picture = np.asarray(image)
    assert picture.shape == (2 * 48, 3 * 48, 3)
    low, full, difference = np.split(picture.astype(int), 3, 1)
    np.testing.assert_array_equal(full[:48], full[48:])  # the same slice beside both doses
    np.testing.assert_array_equal(full[..., 0], full[..., 2])  # grey
    assert full.std() > 40
    assert 0 < np.abs(low - full)[:48].mean() < np.abs(low - full)[48:].mean()
    assert difference[:48].mean() > difference[48:].mean()  # nearer to white at the higher dose


def test_pairs_of_a_lambda_model_are_named_by_it(split_data, tmp_path):
    call(split_data, tmp_path / "out", "--format", "pairs", "--dose-model", "calibrated", "--doses", 5)
    sample = tmp_path / "out" / "test" / "sample_00000"
    np.testing.assert_array_equal(
        np.load(sample / "LDCT_lambda5_hu.npy"),
        expected(series_folders(split_data, "test")[0], "calibrated", 5.0)[0],
    )


# ---------------------------------------------------------------- lodopab


@pytest.fixture(scope="module")
def lodopab(split_data_once, tmp_path_factory):
    """(data, out): the val split at two doses; only to be read."""
    out = tmp_path_factory.mktemp("lodopab") / "out"
    call(split_data_once, out, "--format", "lodopab", "--split", "val", "--doses", 1, 0.25)
    return split_data_once, out


def test_lodopab_ground_truth_comes_back_as_whole_hu(lodopab):
    data, out = lodopab
    series = series_folders(data, "val")
    scans = scans_of("lodopab", out)
    assert len(scans) == 6 * len(series)
    assert len({scan.patient_id for scan in scans}) == len(series)
    for number, scan in enumerate(scans):
        assert (scan.split, scan.hu.shape) == ("val", (1, 362, 362))
        image = read_slices(series[number // 6], "image", 6)[number % 6]
        # the 48 pixels of 236 mm lie on 329 of the 362 of 260 mm, middle on middle
        inner = torch.from_numpy(scan.hu[:, 16:345, 16:345]).float()[None]
        small = torch.nn.functional.interpolate(inner, (48, 48), mode="bilinear", antialias=True)[
            0, 0
        ].numpy()
        clipped = image.clip(-1001, 3071)
        assert np.corrcoef(small.ravel(), clipped.ravel())[0, 1] > 0.98
        assert abs(small.mean() - clipped.mean()) < 3
        assert (scan.hu[:, :10] == -1001).all()  # air outside the picture


def test_lodopab_files_have_the_shape_of_the_set(lodopab):
    data, out = lodopab
    count = 6 * len(series_folders(data, "val"))
    shapes = {
        "ground_truth": (128, 362, 362),
        "observation": (128, 1000, 513),
        "observation_0.25": (128, 1000, 513),
    }
    assert {path.name for path in out.glob("*.hdf5")} == {f"{name}_validation_000.hdf5" for name in shapes}
    for name, shape in shapes.items():
        with h5py.File(out / f"{name}_validation_000.hdf5") as file:
            assert list(file) == ["data"]
            assert (file["data"].shape, file["data"].dtype) == (shape, np.float32)
            assert file["data"][count - 1].any()
            assert not file["data"][count:].any()
    patients = (out / "patient_ids_rand_validation.csv").read_text().split()
    assert patients == [str(number) for number in range(count // 6) for _ in range(6)]


def test_lodopab_observation_is_the_noisy_projection_of_its_ground_truth(lodopab):
    _, out = lodopab
    with (
        h5py.File(out / "ground_truth_validation_000.hdf5") as truth,
        h5py.File(out / "observation_validation_000.hdf5") as full,
        h5py.File(out / "observation_0.25_validation_000.hdf5") as low,
    ):
        truth, full, low = (file["data"][3].astype(np.float64) for file in (truth, full, low))
    # what every view sees of the whole slice: the integral over the detectors is the mass
    mass = truth.sum() * (0.26 / 362) ** 2
    np.testing.assert_allclose(full.sum(1) * LODOPAB_SCAN.pitch_mm / 1000, mass, rtol=0.02)
    beside = slice(0, 60)  # rays that pass by the head
    for values, dose in ((full, 1), (low, 0.25)):
        variance = values[:, beside].var() * MU_MAX_PER_M**2
        assert variance == pytest.approx(1 / (4096 * dose), rel=0.05)
        assert abs(values[:, beside].mean()) * MU_MAX_PER_M < 3 / (4096 * dose)
    assert not np.array_equal(full[:, beside], low[:, beside])


def test_lodopab_views_run_as_in_the_set():
    """A dot is seen where ODL's parallel_beam_geometry has it: at x cos + y sin of (j + 1/2) pi / 1000."""
    row, column = 100, 250
    mu = torch.zeros(1, 362, 362)
    mu[0, row, column] = 0.02
    scan = export_low_dose.LodopabViews(*LODOPAB_SCAN)
    lines = export_low_dose._lodopab_lines(mu, scan)[0].double()
    place = torch.arange(513, dtype=torch.float64)
    seen = (lines * place).sum(1) / lines.sum(1)
    # the set stores [x, y], its transpose is upright: x runs along columns, y along rows
    angles = (torch.arange(1000, dtype=torch.float64) + 0.5) * math.pi / 1000
    offset = ((column - 180.5) * angles.cos() + (row - 180.5) * angles.sin()) * 260 / 362
    expected_place = offset / (260 * math.sqrt(2) / 513) + 256
    assert (seen - expected_place).abs().max() < 0.6  # a dot of one pixel between detectors
    assert (seen - expected_place).abs().mean() < 0.2


def test_lodopab_scale_is_that_of_the_reader():
    water = (MU_WATER_PER_M + 40 * (MU_WATER_PER_M - MU_AIR_PER_M) / 1000) / MU_MAX_PER_M
    assert water == pytest.approx(0.25565, abs=1e-4)


def test_lodopab_mends_what_is_missing_with_the_same_bytes(lodopab, tmp_path):
    data, whole = lodopab
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "observation_0.25_validation_000.hdf5").unlink()
    (out / ".ground_truth_validation_000.hdf5.partial").write_bytes(b"half")
    call(data, out, "--format", "lodopab", "--split", "val", "--doses", 1, 0.25)
    assert snapshot(out) == snapshot(whole)


# ---------------------------------------------------------------- going on, and what is refused


def test_samples_are_listed_with_where_they_come_from(split_data, tmp_path):
    out = tmp_path / "out"
    call(split_data, out, "--format", "pairs", "--doses", 0.5)
    with (out / "samples_test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    series = series_folders(split_data, "test")
    assert [row["sample"] for row in rows] == [f"sample_{number:05d}" for number in range(6 * len(series))]
    for row in rows:
        image = read_slices(split_data / "test" / row["series_uid"], "image", 1, int(row["slice_index"]))[0]
        np.testing.assert_array_equal(np.load(out / "test" / row["sample"] / "NDCT_hu.npy"), image)
    manifest = json.loads((out / "export.json").read_text())
    assert manifest["options"]["doses"] == [0.5]
    assert manifest["splits"]["test"]["complete"]
    assert manifest["options"]["split_hash"] == json.loads((split_data / "splits.json").read_text())["hash"]


def test_splits_share_a_folder_and_a_second_run_writes_nothing(split_data, tmp_path, capsys):
    out = tmp_path / "out"
    for split in ("test", "val"):
        call(split_data, out, "--format", "npz", "--doses", 0.5, "--split", split)
    before = snapshot(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    capsys.readouterr()
    call(split_data, out, "--format", "npz", "--doses", 0.5)
    assert "0 of" in capsys.readouterr().out
    assert snapshot(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")} == times


@pytest.mark.slow
def test_workers_do_not_change_a_byte(split_data, tmp_path):
    for workers in (1, 2):
        call(split_data, tmp_path / str(workers), "--format", "pairs", "--doses", 0.1, "--workers", workers)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["npz", "pairs"])
def test_export_killed_at_any_moment_leaves_whole_samples_and_goes_on(split_data, tmp_path, layout):
    options = ["--format", layout, "--doses", "0.1", "--split", "train"]
    call(split_data, tmp_path / "whole", *options)
    expected_files = snapshot(tmp_path / "whole")
    out = tmp_path / "killed"
    command = [
        sys.executable,
        str(ROOT / "export_low_dose.py"),
        "--data",
        str(split_data),
        "--out",
        str(out),
        *options,
    ]
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = len(list(out.glob("train/[!.]*")))
        while len(list(out.glob("train/[!.]*"))) == before and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        with stage.lock(out / ".lock", wait=True):
            pass
        assert process.returncode == -signal.SIGKILL
        visible = {
            p: b for p, b in snapshot(out).items() if not any(part.startswith(".") for part in p.parts)
        }
        done = {path: content for path, content in visible.items() if path.parts[0] == "train"}
        assert 0 < len(done) < len(expected_files)
        assert done.items() <= expected_files.items()
        folders = {path.parts[1] for path in done}
        assert {p for p in expected_files if p.parts[0] == "train" and p.parts[1] in folders} == set(done)
    call(split_data, out, *options)
    assert snapshot(out) == expected_files


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--doses", 0.1], "doses"),
        (["--doses", 0.5, "--seed", 1], "seed 0, not 1"),
        (["--doses", 0.5, "--artifact", "rings", "--severity", 1], "artifact None, not rings"),
        (["--doses", 0.5, "--dose-model", "projection-head-hann"], "projection-head-hann"),
    ],
)
def test_another_export_into_the_same_folder_is_refused(split_data, tmp_path, more, words):
    call(split_data, tmp_path / "out", "--format", "npz", "--doses", 0.5)
    before = snapshot(tmp_path / "out")
    with pytest.raises(stage.InputError, match=words) as refused:
        call(split_data, tmp_path / "out", "--format", "npz", *more)
    assert "choose another --out" in str(refused.value)
    assert snapshot(tmp_path / "out") == before


def test_export_of_data_that_changed_is_refused(split_data, tmp_path):
    call(split_data, tmp_path / "out", "--format", "pairs", "--doses", 0.5)
    shutil.rmtree(series_folders(split_data, "test")[0])
    with pytest.raises(stage.InputError, match="series of test have changed"):
        call(split_data, tmp_path / "out", "--format", "pairs", "--doses", 0.5)


def test_folder_with_other_things_in_it_is_left_alone(split_data):
    before = snapshot(split_data)
    with pytest.raises(stage.InputError, match="is not empty and holds no export"):
        call(split_data, split_data, "--format", "npz", "--doses", 0.5)
    assert snapshot(split_data) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--format", "npz", "--doses", 0], "dose 0"),
        (["--format", "npz", "--doses", 1.5], r"dose 1\.5"),
        (["--format", "npz", "--doses", "nan"], "dose nan"),
        (["--format", "pairs", "--doses", 0.025], r"0\.025: .*whole per cents"),
        (["--format", "pairs", "--doses", 1], "whole per cents"),
        (["--format", "npz", "--doses", 0.5, "--artifact", "rings"], "--severity"),
        (["--format", "npz", "--doses", 0.5, "--severity", 0.5], "--artifact"),
        (["--format", "npz", "--doses", 0.5, "--artifact", "rings", "--severity", 2], "severity 2"),
        (["--format", "lodopab", "--doses", 1, "--dose-model", "projection"], "reprojection-lodopab"),
        (["--format", "lodopab", "--doses", 1, "--artifact", "rings", "--severity", 1], "measurements"),
        (["--format", "npz"], "--doses"),
        (["--doses", 0.5], "--format"),
    ],
)
def test_bad_options_are_refused_in_one_line_before_anything_is_written(split_data, tmp_path, args, words):
    with pytest.raises(ValueError, match=words) as refused:
        call(split_data, tmp_path / "out", *args)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_windowed_data_and_empty_splits_are_refused(split_data, tmp_path):
    folder = series_folders(split_data, "test")[0]
    stage.write_json(folder / "metadata.json", read_metadata(folder) | {"intensity": "windowed"})
    with pytest.raises(stage.InputError, match="have no HU"):
        call(split_data, tmp_path / "out", "--format", "npz", "--doses", 0.5)
    shutil.rmtree(split_data / "val")
    with pytest.raises(stage.InputError, match="no series"):
        call(split_data, tmp_path / "out", "--format", "npz", "--doses", 0.5, "--split", "val")


def test_disk_is_checked_first(split_data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**4)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(stage.StageError, match="GB free") as full:
        call(split_data, tmp_path / "out", "--format", "npz", "--doses", 0.5)
    assert full.value.exit_code == stage.EXIT_DISK


def test_export_in_use_is_refused(split_data, tmp_path):
    (tmp_path / "out").mkdir()
    with stage.lock(tmp_path / "out" / ".lock"), pytest.raises(stage.StageError, match="in use") as held:
        call(split_data, tmp_path / "out", "--format", "npz", "--doses", 0.5)
    assert held.value.exit_code == stage.EXIT_LOCKED


def test_damaged_series_is_named_and_the_others_are_written(split_data, tmp_path):
    series = series_folders(split_data, "train")
    (series[0] / "00002" / "image.npz").write_bytes(b"no zip")
    with pytest.raises(stage.StageError, match=rf"1 of {len(series)} parts .*{series[0].name}") as failed:
        call(split_data, tmp_path / "out", "--format", "npz", "--doses", 0.5, "--split", "train")
    assert failed.value.exit_code == stage.EXIT_REJECTED
    done = {path.name for path in (tmp_path / "out" / "train").glob("[!.]*")}
    assert done == {folder.name for folder in series[1:]}
    assert not json.loads((tmp_path / "out" / "export.json").read_text())["splits"]["train"]["complete"]
