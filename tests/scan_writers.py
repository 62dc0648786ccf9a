"""Scans on disk: the same voxels (i, j, k) and affine, index to RAS+ millimetres, in every format."""

import locale

import nibabel
import numpy as np
import SimpleITK as sitk

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.normal(size=(14, 13, 12)).astype(np.float32)
COUNTS = GENERATOR.integers(-1000, 1000, (7, 6, 5)).astype(np.int16)
SPACED = np.diag([1.5, 2.0, 3.0, 1.0])
SMOOTH = np.indices((64, 48, 5)).sum(0).astype(np.int16)  # packing noise, the writer would go beyond its memory


def write_nifti(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def itk_image(array, affine=None):
    affine = TO_LPS @ (np.eye(4) if affine is None else affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).flatten().tolist())
    return image


def write_nrrd(path, array, affine=None, packed=False):
    """Also MetaImage, and header and voxels in two files, by the suffix."""
    sitk.WriteImage(itk_image(array, affine), str(path), useCompression=packed)
    return path


def write_pair(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Pair(array, np.eye(4) if affine is None else affine), path)
    return path


def write_analyze(path, array, spacing=(1, 1, 1)):
    image = nibabel.AnalyzeImage(array, None)
    image.header.set_zooms(spacing)
    nibabel.save(image, path)
    return path


def write_mgh(path, array, affine=None):
    nibabel.save(nibabel.MGHImage(array, np.eye(4) if affine is None else affine), path)
    return path


def write_dicom(folder, array, affine=None, series="1.2.3.4", prefix="", tags=None, packed=None):
    """One file a slice (i, j), their names in no order. `tags`: others for every slice, values or functions of k."""
    folder.mkdir(exist_ok=True)
    affine = TO_LPS @ (np.eye(4) if affine is None else affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :2] / spacing[:2]
    names = np.random.default_rng(5).permutation(array.shape[2])
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    if packed:
        writer.UseCompressionOn()
        writer.SetCompressor(packed)
    for k in range(array.shape[2]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, k].T))
        image.SetSpacing(spacing[:2].tolist())
        values = {
            "0008|0018": f"{series}.{k + 1}",
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0032": decimals(affine[:3, :3] @ (0, 0, k) + affine[:3, 3]),
            "0020|0037": decimals(directions.T.flatten()),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for tag, value in (values | (tags or {})).items():
            image.SetMetaData(tag, value(k) if callable(value) else value)
        writer.SetFileName(str(folder / f"{prefix}{names[k]}"))
        execute(writer, image)
    return folder


def write_frames(folder, array, affine=None, packed=None):
    """The same in one multi-frame file."""
    folder.mkdir()
    image = itk_image(array, affine)
    image.SetMetaData("0008|0060", "CT")
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "frames"))
    if packed:
        writer.UseCompressionOn()
        writer.SetCompressor(packed)
    execute(writer, image)
    return folder


def execute(writer, image):
    """Writes DICOM, and takes back the locale that GDCM sets for the whole process."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        writer.Execute(image)
    finally:
        locale.setlocale(locale.LC_ALL, before)


def decimals(numbers):
    return "\\".join(f"{number:.9g}" for number in numbers)


def turned_affine(codes, oblique):
    """Array axes along `codes`, 1.5, 2 and 3 mm, from an odd corner; turned by 20 degrees or so where oblique."""
    affine = np.zeros((4, 4))
    for column, (code, size) in enumerate(zip(codes, (1.5, 2.0, 3.0))):
        row = next(r for r, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[row, column] = size if code in "RAS" else -size
    if oblique:
        angles = np.radians(20), np.radians(-15)
        (c, d), (s, t) = np.cos(angles), np.sin(angles)
        affine[:3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ np.array([[1, 0, 0], [0, d, -t], [0, t, d]]) @ affine[:3]
    affine[:, 3] = (-31.5, 12.25, 101, 1)
    return affine


WRITERS = {
    "nii": lambda folder, *scan: write_nifti(folder / "a.nii", *scan),
    "nii.gz": lambda folder, *scan: write_nifti(folder / "a.nii.gz", *scan),
    "nrrd": lambda folder, *scan: write_nrrd(folder / "a.nrrd", *scan),
    "packed nrrd": lambda folder, *scan: write_nrrd(folder / "a.nrrd", *scan, packed=True),
    "nhdr": lambda folder, *scan: write_nrrd(folder / "a.nhdr", *scan),
    "packed nhdr": lambda folder, *scan: write_nrrd(folder / "a.nhdr", *scan, packed=True),
    "mha": lambda folder, *scan: write_nrrd(folder / "a.mha", *scan),
    "packed mha": lambda folder, *scan: write_nrrd(folder / "a.mha", *scan, packed=True),
    "mhd": lambda folder, *scan: write_nrrd(folder / "a.mhd", *scan),
    "packed mhd": lambda folder, *scan: write_nrrd(folder / "a.mhd", *scan, packed=True),
    "hdr": lambda folder, *scan: write_pair(folder / "a.hdr", *scan),
    "img": lambda folder, *scan: write_pair(folder / "a.img", *scan),
    "mgz": lambda folder, *scan: write_mgh(folder / "a.mgz", *scan),
    "mgh": lambda folder, *scan: write_mgh(folder / "a.mgh", *scan),
    "dicom": lambda folder, *scan: write_dicom(folder / "a", *scan),
    "frames": lambda folder, *scan: write_frames(folder / "a", *scan),
}
