"""Bad scans of many kinds, but for DICOM: how to make each, and what must be said of it."""

import gzip
import io
import pickle
import struct
import zipfile

import nibabel
import numpy as np
import SimpleITK as sitk

from ..scan_writers import NOISE, write_nifti, write_nrrd


def truncated(path, share=2 / 3):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def element(group, number, kind, value):
    """An element with explicit type."""
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value


def patched(data, tag, value):
    """DICOM bytes with another value, as long as the old one, of an element with implicit type."""
    key = struct.pack("<HHI", *(int(part, 16) for part in tag.split("|")), len(value))
    assert data.count(key) == 1, data.count(key)
    start = data.index(key) + len(key)
    return data[:start] + value + data[start + len(value) :]


def huge(path):
    """A complete NIfTI header of 30000^3 voxels, and nothing else."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_data_dtype(np.float32)
    data = header.binaryblock + b"\0" * 4
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def npy_header(shape, kind="<f4"):
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def npz(path, kind=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


def packed_npy(array, **settings):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **settings)
    return file.getvalue()


def nrrd(path, data=None, **fields):
    """An NRRD file of (6, 5, 4) voxels, or with other fields; None leaves one out."""
    values = {
        "type": "float",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "6 5 4",
        "space_directions": "(1,0,0) (0,2,0) (0,0,3)",
        "endian": "little",
        "encoding": "raw",
        "space_origin": "(5,6,7)",
    } | fields
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in values.items() if value is not None]
    data = NOISE.flatten()[:120].tobytes() if data is None else data
    path.write_bytes("\n".join(["NRRD0004", *lines, "", ""]).encode() + data)


def without_data(path, name):
    write_nrrd(path, NOISE)
    path.with_name(name).unlink()


def nrrd_of(path, array):
    sitk.WriteImage(array, str(path))


def flipped_bit(path):
    write_nrrd(path, NOISE, packed=True)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the checksum
    path.write_bytes(data)


WITH_NAN = np.where(np.arange(12) == 3, np.float32(np.nan), NOISE)
DAMAGED = "cannot be read, it may be truncated or damaged: "
TOO_MUCH = "must need at most 8 GiB to be read, got a header that asks for "
ONE_NPZ = "must hold one array, or one called 'volume', got "
SCANS = {
    "missing": ("a.nii.gz", lambda p: None, "must be a file, or a folder of DICOM files, got a path where there is"),
    "unknown ending": (
        "a.jpg",
        lambda p: p.write_bytes(b"1"),
        "must be a file ending in .nii, .nii.gz, .hdr, .img, .mgz, .mgh, .nrrd",
    ),
    # NIfTI
    "truncated gz": ("a.nii.gz", lambda p: truncated(write_nifti(p, NOISE)), DAMAGED),
    "truncated": ("a.nii", lambda p: truncated(write_nifti(p, NOISE)), DAMAGED),
    "empty": ("a.nii", lambda p: p.write_bytes(b""), "must be a NIfTI image"),
    "not gzip": ("a.nii.gz", lambda p: p.write_bytes(b"hello" * 99), "must be a NIfTI image"),
    "not nifti": ("a.nii", lambda p: p.write_bytes(b"hello" * 99), "must be a NIfTI image"),
    "2D": ("a.nii", lambda p: write_nifti(p, NOISE[0]), r"must be 3D and not empty, got the shape \(13, 12\)"),
    "4D": ("a.nii", lambda p: write_nifti(p, NOISE[..., None].repeat(2, -1)), r"must be 3D .* \(14, 13, 12, 2\)"),
    "NaN": (
        "a.nii.gz",
        lambda p: write_nifti(p, NOISE * np.nan),
        "must hold finite voxels, got 2184 NaN and 0 infinite",
    ),
    "some NaN": ("a.nii", lambda p: write_nifti(p, WITH_NAN), "must hold finite voxels, got 182 NaN and 0 infinite"),
    "constant": (
        "a.nii",
        lambda p: write_nifti(p, NOISE * 0 + 7),
        "must hold an image, got the one value 7 everywhere",
    ),
    "huge gz": ("a.nii.gz", huge, TOO_MUCH + "5.03e[+]05 GiB"),
    "huge": ("a.nii", huge, TOO_MUCH),
    "colour": (
        "a.nii",
        lambda p: nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), [(c, "u1") for c in "RGB"]), np.eye(4)), p),
        "must hold real numbers, got the dtype",
    ),
    "complex": ("a.nii", lambda p: write_nifti(p, NOISE + 1j), "must hold real numbers, got the dtype complex64"),
    # npy
    "npy 4D": ("a.npy", lambda p: np.save(p, NOISE[None]), r"must be 3D .*, got the shape \(1, 14, 13, 12\)"),
    "npy no voxels": ("a.npy", lambda p: np.save(p, NOISE[:0]), r"must be 3D and not empty, got .* \(0, 13, 12\)"),
    "npy infinite": ("a.npy", lambda p: np.save(p, NOISE / 0), "must hold finite voxels"),
    "npy huge": ("a.npy", lambda p: p.write_bytes(npy_header((10**6,) * 3)), TOO_MUCH),
    "npy pickle": (
        "a.npy",
        lambda p: np.save(p, np.array([{}]), allow_pickle=True),
        "must hold real numbers, got the dtype object",
    ),
    "npy bare pickle": ("a.npy", lambda p: p.write_bytes(pickle.dumps(NOISE)), DAMAGED),
    "npy complex": ("a.npy", lambda p: np.save(p, NOISE + 1j), "must hold real numbers, got the dtype complex"),
    "npy truncated": ("a.npy", lambda p: (np.save(p, NOISE), truncated(p)), DAMAGED),
    "npy header": ("a.npy", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{"), DAMAGED),
    "npy long header": (
        "a.npy",
        lambda p: p.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"{" * 10**5),
        DAMAGED,
    ),
    "npy empty": ("a.npy", lambda p: p.write_bytes(b""), DAMAGED),
    # npz
    "npz two": ("a.npz", lambda p: np.savez(p, one=NOISE, two=NOISE), ONE_NPZ + r"\['one', 'two'\]"),
    "npz none": ("a.npz", lambda p: np.savez(p, spacing=[1, 1, 1]), ONE_NPZ + r"\['spacing'\]"),
    "npz 2D": ("a.npz", lambda p: np.savez(p, NOISE[0]), r"must be 3D and not empty, got the shape \(13, 12\)"),
    "npz spacing": ("a.npz", lambda p: np.savez(p, NOISE, spacing=[1, 0, 1]), "must have a spacing of 3 positive fin"),
    "npz NaN spacing": ("a.npz", lambda p: np.savez(p, NOISE, spacing=[1, 1, np.nan]), "must have a spacing of 3 posi"),
    "npz two spacings": ("a.npz", lambda p: np.savez(p, NOISE, spacing=[1, 2]), r"spacing of 3 .* the shape \(2,\)"),
    "npz pickle": (
        "a.npz",
        lambda p: npz(p, volume=packed_npy(np.array([{}]), allow_pickle=True)),
        "must hold real numbers, got the dtype object",
    ),
    "npz pickled spacing": (
        "a.npz",
        lambda p: npz(p, volume=packed_npy(NOISE), spacing=packed_npy(np.array([{}] * 3), allow_pickle=True)),
        r"must have a spacing .* got the shape \(3,\) of object",
    ),
    "npz huge": ("a.npz", lambda p: npz(p, volume=npy_header((10**6,) * 3)), TOO_MUCH),
    "npz bomb": (  # 64 MiB of nothing behind the header of one MiB
        "a.npz",
        lambda p: npz(p, volume=npy_header((64, 64, 64)) + b"\0" * 2**26),
        "must have arrays as long as their headers say, got 67108992 bytes of 1048704 in volume",
    ),
    "npz short": ("a.npz", lambda p: npz(p, volume=npy_header((64, 64, 64))), "must have arrays as long as"),
    "npz truncated": ("a.npz", lambda p: (np.savez_compressed(p, NOISE), truncated(p)), DAMAGED),
    "npz not zip": ("a.npz", lambda p: p.write_bytes(b"hello" * 99), DAMAGED + "File is not a zip file"),
    "npz empty": ("a.npz", lambda p: p.write_bytes(b""), DAMAGED),
    # NRRD
    "nrrd truncated": ("a.nrrd", lambda p: truncated(write_nrrd(p, NOISE)), DAMAGED + r"\[nrrd\]"),
    "nrrd truncated gz": ("a.nrrd", lambda p: truncated(write_nrrd(p, NOISE, packed=True)), DAMAGED),
    "nrrd checksum": ("a.nrrd", flipped_bit, DAMAGED + "CRC check failed"),
    "nrrd packs less": (
        "a.nrrd",
        lambda p: nrrd(p, gzip.compress(b"\1" * 479), encoding="gzip"),
        DAMAGED + "it must unpack to 480 bytes",
    ),
    "nrrd bomb": (
        "a.nrrd",
        lambda p: nrrd(p, gzip.compress(b"\1" * 2**26), encoding="gzip"),
        DAMAGED + "it must unpack to 480 bytes",
    ),
    "nrrd empty": ("a.nrrd", lambda p: p.write_bytes(b""), "must be an NRRD file"),
    "nrrd magic": ("a.nrrd", lambda p: p.write_bytes(b"hello" * 99), "must be an NRRD file"),
    "nrrd nifti": ("a.nrrd", lambda p: write_nifti(p.with_suffix(".nii"), NOISE).rename(p), "must be an NRRD file"),
    "nrrd huge": ("a.nrrd", lambda p: nrrd(p, sizes="30000 30000 30000"), TOO_MUCH + "3.02e[+]05 GiB"),
    "nrrd overflow": ("a.nrrd", lambda p: nrrd(p, sizes=" ".join(["4294967296"] * 3)), "(must need|cannot be read)"),
    "nrrd 2D": ("a.nrrd", lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[0])), "must be 3D .* the dimension '2'"),
    "nrrd 4D": ("a.nrrd", lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[None])), "an axis of the kind 'vector'"),
    "nrrd colour": (
        "a.nrrd",
        lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[..., None].repeat(3, -1), isVector=True)),
        "must hold one number a voxel, got an axis of the kind 'vector'",
    ),
    "nrrd flat colour": ("a.nrrd", lambda p: nrrd(p, kinds="RGB-color domain domain", sizes="3 5 8"), "must|cannot"),
    "nrrd complex": ("a.nrrd", lambda p: nrrd(p, kinds="complex domain domain", sizes="2 5 12"), "must|cannot"),
    "nrrd NaN": ("a.nrrd", lambda p: write_nrrd(p, WITH_NAN), "must hold finite voxels, got 182"),
    "nrrd constant": ("a.nrrd", lambda p: write_nrrd(p, NOISE * 0), "must hold an image, got the one value 0"),
    "nrrd no space": ("a.nrrd", lambda p: nrrd(p, space=None), "must say its space .*, got None"),
    "nrrd odd space": ("a.nrrd", lambda p: nrrd(p, space="scanner-xyz"), "must say its space .*, got 'scanner-xyz'"),
    "nrrd no directions": ("a.nrrd", lambda p: nrrd(p, space_directions=None), "must say its space .* and directions"),
    "nrrd NaN directions": (
        "a.nrrd",
        lambda p: nrrd(p, space_directions="(nan,0,0) (0,2,0) (0,0,3)"),
        "must have finite space directions",
    ),
    "nrrd singular": ("a.nrrd", lambda p: nrrd(p, space_directions="(1,0,0) (1,0,0) (0,0,3)"), "(must have an|cannot)"),
    "nrrd flat": (
        "a.nrrd",
        lambda p: nrrd(p, space_directions="(1,0,0) (1,0.0001,0) (0,0,3)"),
        "must have an affine whose axes span space",
    ),
    "nrrd detached": (
        "a.nrrd",
        lambda p: nrrd(p, data_file="/etc/passwd"),
        "must name one data file in its own folder",
    ),
    "nhdr above": (
        "a.nhdr",
        lambda p: nrrd(p, data_file="../b.raw"),
        "one data file in its own folder, got '../b.raw'",
    ),
    "nhdr list": ("a.nhdr", lambda p: nrrd(p, data_file="LIST"), "one data file in its own folder, got 'LIST'"),
    "nhdr pattern": ("a.nhdr", lambda p: nrrd(p, data_file="b%02d.raw 1 6 1"), "no file 'b%02d.raw 1 6 1'"),
    "nhdr missing": (
        "a.nhdr",
        lambda p: without_data(p, "a.raw"),
        "must have its data file beside it, got no file 'a.raw",
    ),
    "nhdr truncated": (
        "a.nhdr",
        lambda p: (write_nrrd(p, NOISE), truncated(p.with_suffix(".raw"))),
        DAMAGED + "it must hold 8736 bytes of voxels, got 5824",
    ),
    "nhdr too long": (
        "a.nhdr",
        lambda p: (write_nrrd(p, NOISE), p.with_suffix(".raw").write_bytes(bytes(9000))),
        DAMAGED + "it must hold 8736 bytes of voxels, got 9000",
    ),
    "nhdr truncated gz": (
        "a.nhdr",
        lambda p: (write_nrrd(p, NOISE, packed=True), truncated(p.with_name("a.raw.gz"))),
        DAMAGED,
    ),
    "nhdr text": (
        "a.nhdr",
        lambda p: (nrrd(p, data_file="b.raw", encoding="text"), p.with_name("b.raw").write_text("1 2")),
        "must have a data file that is raw or packed by gzip, got 'text'",
    ),
    "nhdr truncated header": ("a.nhdr", lambda p: (write_nrrd(p, NOISE), truncated(p, 0.5)), "must|cannot be read"),
    "nhdr skip": ("a.nhdr", lambda p: nrrd(p, data_file="b.raw", byte_skip="8"), "must hold its voxels right behind"),
    "nrrd twice": (
        "a.nrrd",
        lambda p: nrrd(p, spacings="1 1 1\nsizes: 6 5 4"),
        DAMAGED + "its header says something twice",
    ),
    "nrrd vector": (
        "a.nrrd",
        lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE.reshape(14, 13, 4, 3), isVector=True)),
        "must hold one number a voxel, got an axis of the kind 'vector'",
    ),
    "nrrd several": (
        "a.nrrd",
        lambda p: nrrd(
            p,
            dimension="4",
            sizes="6 5 2 2",
            kinds="domain domain domain list",
            space_directions="(1,0,0) (0,2,0) (0,0,3) none",
        ),
        r"must be 3D .* \(6, 5, 2, 2\), 2 volumes: index \(--index\) picks one, from 0",
    ),
    "nrrd skip": ("a.nrrd", lambda p: nrrd(p, byte_skip="-1"), "must hold its voxels right behind"),
}
