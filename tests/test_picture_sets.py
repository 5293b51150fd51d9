"""The readers of pictures against sets written here from the phantom, in their exact layouts and defects."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from array_sets import fingerprint
from dataset import load_pack, read_metadata, read_slices, window_hu, write_scan
from phantom import generate_phantom
from picture_sets import PICTURE_READERS, painted_lesion, read_picture
from scans import read_scan
from stage import InputError, write_json
from tests.reading import codes, read_all, read_error, read_one
from volumes import ASSUMED_HU, ASSUMED_WINDOW, LABEL_NAMES, ScanError

SIZE = 64
RED, GREEN = (255, 0, 0), (0, 255, 0)
CLASSES = ("Bleeding", "Ischemia", "Normal")
NONE = dict.fromkeys(LABEL_NAMES)
NO_BLOOD = dict.fromkeys(LABEL_NAMES, 0)


@pytest.fixture(scope="module")
def phantoms():
    """Class -> (grey (S, H, W) uint8, lesion (S, H, W) bool), only slices that show the class."""
    made = {}
    for seed, (name, lesions) in enumerate(
        zip(CLASSES, (["intraparenchymal"], ["ischemia"], []), strict=True)
    ):
        phantom = generate_phantom(seed + 20, size=(SIZE, SIZE + 6), slices=48, lesions=lesions)
        keep = np.flatnonzero(phantom.mask.any(axis=(1, 2)))[:3] if lesions else np.arange(20, 24)
        grey = np.rint(window_hu(phantom.hu[keep].astype(float), 40, 80) * 255).astype(np.uint8)
        assert len(keep) >= 2
        made[name] = grey, phantom.mask[keep] > 0
    return made


def save(path: Path, values: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def paint(grey: np.ndarray, where: np.ndarray, colour=RED, opacity=1.0) -> np.ndarray:
    rgb = np.repeat(grey[..., None], 3, axis=-1).astype(float)
    rgb[where] = (1 - opacity) * rgb[where] + opacity * np.array(colour)
    return rgb.round().astype(np.uint8)


def outline(where: np.ndarray) -> np.ndarray:
    return where & ~ndimage.binary_erosion(where)


def filled(where: np.ndarray) -> np.ndarray:
    return ndimage.binary_fill_holes(where)


# ---------------------------------------------------------------- one picture


def grey_modes(grey: np.ndarray) -> dict[str, Image.Image]:
    image = Image.fromarray(grey)
    palette = image.convert("RGB").quantize(256)
    transparent = Image.merge("LA", (image, Image.new("L", image.size, 9)))
    return {"L": image, "RGB": image.convert("RGB"), "P": palette, "LA": transparent} | {
        "RGBA": Image.merge("RGBA", (image, image, image, Image.new("L", image.size, 9)))
    }


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA"])
def test_read_picture_of_any_grey_mode_gives_its_values_and_ignores_alpha(tmp_path, phantoms, mode):
    grey = (phantoms["Normal"][0][0] // 2) * 2  # few enough levels for an exact palette
    grey_modes(grey)[mode].save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
    values = read_picture(tmp_path / "a.png")
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, grey)


def test_read_picture_ignores_the_orientation_tag(tmp_path, phantoms):
    grey = phantoms["Normal"][0][0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(tmp_path / "a.png", grey, exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), grey)


@pytest.mark.parametrize("convert", ["L", "RGB"])
def test_read_picture_of_a_grey_jpeg_is_grey(tmp_path, phantoms, convert):
    grey = phantoms["Normal"][0][0]
    Image.fromarray(grey).convert(convert).save(tmp_path / "a.jpg", quality=98)
    assert np.abs(read_picture(tmp_path / "a.jpg").astype(int) - grey).max() <= 8


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims this size and whose data are a few bytes."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda _: b"", "damaged"),
        (lambda _: b"<html>404</html>", "damaged"),
        (lambda data: data[:30], "damaged"),
        (lambda _: bomb(65535, 65535), "too_large"),
        (lambda _: bomb(10000, 10000), "too_large"),  # where PIL only warns
        (lambda _: bomb(4097, 10), "too_large"),
        (lambda _: b"GIF89a" + bytes(50), "damaged"),
    ],
)
@pytest.mark.parametrize("source", PICTURE_READERS)
def test_discover_refuses_a_bad_picture_by_name_before_it_is_decoded(tmp_path, phantoms, spoil, code, source):
    path = save(tmp_path / "PNG" / "Normal" / "bad.png", phantoms["Normal"][0][0])
    path.write_bytes(spoil(path.read_bytes()))
    save(tmp_path / "PNG" / "Normal" / "fine.png", phantoms["Normal"][0][1])
    jobs, rejected = PICTURE_READERS[source].discover(tmp_path)
    assert [job.case for job in jobs] == ["PNG/Normal/fine.png"]
    assert [(entry.file, entry.code) for entry in rejected] == [(str(path), code)]
    assert rejected[0].reason.isprintable()


def test_read_of_a_truncated_picture_says_so(tmp_path, phantoms):
    path = save(tmp_path / "a.png", phantoms["Normal"][0][0])
    path.write_bytes(path.read_bytes()[:-600])
    assert read_error("png", tmp_path).code == "damaged"


def test_discover_png_refuses_one_bit_cmyk_and_moving_pictures(tmp_path, phantoms):
    image = Image.fromarray(phantoms["Normal"][0][0])
    image.convert("1").save(tmp_path / "bits.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(
        tmp_path / "moving.png", save_all=True, append_images=[Image.fromarray(phantoms["Normal"][0][1])]
    )
    assert codes("png", tmp_path) == {
        "bits.png": "not_a_slice",
        "cmyk.jpg": "colour",
        "moving.png": "not_a_slice",
        ".": "no_ct",
    }


# ---------------------------------------------------------------- png


def test_png_of_8_bit_comes_back_as_grey_levels_flagged_as_windowed(tmp_path, phantoms):
    grey = phantoms["Bleeding"][0]
    save(tmp_path / "test" / "a" / "head.png", grey[0])
    scan = read_one("png", tmp_path)
    np.testing.assert_array_equal(scan.hu, grey[:1])
    assert (scan.intensity, scan.source, scan.split) == ("windowed", "png", "test")
    assert scan.hu.dtype == np.int16 and np.isnan(scan.noise_hu) and scan.mask is None
    assert scan.labels == NONE
    assert scan.spacing_mm == pytest.approx((5, 250 / (SIZE + 6), 250 / (SIZE + 6)))
    assert sum("assumed" in note for note in scan.repairs[0]) == 2


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("2.png", "10.png", *(f"{i}.png" for i in (1, 3, 4, 5, 6, 7, 8, 9))), [2, 0, *range(3, 10), 1]),
        (("IM-0002.png", "IM-0001.png", "IM-0003.png"), [1, 0, 2]),
        (("s1 of p2 000.jpg", "s1 of p2 001.jpg"), [0, 1]),
        (("1.png", "3.png"), None),  # a gap
        (("10001.png", "10002.png"), None),  # numbers of pictures, not of slices
        (("a1.png", "b2.png"), None),
        (("1.png", "1.jpg"), None),
        (("left.png", "right.png"), None),
    ],
)
def test_png_folder_is_one_series_only_where_numbers_run_without_a_gap(tmp_path, phantoms, names, order):
    grey = [np.full((SIZE, SIZE), 20 * (index + 1), np.uint8) for index in range(len(names))]
    for name, image in zip(names, grey, strict=True):
        save(tmp_path / "scan" / name, image)
    scans = read_all("png", tmp_path)
    if order is None:
        assert sorted(scans) == sorted(f"scan/{name}" for name in names)
        assert len({scan.patient_id for scan in scans.values()}) == len(names)
    else:
        assert list(scans) == ["scan"]
        levels = [20 * (index + 1) for index in order]
        np.testing.assert_allclose(scans["scan"].hu[:, 5, 5], levels, atol=1)  # JPEG
        assert any("order from the slice numbers" in note for note in scans["scan"].repairs[0])


def test_png_folder_of_mixed_sizes_is_not_one_series(tmp_path):
    for index in range(2):
        save(tmp_path / f"{index}.png", np.zeros((SIZE + index, SIZE), np.uint8))
    assert len(read_all("png", tmp_path)) == 2


def test_png_of_jpeg_says_that_detail_was_lost(tmp_path, phantoms):
    save(tmp_path / "a.jpeg", phantoms["Normal"][0][0])
    assert any("JPEG" in note for note in read_one("png", tmp_path).repairs[0])


@pytest.mark.parametrize(("offset", "name"), [(32768, "HU + 32768"), (0, "signed 16 bit")])
def test_png_of_16_bit_hu_is_read_as_hu_where_air_proves_the_offset(tmp_path, offset, name):
    phantom = generate_phantom(3, size=SIZE, slices=6, lesions=[])
    for index, image in enumerate(phantom.hu):
        save(tmp_path / f"{index:03d}.png", (image.astype(np.int32) + offset).astype(np.uint16))
    scan = read_one("png", tmp_path)
    np.testing.assert_array_equal(scan.hu, phantom.hu)
    assert scan.intensity == "hu" and any(name in note for note in scan.repairs[0])


def test_png_of_16_bit_grey_is_scaled_and_of_12_bit_refused(tmp_path, phantoms):
    grey = phantoms["Normal"][0][0]
    save(tmp_path / "wide" / "a.png", grey.astype(np.uint16) * 257)
    scan = read_one("png", tmp_path / "wide")
    np.testing.assert_array_equal(scan.hu[0], grey)
    assert scan.intensity == "windowed" and any("scaled" in note for note in scan.repairs[0])
    hu = generate_phantom(3, size=SIZE, slices=6, lesions=[]).hu[2]
    save(tmp_path / "narrow" / "a.png", (hu + 1024).clip(0).astype(np.uint16))
    assert read_error("png", tmp_path / "narrow").code == "not_hu"


def test_png_of_16_bit_with_assumed_hu_is_taken_as_signed_16_bit_and_of_8_bit_stays_grey(tmp_path, phantoms):
    hu = generate_phantom(3, size=SIZE, slices=6, lesions=[]).hu[2].clip(-100)
    save(tmp_path / "hu" / "a.png", hu.astype(np.int16).view(np.uint16))
    grey = save(tmp_path / "grey" / "a.png", phantoms["Normal"][0][0]).parent
    (wide, eight_bit) = (PICTURE_READERS["png"].discover(folder)[0][0] for folder in (tmp_path / "hu", grey))
    assert PICTURE_READERS["png"].read(wide).intensity == "windowed"
    scan = PICTURE_READERS["png"].read(wide._replace(assume_hu=True))
    np.testing.assert_array_equal(scan.hu[0], hu)
    assert scan.intensity == "hu" and ASSUMED_HU in scan.repairs[0]
    assert PICTURE_READERS["png"].read(eight_bit._replace(assume_hu=True)).intensity == "windowed"


def test_png_leaves_out_what_is_painted_by_colour_or_by_folder_and_keeps_its_neighbours(tmp_path, phantoms):
    grey, lesion = phantoms["Bleeding"]
    save(tmp_path / "0.png", grey[0])
    save(tmp_path / "1.png", paint(grey[1], lesion[1], opacity=0.3))
    save(tmp_path / "2.png", np.repeat(grey[0][..., None], 3, axis=-1))  # RGB, but grey
    save(tmp_path / "OVERLAY" / "a.png", grey[0])
    save(tmp_path / "x" / "Masks" / "a.png", grey[0])
    painted = ["1.png", "OVERLAY/a.png", "x/Masks/a.png"]
    assert codes("png", tmp_path) == dict.fromkeys(painted, "painted")
    assert {scan.hu.shape[0] for scan in read_all("png", tmp_path).values()} == {1}
    assert set(read_all("png", tmp_path)) == {"0.png", "2.png"}


def test_png_of_a_folder_of_overlays_holds_no_scan(tmp_path, phantoms):
    grey, lesion = phantoms["Bleeding"]
    save(tmp_path / "OVERLAY" / "10.png", paint(grey[0], lesion[0]))
    jobs, rejected = PICTURE_READERS["png"].discover(tmp_path / "OVERLAY")
    assert not jobs and [entry.code for entry in rejected] == ["painted", "no_ct"]


def test_png_that_turns_into_colour_before_it_is_read_is_refused(tmp_path, phantoms):
    grey, lesion = phantoms["Bleeding"]
    file = save(tmp_path / "a.png", grey[0])
    (job,), _ = PICTURE_READERS["png"].discover(tmp_path)
    save(file, paint(grey[0], lesion[0]))
    with pytest.raises(ScanError, match="painted"):
        PICTURE_READERS["png"].read(job)


def test_png_of_the_same_pixels_share_a_patient_whatever_the_files(tmp_path, phantoms):
    grey = phantoms["Normal"][0]
    save(tmp_path / "a" / "x.png", grey[0])
    save(tmp_path / "b" / "y.png", grey[0], compress_level=0)
    save(tmp_path / "b" / "z.png", grey[1])
    ids = {case: scan.patient_id for case, scan in read_all("png", tmp_path).items()}
    assert fingerprint(tmp_path / "a" / "x.png") != fingerprint(tmp_path / "b" / "y.png")
    assert ids["a/x.png"] == ids["b/y.png"] != ids["b/z.png"]


# ---------------------------------------------------------------- brain-stroke


def write_class(folder: Path, name: str, grey: np.ndarray, lesion: np.ndarray, first: int = 10001) -> None:
    """One class of the set: PNG, OVERLAY with the lesion painted, DICOM; bare numbers that start anywhere."""
    for index, (image, where) in enumerate(zip(grey, lesion, strict=True)):
        number = first + 3 * index
        save(folder / name / "PNG" / f"{number}.png", image)
        save(folder / name / "OVERLAY" / f"{number}.png", paint(image, where, (RED, GREEN)[index % 2]))
        (folder / name / "DICOM").mkdir(exist_ok=True)
        (folder / name / "DICOM" / f"{number}.dcm").write_bytes(b"not read")


def test_brain_stroke_comes_back_with_values_labels_masks_and_split(tmp_path, phantoms):
    root = tmp_path / "Brain_Stroke_CT_Dataset"
    for name, (grey, lesion) in phantoms.items():
        write_class(root, name, grey[1:], lesion[1:])
        write_class(root / "External_Test", name, grey[:1], lesion[:1])
    scans = read_all("brain-stroke", tmp_path)
    assert len(scans) == sum(len(grey) for grey, _ in phantoms.values())
    for name, (grey, lesion) in phantoms.items():
        value = {"Bleeding": 255, "Ischemia": 6, "Normal": 0}[name]
        labels = {"Bleeding": NONE | {"any": 1}, "Ischemia": NO_BLOOD | {"ischemia": 1}, "Normal": NO_BLOOD}[
            name
        ]
        for index in range(len(grey)):
            part = "External_Test/" if index == 0 else ""
            number = 10001 + 3 * max(index - 1, 0)
            scan = scans[f"Brain_Stroke_CT_Dataset/{part}{name}/PNG/{number}.png"]
            np.testing.assert_array_equal(scan.hu[0], grey[index])
            np.testing.assert_array_equal(scan.mask[0], np.where(filled(lesion[index]), value, 0))
            assert scan.labels == labels and scan.slice_labels == [labels]
            assert scan.split == ("test" if part else None)
            assert (scan.source, scan.intensity) == ("brain-stroke", "windowed")
    assert len({scan.patient_id for scan in scans.values()}) == len(scans)


def test_brain_stroke_that_arrives_split_keeps_its_split(tmp_path, phantoms):
    for place, split in enumerate(("train", "val", "test")):
        for name, (grey, lesion) in phantoms.items():
            index = place % len(grey)
            save(tmp_path / split / "PNG" / name / "7.png", grey[index])
            if name != "Normal":
                save(tmp_path / split / "OVERLAY" / name / "7.png", paint(grey[index], lesion[index]))
    scans = read_all("brain-stroke", tmp_path)
    assert len(scans) == 9
    for case, scan in scans.items():
        assert scan.split == case.split("/")[0]
        assert scan.labels["any"] == int("Bleeding" in case)
        assert bool(scan.mask.any()) == ("Normal" not in case)


def test_discover_brain_stroke_counts_dicom_and_names_lonely_overlays_and_strangers(tmp_path, phantoms):
    write_class(tmp_path, "Bleeding", *phantoms["Bleeding"])
    count = len(phantoms["Bleeding"][0])
    save(tmp_path / "Bleeding" / "OVERLAY" / "9.png", phantoms["Bleeding"][0][0])
    (tmp_path / "labels.csv").write_text("x")
    assert codes("brain-stroke", tmp_path) == {
        "Bleeding/DICOM": "other_file",
        "Bleeding/OVERLAY/9.png": "no_image",
        "labels.csv": "other_file",
    }
    jobs, rejected = PICTURE_READERS["brain-stroke"].discover(tmp_path)
    assert len(jobs) == count
    assert any(entry.reason.startswith(f"{count} files in DICOM") for entry in rejected)
    assert not any("OVERLAY" in job.inputs.image for job in jobs)


@pytest.mark.parametrize("name", ["Bleeding", "Ischemia"])
def test_brain_stroke_without_an_overlay_or_with_an_unpainted_one_has_an_unknown_mask(
    tmp_path, phantoms, name
):
    grey, _ = phantoms[name]
    save(tmp_path / name / "PNG" / "1.png", grey[0])
    save(tmp_path / name / "PNG" / "2.png", grey[1])
    save(tmp_path / name / "OVERLAY" / "2.png", grey[1])
    missing, bare = read_all("brain-stroke", tmp_path).values()
    assert missing.mask is None and "no overlay: mask unknown" in missing.repairs[0]
    assert bare.mask is None and "nothing painted in its overlay: mask unknown" in bare.repairs[0]


def test_brain_stroke_normal_has_an_empty_mask_but_none_where_it_is_painted(tmp_path, phantoms):
    grey, _ = phantoms["Normal"]
    save(tmp_path / "a" / "Normal" / "PNG" / "1.png", grey[0])
    scan = read_one("brain-stroke", tmp_path / "a")
    assert scan.mask.shape == scan.hu.shape and not scan.mask.any()
    save(tmp_path / "b" / "Normal" / "PNG" / "1.png", grey[0])
    save(tmp_path / "b" / "Normal" / "OVERLAY" / "1.png", paint(grey[0], phantoms["Bleeding"][1][0]))
    assert read_error("brain-stroke", tmp_path / "b").code == "label_mask"


def test_brain_stroke_outside_the_classes_has_unknown_labels(tmp_path, phantoms):
    grey, lesion = phantoms["Ischemia"]
    save(tmp_path / "External_Test" / "PNG" / "1.png", grey[0])
    save(tmp_path / "External_Test" / "OVERLAY" / "1.png", paint(grey[0], lesion[0]))
    scan = read_one("brain-stroke", tmp_path)
    assert scan.labels == NONE and scan.split == "test"
    np.testing.assert_array_equal(scan.mask[0], np.where(filled(lesion[0]), 255, 0))


def test_brain_stroke_duplicates_share_a_patient_across_classes_and_splits(tmp_path, phantoms):
    grey, _ = phantoms["Normal"]
    for place in (
        "Normal/PNG/1.png",
        "Normal/PNG/77.png",
        "Ischemia/PNG/5.png",
        "External_Test/Normal/PNG/1.png",
    ):
        save(tmp_path / place, grey[0])
    save(tmp_path / "Normal" / "PNG" / "2.png", grey[1])
    scans = read_all("brain-stroke", tmp_path)
    other = scans.pop("Normal/PNG/2.png").patient_id
    (shared,) = {scan.patient_id for scan in scans.values()}
    assert shared != other and len(scans) == 4


@pytest.mark.parametrize("colour", [RED, GREEN])
@pytest.mark.parametrize("opacity", [1.0, 0.5, 0.15])
@pytest.mark.parametrize("draw", [lambda where: where, outline])
def test_painted_lesion_is_exact_for_any_paint_and_fills_an_outline(
    tmp_path, phantoms, colour, opacity, draw
):
    grey, _ = phantoms["Bleeding"]
    where = np.hypot(*(np.mgrid[:SIZE, : SIZE + 6] - 33)) < 9
    path = save(tmp_path / "a.png", paint(grey[1], draw(where), colour, opacity))
    np.testing.assert_array_equal(painted_lesion(path, grey[1]), where)


@pytest.mark.parametrize("quality", [75, 95])
def test_painted_lesion_from_a_jpeg_overlay_is_nearly_the_same(tmp_path, quality):
    grey = np.random.default_rng(0).integers(90, 130, (256, 256)).astype(np.uint8)
    y, x = np.mgrid[:256, :256]
    where = np.hypot(y - 120, x - 140) < 30
    path = save(tmp_path / "a.jpg", paint(grey, where), quality=quality)
    found = painted_lesion(path, grey)
    assert 2 * (found & where).sum() / (found.sum() + where.sum()) > 0.98
    plain = save(tmp_path / "b.jpg", paint(grey, where & False), quality=quality)
    assert not painted_lesion(plain, grey).any()


def test_painted_lesion_of_another_picture_or_size_is_refused(tmp_path, phantoms):
    grey, lesion = phantoms["Bleeding"]
    other = phantoms["Normal"][0][0]
    for name, overlay in (("other", paint(other, lesion[0])), ("size", paint(grey[0], lesion[0])[1:])):
        path = save(tmp_path / f"{name}.png", overlay)
        with pytest.raises(ScanError) as caught:
            painted_lesion(path, grey[0])
        assert caught.value.code == "overlay" and caught.value.file == str(path)


def test_brain_stroke_refuses_a_painted_or_a_16_bit_image(tmp_path, phantoms):
    grey, lesion = phantoms["Bleeding"]
    save(tmp_path / "a" / "Bleeding" / "PNG" / "1.png", paint(grey[0], lesion[0]))
    assert read_error("brain-stroke", tmp_path / "a").code == "painted"
    save(tmp_path / "b" / "Bleeding" / "PNG" / "1.png", grey[0].astype(np.uint16) * 257)
    assert read_error("brain-stroke", tmp_path / "b").code == "not_8_bit"


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("source", PICTURE_READERS)
def test_discover_of_an_empty_or_missing_folder_says_so(tmp_path, source):
    discover = PICTURE_READERS[source].discover
    jobs, rejected = discover(tmp_path)
    assert not jobs and [entry.code for entry in rejected] == ["no_ct"]
    with pytest.raises(ScanError, match="no such folder"):
        discover(tmp_path / "nowhere")


@pytest.mark.parametrize("source", PICTURE_READERS)
def test_written_scan_holds_what_was_read_and_load_pack_refuses_it(tmp_path, phantoms, source):
    grey, lesion = phantoms["Bleeding"]
    write_class(tmp_path / "raw" / "External_Test" / "test", "Bleeding", grey[:1], lesion[:1])
    scan = read_one(source, tmp_path / "raw")
    folder = write_scan(scan, tmp_path / "out" / "test")
    metadata = read_metadata(folder)
    assert (metadata["source"], metadata["intensity"], metadata["split"]) == (source, "windowed", "test")
    assert metadata["slices"][0]["repairs"] == scan.repairs[0]
    np.testing.assert_array_equal(read_slices(folder, "image", 1), grey[:1])
    if source == "brain-stroke":
        np.testing.assert_array_equal(read_slices(folder, "mask", 1), scan.mask)
    assert str(tmp_path) not in json.dumps(metadata)
    write_json(tmp_path / "out" / "splits.json", {"hash": "x", "patients": {scan.patient_id: "test"}})
    with pytest.raises(InputError, match="windowed 8-bit images have no HU"):
        load_pack(tmp_path / "out", "test", 32)


def test_pictures_of_an_assumed_window_become_its_hu_and_say_so(tmp_path, phantoms):
    grey, lesion = phantoms["Bleeding"]
    write_class(tmp_path / "External_Test", "Bleeding", grey[:1], lesion[:1])
    jobs, _ = PICTURE_READERS["brain-stroke"].discover(tmp_path)
    scan = read_scan(jobs[0]._replace(assume_window=(40.0, 80.0)))
    assert scan.intensity == "hu"
    assert ASSUMED_WINDOW in scan.repairs[0]
    np.testing.assert_array_equal(scan.hu[0], np.rint(grey[0] * (80 / 255)))
    assert scan.hu.max() > 60
    np.testing.assert_array_equal(scan.mask, read_scan(jobs[0]).mask)
    folder = write_scan(scan, tmp_path / "out" / "test")
    write_json(tmp_path / "out" / "splits.json", {"hash": "x", "patients": {scan.patient_id: "test"}})
    assert load_pack(tmp_path / "out", "test", 32).image.max() <= 80
    assert read_metadata(folder)["slices"][0]["repairs"] == scan.repairs[0]
