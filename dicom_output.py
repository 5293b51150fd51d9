"""A mask -> a DICOM segmentation object of the series that it was drawn on, through highdicom (optional)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from anatomy import LESION_CLASSES
from dicom_headers import CT_IMAGE, open_dicom, quiet_pydicom
from stage import InputError, atomic_write
from volumes import ASSUMED_SLICE_SPACING_MM, pseudonym, shown, stack_geometry

# A segmentation is an object of its patient and study, as an archive has to file it, so that these alone of
# all that we write carry what names the patient. An archive wants every one of them to be there.
IDENTITY_TAGS = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "ReferringPhysicianName", "StudyID", "StudyDate", "StudyTime"),
)
NEEDED_TAGS = (
    *("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"),
)
SOURCE_TAGS = (
    *("SpecificCharacterSet", "SOPClassUID", "Modality"),
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "SliceThickness"),
    *NEEDED_TAGS,
    *IDENTITY_TAGS,
)
BLOOD = LESION_CLASSES[:5]
INFARCT = Code("55641003", "SCT", "Infarct")  # SNOMED CT, morphologic abnormality; pydicom's list has none
MANUFACTURER = "research software, not a medical device"
SERIES_NUMBER = 9000  # far above those of a scanner


class Software(NamedTuple):
    """What drew a mask: the name of a network, and its version."""

    name: str
    version: str


def write_segmentation(
    path: str | Path,
    files: Sequence[str | Path],
    mask: np.ndarray,
    segments: dict[int, str],
    drawn_by: Software,
) -> bool:
    """Write a mask as a binary DICOM SEG, atomically. Returns False, and writes none, for an empty mask.

    files: of the series, one per slice in the order of the mask, as dicom_series.read_pixels has them.
    mask: (S, H, W) uint8. segments: value of the mask -> name, of LESION_CLASSES or any other for a lesion of
    whatever kind; each that is present becomes a segment, in the order of the values, with one frame for each
    slice that shows it. UIDs are new, and the frames refer to the slices; slices lie where their own headers
    say, tilt and uneven gaps included.
    Raises InputError without highdicom, for slices without a position, and ScanError for files that cannot be
    read; ValueError for a mask of another shape or of values without a name."""
    highdicom = highdicom_package()
    mask = np.asarray(mask)
    present = [int(value) for value in np.unique(mask) if value]
    if len(files) != len(mask) or mask.ndim != 3:
        raise ValueError(f"{shown(path)}: {len(files)} files for a mask of shape {mask.shape}")
    unknown = [value for value in present if value not in segments]
    if unknown:
        raise ValueError(f"{shown(path)}: the mask holds {unknown[0]}, which segments does not name")
    if not present:
        return False
    number_of = np.zeros(256, np.uint8)
    number_of[present] = np.arange(1, len(present) + 1)
    with quiet_pydicom():
        sources = _sources(files)
        if (sources[0].Rows, sources[0].Columns) != mask.shape[1:]:
            raise ValueError(f"{shown(path)}: slices of the series are not {mask.shape[1:]} as the mask is")
        try:
            made = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=number_of[mask],
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[
                    _description(highdicom, number, segments[value], drawn_by)
                    for number, value in enumerate(present, start=1)
                ],
                series_instance_uid=highdicom.UID(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=drawn_by.name,
                software_versions=drawn_by.version,
                device_serial_number="0",
                content_description="research use only",
                omit_empty_frames=True,
            )
        except (AttributeError, TypeError, ValueError) as error:  # headers that its rules do not allow
            raise InputError(
                f"{shown(files[0])}: highdicom refuses its headers, {error} (--mask-format nifti)"
            ) from None
        made.SeriesDescription = "lesions, drawn by a network"
        with atomic_write(Path(path), "wb") as file:
            made.save_as(file, enforce_file_format=True)
    return True


def highdicom_package() -> ModuleType:
    """The package that only this needs. Raises InputError without it."""
    try:
        import highdicom
        import highdicom.seg
    except ImportError:
        raise InputError("a DICOM SEG needs highdicom (pip install highdicom)") from None
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it would tell every module that it copies
    return highdicom


def _sources(files: Sequence[str | Path]) -> list[pydicom.Dataset]:
    """What a segmentation has to know of the slices; what sparse headers leave out is filled in."""
    found = [open_dicom(str(file), SOURCE_TAGS) for file in files]
    for file, slice_ in zip(files, found, strict=True):
        missing = [tag for tag in NEEDED_TAGS if slice_.get(tag) in (None, "")]
        if missing:
            raise InputError(
                f"{shown(file)}: {missing[0]} is missing, no DICOM SEG can refer to it (--mask-format nifti)"
            )
    first = found[0]
    corners = np.array([slice_.ImagePositionPatient for slice_ in found], float)
    stack = stack_geometry(
        corners, first.ImageOrientationPatient, first.PixelSpacing, ASSUMED_SLICE_SPACING_MM
    )
    series = pseudonym("frame of reference", str(first.StudyInstanceUID), str(first.SeriesInstanceUID))
    own = {
        "FrameOfReferenceUID": pydicom.uid.generate_uid(entropy_srcs=[series]),  # one for the series alone
        "SliceThickness": stack.spacing_mm[0],
        **dict.fromkeys(IDENTITY_TAGS, ""),
    }
    for slice_ in found:
        slice_.SOPClassUID = CT_IMAGE  # all that the readers take
        # The readers have seen that these differ by rounding at most; highdicom wants them equal
        slice_.ImageOrientationPatient = first.ImageOrientationPatient
        slice_.PixelSpacing = first.PixelSpacing
        for tag, value in own.items():
            if slice_.get(tag) in (None, ""):
                setattr(slice_, tag, value)
    return found


def _description(highdicom: ModuleType, number: int, name: str, drawn_by: Software):
    if name in BLOOD:
        kind, label = codes.SCT.Hemorrhage, f"{name} hemorrhage"
    elif name in LESION_CLASSES:
        kind, label = INFARCT, name
    else:
        kind, label = codes.SCT.Lesion, name
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=drawn_by.name,
            family=codes.DCM.ArtificialIntelligence,
            version=drawn_by.version,
        ),
        anatomic_regions=[codes.SCT.Brain],
    )
