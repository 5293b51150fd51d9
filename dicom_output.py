"""What a network made of a DICOM series -> DICOM of the same study: slices as a derived series, a mask as a
segmentation object through highdicom (optional)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
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
SERIES_NUMBER, DERIVED_SERIES_NUMBER = 9000, 9001  # far above those of a scanner


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
        _check_needed(file, slice_, "no DICOM SEG can refer to it (--mask-format nifti)")
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


def _check_needed(file: str | Path, slice_: pydicom.Dataset, why: str) -> None:
    missing = [tag for tag in NEEDED_TAGS if slice_.get(tag) in (None, "")]
    if missing:
        raise InputError(f"{shown(file)}: {missing[0]} is missing, {why}")


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


# ---------------------------------------------------------------- slices

# Of the patient, the study and how the scan was made; nothing else of a source's header goes on
KEPT_TAGS = (
    *("SpecificCharacterSet", *IDENTITY_TAGS, "StudyInstanceUID", "PatientPosition", "BodyPartExamined"),
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "AcquisitionDate", "AcquisitionTime"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "KVP"),
    *("GantryDetectorTilt", "AcquisitionNumber", "ConvolutionKernel", "Rows", "Columns"),
)
# What an archive wants to be there, be it empty
EMPTY_TAGS = (
    *(*IDENTITY_TAGS, "PatientPosition"),
    *("PositionReferenceIndicator", "SliceThickness", "KVP", "AcquisitionNumber"),
)
STORED_INTERCEPT = -1024  # stored 0; 12 bits hold -1024..3071 HU, as a scanner's do


def write_derived_series(
    folder: str | Path,
    files: Sequence[str | Path],
    hu: np.ndarray,
    made_by: Software,
    description: str = "denoised by a network, research use only",
) -> list[Path]:
    """Write slices as a CT series of their own in the study of the series that they were made of.

    files: of that series, one per slice in the order of hu, as dicom_series.read_pixels has them. hu: (S, H,
    W) HU, rounded and clipped to -1024..3071. Writes <folder>/<number>.dcm, atomically, and returns them.
    UIDs are new, each slice names its source, and lies where its source lies. Raises InputError for a source
    without a position, ScanError for one that cannot be read, ValueError for another shape."""
    if hu.ndim != 3 or len(files) != len(hu):
        raise ValueError(f"{shown(folder)}: {len(files)} files for slices of shape {hu.shape}")
    series, written = pydicom.uid.generate_uid(), []
    now = datetime.now()
    with quiet_pydicom():
        for number, (file, image) in enumerate(zip(files, hu, strict=True), start=1):
            source = open_dicom(str(file), (*KEPT_TAGS, *NEEDED_TAGS))
            _check_needed(file, source, "no slice can be derived from it")
            if (source.Rows, source.Columns) != image.shape:
                raise ValueError(f"{shown(file)}: is not {image.shape} as the derived slices are")
            slice_ = _derived(source, image, number, made_by)
            slice_.SeriesInstanceUID, slice_.SeriesDescription = series, description
            slice_.ContentDate, slice_.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
            path = Path(folder) / f"{number:05d}.dcm"
            with atomic_write(path, "wb") as opened:
                slice_.save_as(opened, enforce_file_format=True)
            written.append(path)
    return written


def _derived(source: pydicom.Dataset, hu: np.ndarray, number: int, made_by: Software) -> pydicom.Dataset:
    made = pydicom.Dataset()
    for tag in (*KEPT_TAGS, *EMPTY_TAGS):
        if tag in source and source.get(tag) not in (None, ""):
            made[tag] = source[tag]
        elif tag in EMPTY_TAGS:
            setattr(made, tag, None)
    if "BodyPartExamined" not in made:
        made.BodyPartExamined = "HEAD"
    if "FrameOfReferenceUID" not in made:
        made.FrameOfReferenceUID = pydicom.uid.generate_uid(entropy_srcs=[str(source.StudyInstanceUID)])
    made.SOPClassUID, made.SOPInstanceUID = CT_IMAGE, pydicom.uid.generate_uid()
    made.Modality, made.SeriesNumber, made.InstanceNumber = "CT", DERIVED_SERIES_NUMBER, number
    made.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    made.Manufacturer, made.ManufacturerModelName = MANUFACTURER, made_by.name
    made.SoftwareVersions, made.BurnedInAnnotation = made_by.version, "NO"
    made.DerivationDescription = f"denoised by {made_by.name} {made_by.version}; {MANUFACTURER}"
    reference = pydicom.Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CT_IMAGE, source.SOPInstanceUID
    made.SourceImageSequence = pydicom.Sequence([reference])
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.RescaleIntercept, made.RescaleSlope, made.RescaleType = STORED_INTERCEPT, 1, "HU"
    made.WindowCenter, made.WindowWidth = 40, 80
    stored = (np.rint(hu) - STORED_INTERCEPT).clip(0, 2**12 - 1).astype("<u2")
    made.PixelData = stored.tobytes()
    made["PixelData"].VR = "OW"
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    return made
