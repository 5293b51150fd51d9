"""Synthetic head CT: volumes in HU with anatomy, strokes, masks, labels by name and the noise-free truth.

Every structure is a smooth implicit function of head coordinates in mm (x to the patient's left, y to the
front, z up, origin near the anterior commissure), so that any matrix and any slice count can be drawn. Tissue
after tissue is laid over what is there with its share of every pixel: soft edges without supersampling.
Positions and radii are those of an average adult head, in mm of the Talairach frame; every patient scales,
tilts and bends them. Shares are 0..1, distances are in mm and positive inside."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from anatomy import LESION_CLASSES
from dose import reconstruction_noise

HEMORRHAGES = LESION_CLASSES[:5]

AIR, FAT, SKIN, MUSCLE = -1000.0, -95.0, 25.0, 58.0  # HU at 120 kV, as all below
CSF, WHITE, GREY, DURA, VENOUS = 7.0, 28.8, 38.6, 50.0, 52.0
COMPACT, DIPLOE, PETROUS, SPONGY = 1450.0, 560.0, 1350.0, 900.0  # bone

FOV_MM = 236.0  # across the smaller matrix axis; a head is 180 to 200 mm long
LOWEST_MM, HIGHEST_MM = -53.0, 88.0  # from the orbito-meatal level to just above the vertex
THICKNESS_MM = 5.0  # of a routine head slice; less where slices lie closer
FINEST_EDGE_MM = 0.9  # focal spot and detector blur at least this much
MIN_AREA_MM2 = 25.0  # a smaller patch of a lesion class is nothing that a reader could be asked to find
TISSUE_HU = (-100.0, 130.0)  # outside lies air or bone, which a mask leaves out
MAX_DRAWS = 8  # of a patient's lesions, until every kind asked for shows in the slices
LATTICE_MM, LATTICE = 3.0, 64  # periodic noise lattice: 192 mm, longer than a brain
CENTRE_Y_MM = 18.0  # the middle of the head lies behind the anterior commissure


class Phantom(NamedTuple):
    """A synthetic scan. S slices from the skull base up; row 0 is anterior, column 0 the patient's right."""

    hu: np.ndarray  # (S, H, W) int16 HU, with the noise of a routine dose
    truth: np.ndarray  # (S, H, W) int16 HU, without noise
    mask: np.ndarray  # (S, H, W) uint8: 0 none, else 1 + index in LESION_CLASSES; haemorrhage wins
    labels: dict[str, int]  # of the scan: LESION_CLASSES and "any" (haemorrhage), 0 or 1
    slice_labels: list[dict[str, int]]  # the same keys: 1 iff the slice's mask holds the class
    spacing_mm: tuple[float, float, float]  # (slice, row, column)
    affine: np.ndarray  # (4, 4): (column, row, slice, 1) to LPS+ mm
    lesions: list[dict]  # one per lesion: kind, volume_ml, contrast_hu, side


class Points(NamedTuple):
    """Where to draw: arrays of one shape, float32 mm."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    edge: float  # width of a soft edge

    @property
    def u(self) -> np.ndarray:
        """Distance from the midline: the head is drawn symmetric and then bent."""
        return np.abs(self.x)


class Patient(NamedTuple):
    """What differs from head to head."""

    rotation: np.ndarray  # (3, 3) scanner to head
    scale: np.ndarray  # (3,) head over average
    offset_mm: np.ndarray  # (3,)
    bends: np.ndarray  # (8, 7): wave vector, phase and amplitude of each smooth deformation
    fold: np.ndarray  # lattice: signed distance in mm to the nearest sheet of a folded surface
    smooth: np.ndarray  # lattice: slowly varying noise, SD 1
    rough: np.ndarray  # lattice: fine noise, SD 1
    places: np.ndarray  # (8, 3) mm: far places of one lattice serve as independent noise
    age: float  # 0 young, 1 old: width of sulci, cisterns and ventricles
    skull_mm: float
    scalp_mm: float
    egg: float  # per mm: how much narrower the forehead is than the back
    squareness: float  # exponent of the superellipse, 2 for an ellipse
    ventricle: tuple[float, float]  # size of the right and of the left one
    csf: float
    white: float
    grey: float
    sinus: float
    mastoid: float
    calcified: frozenset[str]
    holder: bool  # the head rest is in view


class Shell(NamedTuple):
    """Distances in mm to the surfaces around the brain, arrays of the points' shape."""

    k: np.ndarray  # relative radius of the cranial vault, 1 on the inner table
    vault: np.ndarray  # to the inner table of the vault
    floor: np.ndarray  # above the skull base
    inner: np.ndarray  # to the cranial cavity: the smaller of both
    outer: np.ndarray  # to the outer table
    skin: np.ndarray
    steep: np.ndarray  # |z| of the vault's normal: widens edges in a thick slice
    petrous: np.ndarray  # in front of the petrous ridge
    sphenoid: np.ndarray  # in front of the lesser wing
    foramen: np.ndarray  # share of the foramen magnum
    temporalis: np.ndarray  # thickness of the muscle


class Brain(NamedTuple):
    """HU of the brain, and shares of its compartments that lesions need."""

    hu: np.ndarray
    ventricle: np.ndarray
    cistern: np.ndarray  # subarachnoid space
    grey: np.ndarray
    below: np.ndarray  # under the tentorium


class Lesion(NamedTuple):
    """A lesion as drawn from the random numbers."""

    kind: str
    site: str
    side: str  # left, right or both
    centre: np.ndarray  # (3,) mm
    size_mm: float  # radius or greatest thickness
    extent: np.ndarray  # (3,) half axes in mm of what covers the surface, or relative ones of a ball
    hu: float  # of blood; of ischemia its fall
    push_mm: float  # mass effect on the tissue at its border, or on the midline
    rim_mm: float  # oedema around it
    place: np.ndarray  # (3,) mm, of the lattice for its irregular border


# ------------------------------------------------------------------------------------------ shapes and noise


def meet(*distances: np.ndarray | float) -> np.ndarray:
    """What lies inside all."""
    return functools.reduce(np.minimum, distances)


def join(*distances: np.ndarray | float) -> np.ndarray:
    """What lies inside any."""
    return functools.reduce(np.maximum, distances)


def soft(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Share inside, from the signed distance to a border that is `width` wide."""
    return np.clip(distance / width + 0.5, 0.0, 1.0)


def bump(value: np.ndarray, centre: float, width: float) -> np.ndarray:
    """1 at the centre, falling as a Gaussian."""
    return np.exp(-(((value - centre) / width) ** 2))


def lay(hu: np.ndarray, share: np.ndarray, value: float | np.ndarray) -> None:
    """Put a tissue over what is there, in place."""
    hu += share * (value - hu)


def ellipsoid(p: Points, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Distance inside an ellipsoid, on both sides of the head; exact along its shortest axis."""
    return ball(p._replace(x=p.u), centre, radii)


def ball(p: Points, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Distance inside an ellipsoid, on one side."""
    k = sum(((c - float(m)) / float(r)) ** 2 for c, m, r in zip(p[:3], centre, radii, strict=True))
    return (1 - np.sqrt(k)) * float(min(radii))


def tube(p: Points, spine: Sequence[Sequence[float]], squash: float) -> np.ndarray:
    """Distance inside a tube along a polyline of (x, y, z, radius), `squash` times as high as wide."""
    best = np.full_like(p.x, -1e3)
    for (ax, ay, az, ar), (bx, by, bz, br) in zip(spine[:-1], spine[1:], strict=True):
        sx, sy, sz = bx - ax, by - ay, (bz - az) / squash
        x, y, z = p.u - ax, p.y - ay, (p.z - az) / squash
        t = np.clip((x * sx + y * sy + z * sz) / (sx**2 + sy**2 + sz**2), 0, 1)
        gap = np.sqrt((x - t * sx) ** 2 + (y - t * sy) ** 2 + (z - t * sz) ** 2)
        np.maximum(best, ar + t * (br - ar) - gap, out=best)
    return best


def sample(lattice: np.ndarray, p: Points, place: np.ndarray, zoom: float = 1.0) -> np.ndarray:
    """Lattice noise at the points, trilinear and periodic; zoom > 1 makes it finer."""
    at = [(c * zoom + s) / LATTICE_MM for c, s in zip(p[:3], place, strict=True)]
    return ndimage.map_coordinates(lattice, at, order=1, mode="grid-wrap", prefilter=False)


def band_pass(noise: np.ndarray, low_mm: float, high_mm: float) -> np.ndarray:
    """Periodic noise on the lattice, only its wavelengths from low_mm to high_mm, SD 1."""
    f, half = fft.fftfreq(LATTICE, LATTICE_MM), fft.rfftfreq(LATTICE, LATTICE_MM)
    f2 = (f[:, None, None] ** 2 + f[None, :, None] ** 2 + half**2).astype(np.float32)
    amplitude = np.exp(-((f2 * low_mm**2) ** 2)) - np.exp(-((f2 * high_mm**2) ** 2))
    passed = fft.irfftn(fft.rfftn(noise) * amplitude, s=noise.shape)
    return passed / passed.std()


def noise_lattice(rng: np.random.Generator, low_mm: float, high_mm: float) -> np.ndarray:
    """Gaussian lattice noise, SD 1, with wavelengths from low_mm to high_mm."""
    return band_pass(rng.standard_normal((LATTICE,) * 3, np.float32), low_mm, high_mm)


def fold_lattice(rng: np.random.Generator) -> np.ndarray:
    """Signed distance in mm to a labyrinth of sheets, as the sulci are.

    Noise that is sharpened and band-passed in turn grows into stripes, as in a reaction-diffusion system; the
    zero set of plain noise is full of closed bubbles."""
    noise = noise_lattice(rng, 17.0, 32.0)
    for _ in range(5):
        noise = band_pass(np.tanh(2 * noise), 17.0, 32.0)
    slopes = [(np.roll(noise, -1, axis) - np.roll(noise, 1, axis)) / (2 * LATTICE_MM) for axis in range(3)]
    steep2 = sum(slope**2 for slope in slopes)
    return noise / np.sqrt(steep2 + 0.12 * steep2.mean())  # the second term keeps flat places finite


def take(fields: NamedTuple, where: np.ndarray) -> NamedTuple:
    """The same fields at some of the points, as flat arrays."""
    return fields._replace(**{n: v[where] for n, v in fields._asdict().items() if isinstance(v, np.ndarray)})


# --------------------------------------------------------------------------------------------------- patient


def draw_patient(rng: np.random.Generator) -> Patient:
    """A random head: pose, size, shape, folds, age, air cells and calcifications."""
    (cx, cy, cz), (sx, sy, sz) = (
        f(np.radians(rng.normal(0, (3.5, 2.5, 3)).clip(-8, 8))) for f in (np.cos, np.sin)
    )
    pitch = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    roll = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    yaw = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    bends = []
    for low_mm, high_mm, amplitude_mm in [(130, 220, 1.0)] * 5 + [(55, 80, 0.6)] * 3:
        wave = rng.normal(size=3)
        wave *= 2 * math.pi / rng.uniform(low_mm, high_mm) / np.linalg.norm(wave)
        bends.append([*wave, rng.uniform(0, 2 * math.pi), *rng.normal(0, amplitude_mm, 3)])
    age = rng.beta(1.3, 1.6)
    wide = (0.78 + 0.55 * age) * math.exp(rng.normal(0, 0.1))
    chances = {"pineal": 0.6, "choroid": 0.6, "pallidum": 0.12, "falx": 0.2}
    return Patient(
        rotation=pitch @ roll @ yaw,
        scale=rng.normal(0.945, 0.025) * np.exp(rng.normal(0, (0.025, 0.025, 0.02))),
        offset_mm=rng.normal(0, (2.5, 3.0, 1.5)),
        bends=np.array(bends),
        fold=fold_lattice(rng),
        smooth=noise_lattice(rng, 36.0, 120.0),
        rough=noise_lattice(rng, 7.0, 30.0),
        places=rng.uniform(0, LATTICE * LATTICE_MM, (8, 3)),
        age=age,
        skull_mm=rng.uniform(5.2, 8.2),
        scalp_mm=rng.uniform(4.0, 8.0),
        egg=rng.normal(0.0012, 0.0006),
        squareness=rng.uniform(2.05, 2.4),
        ventricle=(wide * math.exp(rng.normal(0, 0.07)), wide * math.exp(rng.normal(0, 0.07))),
        csf=CSF + rng.uniform(-2, 3),
        white=WHITE + rng.uniform(-1.2, 1.2),
        grey=GREY + rng.uniform(-0.8, 1.5),
        sinus=rng.uniform(0.6, 1.3),
        mastoid=rng.uniform(0.6, 1.1),
        calcified=frozenset(name for name, chance in chances.items() if rng.random() < chance),
        holder=bool(rng.random() < 0.5),
    )


def head_points(patient: Patient, x: np.ndarray, y: np.ndarray, z: float, edge: float) -> Points:
    """Scanner mm (x left, y front, z up) to head coordinates: pose, size, and the patient's own bends."""
    scanner = [c - o for c, o in zip((x, y - CENTRE_Y_MM, z), patient.offset_mm.tolist(), strict=True)]
    rows = (patient.rotation / patient.scale[:, None]).tolist()
    straight = [row[0] * scanner[0] + row[1] * scanner[1] + row[2] * scanner[2] for row in rows]
    bent = [c.copy() for c in straight]
    for *wave, phase, ax, ay, az in patient.bends.tolist():
        sine = np.sin(wave[0] * straight[0] + wave[1] * straight[1] + wave[2] * straight[2] + phase)
        for c, amplitude in zip(bent, (ax, ay, az), strict=True):
            c += amplitude * sine
    return Points(*bent, edge)


# --------------------------------------------------------------------------------------------- skull and face


def cranial_vault(patient: Patient, p: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inner table: relative radius, distance, and |z| of its normal."""
    y = p.y + CENTRE_Y_MM + 0.05 * (p.z - 10)
    x = p.u * (1 + patient.egg * y)
    a, b, c = 69.5, 87.5, np.where(p.z > 0, np.float32(78), np.float32(92))
    n = patient.squareness
    plane = ((x / a + 1e-4) ** n + (np.abs(y) / b + 1e-4) ** n) ** (2 / n)
    k = np.sqrt(plane + (p.z / c) ** 2) + 1e-4
    slope = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (p.z / c**2) ** 2) / k + 1e-4
    return k, (1 - k) / slope, np.abs(p.z / c**2) / k / slope


def skull_base(p: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Height in mm of the floor of the three cranial fossae; distances to the ridges that divide them."""
    u = p.u
    petrous = (u - 14) * 0.504 + (p.y + 13) * 0.863 + 1.6 * np.sin(0.11 * u + 0.05 * p.z)
    sphenoid = p.y - 22 + 0.016 * (u - 36) ** 2
    clivus = -31 + 1.4 * (p.y + 10) - 0.05 * u**2
    posterior = join(-69 + 0.0075 * u**2 + 0.011 * (p.y + 52) ** 2, clivus)
    middle = -47 + 0.010 * (u - 36) ** 2 + 0.004 * (p.y - 2) ** 2
    anterior = -28 + 9 * bump(u, 37, 18) * bump(p.y, 54, 23) + 0.004 * u**2  # the bump is the orbital roof
    floor = middle + soft(sphenoid, 6) * (anterior - middle)
    floor += soft(-petrous, 8) * (posterior - floor)
    medial = np.maximum(14 - u, 0) ** 2
    crest = -31 + 0.06 * u - 7 * (petrous / (5 + 0.08 * u)) ** 2 - 0.2 * medial
    wing = -17 - 0.28 * sphenoid**2 - 0.05 * medial
    sella = -30 - 0.25 * np.maximum(u - 9, 0) ** 2 - 0.44 * np.maximum(np.abs(p.y + 1) - 9, 0) ** 2
    return join(floor, crest, wing, sella), petrous, sphenoid


def head_shell(patient: Patient, p: Points, pixel_mm: float) -> Shell:
    """All surfaces around the brain, on a plane of (H, W) points."""
    u = p.u
    k, vault, steep = cranial_vault(patient, p)
    height, petrous, sphenoid = skull_base(p)
    foramen = soft(15.5 - np.hypot(u, (p.y + 44) * 0.85), 3)
    gy, gx = np.gradient(height, pixel_mm)
    # the slope turns a height into a distance; capped, or a cliff would reach far up
    floor = (p.z - height + 60 * foramen) / np.sqrt(1 + np.minimum(gx**2 + gy**2, 2.0))
    lumps = sample(patient.smooth, p, patient.places[1], 0.7)
    thickness = patient.skull_mm * (1 + 0.13 * lumps) * (1 - 0.42 * bump(p.z, -12, 26) * bump(p.y, 0, 45))
    thickness += 3.5 * bump(u, 0, 9) * bump(p.z, -16, 14) * (p.y < -60)  # inion
    thickness += 2.0 * soft(p.y - 45, 20) * soft(p.z + 5, 15)
    thickness += 4.0 * patient.sinus * bump(u, 9, 14) * bump(p.z, -17, 12) * soft(p.y - 45, 20)  # brow
    outer = vault + thickness
    temporalis = 7 * soft(u - 40, 10) * bump(p.z, -25, 26) * bump(p.y, 18, 26)
    scalp = patient.scalp_mm * (1 + 0.06 * lumps) + temporalis + 3 * soft(-p.y - 70, 20) * soft(-p.z, 20)
    jaw = ball(p, (0, 10, -60), (66, 66, 75))
    neck = meet(ball(p, (0, -42, -60), (68, 64, 70)), -20 - p.z)
    nose = 14 - np.hypot(u * 1.2, (p.y - 74) * 0.75) - 0.8 * np.maximum(p.z + 38, 0)
    ear = ellipsoid(p, (75, -32, -42), (3.5, 13, 24))
    skin = join(outer + scalp, jaw, neck, nose, ear)
    return Shell(
        k, vault, floor, meet(vault, floor), outer, skin, steep, petrous, sphenoid, foramen, temporalis
    )


def soft_tissue(patient: Patient, p: Points, s: Shell, wide: np.ndarray) -> np.ndarray:
    """HU of the head without bone, face and brain: skin, fat under it, galea, muscle."""
    hu = np.full_like(p.x, AIR)
    lay(hu, soft(s.skin, wide), FAT)
    lay(hu, soft(meet(s.skin, 2.2 - s.skin), p.edge), SKIN)
    lay(hu, soft(s.temporalis - 2.5, 2) * soft(meet(s.skin - 2.8, -s.outer - 0.5), p.edge), MUSCLE)
    lay(hu, 0.7 * soft(1.2 + s.outer, p.edge) * soft(-s.outer, p.edge), 40)  # galea
    low = p.z < 5
    strands = np.zeros_like(p.x)
    deep = low & (s.inner < 2) & (s.skin > 0)
    strands[deep] = soft(sample(patient.rough, take(p, deep), patient.places[0], 0.8) + 0.55, 0.5)
    lay(hu, soft(s.skin - 0.9 * patient.scalp_mm, 3) * strands, MUSCLE)
    return hu


def septa(patient: Patient, p: Points, place: int, zoom: float) -> np.ndarray:
    """Share of bony walls among air cells."""
    return np.clip(1.25 - 2.2 * np.abs(sample(patient.rough, p, patient.places[place], zoom)), 0, 1)


def orbits(hu: np.ndarray, p: Points, skin: np.ndarray) -> None:
    """Bony cone of the orbit with fat, optic nerve, muscles and the globe, in place."""
    e, u = p.edge, p.u
    t = np.clip((p.y - 18) / 45, 0, 1.3)  # 0 at the optic canal, 1 at the rim
    radius = 3 + 15.5 * np.sqrt(t)
    x, z = u - (13 + 18 * t), p.z + 32 + 5 * t
    off = np.hypot(x, 1.05 * z)
    along = meet(p.y - 17, 75 - p.y)
    wall = soft(2.4 - np.abs(off - radius - 1.2), e) * soft(meet(along, 62 - 0.35 * u - p.y), 2)
    lay(hu, wall * soft(skin - 3, 2), SPONGY)
    inside = soft(meet(radius - off, along), e) * soft(skin - 1.5, 2)
    lay(hu, inside, FAT)
    nerve = soft(2.0 - np.hypot(x, z), e) * soft(50 - p.y, 3)
    recti = soft(1.6 - np.abs(off - 0.72 * radius), e) * soft(52 - p.y, 6) * soft(np.abs(x) - 0.4 * radius, 2)
    lay(hu, inside * join(nerve, recti), 42)
    globe = ellipsoid(p, (31, 57, -37), (12.2, 12.5, 12))
    lay(hu, soft(globe, e), 48)
    lay(hu, soft(globe - 1.6, e), 11)
    lay(hu, soft(ellipsoid(p, (31, 66, -37), (4.5, 2.2, 4.5)), e), 85)  # lens


def face(patient: Patient, hu: np.ndarray, p: Points, skin: np.ndarray) -> None:
    """Orbits, cheek bones, sphenoid, ethmoid and maxillary sinuses, in place."""
    e, u = p.edge, p.u
    orbits(hu, p, skin)
    body = soft(meet(14 - u, 22 - p.y, p.y + 22), 3) * soft(-28 - p.z, 3)
    lay(hu, body, 620)
    sphenoid = ellipsoid(p, (0, 8, -39), (12 * patient.sinus, 11, 9))
    lay(hu, soft(sphenoid + 1.5, e), SPONGY)
    lay(hu, soft(meet(sphenoid, np.abs(p.x - 2 * patient.sinus) - 0.7), e), AIR)
    flare = 0.16 * np.maximum(-40 - p.z, 0) - 0.06 * (62 - p.y)
    ethmoid = meet(11.5 + flare - u, 62 - p.y, p.y - 18, -28.5 - p.z)
    ethmoid += 1.2 * sample(patient.rough, p, patient.places[3], 0.7)
    lay(hu, soft(ethmoid + 1.6, e) * soft(skin - 3, 2), 600)
    walls = join(septa(patient, p, 1, 1.4), soft(0.9 - u, e))
    lay(hu, soft(ethmoid, e) * soft(skin - 5, 2), AIR + 1150 * walls)
    maxillary = ellipsoid(p, (28, 42, -68), (16, 19, 19))
    lay(hu, soft(maxillary + 1.6, e), SPONGY)
    lay(hu, soft(maxillary, e), AIR)
    cheek = soft(3.2 - np.abs(np.hypot(u - 36, p.y - 42) - 17), e) * soft(u - 44, 2) * soft(-24 - p.z, 3)
    lay(hu, cheek * soft(skin - 3, 2), 1000)


def calvaria(patient: Patient, hu: np.ndarray, p: Points, s: Shell, wide: np.ndarray) -> None:
    """The vault: two tables of compact bone with diploe between, and the frontal sinus, in place."""
    table = join(soft(1.5 - s.outer, wide), soft(1.5 + s.vault, wide), soft(4.5 - (s.outer - s.vault), 2))
    marrow = DIPLOE + 130 * sample(patient.rough, p, patient.places[2], 1.3)
    to_face = soft(meet(-14 - p.z, s.sphenoid), 5)  # below the brow the vault gives way to the face
    lay(hu, soft(meet(s.outer, -s.vault), wide) * (1 - to_face), marrow + table * (COMPACT - marrow))
    lobes = 3.2 + 2.0 * np.sin(0.33 * p.u + float(patient.places[0, 0]))
    sinus = ellipsoid(p, (9, 77, -17), (16 * patient.sinus, 12, 12 * patient.sinus))
    sinus = meet(sinus, s.outer - 1.7, -s.vault - 1.5, np.abs(p.x - lobes + 3) - 1.2 + 0.1 * lobes)
    lay(hu, soft(sinus, p.edge) * soft(p.y - 50, 2), AIR)


def base_bones(patient: Patient, hu: np.ndarray, p: Points, s: Shell) -> None:
    """Floor of the fossae, petrous bones, mastoid cells and ear canals, in place."""
    e, u = p.edge, p.u
    plate_mm = 4.0 - 1.8 * soft(s.sphenoid - 6, 6)  # thin over the orbits
    lay(hu, soft(meet(-s.floor, s.floor + plate_mm), e) * soft(s.outer - 1, 2) * (1 - s.foramen), 950)
    pyramid = meet(5.5 + 0.11 * u - np.abs(s.petrous), u - 9, p.z + 58, -s.floor)
    labyrinth = np.clip(sample(patient.rough, p, patient.places[3], 1.2) + 0.2, 0, 1.6)
    lay(hu, soft(pyramid, e + 1) * soft(s.outer - 1, 2), PETROUS - 420 * labyrinth)
    mastoid = ellipsoid(p, (53, -38, -45), (11 * patient.mastoid, 15 * patient.mastoid, 17))
    mastoid = meet(mastoid, s.outer - 2.5, -s.inner - 1.2)
    lay(hu, soft(mastoid + 1.5, e), 950)
    lay(hu, soft(mastoid, e), AIR + 1700 * septa(patient, p, 4, 1.6))
    canal = 3.4 - np.hypot(p.y + 20 + 0.2 * (u - 60), p.z + 46)
    lay(hu, soft(meet(canal, u - 50), e), AIR)


# ------------------------------------------------------------------------------------------------------ brain

LATERAL_VENTRICLE = (  # spine of one side from the frontal to the occipital horn: x, y, z, radius
    *((16, 32, 3, 2.6), (11, 25, 8, 4.6), (6.5, 12, 12, 4.4), (7.5, -2, 20, 4.2), (11, -18, 23, 4.6)),
    *((18, -34, 19, 5.2), (25, -46, 8, 6.2), (26, -60, 4, 3.2), (21, -76, 3, 1.6)),
)
TEMPORAL_HORN = ((25, -46, 8, 5.0), (35, -36, -6, 2.4), (35, -22, -15, 1.9), (30, -10, -20, 2.2))
CAUDATE_TAIL = ((16, 6, 17, 3.6), (19, -16, 22, 2.4), (25, -30, 18, 1.5))


class Field(NamedTuple):
    """What the structures of the brain share: arrays of the points' shape."""

    depth: np.ndarray  # mm below the dura, or below a clot on it
    k: np.ndarray  # relative radius of the vault
    open: np.ndarray  # 1, less where swelling closes the sulci
    wander: np.ndarray  # smooth noise
    fine: np.ndarray  # fine noise
    below: np.ndarray  # share under the tentorium


def above_tentorium(p: Points) -> np.ndarray:
    """Height in mm above the tentorium, a tent that falls to the sides and to the back."""
    ridge = 1 - 0.32 * np.maximum(-48 - p.y, 0) - 0.25 * np.maximum(p.y + 40, 0)
    return 0.85 * (p.z - ridge + 0.52 * p.u - 0.004 * p.u**2)


def convexity(patient: Patient, p: Points, f: Field) -> tuple[np.ndarray, np.ndarray]:
    """CSF over and between the gyri, and the distance from CSF into the cortex."""
    e, age = p.edge, patient.age
    # sulci run at right angles to the surface: the lattice of folds is stretched along the radius
    stretch = np.maximum(f.k, 0.3) ** -0.72
    at = Points(p.x * stretch, (p.y + CENTRE_Y_MM) * stretch, p.z * stretch, e)
    fold = np.abs(sample(patient.fold, at, patient.places[7]) + 0.35 * f.fine) / stretch
    sulcus_mm = np.clip(14 + 5 * f.wander + 3 * age, 6, 23)
    width = np.clip(0.3 + 1.35 * age + 0.4 * sample(patient.smooth, p, patient.places[2], 1.5), 0.02, 3)
    narrowing = (1.05 - np.clip(f.depth / sulcus_mm, 0, 1)) * soft(f.k - 0.62, 0.16)
    width = width * f.open * narrowing * (1 - f.below)
    sulcus = soft(width - fold, e) * soft(sulcus_mm - f.depth, 3) * soft(f.k - 0.6, 0.1)
    pia = (0.4 + 1.6 * age * (1 + 0.4 * f.wander)) * (0.2 + 0.8 * f.open) * (1 - 0.7 * f.below)
    ribbon = meet(f.depth - pia, join(fold - width, 0.8 * (f.depth - sulcus_mm)))
    return join(soft(pia - f.depth, e), sulcus), ribbon


def hemispheric_fissure(patient: Patient, p: Points, f: Field) -> tuple[np.ndarray, np.ndarray]:
    """CSF between the hemispheres around the corpus callosum, and the distance from it."""
    e, u, age = p.edge, p.u, patient.age
    core = 1.1 * ball(p, (0, -6, -3), (30, 37, 26))
    here = (1 - soft(core, 3)) * (1 - f.below)
    side = p._replace(x=0.45 * p.x + 70 * (p.x > 0))  # two sides of unlike folds
    fold = np.abs(sample(patient.fold, side, patient.places[4]) + 0.9 * f.fine)
    sulcus_mm = np.clip(9 + 5 * f.wander, 3, 16)
    cleft = 0.5 + 0.9 * age + 1.2 * age * soft(p.y - 20, 20)
    width = (0.2 + 0.9 * age) * f.open
    csf = join(soft(cleft - u, e), soft(width - fold, e) * soft(sulcus_mm - u, 3)) * here
    ribbon = meet(u - cleft, join(fold - width, 0.8 * (u - sulcus_mm)))
    return csf, ribbon + 30 * soft(core, 4) + 30 * f.below


def sylvian_fissure(patient: Patient, p: Points, f: Field) -> tuple[np.ndarray, np.ndarray]:
    """CSF over the insula, in the cleft from it to the surface, and along the stem of the middle artery."""
    e, u = p.edge, p.u
    insula = np.abs(u - 38.5 - 2.2 * f.fine + 0.010 * (p.y - 2) ** 2 + 0.12 * np.abs(p.z - 2))
    span = meet(p.y + 20 + 0.3 * (p.z - 5), 22 - p.y, p.z + 13, 20 - p.z)
    cleft = 0.87 * np.abs(p.z + 11 - 0.52 * (19 - p.y) + 3.5 * f.wander)  # rises to the back
    lateral = meet(u - 38, p.y + 34, 24 - p.y)
    stem = np.hypot(0.5 * (p.z + 13), p.y - 6 - 0.2 * (u - 12) - 2 * f.fine)
    width = (0.7 + 1.9 * patient.age) * (0.1 + 0.9 * f.open)
    outward = width * (0.7 + 0.5 * f.fine) + 0.035 * np.maximum(u - 45, 0)
    csf = join(
        soft(width * (0.9 + 0.5 * f.fine + 0.02 * p.y) - insula, e) * soft(span, 4),
        soft(outward - cleft, e + 1.5) * soft(lateral, 4),
        soft(width + 1 - stem, e + 1) * soft(meet(u - 8, 40 - u), 4),
    )
    ribbon = meet(np.where(span > -3, insula, 30), np.where(lateral > -3, cleft, 30)) - width
    return csf * (1 - f.below), ribbon + 30 * f.below


def nuclei(patient: Patient, hu: np.ndarray, grey: np.ndarray, p: Points) -> None:
    """Putamen, pallidum and thalamus, in place; the white matter between them is the internal capsule."""
    e, u = p.edge + 1, p.u
    putamen = soft(ball(p._replace(x=u - 0.18 * (p.y - 2)), (26.5, 2, 2), (5.5, 17, 10.5)), e)
    pallidum = soft(ball(p._replace(x=u + 0.30 * (p.y + 3)), (19.5, -3, -1), (4.5, 9, 7)), e)
    thalamus = soft(ball(p._replace(x=u + 0.20 * (p.y + 17)), (10.5, -17, 7), (8.5, 14, 9.5)), e)
    for share, above in (
        (putamen, 0.5),
        (pallidum, 20 if "pallidum" in patient.calcified else -1.5),
        (thalamus, 0),
    ):
        lay(hu, share, patient.grey + above)
        np.maximum(grey, share, out=grey)


def brain_stem(p: Points, f: Field) -> tuple[np.ndarray, np.ndarray]:
    """Distance inside midbrain, pons and medulla, and the room in mm for CSF around them."""
    axis = -25 - 0.28 * np.maximum(-p.z - 12, 0)
    ahead = p.y - axis
    pons, midbrain = bump(p.z, -32, 9), bump(p.z, -13, 7)
    radius = 13.5 + 3.0 * pons - 4.5 * soft(-48 - p.z, 8)
    between_peduncles = 7 * midbrain * np.clip(1 - p.u / 7, 0, 1) * soft(ahead, 8)
    waist = 2.5 * midbrain * bump(ahead, 0, 5)
    stem = radius - np.hypot(p.u, ahead * (1.1 + 0.12 * pons)) - between_peduncles - waist + 0.6 * f.fine
    stem = meet(stem, -5 - p.z + 0.15 * ahead)
    # CSF lies in front of the pons, beside and behind the midbrain
    front, back = soft(ahead - 5, 8), soft(2 - ahead, 6)
    room = 0.15 + 0.9 * front * (1 - 0.6 * midbrain) + back * (1.1 * midbrain - 0.8 * pons)
    return stem, np.maximum(room + 0.35 * f.fine + 0.25 * f.wander, 0)


def cerebellum(patient: Patient, p: Points, f: Field) -> tuple[np.ndarray, np.ndarray]:
    """HU of the cerebellum, and CSF in its fissures: arcs around the stem, and the gap beside the vermis."""
    folia = np.sin(0.62 * np.hypot(0.8 * p.u, p.y + 22) + 0.75 * p.z + 1.2 * f.fine)
    dentate = soft(ellipsoid(p, (18, -58, -36), (14, 11, 8)), 8)
    hu = 36.0 + 1.6 * folia * soft(14 - f.depth, 8) + 1.5 * soft(9 - p.u, 5) - 4.5 * dentate
    age = patient.age
    fissure = soft(folia - 0.96 + 0.06 * age, 0.15) * soft(6 + 10 * age + 4 * f.wander - f.depth, 5)
    midline = soft(0.4 + age - p.u, p.edge) * soft(-62 - p.y, 4) * soft(18 - f.depth, 5)
    return hu, join(fissure * (0.35 + 0.4 * age) * f.open, midline) * f.below


def basal_cisterns(patient: Patient, p: Points, f: Field, stem: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Share of CSF in the suprasellar star, around the stem, behind the midbrain, below the cerebellum."""
    age = patient.age
    star = join(ellipsoid(p, (0, -2, -17), (10, 10, 9)), ellipsoid(p, (7, -5, -18), (8, 5, 7)))
    quadrigeminal = join(
        ellipsoid(p, (0, -41, -4), (11, 5 + 2 * age, 8)), ellipsoid(p, (14, -36, 0), (9, 3 + age, 6))
    )
    angle = ellipsoid(p, (15, -27, -36), (8, 3.2 + 1.5 * age, 8))  # cerebellopontine
    magna = meet(ellipsoid(p, (0, -78, -58), (14, 12, 12)), 3 + 8 * age - f.depth)
    wide = 0.5 + 1.6 * age
    ambient = (wide + 0.6) * room * f.open - np.abs(stem + 0.5 * wide + 0.3)
    ambient = soft(meet(ambient, -4 - p.z), p.edge) * np.clip(2 * room, 0, 1)
    share = join(soft(join(join(star, quadrigeminal, angle) * f.open, magna), p.edge), ambient)
    return share * (1 - soft(stem, p.edge))


def ventricles(patient: Patient, p: Points, widen: float) -> tuple[np.ndarray, np.ndarray]:
    """Share of all ventricles, and of the caudate nuclei that dent the lateral ones."""
    e, u = p.edge, p.u
    size = np.where(p.x > 0, *(np.float32(widen * v) for v in reversed(patient.ventricle)))
    lateral = tube(p, LATERAL_VENTRICLE, 1.75) + 4.6 * (size - 1)
    horn = tube(p, TEMPORAL_HORN, 1.2) + 2.0 * (size - 1) - 0.6
    third = meet(0.5 + 1.6 * size - u - 0.02 * np.abs(p.y + 10), ball(p, (0, -10, -2), (15, 17, 12)))
    floor = -p.y - 42 - 0.15 * u + 2 * (size - 1)  # of the fourth ventricle: the back of the pons
    fourth = meet(ball(p, (0, -46, -34), (8.5, 6.5, 13)), floor, p.y + 51.5 - 0.45 * u)
    share = join(soft(meet(join(lateral, horn), u - 0.9), e), soft(third, e), soft(fourth, e))
    head = ball(p._replace(x=u - 0.38 * (p.y - 16)), (14.5, 17, 6), (5.6, 12, 12))
    caudate = soft(join(head, tube(p, CAUDATE_TAIL, 1.2)), e + 0.5)
    caudate *= 1 - 0.85 * soft(lateral - 2.5 * size, 1.5)
    return share * (1 - caudate), caudate


def draw_brain(patient: Patient, p: Points, skull: Points, f: Field, widen: float) -> Brain:
    """Brain without lesions. p: where its tissue came from under mass effect; skull: where the points are."""
    e, age = p.edge, patient.age
    csf, ribbon = convexity(patient, p, f)
    for part in (hemispheric_fissure, sylvian_fissure):
        share, distance = part(patient, p, f)
        csf, ribbon = join(csf, share), meet(ribbon, distance)
    grey = soft(3.4 + 0.7 * f.fine - ribbon, e + 1.2)  # cortex, 2 to 4 mm
    leukoaraiosis = 1.3 * age * bump(p.z, 24, 14) * bump(p.u, 22, 12)
    white = patient.white + 0.5 * f.wander - leukoaraiosis
    hu = white + grey * (patient.grey - white)
    nuclei(patient, hu, grey, p)

    folded, fissures = cerebellum(patient, p, f)
    lay(hu, f.below, folded)
    lay(grey, f.below, 0.6)
    stem, room = brain_stem(p, f)
    inside = soft(stem, e)
    lay(hu, inside, patient.white + 4)
    lay(grey, inside, 0.3)
    cistern = join(csf * (1 - inside), fissures, basal_cisterns(patient, p, f, stem, room))
    lay(hu, cistern, patient.csf + 1.5)

    ventricle, caudate = ventricles(patient, p, widen)
    lay(hu, ventricle, patient.csf)
    lay(hu, caudate, patient.grey + 0.3)
    cistern *= 1 - ventricle
    grey = join(grey, caudate) * (1 - join(cistern, ventricle))
    plexus = ellipsoid(p, (24, -46, 10), (2.8, 4.5, 4)) + 0.8 * f.fine
    lay(hu, soft(plexus, e + 1), 130 if "choroid" in patient.calcified else 36)
    if "pineal" in patient.calcified:
        lay(hu, soft(ball(p, (0, -30, 2), (2.4, 2.8, 3.5)), e), 160)
    # beam hardening brightens the brain along the skull and darkens it between the petrous bones
    hu += 3.0 * np.exp(-np.maximum(f.depth, 0) / 7)
    hu -= 5.0 * bump(skull.z, -42, 7) * bump(skull.y, -30, 9) * soft(45 - skull.u, 12)
    return Brain(hu, ventricle, cistern, grey, f.below)


def dura(patient: Patient, hu: np.ndarray, p: Points, depth: np.ndarray) -> None:
    """Falx, edge of the tentorium and the great venous sinuses, in place."""
    e, u = p.edge, p.u
    tent = above_tentorium(p)
    falx = soft(0.9 - u, e) * soft(-ball(p, (0, -8, 0), (40, 46, 34)), 2) * soft(tent + 1, 2)
    lay(hu, 0.85 * falx, DURA + (25 * soft(p.y - 30, 10) if "falx" in patient.calcified else 0))
    edge = soft(0.9 - np.abs(tent), e) * soft(-p.y - 24, 6) * soft(meet(u - 12, 62 - u), 5)
    lay(hu, 0.75 * edge, DURA)
    sagittal = soft(3.4 - 0.75 * depth - 0.9 * u, e) * soft(join(p.z - 35, -60 - p.y), 8)
    transverse = soft(3.2 - np.abs(tent + 2), e) * soft(4.5 - depth, e) * soft(-p.y - 48, 5)
    lay(hu, join(sagittal, transverse), VENOUS)


# ---------------------------------------------------------------------------------------------------- lesions

# where bleeds and infarcts sit: x (of one side) and y in mm, lowest and highest z, greatest radius in mm
BLEEDS = {
    "putamen": (27, 0, -2, 14, 24),
    "thalamus": (14, -18, 2, 16, 15),
    "frontal": (26, 40, 8, 45, 26),
    "parietal": (34, -45, 18, 52, 26),
    "temporal": (44, -15, -25, 0, 22),
    "occipital": (24, -75, 2, 22, 22),
    "cerebellar": (22, -62, -48, -30, 18),
    "pontine": (4, -27, -38, -28, 10),
}
INFARCTS = {
    "mca": (45, -10, 0, 40, 36),
    "partial mca": (52, -12, 0, 48, 36),
    "pca": (18, -75, -2, 14, 30),
    "aca": (8, 20, 25, 60, 30),
    "lacune": (21, -5, -2, 22, 9),
    "cerebellar": (26, -66, -48, -28, 28),
}
INFARCT_ODDS = {"mca": 0.27, "partial mca": 0.28, "pca": 0.13, "aca": 0.1, "lacune": 0.12, "cerebellar": 0.1}
CISTERN_BLEEDS = {
    "basal": (0, 0, -22, -8, 52),
    "sylvian": (42, 2, -12, 16, 52),
    "convexity": (38, -20, 25, 60, 52),
}
KIND_ODDS = dict(zip(LESION_CLASSES, (0.13, 0.2, 0.12, 0.14, 0.16, 0.25), strict=True))  # of stroke patients


def _level(rng: np.random.Generator, levels_mm: np.ndarray, low: float, high: float) -> float:
    """One of the slices' levels between low and high, else the height there that is nearest to a slice."""
    inside = levels_mm[(levels_mm >= low) & (levels_mm <= high)]
    if len(inside):
        return float(rng.choice(inside))
    allowed = np.clip(levels_mm, low, high)
    return float(allowed[np.abs(allowed - levels_mm).argmin()])


def _site(rng: np.random.Generator, sites: dict, levels_mm: np.ndarray, odds: dict | None = None) -> str:
    """A site that some slice shows, or any where none does."""
    seen = [
        name
        for name, (_, _, low, high, _) in sites.items()
        if np.any((levels_mm >= low) & (levels_mm <= high))
    ]
    seen = seen or list(sites)
    p = np.array([odds[name] if odds else 1.0 for name in seen])
    return str(rng.choice(seen, p=p / p.sum()))


def draw_lesion(rng: np.random.Generator, kind: str, levels_mm: np.ndarray, boost: float) -> Lesion:
    """A random lesion of this kind, `boost` times the usual size, at one of the levels (head z in mm)."""
    sign = -1.0 if rng.random() < 0.5 else 1.0
    side = "left" if sign > 0 else "right"
    hu, site, extent, push, rim = rng.uniform(54, 76), kind, np.ones(3), 0.0, 0.0
    if kind == "epidural":
        centre = (62, rng.uniform(-55, 35), _level(rng, levels_mm, -15, 45))
        size = rng.uniform(9, 26) * boost
        extent = np.full(3, rng.uniform(26, 34) + 0.6 * size)
        push = 0.32 * size
    elif kind == "subdural":
        centre = (60, rng.uniform(-35, 0), _level(rng, levels_mm, 5, 50))
        size = rng.uniform(5.5, 15) * boost
        extent = np.array([1, rng.uniform(65, 95), rng.uniform(40, 65)])
        push = 0.6 * size
    elif kind == "intraventricular":
        site = str(rng.choice(["one side", "middle", "layered", "cast"]))
        centre = (12, rng.uniform(-45, 20), _level(rng, levels_mm, -5, 25))
        size = rng.uniform(20, 60) * boost
        side = side if site == "one side" else "both"
    else:
        sites = {"intraparenchymal": BLEEDS, "subarachnoid": CISTERN_BLEEDS, "ischemia": INFARCTS}[kind]
        site = _site(rng, sites, levels_mm, INFARCT_ODDS if kind == "ischemia" else None)
        x, y, low, high, limit = sites[site]
        spread = (3, 20, 0) if site == "partial mca" else (3, 5, 0)
        centre = np.array([x, y, _level(rng, levels_mm, low, high)]) + rng.normal(0, spread)
        if kind == "intraparenchymal":
            size = min(rng.uniform(7, limit), rng.uniform(12, limit + 5)) * boost  # small ones are commoner
            extent = np.exp(rng.normal(0, 0.16, 3))
            rim = rng.uniform(1.5, 5) if size > 10 else 0.0
            push = rng.uniform(0.25, 0.5) * size
        elif kind == "subarachnoid":
            size = rng.uniform(24, limit) * boost
            side = "both" if site == "basal" else side
            hu = rng.uniform(52, 68)
        else:
            size = rng.uniform(0.62, 1) * limit * boost
            hu = rng.uniform(8 if site == "lacune" else 5, 12)  # a faint lacune could not be found at all
            push = rng.uniform(0, 4) if site == "mca" else 0.0
    centre = np.array([sign * centre[0], *centre[1:]])
    return Lesion(kind, site, side, centre, size, extent, hu, push, rim, rng.uniform(0, 192, 3))


def clot_mm(lesion: Lesion, p: Points, k: np.ndarray) -> np.ndarray:
    """Thickness in mm of an epidural or subdural clot where the ray through a point meets the inner table."""
    r = 1 / np.maximum(k, 0.3)
    x, y, z = p.x * r, (p.y + CENTRE_Y_MM) * r - CENTRE_Y_MM, p.z * r
    cx, cy, cz = lesion.centre.tolist()
    ex, ey, ez = lesion.extent.tolist()
    if lesion.kind == "epidural":  # biconvex: a lens around one point
        lens = 1 - ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / ex**2
        return lesion.size_mm * np.maximum(lens, -1)
    window = 1 - ((y - cy) / ey) ** 2 - ((z - cz) / ez) ** 2  # a crescent over the hemisphere
    arc = np.sqrt(np.maximum(window, 0)) - 0.6 * (window < 0)
    from_falx = np.clip((math.copysign(1, cx) * x - 2) / 24, -0.1, 1)
    return lesion.size_mm * meet(arc, np.sqrt(np.abs(from_falx)) * np.sign(from_falx))


def displace(lesions: Sequence[Lesion], p: Points, k: np.ndarray) -> Points:
    """Mass effect: where the brain tissue now at p came from. The skull does not give."""
    x, y, z = p[:3]
    hold = np.clip(1 - k**2, 0, 1)
    for lesion in lesions:
        cx, cy, cz = lesion.centre.tolist()
        if lesion.kind == "intraparenchymal":  # pushes away from its centre
            dx, dy, dz = p.x - cx, p.y - cy, p.z - cz
            r = np.sqrt(dx**2 + dy**2 + dz**2) + 1e-3
            falling = meet(r / lesion.size_mm, (lesion.size_mm / r) ** 1.5)
            pull = lesion.push_mm * falling * np.sqrt(hold) / r
            x, y, z = x - dx * pull, y - dy * pull, z - dz * pull
        elif lesion.push_mm:  # pushes the midline to the other side
            x = x + math.copysign(1, cx) * lesion.push_mm * bump(p.y, cy, 60) * bump(p.z, cz, 45) * hold
    return Points(x, y, z, p.edge)


def closed_sulci(lesions: Sequence[Lesion], p: Points) -> np.ndarray:
    """Share of the sulci that swelling closes."""
    closed = np.zeros_like(p.x)
    for lesion in lesions:
        cx, cy, cz = lesion.centre.tolist()
        near = bump(p.x, cx, 45) * bump(p.y, cy, 55) * bump(p.z, cz, 45)
        np.maximum(closed, min(lesion.push_mm / 6, 0.9) * near, out=closed)
    return closed


def territory_mm(lesion: Lesion, p: Points, k: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Distance inside the part of an arterial territory that an infarct takes."""
    u = math.copysign(1, lesion.centre[0]) * p.x  # > 0 on its side
    y = p.y + CENTRE_Y_MM
    azimuth = np.degrees(np.arctan2(u, y))  # 0 to the front, 180 to the back
    arc_mm = np.hypot(u, y) * math.pi / 180  # per degree
    cerebral = 20 - 40 * below
    around = ball(p, lesion.centre, (lesion.size_mm,) * 3)
    if lesion.site in ("mca", "partial mca"):
        whole = meet((azimuth - 27) * arc_mm, (132 - azimuth) * arc_mm, u - 17 - 6 * soft(-p.y, 8), cerebral)
        return meet(whole, around) if lesion.site == "partial mca" else whole
    if lesion.site == "pca":
        return meet((azimuth - 138) * arc_mm, 26 - p.z, u - 2, -34 - p.y, cerebral)
    if lesion.site == "aca":
        return meet(19 - u, u - 0.5, (k - 0.42) * 60, p.y + 38)
    if lesion.site == "cerebellar":
        return meet(u - 5, -cerebral, around)
    return around  # a lacune


class Scene(NamedTuple):
    """What a lesion is drawn into, at flat points."""

    patient: Patient
    p: Points  # in the skull
    moved: Points  # in the brain
    depth: np.ndarray  # mm below the inner table
    k: np.ndarray  # relative radius of the vault
    brain: Brain


def _clot(lesion: Lesion, s: Scene, ragged: np.ndarray) -> np.ndarray:
    thick = clot_mm(lesion, s.p, s.k) + 0.5 * ragged
    return soft(meet(thick - s.depth, s.depth + 0.3), s.p.edge) * soft(thick - 0.8, 1)


def _bleed(lesion: Lesion, s: Scene, ragged: np.ndarray) -> np.ndarray:
    lobes = sample(s.patient.smooth, s.p, lesion.place[::-1], min(24 / lesion.size_mm, 2.5))
    inside = ball(s.p, lesion.centre, lesion.size_mm * lesion.extent)
    return soft(meet(inside + lesion.size_mm * (0.14 * lobes + 0.05 * ragged), s.depth - 1), s.p.edge)


def _in_ventricles(lesion: Lesion, s: Scene, ragged: np.ndarray) -> np.ndarray:
    if lesion.site == "layered":  # settled in the horns of a patient on his back, under a level
        return s.brain.ventricle * soft(-38 - s.p.y + 0.4 * lesion.size_mm, 2)
    cx, cy, cz = lesion.centre.tolist()
    along = s.moved.y - cy
    region = {
        "cast": 5 + 0 * along,
        "middle": lesion.size_mm - np.hypot(along, 1.5 * (s.moved.z - cz)),
        "one side": meet(math.copysign(1, cx) * s.moved.x - 0.5, lesion.size_mm - np.abs(along)),
    }[lesion.site]
    return s.brain.ventricle * soft(region + 2 * ragged, 2)


def _in_cisterns(lesion: Lesion, s: Scene, ragged: np.ndarray) -> np.ndarray:
    r = lesion.size_mm
    near = ball(s.moved, lesion.centre, (1.33 * r, r, 0.9 * r)) + 7 * ragged
    return np.clip(1.2 * s.brain.cistern, 0, 1) * soft(near, 6)


def _infarct(lesion: Lesion, s: Scene, ragged: np.ndarray) -> np.ndarray:
    inside = soft(territory_mm(lesion, s.moved, s.k, s.brain.below) + 2 * ragged, 3)
    return inside * (1 - np.clip(s.brain.cistern + s.brain.ventricle, 0, 1)) * soft(s.depth - 1, 1.5)


SHARES: dict[str, Callable[[Lesion, Scene, np.ndarray], np.ndarray]] = {  # of every point, (N,) in 0..1
    "epidural": _clot,
    "intraparenchymal": _bleed,
    "intraventricular": _in_ventricles,
    "subarachnoid": _in_cisterns,
    "subdural": _clot,
    "ischemia": _infarct,
}


# ----------------------------------------------------------------------------------------------------- slices


def draw_contents(
    patient: Patient, lesions: Sequence[Lesion], p: Points, s: Shell
) -> tuple[np.ndarray, list]:
    """HU of what lies inside the skull, and the share of every lesion, at flat points."""
    clot = np.zeros_like(p.x)
    for lesion in lesions:
        if lesion.kind in ("epidural", "subdural"):
            np.maximum(clot, clot_mm(lesion, p, s.k), out=clot)
    moved = displace(lesions, p, s.k)
    field = Field(
        depth=s.inner - clot,
        k=s.k,
        open=1 - closed_sulci(lesions, p),
        wander=sample(patient.smooth, moved, patient.places[5]),
        fine=sample(patient.rough, moved, patient.places[6]),
        below=soft(-above_tentorium(moved), 2) * soft(-moved.y - 8 + 0.25 * moved.u, 4),
    )
    widen = 1.25 if any(lesion.kind == "intraventricular" for lesion in lesions) else 1.0  # blocked outflow
    brain = draw_brain(patient, moved, p, field, widen)
    hu = brain.hu
    dura(patient, hu, p._replace(x=(p.x + moved.x) / 2), s.inner)  # the falx gives half as much as the brain
    scene = Scene(patient, p, moved, s.inner, s.k, brain)
    shares = []
    for lesion in lesions:
        share = SHARES[lesion.kind](lesion, scene, sample(patient.rough, p, lesion.place, 0.6))
        shares.append(share)
        if lesion.kind == "ischemia":
            hu -= share * lesion.hu * (0.8 + 0.2 * brain.grey)
        else:
            if lesion.rim_mm:
                rim = ball(p, lesion.centre, lesion.size_mm * lesion.extent + lesion.rim_mm)
                lay(hu, 0.8 * soft(rim, 3) * (1 - join(brain.cistern, brain.ventricle)), 20)
            lay(hu, share, lesion.hu + 3 * sample(patient.rough, p, lesion.place[::-1], 1.2))
    return hu, shares


def draw_plane(
    patient: Patient,
    lesions: Sequence[Lesion],
    grid_mm: tuple[np.ndarray, np.ndarray],
    z: float,
    pixel_mm: float,
) -> tuple[np.ndarray, np.ndarray]:
    """One thin plane at z mm of the scanner: (H, W) float32 HU, and (L, H, W) shares of the lesions."""
    p = head_points(patient, *grid_mm, z, max(pixel_mm, FINEST_EDGE_MM))
    s = head_shell(patient, p, pixel_mm)
    wide = p.edge + 2 * s.steep  # a thick slice smears an oblique wall
    hu = soft_tissue(patient, p, s, wide)

    def part(where: np.ndarray, draw: Callable, *extra: object) -> None:
        if where.any():
            values = hu[where]
            draw(patient, values, take(p, where), *extra)
            hu[where] = values

    front = (s.inner < 3) & (s.skin > -2) & (p.z < -10) & (p.y > -30)
    part(front, face, s.skin[front])
    if patient.holder:
        x, y = grid_mm
        lay(hu, soft(1.4 - np.abs(np.hypot(1.05 * x, y + 2) - 108), p.edge) * soft(-y - 15, 4), -420)
    shares = np.zeros((len(lesions), *p.x.shape), np.float32)
    inside = s.inner > -2
    if inside.any():
        contents, parts = draw_contents(patient, lesions, take(p, inside), take(s, inside))
        solid = soft(s.inner[inside], wide[inside])
        hu[inside] += solid * (contents - hu[inside])
        for share, flat in zip(shares, parts, strict=True):
            share[inside] = flat * solid
    shell = (s.vault < wide) & (s.outer > -wide)
    part(shell, calvaria, take(s, shell), wide[shell])
    base = (s.inner < 3) & (s.skin > -2) & (p.z < 0)
    part(base, base_bones, take(s, base))
    return hu, shares


def _check(size: int | tuple[int, int], slices: int, noise_hu: float, lesions: Sequence[str] | None) -> tuple:
    shape = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(shape) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 16 for n in shape):
        raise ValueError(f"size {size}: must be a whole number or (rows, columns), each at least 16")
    if not isinstance(slices, (int, np.integer)) or slices < 1:
        raise ValueError(f"slices {slices}: must be a whole number, at least 1")
    if not (math.isfinite(noise_hu) and noise_hu >= 0):
        raise ValueError(f"noise_hu {noise_hu}: must be finite and at least 0 HU")
    for name in lesions or ():
        if name not in LESION_CLASSES:
            raise ValueError(f"lesion {name!r}: must be one of {', '.join(LESION_CLASSES)}")
    return int(shape[0]), int(shape[1])


def _draw_kinds(rng: np.random.Generator) -> list[str]:
    """Half of the patients have no stroke; a third of the others have two kinds at once."""
    if rng.random() < 0.5:
        return []
    count = 1 + int(rng.random() < 0.3)
    return [str(k) for k in rng.choice(list(KIND_ODDS), count, replace=False, p=list(KIND_ODDS.values()))]


def _mask(shares: np.ndarray, lesions: Sequence[Lesion], pixel_mm: float) -> np.ndarray:
    """(S, L, H, W) shares to (S, H, W) classes; a class below MIN_AREA_MM2 in a slice is dropped there."""
    mask = np.zeros((shares.shape[0], *shares.shape[2:]), np.uint8)
    for i, lesion in enumerate(lesions):
        enough = (
            0.4 if lesion.kind == "subarachnoid" else 0.5
        )  # of thin sheets a reader marks what looks bright
        mask[shares[:, i] > enough] = 1 + LESION_CLASSES.index(lesion.kind)
    for plane in mask:
        areas_mm2 = np.bincount(plane.ravel(), minlength=len(LESION_CLASSES) + 1) * pixel_mm**2
        plane[areas_mm2[plane] < MIN_AREA_MM2] = 0
    return mask


def _labels(mask: np.ndarray) -> dict[str, int]:
    present = {name: int((mask == i).any()) for i, name in enumerate(LESION_CLASSES, start=1)}
    return present | {"any": int(any(present[name] for name in HEMORRHAGES))}


def generate_phantom(
    seed: int,
    *,
    size: int | tuple[int, int] = 128,
    slices: int = 24,
    noise_hu: float = 4.0,
    lesions: Sequence[str] | None = None,
) -> Phantom:
    """A synthetic head CT; the same arguments give the same arrays.

    seed: not negative; the head depends on it alone, so the same seed without lesions is its healthy twin.
    size: pixels, or (rows, columns), of a field of view of 236 mm across the smaller. slices: from the
    orbito-meatal level to the vertex. noise_hu: SD of the noise in HU. lesions: names of LESION_CLASSES,
    empty for a healthy head; by default drawn, half of the seeds without any. On a matrix too coarse for it a
    lesion may stay without a mask and is then not reported. Raises ValueError for a size below 16, slices
    below 1, negative noise or an unknown lesion."""
    height, width = _check(size, slices, noise_hu, lesions)
    head_rng, lesion_rng, noise_rng = (np.random.default_rng((seed, i)) for i in range(3))
    patient = draw_patient(head_rng)
    kinds = _draw_kinds(lesion_rng) if lesions is None else list(dict.fromkeys(lesions))
    pixel_mm = FOV_MM / min(height, width)
    low, high = LOWEST_MM * patient.scale[2], HIGHEST_MM * patient.scale[2]
    levels = low + (np.arange(slices) + 0.5) * (high - low) / slices
    spacing_mm = (high - low) / slices if slices > 1 else THICKNESS_MM
    offset = float(min(spacing_mm, THICKNESS_MM)) / 4  # two planes stand for a slice
    x = ((np.arange(width) - (width - 1) / 2) * pixel_mm).astype(np.float32)
    y = ((np.arange(height) - (height - 1) / 2) * -pixel_mm).astype(np.float32)
    grid = tuple(np.meshgrid(x, y))

    for attempt in range(MAX_DRAWS):
        drawn = [
            draw_lesion(lesion_rng, kind, levels / patient.scale[2], 1 + 0.1 * attempt) for kind in kinds
        ]
        drawn.sort(key=lambda lesion: lesion.kind != "ischemia")  # blood lies over it, in HU and in the mask
        pairs = [
            [draw_plane(patient, drawn, grid, z + o, pixel_mm) for o in (-offset, offset)]
            for z in levels.tolist()
        ]
        truth = np.stack([(a[0] + b[0]) / 2 for a, b in pairs])
        shares = np.stack([(a[1] + b[1]) / 2 for a, b in pairs])
        shares *= ((truth > TISSUE_HU[0]) & (truth < TISSUE_HU[1]))[:, None]
        mask = _mask(shares, drawn, pixel_mm)
        if all((mask == 1 + LESION_CLASSES.index(kind)).any() for kind in kinds):
            break

    hu = truth.copy()
    if noise_hu > 0:
        for plane in hu:
            plane += reconstruction_noise((height, width), noise_hu, pixel_mm, noise_rng)
    voxel_ml = spacing_mm * pixel_mm**2 / 1000
    counts = np.bincount(mask.ravel(), minlength=len(LESION_CLASSES) + 1)
    report = [
        {
            "kind": lesion.kind,
            "volume_ml": round(float(counts[1 + LESION_CLASSES.index(lesion.kind)] * voxel_ml), 3),
            "contrast_hu": round(
                float(-lesion.hu if lesion.kind == "ischemia" else lesion.hu - patient.grey), 2
            ),
            "side": lesion.side,
        }
        for lesion in drawn
        if counts[1 + LESION_CLASSES.index(lesion.kind)]
    ]
    affine = np.diag([pixel_mm, pixel_mm, spacing_mm, 1.0])
    affine[:3, 3] = (x[0], -y[0], levels[0])  # LPS: y grows to the back
    hu, truth = (np.clip(np.rint(v), -1024, 3071).astype(np.int16) for v in (hu, truth))
    slice_labels = [_labels(plane) for plane in mask]
    spacing = (float(spacing_mm), pixel_mm, pixel_mm)
    return Phantom(hu, truth, mask, _labels(mask), slice_labels, spacing, affine, report)
