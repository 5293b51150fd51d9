"""The app in a real browser: pixels on the canvas against the window of known HU, sides, doses, requests."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from display import to_grey
from tests.conftest import ROOT
from tests.test_app import (
    LPS,
    SIZE,
    SLICES,
    make_scan,
    write_checkpoint,
    write_data,
    write_models,
    write_results,
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test does)")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM} (apt-get install chromium)"),
]
WAIT_MS = 60_000  # for what takes a second on a machine that does nothing else
BRAIN_HU, CLOT_HU = 35, 70
BRAIN, CLOT = (SIZE // 2 - 9, SIZE // 2), (SIZE // 2, SIZE // 2 + 8)  # row and column, of flat surroundings
LESION_SLICE = 4  # counts from 1
SLOW = "denoiser_slow"  # it takes long enough for a click


def exact(name: str, *, flipped: bool = False):
    """A head without noise whose clot lies at the left of the patient; flipped: stored from left to right."""
    scan = make_scan(name)
    volumes = {"hu": scan.truth, "truth": scan.truth, "mask": scan.mask}
    affine = LPS.copy()
    if flipped:
        volumes = {kind: np.ascontiguousarray(volume[:, :, ::-1]) for kind, volume in volumes.items()}
        affine[0] = [-4.0, 0, 0, 4.0 * (SIZE - 1)]
    return dataclasses.replace(scan, affine=affine, noise_hu=4.0, **volumes)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the app on a tiny phantom."""
    root = tmp_path_factory.mktemp("browser")
    write_data(root / "data", exact("s1"), exact("s2", flipped=True))
    write_models(root / "models")
    write_checkpoint(root / "models", SLOW, "denoiser", widths=(64, 128, 256))
    write_results(root / "results")
    port = free_port()
    options = [f"--{name}={root / name}" for name in ("data", "models", "results")]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--server.headless", "true", "--", *options, "--device=cpu"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.monotonic() + 60
            while not answers(port):
                assert process.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server):
    """A page that must ask no other host and tell no error. Its first page is Overview."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    asked, told = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: told.append(str(error)))
    opened.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    opened.set_default_timeout(WAIT_MS)
    opened.goto(server)
    opened.get_by_role("link", name="Viewer").wait_for()
    yield opened
    context.close()
    hosts = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("blob", "data")}
    assert hosts == {urlsplit(server).netloc}
    assert told == []


def open_viewer(page, case: str) -> None:
    """The page Viewer at a case, with one view and without overlays."""
    page.get_by_role("link", name="Viewer").click()
    choose(page, "Case", case)
    root(page, ready=case)
    press(page, "g")
    page.get_by_role("button", name="one view").click()


def choose(page, label: str, text: str) -> None:
    """An entry of a select box by a part of its text."""
    box = page.get_by_test_id("stSelectbox").filter(has_text=label)
    box.get_by_role("combobox").click()
    page.get_by_role("option", name=re.compile(text)).first.click()


def root(page, **state):
    """The viewer's root, once its data attributes are so."""
    wanted = "".join(f'[data-{name.replace("_", "-")}="{value}"]' for name, value in state.items())
    found = page.locator(f".viewer{wanted}")
    found.wait_for()
    return found


def press(page, key: str) -> None:
    root(page).focus()
    page.keyboard.press(key)


def settled(page) -> None:
    """Two frames on: whatever was to be drawn is."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixels(page, place: int = 0) -> tuple[np.ndarray, list[float]]:
    """((H, W, 4) uint8 of a view, where its slice lies in it: x, y, width, height)."""
    settled(page)
    canvas = page.locator(".pane canvas").nth(place)
    read = """canvas => {
        const {width, height} = canvas;
        const bytes = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        let text = "";
        for (let i = 0; i < bytes.length; i += 32768)
            text += String.fromCharCode(...bytes.subarray(i, i + 32768));
        return [btoa(text), width, height, canvas.dataset.frame];
    }"""
    data, width, height, frame = canvas.evaluate(read)
    image = np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)
    return image, [float(number) for number in frame.split()]


def at(page, voxel: tuple[int, int], place: int = 0) -> int:
    """The grey level in the middle of a voxel (row, column) as it is seen."""
    image, (x, y, width, height) = pixels(page, place)
    row, column = (voxel[0] + 0.5) / SIZE, (voxel[1] + 0.5) / SIZE
    found = image[int(y + row * height), int(x + column * width)]
    assert found[0] == found[1] == found[2] and found[3] == 255
    return int(found[0])


def grey(hu: float, width: float, level: float) -> int:
    return int(to_grey(np.array([hu]), level, width)[0])


# ---------------------------------------------------------------- the viewer


def test_pixels_are_the_window_of_the_known_hu_under_every_preset(page):
    open_viewer(page, "s1")
    root(page, slice=LESION_SLICE, layers="full")
    for key, (width, level) in {"1": (80, 40), "2": (200, 80), "3": (40, 40), "5": (400, 40)}.items():
        press(page, key)
        root(page, window=f"{width}/{level}")
        for voxel, hu in ((BRAIN, BRAIN_HU), (CLOT, CLOT_HU)):
            assert abs(at(page, voxel) - grey(hu, width, level)) <= 1  # halves round differently
    press(page, "4")
    assert abs(at(page, BRAIN) - grey(BRAIN_HU, 2800, 600)) <= 1
    press(page, "1")
    press(page, "i")
    settled(page)
    assert abs(at(page, BRAIN) - (255 - grey(BRAIN_HU, 80, 40))) <= 1


def test_wheel_keys_and_drag_move_slice_and_window_without_a_word_to_the_server(page):
    sent = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
    page.reload()
    open_viewer(page, "s1")
    canvas = page.locator(".pane canvas").first
    canvas.hover()
    page.wait_for_timeout(1500)  # until the page has said all that it has to say
    before = len(sent)
    page.mouse.wheel(0, -100)
    root(page, slice=LESION_SLICE - 1)
    assert at(page, CLOT) == at(page, BRAIN)  # there is no clot in this slice
    page.mouse.wheel(0, 100)
    root(page, slice=LESION_SLICE)
    for _ in range(6):  # a touchpad sends little at a time
        page.mouse.wheel(0, 10)
    root(page, slice=SLICES)
    for key, slice_ in (("Home", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("PageDown", SLICES), ("End", SLICES)):
        press(page, key)
        root(page, slice=slice_)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down(button="right")
    page.mouse.move(x + 100, y + 30, steps=4)
    page.mouse.up(button="right")
    width, level = map(int, root(page).get_attribute("data-window").split("/"))
    assert width > 80 and level > 40
    press(page, " ")
    root(page, window="80/40", zoom="1.00")
    assert len(sent) == before
    page.wait_for_url("**slice=5")  # the address follows, so that it can be passed on


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_lesion_at_the_left_of_the_patient_is_under_the_letter_l_however_it_is_stored(page, case):
    open_viewer(page, case)
    assert root(page, slice=LESION_SLICE).get_attribute("data-letters") == "RLAP"
    clot, mirrored = at(page, CLOT), at(page, (CLOT[0], SIZE - 1 - CLOT[1]))
    assert clot == grey(CLOT_HU, 80, 40) and abs(mirrored - grey(BRAIN_HU, 80, 40)) <= 1
    press(page, "v")
    assert root(page, axis="coronal").get_attribute("data-letters") == "RLSI"
    press(page, "v")
    assert root(page, axis="sagittal").get_attribute("data-letters") == "APSI"


def test_outline_of_the_truth_is_drawn_around_the_lesion_and_can_be_switched_off(page):
    open_viewer(page, "s1")
    without, _ = pixels(page)
    press(page, "g")
    root(page, lesions="true")
    drawn, (x, y, width, height) = pixels(page)
    changed = (drawn != without).any(axis=2)
    rows, columns = np.nonzero(changed)
    expected = np.array([SIZE // 2 - 2, SIZE // 2 + 3, SIZE // 2 + 6, SIZE // 2 + 12]) / SIZE
    found = [(rows.min() - y) / height, (rows.max() - y) / height]
    found += [(columns.min() - x) / width, (columns.max() - x) / width]
    np.testing.assert_allclose(found, expected, atol=3 / min(width, height))  # a line is 1.5 pixels wide
    green = drawn[changed].astype(int)
    assert (green[:, 1] >= green[:, 0]).all()


def test_dose_slider_simulates_anew_and_less_dose_is_noisier(page):
    open_viewer(page, "s1")
    page.get_by_role("button", name="2 views side by side").click()
    root(page, layers="full low")

    def noise() -> tuple[float, str]:
        image, (x, y, width, height) = pixels(page, 1)
        rows = slice(int(y + 0.25 * height), int(y + 0.45 * height))
        columns = slice(int(x + 0.4 * width), int(x + 0.6 * width))
        return float(image[rows, columns, 0].std()), page.locator(".note").inner_text()

    slider = page.get_by_role("slider", name=re.compile("Dose"))
    slider.focus()
    page.keyboard.press("End")
    page.wait_for_url(re.compile("dose=40(&|$)"))
    page.wait_for_timeout(1500)
    high, told_high = noise()
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_url(re.compile("dose=1(&|$)"))
    page.wait_for_function("told => !document.body.innerText.includes(told)", arg=told_high)
    page.wait_for_timeout(1500)
    low, told_low = noise()
    assert low > 2 * high and told_low != told_high
    assert at(page, CLOT) == grey(CLOT_HU, 80, 40)  # the full dose beside it stays


def test_link_opens_case_dose_and_slice(browser, server):
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    refused = []
    page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
    page.goto(f"{server}/viewer?case=s2&dose=20&slice=2")
    root(page, ready="s2", slice=2)
    page.get_by_text("lambda 20 (50 %)").first.wait_for()
    # Streamlit itself looks for its server below the address of the page before it looks below the root
    assert set(refused) <= {f"{server}/viewer/_stcore/{name}" for name in ("health", "host-config")}
    page.close()


def test_picture_that_is_saved_shows_the_slice_and_says_what_it_is(page):
    open_viewer(page, "s1")
    with page.expect_download() as waiting:
        press(page, "p")
    download = waiting.value
    assert download.suggested_filename.endswith(f"_axial_{LESION_SLICE}.png")
    with Image.open(io.BytesIO(Path(download.path()).read_bytes())) as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown - grey(CLOT_HU, 80, 40)).max(axis=2).min() <= 1  # the clot is there
    footer = shown[-88:]
    assert (footer.max(axis=2) > 150).sum() > 200  # words


def test_keys_of_the_viewer_do_not_reach_streamlit(page):
    open_viewer(page, "s1")
    press(page, "c")  # plays; Streamlit would ask whether to clear its caches
    root(page, slice=1)
    press(page, "c")
    assert page.get_by_role("dialog").count() == 0
    press(page, "?")
    page.get_by_text("window presets").wait_for()
    press(page, "Escape")
    page.get_by_text("window presets").wait_for(state="hidden")


def test_pointer_reads_hu_and_millimetres(page):
    open_viewer(page, "s1")
    canvas = page.locator(".pane canvas").first
    _, (x, y, width, height) = pixels(page)
    position = {"x": x + (CLOT[1] + 0.5) / SIZE * width, "y": y + (CLOT[0] + 0.5) / SIZE * height}
    canvas.hover(position=position)
    settled(page)
    text = page.locator(".hu").inner_text()
    assert f"Full dose {CLOT_HU}" in text
    assert f"L {4 * CLOT[1]:.1f}" in text and f"P {4 * CLOT[0]:.1f}" in text  # of the affine LPS
    assert f"column {CLOT[1] + 1}, row {CLOT[0] + 1}" in text


def test_profile_of_a_row_rises_where_the_clot_is(page):
    open_viewer(page, "s1")
    press(page, "l")
    _, (x, y, width, height) = pixels(page)
    row = y + (CLOT[0] + 0.5) / SIZE * height
    page.locator(".pane canvas").first.hover(position={"x": x + 0.1 * width, "y": row})
    drawn, _ = pixels(page)
    top, bottom = 0.64 * len(drawn), 0.86 * len(drawn)  # of the profile in the view

    def profile_hu(column: int) -> float:
        strip = drawn[int(top) - 3 : int(bottom) + 3, int(x + (column + 0.5) / SIZE * width), :3].astype(int)
        yellow = np.flatnonzero((strip[:, 0] > 180) & (strip[:, 2] < 100))
        return 80 * (1 - (yellow.mean() - 3) / (bottom - top))

    for column, hu in ((CLOT[1], CLOT_HU), (BRAIN[1], BRAIN_HU)):
        assert abs(profile_hu(column) - hu) < 2  # a line of 1.5 pixels
    press(page, "l")
    without, _ = pixels(page)
    assert (without != drawn).any()


# ---------------------------------------------------------------- other pages, the server


def test_every_page_opens_without_an_error(page):
    for name in ("Overview", "Cases", "Viewer", "Experiments", "Training", "Models", "Own scan"):
        page.get_by_role("link", name=name).click()
        page.get_by_text("not a medical device").first.wait_for()
        page.get_by_test_id("stStatusWidget").wait_for(state="detached")
        assert page.get_by_test_id("stException").count() == 0
        assert page.get_by_test_id("stAlertContentError").count() == 0, name


def test_click_on_a_case_opens_it_in_the_viewer(page):
    page.get_by_role("link", name="Cases").click()
    table = page.get_by_test_id("stDataFrame")
    table.wait_for()
    page.get_by_test_id("stStatusWidget").wait_for(state="detached")
    table.click(position={"x": 16, "y": 88})  # left edge of the second row; rows are 35 pixels high
    page.wait_for_url(re.compile("/viewer.*case=s2"))
    root(page, ready="s2")
    choose(page, "Case", "s1")  # and the choice of the next case is not overruled by the address
    root(page, ready="s1")
    page.wait_for_url(re.compile("case=s1"))


def test_folder_of_a_real_tilted_scan_is_read_from_an_upload(page, real_data):
    page.get_by_role("link", name="Own scan").click()
    page.get_by_role("radio", name="Upload").click()
    choosers = page.locator("input[type=file]")
    choosers.nth(1).wait_for(state="attached")
    choosers.nth(1).set_input_files(str(real_data / "head_ge_tilted/dicom"))
    shown = root(page, letters="RLAP", axis="axial")
    page.get_by_text("gantry tilt").wait_for()
    assert int(shown.get_attribute("data-slices")) > 10
    image, _ = pixels(page)
    assert 20 < image[..., :3].mean() < 200 and image[..., 0].std() > 20


def test_long_run_is_cancelled_and_the_page_goes_on(page):
    page.get_by_role("link", name="Own scan").click()
    root(page, axis="axial")
    choose(page, "Denoiser", SLOW)
    page.get_by_role("button", name="Denoise and read").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Denoise and read").wait_for()
    page.get_by_test_id("stStatusWidget").wait_for(state="detached")
    assert page.get_by_role("button", name="Denoised NIfTI").count() == 0
    choose(page, "Denoiser", "denoiser.pt")
    page.get_by_role("button", name="Denoise and read").click()
    page.get_by_role("button", name="Denoised NIfTI").wait_for()


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        (None, None, 101),
        ("evil.example", None, 403),
        (None, "http://evil.example", 403),
    ],
)
def test_session_for_a_foreign_host_or_origin_is_refused(server, host, origin, status):
    own = urlsplit(server).netloc
    connection = http.client.HTTPConnection(own, timeout=20)
    headers = {
        "Host": host or own,
        "Origin": origin or server,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",  # of RFC 6455
        "Sec-WebSocket-Protocol": "streamlit",
    }
    connection.request("GET", "/_stcore/stream", headers=headers)
    assert connection.getresponse().status == status
    connection.close()
