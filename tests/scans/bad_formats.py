"""Bad MetaImages, pairs of NIfTI and Analyze, and MGH: how to make each, and what must be said of it."""

import gzip
import struct
import zlib

import nibabel
import numpy as np
import SimpleITK as sitk

from ..scan_writers import NOISE, write_analyze, write_mgh, write_nifti, write_nrrd, write_pair
from .bad_scans import DAMAGED, TOO_MUCH, WITH_NAN, nrrd_of, truncated, without_data


def write_intent(path, array, name):
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.set_intent(name)
    nibabel.save(image, path)


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


BAD_FORMATS = {
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
    "mha long axes": (
        "a.mha",
        lambda p: meta(p, TransformMatrix="2 0 0 0 1 0 0 0 1"),
        "must have directions of length 1",
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
}
