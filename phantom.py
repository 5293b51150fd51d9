"""Synthetic head CT: volumes in HU with anatomy, strokes, masks, labels by name and the noise-free truth.

Every structure is a smooth implicit function of head coordinates in mm (x to the patient's left, y to the
front, z up, origin near the anterior commissure), so that any matrix and any slice count can be drawn. A tissue
is laid over what is there with its share of the pixel, which gives soft edges without supersampling.
The positions are those of an average adult head (the Talairach frame), scaled and bent for every patient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dose import reconstruction_noise

LESION_CLASSES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "ischemia")
HEMORRHAGES = LESION_CLASSES[:5]

AIR, FAT, SKIN, MUSCLE = -1000.0, -95.0, 25.0, 58.0  # HU, textbook values at 120 kV
CSF, WHITE, GREY, DURA, VENOUS = 7.0, 28.8, 38.0, 50.0, 52.0
COMPACT, DIPLOE, PETROUS = 1450.0, 560.0, 1350.0

FOV_MM = 236.0  # across the smaller matrix axis; a head is 180 to 200 mm long
LOWEST_MM, HIGHEST_MM = -52.0, 90.0  # orbito-meatal level to just above the vertex, head frame
THICKNESS_MM = 5.0  # a routine head slice; thinner where the slices lie closer
MIN_AREA_MM2 = 25.0  # a smaller patch of a lesion class is nothing that a reader could be asked to find
MAX_DRAWS = 8  # of the lesions of a patient until every one asked for is in the volume
LATTICE_MM, LATTICE = 3.0, 64  # periodic noise lattice: 192 mm, longer than the brain


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


class Patient(NamedTuple):
    """What differs from head to head."""

    rotation: np.ndarray  # (3, 3) scanner to head
    scale: np.ndarray  # (3,) head over average
    offset_mm: np.ndarray  # (3,)
    bend: np.ndarray  # (8, 8) amplitude, wave vector and phases of the smooth deformation
    fold: np.ndarray  # lattice: signed distance in mm to the nearest sulcal sheet
    smooth: np.ndarray  # lattice: slowly varying noise, SD 1
    rough: np.ndarray  # lattice: fine noise, SD 1
    seed_shift: np.ndarray  # (8, 3) offsets that make independent fields of one lattice
    atrophy: float  # 0 young, 1 old: width of sulci and ventricles
    skull_mm: float
    scalp_mm: float
    egg: float
    power: float
    ventricle: tuple[float, float]  # scale of the right and left lateral ventricle
    tissue: dict[str, float]
    sinus: float
    pneumatisation: float
    calcified: dict[str, bool]
    holder: bool


class Points(NamedTuple):
    """Coordinates of the pixels in question, all (N,) float32 mm."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    edge: float  # width of a soft edge, mm


class Lesion(NamedTuple):
    """A lesion, drawn by `share`; its other members bend the anatomy around it."""

    kind: str
    hu: float  # blood: its HU; ischemia: the fall in HU
    side: str
    centre: np.ndarray  # (3,) mm
    size_mm: float
    push_mm: float  # of the mass effect at its border or at the midline
    style: str
    rim_mm: float
    extent: np.ndarray  # (3,) mm, half axes where the kind has them
    shift: np.ndarray  # (3,) lattice offset of its irregular border


def soft(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Share of a pixel inside, from the signed distance to the border (positive inside)."""
    return np.clip(distance / width + 0.5, 0.0, 1.0)


def ellipsoid(p: Points, centre: Sequence[float], radii: Sequence[float], mirror: bool = True) -> np.ndarray:
    """Signed distance in mm, positive inside, exact on the shortest axis; mirrored to both sides by default."""
    x = np.abs(p.x) if mirror else p.x
    k = (
        ((x - centre[0]) / radii[0]) ** 2
        + ((p.y - centre[1]) / radii[1]) ** 2
        + ((p.z - centre[2]) / radii[2]) ** 2
    )
    return (1 - np.sqrt(k)) * min(radii)


def tube(p: Points, spine: np.ndarray, squash: float) -> np.ndarray:
    """Signed distance to a tube along a polyline of (x, y, z, radius), `squash` times as high as wide."""
    u = np.abs(p.x)
    best = np.full_like(u, -1e3)
    for a, b in zip(spine[:-1], spine[1:], strict=True):
        step = (b - a)[:3] / (1, 1, squash)
        ux, uy, uz = u - a[0], p.y - a[1], (p.z - a[2]) / squash
        t = np.clip((ux * step[0] + uy * step[1] + uz * step[2]) / (step @ step), 0, 1)
        gap = np.sqrt((ux - t * step[0]) ** 2 + (uy - t * step[1]) ** 2 + (uz - t * step[2]) ** 2)
        np.maximum(best, a[3] + t * (b[3] - a[3]) - gap, out=best)
    return best


def lay(hu: np.ndarray, share: np.ndarray, value: float | np.ndarray) -> None:
    """Put a tissue over what is there, in place, with its share of every pixel."""
    hu += share * (value - hu)


def sample(lattice: np.ndarray, p: Points, shift: np.ndarray, zoom: float = 1.0) -> np.ndarray:
    """Lattice noise at the points, trilinear and periodic; zoom > 1 makes it finer."""
    at = [(c * zoom + s) / LATTICE_MM for c, s in zip((p.x, p.y, p.z), shift, strict=True)]
    return ndimage.map_coordinates(lattice, at, order=1, mode="grid-wrap", prefilter=False)


def _band_noise(rng: np.random.Generator, low_mm: float, high_mm: float) -> np.ndarray:
    """Periodic Gaussian lattice noise of SD 1 with wavelengths between low_mm and high_mm."""
    f = np.fft.fftfreq(LATTICE, LATTICE_MM)
    f = np.sqrt(f[:, None, None] ** 2 + f[None, :, None] ** 2 + np.fft.rfftfreq(LATTICE, LATTICE_MM) ** 2)
    power = np.exp(-((f * low_mm) ** 4)) * (1 - np.exp(-((f * high_mm) ** 4)))
    white = np.fft.rfftn(rng.standard_normal((LATTICE,) * 3))
    noise = np.fft.irfftn(white * power, s=(LATTICE,) * 3, axes=(0, 1, 2))
    return (noise / noise.std()).astype(np.float32)


def _fold_lattice(rng: np.random.Generator) -> np.ndarray:
    """Signed distance in mm to the zero set of band-passed noise: the sheets of a folded cortex."""
    noise = _band_noise(rng, 17.0, 32.0)
    slope = np.stack([(np.roll(noise, -1, a) - np.roll(noise, 1, a)) / (2 * LATTICE_MM) for a in range(3)])
    steep = np.sqrt((slope**2).sum(0))
    return noise / np.sqrt(steep**2 + (0.35 * steep.mean()) ** 2)


def draw_patient(rng: np.random.Generator) -> Patient:
    """A random head: pose, size, shape, folds, age, air cells and calcifications."""
    pitch, roll, yaw = np.radians(rng.normal(0, (3.5, 2.5, 3.0)).clip(-8, 8))
    rx = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    ry = np.array([[math.cos(roll), 0, math.sin(roll)], [0, 1, 0], [-math.sin(roll), 0, math.cos(roll)]])
    rz = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    bend = np.empty((8, 8), np.float32)
    for i, row in enumerate(bend):
        wavelength = rng.uniform(130, 220) if i < 5 else rng.uniform(55, 80)
        direction = rng.normal(size=3)
        direction *= 2 * math.pi / wavelength / np.linalg.norm(direction)
        row[:3] = direction
        row[3] = rng.uniform(0, 2 * math.pi)
        row[4:7] = rng.normal(0, 1.0 if i < 5 else 0.6, 3)
    atrophy = rng.beta(1.3, 1.6)
    wide = (0.78 + 0.55 * atrophy) * math.exp(rng.normal(0, 0.1))
    return Patient(
        rotation=rx @ ry @ rz,
        scale=rng.normal(0.945, 0.025) * np.exp(rng.normal(0, (0.025, 0.025, 0.02))),
        offset_mm=rng.normal((0, 0, 0), (2.5, 3, 1.5)),
        bend=bend,
        fold=_fold_lattice(rng),
        smooth=_band_noise(rng, 36.0, 120.0),
        rough=_band_noise(rng, 7.0, 30.0),
        seed_shift=rng.uniform(0, 192, (8, 3)),
        atrophy=atrophy,
        skull_mm=rng.uniform(5.2, 8.2),
        scalp_mm=rng.uniform(4.0, 8.0),
        egg=rng.normal(0.0012, 0.0006),
        power=rng.uniform(2.05, 2.4),
        ventricle=(wide * math.exp(rng.normal(0, 0.07)), wide * math.exp(rng.normal(0, 0.07))),
        tissue={
            "white": WHITE + rng.uniform(-1.2, 1.2),
            "grey": GREY + rng.uniform(-1.0, 1.5),
            "csf": CSF + rng.uniform(-2, 3),
        },
        sinus=rng.uniform(0.6, 1.3),
        pneumatisation=rng.uniform(0.6, 1.1),
        calcified={
            name: bool(rng.random() < chance)
            for name, chance in (("pineal", 0.6), ("choroid", 0.6), ("pallidum", 0.12), ("falx", 0.2))
        },
        holder=bool(rng.random() < 0.5),
    )


def head_points(patient: Patient, scanner: tuple[np.ndarray, np.ndarray, float], edge: float) -> Points:
    """Scanner mm (x left, y front, z up) to head coordinates: pose, size, and the patient's own bends."""
    x, y, z = (c - o for c, o in zip(scanner, patient.offset_mm, strict=True))
    y = y - 17.0  # the head is centred in the field of view 17 mm behind the anterior commissure
    p = [(r[0] * x + r[1] * y + r[2] * z) / s for r, s in zip(patient.rotation, patient.scale, strict=True)]
    bent = [c.astype(np.float32) for c in p]
    for kx, ky, kz, phase, ax, ay, az, _ in patient.bend.tolist():
        wave = np.sin((kx * p[0] + ky * p[1] + kz * p[2] + phase).astype(np.float32))
        bent[0] += ax * wave
        bent[1] += ay * wave
        bent[2] += az * wave
    return Points(*bent, edge)


# ---------------------------------------------------------------------------------------------- skull and face


def vault(patient: Patient, p: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inner table: its relative radius k (1 on it), distance in mm (positive inside), and normal's z."""
    y = p.y + 18.0 + np.float32(0.05) * (p.z - 10)
    x = np.abs(p.x) * (1 + patient.egg * y) + 1e-3
    a, b, c = 69.5, 87.5, np.where(p.z > 0, 78.0, 92.0).astype(np.float32)
    n = patient.power
    plane = ((x / a) ** n + (np.abs(y) / b + 1e-4) ** n) ** (2 / n)
    k = np.sqrt(plane + (p.z / c) ** 2) + 1e-4
    slope = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (p.z / c**2) ** 2) / k + 1e-4
    return k, (1 - k) / slope, np.abs(p.z / c**2) / k / slope


def skull_base(p: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Height in mm of the floor of the three cranial fossae, and the distances to petrous and sphenoid ridges."""
    u = np.abs(p.x)
    petrous = (
        (u - 14) * 0.504 + (p.y + 13) * 0.863 + 1.6 * np.sin(0.11 * u + 0.05 * p.z)
    )  # > 0 in front of the petrous ridge
    sphenoid = p.y - (22 - 0.016 * (u - 36) ** 2)  # > 0 in front of the lesser wing
    posterior = -69 + 0.0075 * u**2 + 0.011 * (p.y + 52) ** 2
    posterior = np.maximum(posterior, -31 + 1.4 * (p.y + 10) - 0.05 * u**2)  # clivus
    middle = -47 + 0.010 * (u - 36) ** 2 + 0.004 * (p.y - 2) ** 2
    anterior = -28 + 9 * np.exp(-(((u - 37) / 18) ** 2) - ((p.y - 54) / 23) ** 2) + 0.004 * u**2
    front = soft(sphenoid, 6)
    behind = soft(-petrous, 8)
    floor = middle + front * (anterior - middle)
    floor += behind * (posterior - floor)
    crest = -29 + 0.06 * (u - 35) - (petrous / (5 + 0.08 * u)) ** 2 * 7 - np.maximum(14 - u, 0) ** 2 * 0.2
    wing = -17 - (sphenoid / 5) ** 2 * 7 - np.maximum(14 - u, 0) ** 2 * 0.05
    body = -30 - np.maximum(u - 9, 0) ** 2 * 0.25 - (np.maximum(np.abs(p.y + 1) - 9, 0) / 3) ** 2 * 4
    floor = np.maximum(np.maximum(floor, crest), np.maximum(wing, body))
    foramen = soft(15.5 - np.hypot(u, (p.y + 44) * 0.85), 3)
    return floor - 60 * foramen, petrous, sphenoid, foramen


def cells(patient: Patient, p: Points, shift: int, zoom: float) -> np.ndarray:
    """Share of bony septa in a region of air cells."""
    return np.clip(1.25 - np.abs(sample(patient.rough, p, patient.seed_shift[shift], zoom)) * 2.2, 0, 1)


def face(patient: Patient, hu: np.ndarray, p: Points, depth: np.ndarray) -> None:
    """Orbits, paranasal sinuses and muscles below and in front of the cranial cavity, in place."""
    e = p.edge
    u = np.abs(p.x)
    muscle = soft(sample(patient.rough, p, patient.seed_shift[0], 0.8) + 0.55, 0.5)
    lay(hu, soft(depth - patient.scalp_mm * 0.9, 3) * muscle, MUSCLE)
    # orbit: a cone of fat with bony walls, its apex at the optic canal
    t = np.clip((p.y - 18) / 45, 0, 1.3)
    radius = 3 + 15.5 * np.sqrt(t)
    off = np.hypot(u - (13 + 18 * t), (p.z + 32 + 5 * t) * 1.05)
    along = np.minimum(p.y - 17, 75 - p.y)
    lay(
        hu,
        soft(2.4 - np.abs(off - radius - 1.2), e)
        * soft(np.minimum(along, 62 - 0.35 * u - p.y), 2)
        * soft(depth - 3, 2),
        900,
    )
    inside = soft(np.minimum(radius - off, along), e) * soft(depth - 1.5, 2)
    lay(hu, inside, FAT)
    nerve = soft(2.0 - np.hypot(u - (13 + 18 * t), p.z + 32 + 5 * t), e) * soft(50 - p.y, 3)
    recti = (
        soft(1.6 - np.abs(off - radius * 0.72), e)
        * soft(52 - p.y, 6)
        * soft(np.abs(u - 13 - 18 * t) - radius * 0.4, 2)
    )
    lay(hu, inside * np.maximum(nerve, recti), 42)
    globe = ellipsoid(p, (31, 57, -37), (12.2, 12.5, 12))
    lay(hu, soft(globe, e), 48)
    lay(hu, soft(globe - 1.6, e), 11)
    lay(hu, soft(ellipsoid(p, (31, 66, -37), (4.5, 2.2, 4.5)), e), 85)
    # sphenoid body, sinus, ethmoid, nasal cavity, maxillary sinus
    lay(hu, soft(np.minimum(14 - u, np.minimum(22 - p.y, p.y + 22)), 3) * soft(-28 - p.z, 3), 620)
    sphenoid = ellipsoid(p, (0, 8, -39), (12 * patient.sinus, 11, 9))
    lay(hu, soft(sphenoid + 1.5, e) * soft(depth - 8, 2), 700)
    lay(hu, soft(np.minimum(sphenoid, u - 0.7), e), AIR)
    ethmoid = np.minimum(
        np.minimum(11.5 - 0.06 * (62 - p.y) - u + 0.16 * np.maximum(-40 - p.z, 0), 62 - p.y),
        np.minimum(p.y - 18, -28.5 - p.z),
    )
    ethmoid = ethmoid + 1.2 * sample(patient.rough, p, patient.seed_shift[3], 0.7)
    lay(hu, soft(ethmoid + 1.6, e) * soft(depth - 3, 2), 600)
    air = soft(ethmoid, e) * soft(depth - 5, 2)
    lay(hu, air, AIR + 1150 * np.maximum(cells(patient, p, 1, 1.4), soft(0.9 - u, e)))
    maxillary = ellipsoid(p, (28, 42, -68), (16, 19, 19))
    lay(hu, soft(maxillary + 1.6, e), 700)
    lay(hu, soft(maxillary, e), AIR)
    zygoma = soft(3.2 - np.abs(np.hypot(u - 36, p.y - 42) - 17), e) * soft(u - 44, 2) * soft(-24 - p.z, 3)
    lay(hu, zygoma * soft(depth - 3, 2), 1000)


def skull(
    patient: Patient,
    hu: np.ndarray,
    p: Points,
    inner: np.ndarray,
    vault_gap: np.ndarray,
    outer: np.ndarray,
    normal_z: np.ndarray,
    ridge: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    floor_gap: np.ndarray,
) -> None:
    """Calvaria with its two tables, base, petrous bones, mastoid cells and frontal sinus, in place."""
    e = p.edge
    _, petrous, sphenoid, foramen = ridge
    thickness = np.maximum(outer - vault_gap, 0.5)
    s = np.clip(outer / thickness, 0, 1)  # 0 on the outer, 1 on the inner surface
    wide = e + normal_z * 2.5
    table = np.maximum(soft(1.5 - outer, wide), soft(1.5 + vault_gap, wide))
    marrow = DIPLOE + 130 * sample(patient.rough, p, patient.seed_shift[2], 1.3)
    thin = soft(4.5 - thickness, 2)
    bone = np.maximum(table, thin)
    value = marrow + bone * (COMPACT - marrow) - 250 * (s > 0.5) * (1 - bone)
    face_side = soft(np.minimum(-14 - p.z, sphenoid), 5)  # below the brow the vault gives way to the face
    lay(hu, soft(np.minimum(outer, -vault_gap), wide) * (1 - face_side), value)
    u = np.abs(p.x)
    base = (
        soft(np.minimum(-floor_gap, floor_gap + 4.0 - 1.8 * soft(sphenoid - 6, 6)), e)
        * soft(outer - 1, 2)
        * (1 - foramen)
    )
    lay(hu, base, 950)
    pyramid = np.minimum(5.5 + 0.11 * u - np.abs(petrous), np.minimum(u - 9, p.z + 58))
    share = soft(np.minimum(pyramid, -floor_gap), e + 1) * soft(outer - 1, 2)
    lay(
        hu, share, PETROUS - 420 * np.clip(sample(patient.rough, p, patient.seed_shift[3], 1.2) + 0.2, 0, 1.6)
    )
    mastoid = ellipsoid(p, (53, -38, -45), (11 * patient.pneumatisation, 15 * patient.pneumatisation, 17))
    mastoid = np.minimum(np.minimum(mastoid, outer - 2.5), np.maximum(-inner, -floor_gap) - 1.2)
    lay(hu, soft(mastoid + 1.5, e), 950)
    lay(hu, soft(mastoid, e), AIR + 1700 * cells(patient, p, 4, 1.6))
    canal = 3.6 - np.hypot(p.y + 20, p.z + 46)
    lay(hu, soft(np.minimum(canal, u - 50), e), AIR)
    lobes = 3.2 + 2.0 * np.sin(u * 0.33 + patient.seed_shift[0, 0])
    frontal = ellipsoid(p, (9, 77, -17), (16 * patient.sinus, 9, (9 + lobes.mean()) * patient.sinus))
    frontal = np.minimum(np.minimum(frontal, outer - 1.7), np.minimum(-inner - 1.5, u - 0.8 + 0.12 * lobes))
    lay(hu, soft(frontal, e) * soft(p.y - 50, 2), AIR)


# ------------------------------------------------------------------------------------------------------- brain

LATERAL_VENTRICLE = np.array(  # spine of one side: x, y, z, radius in mm
    [(16, 32, 3, 2.6), (11, 25, 8, 4.6), (6.5, 12, 12, 4.4), (7.5, -2, 20, 4.2), (11, -18, 23, 4.6),
     (18, -34, 19, 5.2), (25, -46, 8, 6.2), (26, -60, 4, 3.2), (21, -76, 3, 1.6)]
)  # fmt: skip
TEMPORAL_HORN = np.array([(25, -46, 8, 5.0), (35, -36, -6, 2.4), (35, -22, -15, 1.9), (30, -10, -20, 2.2)])


class Brain(NamedTuple):
    """Shares of the brain's compartments at the points, (N,) float32."""

    hu: np.ndarray
    ventricle: np.ndarray
    cistern: np.ndarray  # subarachnoid space
    grey: np.ndarray
    below: np.ndarray  # under the tentorium
    surface: np.ndarray  # depth in mm below the pia


def tentorium(p: Points) -> np.ndarray:
    """Height in mm above the tentorium."""
    u = np.abs(p.x)
    roof = 1 - 0.52 * u + 0.004 * u**2 - 0.32 * np.maximum(-48 - p.y, 0) - 0.25 * np.maximum(p.y + 40, 0)
    return (p.z - roof) * 0.85


def brain(
    patient: Patient, p: Points, q: Points, depth: np.ndarray, k: np.ndarray, efface: np.ndarray, widen: float
) -> Brain:
    """Brain tissue without lesions.

    p: coordinates in the brain (bent by mass effects); q: where the skull is. depth: mm below the inner table or
    below a clot on it. k: relative radius. efface: 0..1 share of sulci closed by swelling. widen: of ventricles."""
    e = p.edge
    u = np.abs(p.x)
    t = patient.tissue
    old = patient.atrophy
    above = tentorium(p)
    below = soft(-above, 2.0) * soft(-p.y - 8 + 0.25 * u, 4)
    wander = sample(patient.smooth, p, patient.seed_shift[5])
    fine = sample(patient.rough, p, patient.seed_shift[6])
    # sulcal sheets run at right angles to the surface: the fold lattice is stretched along the radius
    stretch = np.maximum(k, 0.3) ** -0.72
    fold = sample(
        patient.fold, Points((p.x) * stretch, (p.y + 18) * stretch, p.z * stretch, e), patient.seed_shift[7]
    )
    fold = np.abs(fold + 0.35 * fine) / stretch
    sulcus_mm = np.clip(14 + 5 * wander + 3 * old, 6, 23)
    gape = np.clip((0.30 + 1.35 * old + 0.4 * sample(patient.smooth, p, patient.seed_shift[2], 1.5)), 0.02, 3)
    gape = (
        gape * (1 - efface) * (1.05 - np.clip(depth / sulcus_mm, 0, 1)) * (1 - below) * soft(k - 0.62, 0.16)
    )
    sulcus = soft(gape - fold, e) * soft(sulcus_mm - depth, 3) * soft(k - 0.6, 0.1)
    pia = (0.4 + 1.6 * old * (1 + 0.4 * wander)) * (1 - 0.8 * efface) * (1 - 0.7 * below)
    outside = soft(pia - depth, e)
    ribbon = np.minimum(depth - pia, np.maximum(fold - gape, (depth - sulcus_mm) * 0.8))
    # fissure between the hemispheres, around the corpus callosum and the brain stem
    core = ellipsoid(p, (0, -6, -3), (30, 37, 26), mirror=False) * 1.1
    medial = (1 - soft(core, 3)) * (1 - below)
    medial_fold = sample(
        patient.fold, Points(p.x * 0.45 + 70 * (p.x > 0), p.y, p.z, e), patient.seed_shift[4]
    )
    medial_fold = np.abs(medial_fold + 0.9 * fine)
    medial_mm = np.clip(9 + 5 * wander, 3, 16)
    cleft = 0.5 + 0.9 * old + 1.2 * soft(p.y - 20, 20) * old
    fissure = soft(cleft - u, e) * medial
    medial_gape = (0.2 + 0.9 * old) * (1 - efface)
    fissure = np.maximum(fissure, soft(medial_gape - medial_fold, e) * soft(medial_mm - u, 3) * medial)
    medial_ribbon = np.minimum(u - cleft, np.maximum(medial_fold - medial_gape, (u - medial_mm) * 0.8))
    ribbon = np.minimum(ribbon, medial_ribbon + 30 * soft(core, 4) + 30 * below)
    # sylvian fissure: insular cleft and the sheet from it to the surface
    insula = np.abs(u - (38.5 + 2.2 * fine - 0.010 * (p.y - 2) ** 2 - 0.12 * np.abs(p.z - 2)))
    span = np.minimum(np.minimum(p.y + 20 + 0.3 * (p.z - 5), 22 - p.y), np.minimum(p.z + 13, 20 - p.z))
    sheet = np.abs(p.z + 11 - 0.52 * (19 - p.y) + 3.5 * wander) * 0.87
    lateral = np.minimum(np.minimum(u - 38, p.y + 34), 24 - p.y)
    syl = (0.7 + 1.9 * old) * (1 - 0.9 * efface)
    stem_gap = np.hypot((p.z + 13) * 0.5, p.y - 6 - 0.2 * (u - 12) - 2 * fine)
    insular = syl * (0.9 + 0.5 * fine + 0.02 * p.y)
    sylvian = np.maximum(
        soft(insular - insula, e) * soft(span, 4),
        soft(syl * (0.7 + 0.5 * fine) + 0.035 * np.maximum(u - 45, 0) - sheet, e + 1.5) * soft(lateral, 4),
    )
    sylvian = np.maximum(sylvian, soft(syl + 1.0 - stem_gap, e + 1) * soft(np.minimum(u - 8, 40 - u), 4))
    sylvian *= 1 - below
    near = np.minimum(np.where(span > -3, insula - syl, 30), np.where(lateral > -3, sheet - syl, 30))
    ribbon = np.minimum(ribbon, near + 30 * below)

    grey = soft(3.3 + 0.7 * fine - ribbon, e + 1.6)
    white = t["white"] + 0.5 * wander - 1.3 * old * np.exp(-(((p.z - 24) / 14) ** 2) - ((u - 22) / 12) ** 2)
    hu = white + grey * (t["grey"] - white)

    def nucleus(share: np.ndarray, value: float) -> None:
        lay(hu, share, value)
        np.maximum(grey, share, out=grey)

    putamen = ellipsoid(
        Points(u - 0.18 * (p.y - 2), p.y, p.z, e), (26.5, 2, 2), (5.5, 17, 10.5), mirror=False
    )
    nucleus(soft(putamen, e + 1), t["grey"] + 0.5)
    pallidum = ellipsoid(Points(u + 0.30 * (p.y + 3), p.y, p.z, e), (19.5, -3, -1), (4.5, 9, 7), mirror=False)
    lay(hu, soft(pallidum, e + 1), t["grey"] + (60 if patient.calcified["pallidum"] else -1.5))
    nucleus(
        soft(
            ellipsoid(
                Points(u + 0.2 * (p.y + 17), p.y, p.z, e), (10.5, -17, 7), (8.5, 14, 9.5), mirror=False
            ),
            e + 1,
        ),
        t["grey"],
    )
    # brain stem and cerebellum
    axis = -25 - 0.28 * np.maximum(-p.z - 12, 0)
    pons = np.exp(-(((p.z + 32) / 9) ** 2))
    midbrain = np.exp(-(((p.z + 13) / 7) ** 2))
    stem_radius = 13.5 + 3.0 * pons - 4.5 * soft(-48 - p.z, 8)
    ahead = p.y - axis
    cleft_mm = 7 * midbrain * np.clip(1 - u / 7, 0, 1) * soft(ahead, 8)  # between the peduncles
    waist = 2.5 * midbrain * np.exp(-((ahead / 5) ** 2))
    trunk = stem_radius - np.hypot(u, ahead * (1.1 + 0.12 * pons)) - cleft_mm - waist + 0.6 * fine
    trunk = np.minimum(trunk, -5 - p.z + 0.15 * ahead)
    folia = np.sin(0.62 * np.hypot(0.8 * u, p.y + 22) + 0.75 * p.z + 1.2 * fine)  # arcs around the stem
    cerebellum = 36.0 + 1.6 * folia * soft(14 - depth, 8) + 1.5 * soft(9 - u, 5)
    dentate = soft(ellipsoid(p, (18, -58, -36), (14, 11, 8)), 8)
    cerebellum = cerebellum - 4.5 * dentate
    lay(hu, below, cerebellum)
    lay(grey, below, 0.6)
    stem_share = soft(trunk, e)
    lay(hu, stem_share, t["white"] + 4.0)
    lay(grey, stem_share, 0.3)

    cistern = np.maximum(np.maximum(outside, sulcus), np.maximum(fissure, sylvian))
    cistern *= 1 - stem_share
    wide = 0.5 + 1.6 * old
    low = 1 - 0.7 * efface
    star = np.maximum(ellipsoid(p, (0, -2, -17), (10, 10, 9)), ellipsoid(p, (7, -5, -18), (8, 5, 7)))
    # around the stem: in front of the pons, beside and behind the midbrain, all round the medulla
    room = (
        0.15
        + 0.9 * soft(ahead - 5, 8) * (1 - 0.6 * midbrain)
        + soft(2 - ahead, 6) * (1.1 * midbrain - 0.8 * pons)
    )
    room = room + 0.35 * fine + 0.25 * wander
    ambient = (wide + 0.6) * room * low - np.abs(trunk + wide * 0.5 + 0.3)
    ambient = np.minimum(ambient, -4 - p.z)
    quad = ellipsoid(p, (0, -41, -4), (11, 5 + 2 * old, 8))
    quad = np.maximum(quad, ellipsoid(p, (14, -36, 0), (9, 3 + old, 6)))
    magna = np.minimum(ellipsoid(p, (0, -78, -58), (14, 12, 12)), 3 + 8 * old - depth)
    angle = ellipsoid(p, (15, -27, -36), (8, 3.2 + 1.5 * old, 8))
    vermian = soft(0.4 + old - u, e) * soft(-62 - p.y, 4) * soft(18 - depth, 5) * below
    basal = soft(np.maximum(star * low, np.maximum(np.maximum(quad, angle) * low, magna)), e)
    basal = np.maximum(basal, soft(ambient, e) * np.clip(2 * room, 0, 1)) * (1 - soft(trunk, e))
    fissures = (
        soft(folia - 0.96 + 0.06 * old, 0.15)
        * soft(6 + 10 * old + 4 * wander - depth, 5)
        * below
        * (0.35 + 0.4 * old)
    )
    cistern = np.maximum(np.maximum(cistern, fissures * (1 - efface)), np.maximum(basal, vermian))
    lay(hu, cistern, t["csf"] + 1.5)
    # ventricles
    side = np.where(p.x > 0, patient.ventricle[1], patient.ventricle[0]).astype(np.float32) * np.float32(
        widen
    )
    lateral_d = np.maximum(tube(p, LATERAL_VENTRICLE, 1.75), -1e3) + LATERAL_VENTRICLE[4, 3] * (side - 1)
    horn = tube(p, TEMPORAL_HORN, 1.2) + 2.0 * (side - 1) - 0.6
    lateral_v = soft(np.minimum(np.maximum(lateral_d, horn), u - 0.9), e)
    third = np.minimum(
        1.0 + 1.6 * side - 0.5 - u - 0.02 * np.abs(p.y + 10),
        ellipsoid(p, (0, -10, -2), (15, 17, 12), mirror=False),
    )
    fourth = np.minimum(
        ellipsoid(p, (0, -46, -34), (8.5, 6.5, 14), mirror=False), -p.y - 40 - 0.2 * u + 2 * side
    )
    ventricle = np.maximum(np.maximum(lateral_v, soft(third, e)), soft(fourth * side, e))
    lay(hu, ventricle, t["csf"])
    caudate = ellipsoid(
        Points(u - 0.38 * (p.y - 16), p.y, p.z, e), (14.5, 17, 6), (5.6, 12, 12), mirror=False
    )
    body = tube(p, np.array([(16, 6, 17, 3.6), (19, -16, 22, 2.4), (25, -30, 18, 1.5)]), 1.2)
    head = soft(np.maximum(caudate, body), e + 0.5)
    head = head * (1 - 0.85 * soft(lateral_d - 2.5 * side, 1.5))
    nucleus(head, t["grey"] + 0.3)
    ventricle *= 1 - head
    cistern *= 1 - ventricle
    grey *= 1 - np.maximum(cistern, ventricle)
    plexus = ellipsoid(p, (24, -46, 10), (2.8, 4.5, 4))
    if patient.calcified["choroid"]:
        lay(hu, soft(plexus + 0.8 * fine, e), 130)
    else:
        lay(hu, soft(plexus, 2.0), 36)
    if patient.calcified["pineal"]:
        lay(hu, soft(ellipsoid(p, (0, -30, 2), (2.4, 2.8, 3.5), mirror=False), e), 160)
    # beam hardening brightens the brain along the skull and darkens it between the petrous bones
    hu += 3.0 * np.exp(-np.maximum(q.z * 0 + depth, 0) / 7)
    hu -= 5.0 * np.exp(-(((q.z + 42) / 7) ** 2) - ((q.y + 30) / 9) ** 2) * soft(45 - np.abs(q.x), 12)
    return Brain(hu, ventricle, cistern, grey, below, ribbon)


def dura(patient: Patient, hu: np.ndarray, p: Points, depth: np.ndarray, k: np.ndarray) -> None:
    """Falx, tentorial edge and the great venous sinuses, in place."""
    e = p.edge
    u = np.abs(p.x)
    hollow = ellipsoid(p, (0, -8, 0), (40, 46, 34), mirror=False)
    falx = soft(0.9 - u, e) * soft(-hollow, 2) * soft(tentorium(p) + 1, 2)
    value = DURA + (25 if patient.calcified["falx"] else 0) * soft(p.y - 30, 10)
    lay(hu, 0.85 * falx, value)
    above = tentorium(p)
    edge = soft(0.9 - np.abs(above), e) * soft(-p.y - 24, 6) * soft(u - 12, 4) * soft(62 - u, 6)
    lay(hu, 0.75 * edge, DURA)
    sagittal = soft(3.4 - 0.75 * depth - u * 0.9, e) * soft(np.maximum(p.z - 35, -60 - p.y), 8)
    transverse = soft(3.2 - np.abs(above + 2), e) * soft(4.5 - depth, e) * soft(-p.y - 48, 5)
    lay(hu, np.maximum(sagittal, transverse), VENOUS)


# ----------------------------------------------------------------------------------------------------- lesions


def _surface(p: Points, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The point of the inner table on the same ray."""
    r = 1 / np.maximum(k, 0.3)
    return p.x * r, (p.y + 18) * r - 18, p.z * r


def clot_mm(lesion: Lesion, p: Points, k: np.ndarray) -> np.ndarray:
    """Thickness in mm of an extra-axial clot on the inner table, along every ray."""
    x, y, z = _surface(p, k)
    cx, cy, cz = lesion.centre
    if lesion.kind == "epidural":  # biconvex: a lens around one point
        chord = ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / lesion.extent[0] ** 2
        return lesion.size_mm * np.maximum(1 - chord, -1.0)
    ey, ez = lesion.extent[1:]  # subdural: a crescent over the hemisphere that ends at the falx
    window = 1 - ((y - cy) / ey) ** 2 - ((z - cz) / ez) ** 2
    arc = np.sqrt(np.maximum(window, 0)) - 0.6 * (window < 0)
    lateral = np.clip((np.sign(cx) * x - 2) / 24, -0.1, 1)
    return lesion.size_mm * np.minimum(np.minimum(arc, 1), np.sqrt(np.abs(lateral)) * np.sign(lateral))


def push(lesions: Sequence[Lesion], p: Points, k: np.ndarray) -> Points:
    """Brain coordinates under mass effect: where the tissue now at p came from."""
    x, y, z = p.x, p.y, p.z
    for lesion in lesions:
        if lesion.push_mm == 0:
            continue
        cx, cy, cz = lesion.centre
        hold = np.clip(1 - k**2, 0, 1)  # the skull does not give
        if lesion.kind in ("epidural", "subdural", "ischemia"):
            wide = np.exp(-(((p.y - cy) / 60) ** 2) - ((p.z - cz) / 45) ** 2)
            x = x + np.sign(cx) * lesion.push_mm * wide * hold
        else:  # an incompressible ball of this radius has appeared
            dx, dy, dz = p.x - cx, p.y - cy, p.z - cz
            r = np.sqrt(dx**2 + dy**2 + dz**2) + 1e-3
            pull = (
                lesion.push_mm
                * np.minimum(r / lesion.size_mm, (lesion.size_mm / r) ** 1.5)
                * np.sqrt(hold)
                / r
            )
            x, y, z = x - dx * pull, y - dy * pull, z - dz * pull
    return Points(x, y, z, p.edge)


def territory(patient: Patient, lesion: Lesion, p: Points, k: np.ndarray, b: Brain) -> np.ndarray:
    """Signed distance in mm, positive inside, to the border of an arterial territory."""
    side = np.float32(np.sign(lesion.centre[0]))
    u = p.x * side
    azimuth = np.degrees(np.arctan2(u, p.y + 18))
    r = np.hypot(u, p.y + 18) * math.pi / 180
    up = 2 - 4 * b.below - 1  # > 0 above the tentorium
    cx, cy, cz = lesion.centre
    ball = lesion.size_mm - np.sqrt((p.x - cx) ** 2 + (p.y - cy) ** 2 + (p.z - cz) ** 2)
    if lesion.style in ("mca", "partial mca"):
        d = np.minimum(np.minimum((azimuth - 27) * r, (132 - azimuth) * r), u - 17 - 6 * soft(-p.y, 8))
        d = np.minimum(d, 20 * up)
        return np.minimum(d, ball) if lesion.style == "partial mca" else d
    if lesion.style == "pca":
        return np.minimum(
            np.minimum((azimuth - 138) * r, 26 - p.z), np.minimum(np.minimum(u - 2, -34 - p.y), 20 * up)
        )
    if lesion.style == "aca":
        return np.minimum(np.minimum(19 - u, u - 0.5), np.minimum((k - 0.42) * 60, p.y + 38))
    if lesion.style == "cerebellar":
        return np.minimum(np.minimum(u - 5, -20 * up), ball)
    return ball  # lacune


def draw_lesion(rng: np.random.Generator, kind: str, levels_mm: np.ndarray, boost: float) -> Lesion:
    """A random lesion of this kind at one of the levels (head z in mm) that the slices show."""

    def level(low: float, high: float) -> float:
        inside = levels_mm[(levels_mm >= low) & (levels_mm <= high)]
        return (
            float(rng.choice(inside))
            if len(inside)
            else float(np.clip(levels_mm[len(levels_mm) // 2], low, high))
        )

    side = -1.0 if rng.random() < 0.5 else 1.0
    name = "left" if side > 0 else "right"
    hu = rng.uniform(54, 76)
    extent = np.ones(3)
    style, rim, mass = "", 0.0, 0.0
    if kind == "epidural":
        z = level(-15, 45)
        centre = np.array([side * 62, rng.uniform(-55, 35), z])
        size = rng.uniform(9, 26) * boost
        extent[:] = rng.uniform(26, 34) + 0.6 * size
        mass = 0.32 * size
    elif kind == "subdural":
        z = level(5, 50)
        centre = np.array([side * 60, rng.uniform(-35, 0), z])
        size = rng.uniform(5.5, 15) * boost
        extent = np.array([1, rng.uniform(65, 95), rng.uniform(40, 65)])
        mass = 0.6 * size
    elif kind == "intraparenchymal":
        sites = {"putamen": (27, 0), "thalamus": (14, -18), "frontal": (26, 40), "parietal": (34, -45),
                 "temporal": (44, -15), "occipital": (24, -75), "cerebellar": (22, -62), "pontine": (4, -27)}  # fmt: skip
        heights = {"putamen": (-2, 14), "thalamus": (2, 16), "frontal": (8, 45), "parietal": (18, 52), "temporal": (-25, 0),
                   "occipital": (2, 22), "cerebellar": (-48, -30), "pontine": (-38, -28)}  # fmt: skip
        fits = [s for s in sites if np.any((levels_mm >= heights[s][0]) & (levels_mm <= heights[s][1]))] or [
            "parietal"
        ]
        style = str(rng.choice(fits))
        limit = {"thalamus": 15, "cerebellar": 18, "pontine": 9}.get(style, 26)
        size = min(rng.uniform(7, limit), rng.uniform(7, limit) + 5) * boost
        centre = np.array([side * sites[style][0], sites[style][1], level(*heights[style])]) + rng.normal(
            0, (3, 4, 0)
        )
        extent = np.exp(rng.normal(0, 0.16, 3))
        rim = rng.uniform(1.5, 5) if size > 10 else 0.0
        mass = rng.uniform(0.25, 0.5) * size
    elif kind == "intraventricular":
        style = str(rng.choice(["one side", "both", "layered", "cast"]))
        size = rng.uniform(20, 60)
        centre = np.array([side * 12, rng.uniform(-45, 20), level(-5, 25)])
        name = name if style == "one side" else "both"
    elif kind == "subarachnoid":
        style = str(rng.choice(["basal", "sylvian", "convexity"]))
        size = rng.uniform(24, 52) * boost
        low, high, x, y = {
            "basal": (-22, -8, 0, 0),
            "sylvian": (-12, 16, 42, 2),
            "convexity": (25, 60, 38, -20),
        }[style]
        centre = np.array([side * x, y + rng.normal(0, 8), level(low, high)])
        name = "both" if style == "basal" else name
        hu = rng.uniform(52, 68)
    else:
        style = str(
            rng.choice(
                ["mca", "partial mca", "pca", "aca", "lacune", "cerebellar"],
                p=[0.27, 0.28, 0.13, 0.1, 0.12, 0.1],
            )
        )
        hu = rng.uniform(4.5, 12)
        low, high, x, y = {"mca": (0, 40, 45, -10), "partial mca": (0, 48, 52, rng.uniform(-50, 25)), "pca": (-2, 14, 18, -75),
                           "aca": (25, 60, 8, 20), "lacune": (-2, 22, rng.uniform(14, 28), rng.uniform(-18, 8)),
                           "cerebellar": (-48, -28, 26, -66)}[style]  # fmt: skip
        if not np.any((levels_mm >= low) & (levels_mm <= high)):
            style, (low, high, x, y) = "partial mca", (0, 48, 52, rng.uniform(-50, 25))
        centre = np.array([side * x, y, level(low, high)])
        size = {"lacune": rng.uniform(5.5, 9), "cerebellar": rng.uniform(18, 28)}.get(
            style, rng.uniform(22, 36)
        ) * boost
        hu = max(hu, 8.0) if style == "lacune" else hu
        mass = rng.uniform(0, 4) if style == "mca" else 0.0
    return Lesion(kind, hu, name, centre, size, mass, style, rim, extent, rng.uniform(0, 192, 3))


def lesion_share(
    patient: Patient,
    lesion: Lesion,
    q: Points,
    p: Points,
    k: np.ndarray,
    inner: np.ndarray,
    clot: np.ndarray,
    b: Brain,
) -> np.ndarray:
    """Share of every pixel that the lesion takes (for ischemia: its strength), (N,) in 0..1."""
    e = q.edge
    ragged = sample(patient.rough, q, lesion.shift, 0.6)
    if lesion.kind in ("epidural", "subdural"):
        thick = clot_mm(lesion, q, k) + 0.5 * ragged
        return soft(np.minimum(thick - inner, inner + 0.3), e) * soft(thick - 0.8, 1.0)
    cx, cy, cz = lesion.centre
    if lesion.kind == "intraparenchymal":
        d = ellipsoid(q, lesion.centre, lesion.size_mm * lesion.extent, mirror=False)
        lobed = sample(patient.smooth, q, lesion.shift[::-1], min(24 / lesion.size_mm, 2.5))
        d = d + lesion.size_mm * (0.14 * lobed + 0.05 * ragged)
        return soft(np.minimum(d, inner - 1.0), e)
    if lesion.kind == "intraventricular":
        region = {
            "one side": np.minimum(np.sign(cx) * q.x - 0.5, lesion.size_mm - np.abs(p.y - cy)),
            "both": lesion.size_mm - np.hypot(p.y - cy, 1.5 * (p.z - cz)),
            "layered": -38 - p.y + 0.4 * lesion.size_mm,
            "cast": np.full_like(p.x, 5.0),
        }[lesion.style]
        return b.ventricle * soft(region + 2 * ragged * (lesion.style != "layered"), 2.0)
    if lesion.kind == "subarachnoid":
        near = lesion.size_mm - np.sqrt((0.75 * (p.x - cx)) ** 2 + (p.y - cy) ** 2 + (1.1 * (p.z - cz)) ** 2)
        return np.clip(b.cistern * 1.2, 0, 1) * soft(near + 7 * ragged, 6)
    d = territory(patient, lesion, p, k, b) + 2.0 * ragged
    return soft(d, 3.0) * (1 - np.clip(b.cistern + b.ventricle, 0, 1)) * soft(inner - 1, 1.5)


# ------------------------------------------------------------------------------------------------------ slices


def draw_plane(
    patient: Patient,
    lesions: Sequence[Lesion],
    scanner: tuple[np.ndarray, np.ndarray, float],
    pixel_mm: float,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """One thin plane: (H, W) float32 HU, and the share of every lesion in every pixel."""
    e = max(pixel_mm, 0.9)  # mm; the detector and the focal spot blur at least this much
    p = head_points(patient, scanner, e)
    shape = p.x.shape
    k, vault_gap, normal_z = vault(patient, p)
    ridge = skull_base(p)
    floor = ridge[0]
    gy, gx = np.gradient(floor, pixel_mm)
    floor_gap = (p.z - floor) / np.sqrt(
        1 + np.minimum(gx**2 + gy**2, 2.0)
    )  # capped: else cliffs reach far up
    lumps = sample(patient.smooth, p, patient.seed_shift[1], 0.7)
    u = np.abs(p.x)
    temple = np.exp(-(((p.z + 12) / 26) ** 2) - ((p.y - 0) / 45) ** 2)
    thickness = patient.skull_mm * (1 + 0.16 * lumps) * (1 - 0.42 * temple)
    thickness += 3.5 * np.exp(-((u / 9) ** 2)) * (p.y < -60) * np.exp(-(((p.z + 16) / 14) ** 2))
    thickness += 2.0 * soft(p.y - 45, 20) * soft(p.z + 5, 15)
    outer = vault_gap + thickness
    inner = np.minimum(vault_gap, floor_gap)
    jaw = ellipsoid(p, (0, 10, -60), (66, 66, 75), mirror=False)
    neck = np.minimum(ellipsoid(p, (0, -42, -60), (68, 64, 70), mirror=False), -20 - p.z)
    nose = 14 - np.hypot(u * 1.2, (p.y - 74) * 0.75) - np.maximum(p.z + 38, 0) * 0.8
    ear = ellipsoid(p, (75, -32, -42), (3.5, 13, 24))
    temporalis = 7 * soft(u - 40, 10) * np.exp(-(((p.z + 25) / 26) ** 2) - ((p.y - 18) / 26) ** 2)
    scalp = patient.scalp_mm * (1 + 0.12 * lumps) + temporalis + 3 * soft(-p.y - 70, 20) * soft(-p.z, 20)
    depth = np.maximum(np.maximum(outer + scalp, jaw), np.maximum(np.maximum(neck, ear), nose))

    hu = np.full(shape, AIR, np.float32)
    wide = e + normal_z * 2.0
    lay(hu, soft(depth, wide), FAT)
    lay(hu, soft(np.minimum(depth, 2.2 - depth), e), SKIN)
    lay(hu, soft(temporalis - 2.5, 2) * soft(np.minimum(depth - 2.8, -outer - 0.5), e), MUSCLE)
    lay(hu, soft(1.2 + outer, e) * soft(-outer, e) * 0.7, 40)
    if p.z.min() < 0:
        face(patient, hu, p, depth)
    if patient.holder:
        x, y, _ = scanner
        lay(hu, soft(1.4 - np.abs(np.hypot(x * 1.05, y + 2) - 108), e) * soft(-y - 15, 4), -420)
    inside = inner > -2
    shares = [np.zeros(shape, np.float32) for _ in lesions]
    if inside.any():
        q = Points(p.x[inside], p.y[inside], p.z[inside], e)
        kq, gap = k[inside], inner[inside]
        extra = [lesion for lesion in lesions if lesion.kind in ("epidural", "subdural")]
        clot = np.zeros_like(gap)
        for lesion in extra:
            np.maximum(clot, clot_mm(lesion, q, kq), out=clot)
        moved = push(lesions, q, kq)
        depth_b = gap - clot
        efface = np.zeros_like(gap)
        for lesion in lesions:
            if lesion.push_mm:
                near = np.exp(
                    -(((moved.x - lesion.centre[0]) / 45) ** 2)
                    - ((moved.y - lesion.centre[1]) / 55) ** 2
                    - ((moved.z - lesion.centre[2]) / 45) ** 2
                )
                np.maximum(efface, np.clip(lesion.push_mm / 6, 0, 0.9) * near, out=efface)
        flooded = any(lesion.kind == "intraventricular" for lesion in lesions)
        b = brain(patient, moved, q, depth_b, kq, efface, 1.25 if flooded else 1.0)
        tissue = b.hu
        dura(patient, tissue, Points(moved.x * 0.5 + q.x * 0.5, q.y, q.z, e), gap, kq)
        for lesion, out in sorted(
            zip(lesions, shares, strict=True), key=lambda pair: pair[0].kind != "ischemia"
        ):
            share = lesion_share(patient, lesion, q, moved, kq, gap, clot, b)
            if lesion.kind == "ischemia":
                tissue -= share * lesion.hu * (0.75 + 0.25 * b.grey)
            else:
                if lesion.rim_mm:
                    d = ellipsoid(
                        q, lesion.centre, lesion.size_mm * lesion.extent + lesion.rim_mm, mirror=False
                    )
                    lay(tissue, 0.8 * soft(d, 3) * (1 - b.cistern) * (1 - b.ventricle), 20)
                texture = 3 * sample(patient.rough, q, lesion.shift[::-1], 1.2)
                lay(tissue, share, lesion.hu + texture)
            out[inside] = share
        whole = np.zeros(shape, np.float32)
        whole[inside] = tissue
        lay(hu, soft(inner, wide) * inside, whole)
    skull(patient, hu, p, inner, vault_gap, outer, normal_z, ridge, floor_gap)
    solid = soft(inner, wide)
    return hu, [share * solid for share in shares]


def _check(
    size: int | tuple[int, int], slices: int, noise_hu: float, lesions: Sequence[str] | None
) -> tuple[int, int]:
    shape = (size, size) if isinstance(size, (int, np.integer)) else tuple(size)
    if len(shape) != 2 or min(shape) < 16:
        raise ValueError(f"size {size}: must be a whole number or (rows, columns), each at least 16")
    if slices < 1:
        raise ValueError(f"slices {slices}: must be at least 1")
    if not (math.isfinite(noise_hu) and noise_hu >= 0):
        raise ValueError(f"noise_hu {noise_hu}: must be a finite number of HU, at least 0")
    for name in lesions or ():
        if name not in LESION_CLASSES:
            raise ValueError(f"lesion {name!r}: must be one of {', '.join(LESION_CLASSES)}")
    return int(shape[0]), int(shape[1])


def _draw_kinds(rng: np.random.Generator) -> list[str]:
    """Half of the patients have nothing; a third of the others have two lesions."""
    if rng.random() < 0.5:
        return []
    count = 1 + (rng.random() < 0.3)
    odds = np.array([0.13, 0.2, 0.12, 0.14, 0.16, 0.25])
    return [LESION_CLASSES[i] for i in rng.choice(len(odds), count, replace=False, p=odds)]


def _masks(shares: np.ndarray, lesions: Sequence[Lesion], pixel_mm: float) -> np.ndarray:
    """(L, S, H, W) shares to (S, H, W) classes; a class below MIN_AREA_MM2 in a slice is dropped there."""
    mask = np.zeros(shares.shape[1:], np.uint8)
    order = sorted(range(len(lesions)), key=lambda i: lesions[i].kind != "ischemia")
    for i in order:
        half = 0.4 if lesions[i].kind == "subarachnoid" else 0.5
        mask[shares[i] > half] = 1 + LESION_CLASSES.index(lesions[i].kind)
    for plane in mask:
        for value in range(1, len(LESION_CLASSES) + 1):
            here = plane == value
            if 0 < here.sum() * pixel_mm**2 < MIN_AREA_MM2:
                plane[here] = 0
    return mask


def _labels(mask: np.ndarray) -> dict[str, int]:
    present = {name: int((mask == i + 1).any()) for i, name in enumerate(LESION_CLASSES)}
    return present | {"any": int(any(present[name] for name in HEMORRHAGES))}


def generate_phantom(
    seed: int,
    *,
    size: int | tuple[int, int] = 128,
    slices: int = 24,
    noise_hu: float = 4.0,
    lesions: Sequence[str] | None = None,
) -> Phantom:
    """A synthetic head CT, the same for the same arguments.

    size: pixels, or (rows, columns), of a field of view of 236 mm across the smaller; slices: from the
    orbito-meatal level to the vertex. noise_hu: SD of the noise in HU. lesions: names of LESION_CLASSES, none
    for a normal head; by default drawn, half of the seeds without any. Raises ValueError for size below 16,
    slices below 1, negative noise or an unknown lesion."""
    height, width = _check(size, slices, noise_hu, lesions)
    anatomy_rng, lesion_rng, noise_rng = (np.random.default_rng((seed, i)) for i in range(3))
    patient = draw_patient(anatomy_rng)
    kinds = _draw_kinds(lesion_rng) if lesions is None else list(dict.fromkeys(lesions))
    pixel_mm = FOV_MM / min(height, width)
    low, high = LOWEST_MM * patient.scale[2], HIGHEST_MM * patient.scale[2]
    gap_mm = (high - low) / slices if slices > 1 else THICKNESS_MM
    levels = low + (np.arange(slices) + 0.5) * (high - low) / slices
    x = ((np.arange(width) - (width - 1) / 2) * pixel_mm).astype(np.float32)[None, :]
    y = (-(np.arange(height) - (height - 1) / 2) * pixel_mm).astype(np.float32)[:, None]
    grid = (x + 0 * y, y + 0 * x)
    slab = min(gap_mm, THICKNESS_MM)

    for attempt in range(MAX_DRAWS):
        drawn = [
            draw_lesion(lesion_rng, kind, levels / patient.scale[2], 1 + 0.1 * attempt) for kind in kinds
        ]
        truth = np.empty((slices, height, width), np.float32)
        shares = np.zeros((len(drawn), slices, height, width), np.float32)
        for s, z in enumerate(levels):
            planes = [
                draw_plane(patient, drawn, (*grid, float(z + slab * o)), pixel_mm) for o in (-0.25, 0.25)
            ]
            truth[s] = sum(plane for plane, _ in planes) / 2
            for i in range(len(drawn)):
                shares[i, s] = sum(part[i] for _, part in planes) / 2
        shares *= (truth > -100) & (truth < 130)  # neither air nor bone, however much of it a steep wall adds
        mask = _masks(shares, drawn, pixel_mm)
        if all((mask == 1 + LESION_CLASSES.index(kind)).any() for kind in kinds):
            break

    hu = truth.copy()
    if noise_hu > 0:
        for plane in hu:
            plane += reconstruction_noise((height, width), noise_hu, pixel_mm, noise_rng)
    voxel_ml = gap_mm * pixel_mm**2 / 1000
    affine = np.diag([pixel_mm, pixel_mm, gap_mm, 1.0])
    affine[:3, 3] = (x[0, 0], -y[0, 0], levels[0])
    report = [
        {
            "kind": lesion.kind,
            "volume_ml": round(float((mask == 1 + LESION_CLASSES.index(lesion.kind)).sum() * voxel_ml), 3),
            "contrast_hu": round(
                float(-lesion.hu if lesion.kind == "ischemia" else lesion.hu - patient.tissue["grey"]), 2
            ),
            "side": lesion.side,
        }
        for lesion in drawn
    ]
    as_int = [np.clip(np.rint(v), -1024, 3071).astype(np.int16) for v in (hu, truth)]
    return Phantom(
        hu=as_int[0],
        truth=as_int[1],
        mask=mask,
        labels=_labels(mask),
        slice_labels=[_labels(plane) for plane in mask],
        spacing_mm=(float(gap_mm), float(pixel_mm), float(pixel_mm)),
        affine=affine,
        lesions=report,
    )
