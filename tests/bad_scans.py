"""Bad scans of many kinds: how to make each, and what must be said of it."""

import gzip
import io
import pickle
import shutil
import struct
import zipfile
import zlib

import nibabel
import numpy as np
import SimpleITK as sitk

from .scans import (
    COUNTS,
    NOISE,
    execute,
    write_analyze,
    write_dicom,
    write_frames,
    write_mgh,
    write_nifti,
    write_nrrd,
    write_pair,
)


def truncated(path, share=2 / 3):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def write_intent(path, array, name):
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.set_intent(name)
    nibabel.save(image, path)


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


def meta(path, data=None, **fields):
    """A MetaImage of (6, 5, 4) voxels, or with other fields; None leaves one out."""
    values = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "5 6 7",
        "ElementSpacing": "1 2 3",
        "DimSize": "6 5 4",
        "ElementType": "MET_FLOAT",
    } | fields
    values["ElementDataFile"] = values.pop("ElementDataFile", "LOCAL")  # the last one
    lines = [f"{name} = {value}" for name, value in values.items() if value is not None]
    data = NOISE.flatten()[:120].tobytes() if data is None else data
    path.write_bytes("\n".join([*lines, ""]).encode() + data)


def mgh(path, array=NOISE, **fields):
    """An MGH file with other fields in its header."""
    write_mgh(path.with_suffix(".mgh"), array)
    data = bytearray(path.with_suffix(".mgh").read_bytes())
    path.with_suffix(".mgh").unlink()
    for name, (offset, kind) in {
        "version": (0, ">i"),
        "dims": (4, ">4i"),
        "type": (20, ">i"),
        "Mdc": (42, ">9f"),
    }.items():
        if name in fields:
            struct.pack_into(kind, data, offset, *fields[name])
    path.write_bytes(gzip.compress(data) if path.suffix == ".mgz" else data)


def nrrd_of(path, array):
    sitk.WriteImage(array, str(path))


def series(path, *faults, affine=None, array=COUNTS, **settings):
    """A DICOM series with faults: functions of its folder."""
    write_dicom(path, array, affine, **settings)
    for fault in faults:
        fault(path)


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
    # MetaImage
    "mha empty": ("a.mha", lambda p: p.write_bytes(b""), "must be a MetaImage, got a file whose header does not name"),
    "mha magic": ("a.mha", lambda p: p.write_bytes(b"hello" * 99), "must be a MetaImage"),
    "mha nifti": ("a.mha", lambda p: write_nifti(p.with_suffix(".nii"), NOISE).rename(p), "must be a MetaImage"),
    "mha truncated": (
        "a.mha",
        lambda p: truncated(write_nrrd(p, NOISE)),
        DAMAGED + "it must hold 8736 bytes of voxels, got",
    ),
    "mha too long": ("a.mha", lambda p: meta(p, bytes(481)), DAMAGED + "it must hold 480 bytes of voxels, got 481"),
    "mha truncated packed": (
        "a.mha",
        lambda p: truncated(write_nrrd(p, NOISE, packed=True)),
        DAMAGED + "its voxels end too early",
    ),
    "mha checksum": (
        "a.mha",
        lambda p: meta(p, zlib.compress(NOISE[:1].tobytes()[:480])[:-1] + b"x", CompressedData="True"),
        DAMAGED,
    ),
    "mha bomb": (
        "a.mha",
        lambda p: meta(p, zlib.compress(b"\1" * 2**26), CompressedData="True"),
        DAMAGED + "it must unpack to 480 bytes",
    ),
    "mha packs less": (
        "a.mha",
        lambda p: meta(p, zlib.compress(b"\1" * 479), CompressedData="True"),
        DAMAGED + "it must unpack to 480 bytes",
    ),
    "mha huge": ("a.mha", lambda p: meta(p, DimSize="30000 30000 30000"), TOO_MUCH + "3.02e[+]05 GiB"),
    "mha overflow": ("a.mha", lambda p: meta(p, DimSize=" ".join(["4294967296"] * 3)), TOO_MUCH),
    "mha 2D": (
        "a.mha",
        lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[0])),
        r"must be 3D and not empty, got the shape \(12, 13\)",
    ),
    "mha 4D": (
        "a.mha",
        lambda p: nrrd_of(p, sitk.GetImageFromArray(np.stack([NOISE, NOISE]), isVector=False)),
        r"must be 3D .* \(12, 13, 14, 2\), 2 volumes: index",
    ),
    "mha colour": (
        "a.mha",
        lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[..., None].repeat(3, -1), isVector=True)),
        "must hold one number a voxel, got 3",
    ),
    "mha array": (
        "a.mha",
        lambda p: meta(p, ElementType="MET_FLOAT_ARRAY"),
        "real numbers of a known size, got the Elem",
    ),
    "mha long": (
        "a.mha",
        lambda p: meta(p, ElementType="MET_LONG"),
        "real numbers of a known size, got the ElementType",
    ),
    "mha no type": ("a.mha", lambda p: meta(p, ElementType=None), "must say its ElementType"),
    "mha sizes": ("a.mha", lambda p: meta(p, DimSize="6 5"), "must have as many sizes as dimensions, got '6 5' of 3"),
    "mha minus": ("a.mha", lambda p: meta(p, DimSize="6 -5 4"), "must have as many sizes as dimensions"),
    "mha empty axis": ("a.mha", lambda p: meta(p, b"", DimSize="6 0 4"), r"not empty, got the shape \(6, 0, 4\)"),
    "mha text": ("a.mha", lambda p: meta(p, BinaryData="False"), "must hold binary data, got text"),
    "mha no order": ("a.mha", lambda p: meta(p, BinaryDataByteOrderMSB=None), "must say the order of its bytes"),
    "mha two orders": ("a.mha", lambda p: meta(p, ElementByteOrderMSB="True"), "must say the order of its bytes"),
    "mha no spacing": ("a.mha", lambda p: meta(p, ElementSpacing=None), "must say its ElementSpacing"),
    "mha no place": ("a.mha", lambda p: meta(p, Offset=None), "must say its Offset"),
    "mha zero spacing": ("a.mha", lambda p: meta(p, ElementSpacing="1 0 3"), "must have a positive ElementSpacing"),
    "mha NaN spacing": ("a.mha", lambda p: meta(p, ElementSpacing="1 nan 3"), "3 finite numbers as ElementSpacing"),
    "mha words": ("a.mha", lambda p: meta(p, Offset="1 2 x"), "must have 3 finite numbers as Offset, got '1 2 x'"),
    "mha two places": ("a.mha", lambda p: meta(p, Position="5 6 7"), "must say once where its axes lie"),
    "mha twice": (
        "a.mha",
        lambda p: meta(p, Comment="1\nDimSize = 6 5 4"),
        DAMAGED + "its header says something twice",
    ),
    "mha flat": (
        "a.mha",
        lambda p: meta(p, TransformMatrix="1 0 0 1 0.0001 0 0 0 1"),
        "must have an affine whose axes span space",
    ),
    "mha skip": ("a.mha", lambda p: meta(p, HeaderSize="-1"), "must hold its voxels right behind its header"),
    "mha tube": ("a.mha", lambda p: meta(p, ObjectType="Tube"), "must be an image, got the ObjectType 'Tube'"),
    "mha NaN": ("a.mha", lambda p: write_nrrd(p, WITH_NAN), "must hold finite voxels, got 182"),
    "mha constant": ("a.mha", lambda p: meta(p, bytes(480)), "must hold an image, got the one value 0"),
    "mhd missing": (
        "a.mhd",
        lambda p: without_data(p, "a.raw"),
        "must have its data file beside it, got no file 'a.raw'",
    ),
    "mhd truncated": (
        "a.mhd",
        lambda p: (write_nrrd(p, NOISE), truncated(p.with_suffix(".raw"))),
        DAMAGED + "it must hold 8736 bytes of voxels, got 5824",
    ),
    "mhd truncated packed": (
        "a.mhd",
        lambda p: (write_nrrd(p, NOISE, packed=True), truncated(p.with_suffix(".zraw"))),
        DAMAGED + "its voxels end too early",
    ),
    "mhd elsewhere": (
        "a.mhd",
        lambda p: meta(p, ElementDataFile="/etc/passwd"),
        "one data file in its own folder, got",
    ),
    "mhd above": ("a.mhd", lambda p: meta(p, ElementDataFile="../a.raw"), "must name one data file in its own folder"),
    "mhd windows": (
        "a.mhd",
        lambda p: meta(p, ElementDataFile="C:\\a.raw"),
        "must name one data file in its own folder",
    ),
    "mhd list": ("a.mhd", lambda p: meta(p, ElementDataFile="LIST\na.raw"), "must have one data file, got 'LIST'"),
    "mhd pattern": (
        "a.mhd",
        lambda p: meta(p, ElementDataFile="%03d.raw 1 4 1"),
        "must have one data file, got '%03d.r",
    ),
    # Two files: NIfTI and Analyze
    "hdr alone": (
        "a.hdr",
        lambda p: (write_pair(p, NOISE), p.with_suffix(".img").unlink()),
        "must have its voxels beside it, got no a.img",
    ),
    "img alone": (
        "a.img",
        lambda p: (write_pair(p, NOISE), p.with_suffix(".hdr").unlink()),
        "must have its header beside it, got no a.hdr",
    ),
    "img truncated": ("a.img", lambda p: truncated(write_pair(p, NOISE)), DAMAGED),
    "hdr truncated": ("a.hdr", lambda p: truncated(write_pair(p, NOISE)), "cannot be read|must be a NIfTI"),
    "hdr of something else": (
        "a.hdr",
        lambda p: (p.write_text("ENVI\n" * 99), p.with_suffix(".img").write_bytes(b"1")),
        "must be a NIfTI image",
    ),
    "pair NaN": ("a.img", lambda p: write_pair(p, WITH_NAN), "must hold finite voxels, got 182"),
    "analyze truncated": ("a.img", lambda p: truncated(write_analyze(p, NOISE)), DAMAGED),
    "analyze constant": (
        "a.hdr",
        lambda p: write_analyze(p, abs(NOISE) * 0),
        "must hold an image, got the one value 0",
    ),
    "vectors": (
        "a.nii",
        lambda p: write_intent(p, NOISE.reshape(14, 13, 4, 1, 3), "vector"),
        "must hold one number a voxel, got the intent 'vector'",
    ),
    "5D": (
        "a.nii",
        lambda p: write_nifti(p, NOISE.reshape(14, 13, 3, 2, 2)),
        r"must be 3D and not empty, got the shape \(14, 13, 3, 2, 2\)",
    ),
    # FreeSurfer
    "mgz truncated": ("a.mgz", lambda p: truncated(write_mgh(p, NOISE)), DAMAGED),
    "mgh truncated": ("a.mgh", lambda p: truncated(write_mgh(p, NOISE)), DAMAGED),
    "mgz checksum": ("a.mgz", lambda p: (mgh(p), p.write_bytes(p.read_bytes()[:-8] + bytes(8))), DAMAGED),
    "mgz empty": ("a.mgz", lambda p: p.write_bytes(b""), "must be a FreeSurfer image|" + DAMAGED),
    "mgh not mgh": ("a.mgh", lambda p: p.write_bytes(b"hello" * 99), "must be a FreeSurfer image|" + DAMAGED),
    "mgz not gzip": ("a.mgz", lambda p: p.write_bytes(b"hello" * 99), "must be a FreeSurfer image|" + DAMAGED),
    "mgh huge": ("a.mgh", lambda p: mgh(p, dims=(30000, 30000, 30000, 1)), TOO_MUCH + "5.03e[+]05 GiB"),
    "mgz huge": ("a.mgz", lambda p: mgh(p, dims=(30000, 30000, 30000, 1)), TOO_MUCH + "5.03e[+]05 GiB"),
    "mgh minus": ("a.mgh", lambda p: mgh(p, dims=(14, -13, 12, 1)), "must be 3D and not empty|" + DAMAGED),
    "mgh version": ("a.mgh", lambda p: mgh(p, version=(2,)), "must be a FreeSurfer image|" + DAMAGED),
    "mgh type": ("a.mgh", lambda p: mgh(p, type=(6,)), "must|" + DAMAGED),
    "mgh frames": (
        "a.mgh",
        lambda p: write_mgh(p, NOISE.reshape(14, 13, 6, 2)),
        r"must be 3D .* \(14, 13, 6, 2\), 2 volumes: index",
    ),
    "mgh singular": ("a.mgh", lambda p: mgh(p, Mdc=(1, 0, 0, 1, 0, 0, 0, 0, 1)), "must have an affine whose axes span"),
    "mgh NaN": ("a.mgh", lambda p: write_mgh(p, WITH_NAN), "must hold finite voxels, got 182"),
    # DICOM
    "empty folder": ("a", lambda p: p.mkdir(), "must hold a DICOM series, got a folder without DICOM images"),
    "no DICOM": ("a", lambda p: (p.mkdir(), (p / "README").write_text("hi")), "must hold a DICOM series"),
    "mixed series": ("a", mixed, r"must hold exactly one image series, got 2: ...1.2.3.4 \(5 images\), \.\.\..* \(3"),
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
    "gantry tilt": ("a", lambda p: series(p, affine=sheared(12)), "got a gantry tilt of 12 degrees"),
    "slight tilt": ("a", lambda p: series(p, affine=sheared(1)), "got a gantry tilt of 1 degrees"),
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
    "other size": ("a", other_size, r"must have the same size and type of pixels in all images, got \(6, 7"),
    "one slice": ("a", lambda p: series(p, array=COUNTS[:, :, :1]), "must be a volume of at least 2 slices, got one"),
    "dicom colour": ("a", in_colour, "must be grey, of MONOCHROME2, got 3 samples a pixel of 'RGB'"),
    "dicom constant": ("a", lambda p: series(p, array=COUNTS * 0), "must hold an image, got the one value 0"),
    "dicom huge": (
        "a",
        lambda p: (write_frames(p, COUNTS), edit("0028|0010", b"\xff\xff")(p)),
        DAMAGED + ".*less than expected",
    ),
    "dicom packed huge": ("a", lambda p: packed_huge(p), TOO_MUCH),
    "dicom no slope": ("a", lambda p: series(p, edit("0028|1053", b"0 ", "2")), "one rescale slope, not 0"),
    "dicom bits": ("a", lambda p: series(p, edit("0028|0101", b"\x20\0")), "pixels of 8, 16 or 32 bits, got 32 of 16"),
}


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
