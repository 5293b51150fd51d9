"""HU as pictures: windows to grey, differences to colour, the radiological view, outlines, notes.

Arrays in, arrays or PNG bytes out; for whatever shows a slice, in a browser or on a contact sheet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from dataset import BRAIN_WINDOW, window_hu

NOTICE = "research use only"
LOW_RGB, HIGH_RGB = (33, 102, 172), (178, 24, 43)  # ends of the RdBu map, told apart by the colour-blind
OUTLINE_PX = 3  # still seen when four views share 1280 px
LESION_RGB = {  # Okabe and Ito 2008, told apart by the colour-blind and from grey
    1: (230, 159, 0),
    2: (240, 80, 60),
    3: (86, 180, 233),
    4: (240, 228, 66),
    5: (204, 121, 167),
    6: (0, 200, 140),
    255: (255, 255, 255),
}
FOUND_RGB, TRUE_RGB = (255, 0, 0), (0, 255, 0)  # as the earlier system had them; area and line differ too
FOUND_COVER = 0.4  # of the grey: what lies below is still to be judged
OVERLAY_PX = 512  # in which the notes can be read


def to_grey(hu: np.ndarray, center: float, width: float) -> np.ndarray:
    """HU -> uint8 over the window center +- width / 2, of the same shape."""
    return np.round(window_hu(hu, center, width) * 255).astype(np.uint8)


def difference_rgb(difference_hu: np.ndarray, range_hu: float) -> np.ndarray:
    """Blue below, white at and red above zero: (H, W) HU -> (H, W, 3) uint8, full colour at +-range_hu."""
    share = np.clip(np.asarray(difference_hu, np.float32) / range_hu, -1, 1)[..., None]
    end = np.where(share < 0, np.array(LOW_RGB), np.array(HIGH_RGB))
    return np.round(255 + np.abs(share) * (end - 255)).astype(np.uint8)


def radiological(image: np.ndarray, affine: Sequence) -> np.ndarray:
    """Turn (H, W, ...) so that the patient's right is at the left edge and the nose is up.

    affine: (4, 4), (column, row, slice, 1) -> LPS mm, as in metadata.json."""
    # where a step in column and a step in row lead: (to the left, to the back)
    columns_to, rows_to = np.asarray(affine, float)[:2, :2].T
    if abs(columns_to[1]) > abs(columns_to[0]):
        image = image.swapaxes(0, 1)
        columns_to, rows_to = rows_to, columns_to
    if columns_to[0] < 0:
        image = image[:, ::-1]
    return image[::-1] if rows_to[1] < 0 else image


def enlarge(image: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> side_px x side_px, smooth; masks (bool) stay sharp. Larger ones stay."""
    if max(image.shape[:2]) >= side_px:
        return image
    how = Image.Resampling.NEAREST if image.dtype == bool else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((side_px, side_px), how))


def draw_outlines(
    rgb: np.ndarray, lesions: np.ndarray, colours: Mapping[int, tuple[int, int, int]] = LESION_RGB
) -> np.ndarray:
    """A line around every lesion class. rgb: (N, N, 3) uint8; lesions: (n, n) uint8, n <= N."""
    out = rgb.copy()
    for value, colour in colours.items():
        if not (lesions == value).any():
            continue
        inside = enlarge(lesions == value, len(rgb))
        out[ndimage.binary_dilation(inside, iterations=OUTLINE_PX) & ~inside] = colour
    return out


def paint(
    rgb: np.ndarray, inside: np.ndarray, colour: tuple[int, int, int], cover: float = FOUND_COVER
) -> np.ndarray:
    """A colour over a part of a picture. rgb: (H, W, 3) uint8; inside: (H, W) bool."""
    out = rgb.copy()
    out[inside] = np.round((1 - cover) * rgb[inside] + cover * np.array(colour))
    return out


class Note(NamedTuple):
    """What is written on a view: top left, bottom right, and the range of a colour bar if it has one."""

    top: str
    bottom: str = ""
    range_hu: float | None = None


def annotate(rgb: np.ndarray, note: Note) -> bytes:
    """PNG of a view with R, L, A, P, what it shows, and the notice. rgb: (N, N, 3) uint8, radiological."""
    image = Image.fromarray(rgb)
    draw = ImageDraw.Draw(image)
    side = len(rgb)
    letters, small = (ImageFont.load_default(side * share) for share in (0.055, 0.037))
    light = note.range_hu is None  # the difference map is white
    ink, back = ((235, 235, 235), (0, 0, 0)) if light else ((60, 60, 60), (255, 255, 255))
    edge = side * 0.02
    for text, place, anchor in (
        ("R", (edge, side / 2), "lm"),
        ("L", (side - edge, side / 2), "rm"),
        ("A", (side / 2, edge), "ma"),
        ("P", (side / 2, side - edge), "md"),
    ):
        draw.text(place, text, ink, letters, anchor, stroke_width=2, stroke_fill=back)
    for text, place, anchor in (
        (note.top, (edge, edge), "la"),
        (NOTICE.upper(), (edge, side - edge), "ld"),
        (note.bottom, (side - edge, side - edge), "rd"),
    ):
        draw.text(place, text, ink, small, anchor, stroke_width=1, stroke_fill=back)
    if note.range_hu is not None:
        ramp = np.linspace(-1, 1, side // 3)[None].repeat(side // 40, axis=0)
        corner = (side - side // 3 - int(edge), int(side * 0.9))
        image.paste(Image.fromarray(difference_rgb(ramp, 1)), corner)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # sent to a browser on the same machine: fast before small
    return file.getvalue()


def lesion_overlay(
    hu: np.ndarray,
    found: np.ndarray,
    truth: np.ndarray | None,
    affine: Sequence,
    note: Note,
    window: tuple[float, float] = BRAIN_WINDOW,
) -> bytes:
    """PNG of a slice in radiological view, what was found in red, around what is true a green line.

    hu, found, truth: (N, N), all values of a mask but 0 alike. affine: as for radiological."""
    grey = enlarge(radiological(to_grey(hu, *window), affine), OVERLAY_PX)
    inside = enlarge(radiological(found > 0, affine), OVERLAY_PX)
    rgb = paint(np.repeat(grey[..., None], 3, axis=2), inside, FOUND_RGB)
    if truth is not None:
        lesions = radiological((truth > 0).astype(np.uint8), affine)
        rgb = draw_outlines(rgb, lesions, {1: TRUE_RGB})
    return annotate(rgb, note)
