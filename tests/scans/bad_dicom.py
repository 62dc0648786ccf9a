"""Bad DICOM series of many kinds: how to make each, and what must be said of it."""

import shutil
import struct

import numpy as np
import pydicom
import SimpleITK as sitk

from ..scan_writers import COUNTS, execute, write_dicom, write_frames
from .bad_scans import DAMAGED, TOO_MUCH, element, patched, truncated


def series(path, *faults, affine=None, array=COUNTS, **settings):
    """A DICOM series with faults: functions of its folder."""
    write_dicom(path, array, affine, **settings)
    for fault in faults:
        fault(path)


def says(*names, **elements):
    """A fault: other elements in some files of the folder; None takes one away."""

    def fault(folder):
        for name in names:
            header = pydicom.dcmread(folder / name)
            for element_, value in elements.items():
                if element_ == "PixelPaddingValue":
                    header.add_new("PixelPaddingValue", "SS", value)
                elif value is None:
                    delattr(header, element_)
                else:
                    setattr(header, element_, value)
            header.save_as(folder / name)

    return fault


def edit(tag, value, *names):
    """A fault: other bytes as the value of a tag, in some files of the folder."""

    def fault(folder):
        for name in names or [path.name for path in folder.iterdir()]:
            (folder / name).write_bytes(patched((folder / name).read_bytes(), tag, value))

    return fault


def mixed(path):
    write_dicom(path, COUNTS)
    write_dicom(path, COUNTS[:, :, :3], series="1.2.840.99999.1.2.3.4.5.6.7.8", prefix="other")


def other_size(path):
    write_dicom(path, COUNTS)
    write_dicom(path.with_name("b"), COUNTS[:5])
    shutil.copy(path.with_name("b") / "3", path / "3")


def in_colour(path):
    path.mkdir()
    image = sitk.GetImageFromArray(np.zeros((3, 4, 3), np.uint8), isVector=True)
    image.SetMetaData("0020|000e", "1.2.3.4")
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(path / "a.dcm"))
    execute(writer, image)


def sheared(degrees):
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[1, 2] = 3 * np.tan(np.radians(degrees))
    return affine


def drop_the_third(folder):
    names = np.random.default_rng(5).permutation(5)
    (folder / str(names[2])).unlink()


def in_a_folder(folder):
    (folder / "b").mkdir()
    (folder / "2").rename(folder / "b" / "2")


def packed_huge(path):
    """65535 x 65535 x 10000 pixels, packed: nothing but the header says how many."""
    header = b"".join(
        element(int(tag[:4], 16), int(tag[5:], 16), kind, value)
        for tag, kind, value in [
            ("0002|0010", b"UI", b"1.2.840.10008.1.2.4.90"),
            ("0020|000e", b"UI", b"1.2.3.4\0"),
            ("0028|0002", b"US", b"\1\0"),
            ("0028|0004", b"CS", b"MONOCHROME2 "),
            ("0028|0008", b"IS", b"100000"),
            ("0028|0010", b"US", b"\xff\xff"),
            ("0028|0011", b"US", b"\xff\xff"),
            ("0028|0100", b"US", b"\x10\0"),
            ("0028|0101", b"US", b"\x10\0"),
            ("0028|0102", b"US", b"\x0f\0"),
            ("0028|0103", b"US", b"\0\0"),
        ]
    )
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    pixels += struct.pack("<HHI", 0xFFFE, 0xE000, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.mkdir()
    (path / "1").write_bytes(b"\0" * 128 + b"DICM" + header + pixels)


BAD_DICOM = {
    "empty folder": ("a", lambda p: p.mkdir(), "must hold a DICOM series, got a folder without DICOM images"),
    "no DICOM": ("a", lambda p: (p.mkdir(), (p / "README").write_text("hi")), "must hold a DICOM series"),
    "mixed series": (
        "a",
        mixed,
        r"exactly one .* \(--series\), got 2: .*CT, 5 images .*; .*CT, 3 images of 6 x 7",
    ),
    "dicom damaged magic": ("a", lambda p: (p.mkdir(), (p / "1.dcm").write_bytes(b"hello")), "1.dcm is not a DICOM"),
    "dicom truncated": (
        "a",
        lambda p: series(p, lambda q: truncated(q / "3", 0.98)),
        DAMAGED + ".*less than expected .*file 3",
    ),
    "dicom truncated header": (
        "a",
        lambda p: series(p, lambda q: truncated(q / "3", 0.5)),
        "must have the element SeriesInstanceUID .file 3",
    ),
    "dicom no pixels": (
        "a",
        lambda p: series(p, lambda q: (q / "3").write_bytes((q / "3").read_bytes().split(b"\xe0\x7f")[0])),
        DAMAGED + ".*no pixel data to decode .file 3.",
    ),
    "missing slice": ("a", lambda p: series(p, drop_the_third), "got 1 to 2 mm: slices are missing or unevenly spaced"),
    "uneven slices": (
        "a",
        lambda p: series(p, tags={"0020|0032": lambda k: f"0\\0\\{3 * k + (k == 1) * 0.2}"}),
        "must have evenly spaced slices, got 2.8 to 3.2 mm",
    ),
    "time series": (
        "a",
        lambda p: series(p, tags={"0020|0032": lambda k: f"0\\0\\{k // 2}"}),
        "got several images at one position, a time series[?]",
    ),
    "all at one place": ("a", lambda p: series(p, tags={"0020|0032": "0\\0\\1"}), "several images at one position"),
    "gantry tilt": (
        "a",
        lambda p: series(p, affine=sheared(12)),
        "got a gantry tilt or shear of 12 degrees; --sp",
    ),
    "slight tilt": ("a", lambda p: series(p, affine=sheared(1)), "got a gantry tilt or shear of 1 degrees; --spacing"),
    "other orientation": (
        "a",
        lambda p: series(p, tags={"0020|0037": lambda k: "1\\0\\0\\0\\0\\1" if k == 2 else "1\\0\\0\\0\\1\\0"}),
        "must have the same orientation and pixel spacing in all slices",
    ),
    "no orientation": (
        "a",
        lambda p: series(p, edit("0020|0037", b"1\\0\\0\\1\\0\\0 "), affine=np.diag([-1.0, -1, 1, 1])),
        "two perpendicular unit vectors",
    ),
    "NaN position": (
        "a",
        lambda p: series(p, tags={"0020|0032": "0\\nan\\1"}),
        "readable ImagePositionPatient",
    ),
    "other size": ("a", other_size, r"must have the same Columns in all slices, got 7 and 5 .file 3."),
    "one slice": ("a", lambda p: series(p, array=COUNTS[:, :, :1]), "must be a volume of at least 2 slices, got one"),
    "dicom colour": ("a", in_colour, "must be grey, of MONOCHROME1 or MONOCHROME2, got 3 samples a pixel of 'RGB'"),
    "dicom constant": ("a", lambda p: series(p, array=COUNTS * 0), "must hold an image, got the one value 0"),
    "dicom huge": (
        "a",
        lambda p: (write_frames(p, COUNTS), edit("0028|0010", b"\xff\xff")(p)),
        DAMAGED + ".*less than expected",
    ),
    "dicom packed huge": ("a", lambda p: packed_huge(p), TOO_MUCH),
    "dicom no slope": (
        "a",
        lambda p: series(p, edit("0028|1053", b"0 ", "2")),
        "a rescale slope other than 0",
    ),
    "dicom bits": ("a", lambda p: series(p, edit("0028|0101", b"\x20\0")), "pixels of 8, 16 or 32 bits, got 32 of 16"),
}

# One slice means something else than the others: what it says, and which element is named

EVERY = [str(n) for n in range(5)]
UNITS = "must have a RescaleSlope and a RescaleIntercept in all slices, or in none: their units would differ .file 2."
USUAL = dict(ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], Modality="PT", KVP="120", EchoTime="2.46", RescaleType="HU")
USUAL |= dict(ConvolutionKernel="B30f", FrameOfReferenceUID="1.2.3.5", Units="BQML", DecayCorrection="START")
ODD = {
    "no rescale": (says("2", RescaleSlope=None, RescaleIntercept=None), UNITS),
    "no slope": (says("2", RescaleSlope=None), UNITS),
    "no intercept": (says("2", RescaleIntercept=None), UNITS),
    "other modality": (says("2", Modality="CT"), "the same Modality in all slices, got PT and CT"),
    "no modality": (says("2", Modality=""), "the same Modality in all slices, got PT and none"),
    "localiser": (
        says("2", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        r"same ImageType .*AXIAL and ORIG",
    ),
    "other energy": (says("2", KVP="80"), "the same KVP in all slices, got 120.0 and 80.0"),
    "other echo": (says("2", EchoTime="4.92"), "the same EchoTime in all slices, got 2.46 and 4.92"),
    "other kernel": (
        says("2", ConvolutionKernel="B70f"),
        "the same ConvolutionKernel in all slices, got B30f and B70f",
    ),
    "other frame of reference": (
        says("2", FrameOfReferenceUID="1.9"),
        "FrameOfReferenceUID in all .* got 1.2.3.5 and 1.9",
    ),
    "other rescale type": (says("2", RescaleType="US"), "the same RescaleType in all slices, got HU and US"),
    "no rescale type": (says("2", RescaleType=None), "the same RescaleType in all slices, got HU and none"),
    "other units": (says("2", Units="CNTS"), "the same Units in all slices, got BQML and CNTS"),
    "other decay": (says("2", DecayCorrection="ADMIN"), "the same DecayCorrection in all slices, got START and ADMIN"),
    "other sign": (says("2", PixelRepresentation=0), "the same PixelRepresentation in all slices, got 1 and 0"),
    "other bits": (says("2", BitsStored=12, HighBit=11), "the same BitsStored in all slices, got 16 and 12"),
    "turned": (
        says("2", PhotometricInterpretation="MONOCHROME1"),
        "same PhotometricInterpretation .* MONOCHROME2 and MONO",
    ),
    "padding": (says("2", PixelPaddingValue=-2000), "the same PixelPaddingValue in all slices, got none and -2000"),
    "b-value": (says("2", DiffusionBValue=800.0), "the same DiffusionBValue in all slices, got none and 800.0"),
    "time": (says("2", TemporalPositionIdentifier=2), "same TemporalPositionIdentifier in all slices, got none and 2"),
}
BAD_DICOM |= {
    kind: ("a", lambda p, fault=fault: series(p, says(*EVERY, **USUAL), fault), message)
    for kind, (fault, message) in ODD.items()
}
BAD_DICOM |= {
    "two LUTs": (
        "a",
        lambda p: series(p, says(*EVERY, PresentationLUTShape="INVERSE")),
        "must say one thing of what is bright, got MONOCHROME2 with the LUT 'INVERSE'",
    ),
    "damaged in a folder": (
        "a",
        lambda p: series(p, in_a_folder, lambda q: truncated(q / "b" / "2", 0.5)),
        "must have the element SeriesInstanceUID .file 2.",
    ),
}
