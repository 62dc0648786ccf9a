"""The process in which GDCM decodes pixels; its text is run by `python -c`, so it imports nothing of this package.

GDCM's decoders print to stderr, and a damaged JPEG can make them crash: here neither reaches the caller.
Standard input: JSON, {"paths": [...], "size": [columns, rows, frames], "dtype": of the numbers, "memory": bytes,
"bare": a file to write to}. Standard output: for every file a byte 1 and its stored numbers (frames, rows, columns); or
a byte 0 and why not, and the end.
"""

import json
import os
import sys
import warnings

PIXELS = ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit"]
PIXELS += ["PixelRepresentation", "PixelData"]
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # Secondary Capture: nothing but pixels


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    warnings.simplefilter("ignore")
    import pydicom
    import SimpleITK as sitk

    limit_memory(task["memory"])
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever is printed must not come between the numbers
        for path in task["paths"]:
            try:
                save_bare(pydicom, path, task["bare"])
                numbers = decode(sitk, task["bare"], tuple(task["size"]), task["dtype"])
            except Exception as error:
                out.write(b"\0" + str(error).encode(errors="replace"))
                return
            out.write(b"\1")
            out.write(numbers)


def save_bare(pydicom, path: str, target: str) -> None:
    """The same packed pixels without anything by which GDCM would turn or rescale them."""
    given, bare = pydicom.dcmread(path), pydicom.Dataset()
    for name in PIXELS:
        if name in given:
            bare[name] = given[name]
    bare.PhotometricInterpretation = "MONOCHROME2"
    bare.SOPClassUID, bare.SOPInstanceUID = CAPTURE, pydicom.uid.generate_uid()
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = given.file_meta.TransferSyntaxUID
    bare.save_as(target, enforce_file_format=True)


def decode(sitk, path: str, size: tuple[int, ...], dtype: str):
    """The numbers of one file."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    reader.ReadImageInformation()
    if reader.GetSize() != size or reader.GetNumberOfComponents() != 1:
        got = f"{reader.GetSize()} pixels of {reader.GetNumberOfComponents()} numbers"
        raise ValueError(f"GDCM finds {got}, not {size} of 1")
    found = sitk.GetArrayFromImage(reader.Execute())
    numbers = found.astype(dtype, copy=False)
    if numbers.dtype != found.dtype and (numbers != found).any():
        raise ValueError(f"GDCM finds {found.dtype} numbers beyond {numbers.dtype}")
    return numbers.data


def limit_memory(size: int) -> None:
    """A bound on what this process may take, where the system has one."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
