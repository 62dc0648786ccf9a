"""The process in which GDCM decodes pixels; its text is run by `python -c`, so it imports nothing of this package.

GDCM's decoders print to stderr, and a damaged JPEG can make them crash: here neither reaches the caller.
Standard input: JSON, {"paths": [...], "size": [columns, rows, frames], "memory": bytes}. Standard output: for every
file a byte 1 and its voxels (frames, rows, columns) float32, rescaled; or a byte 0 and why not, and the end.
"""

import json
import os
import sys


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    import SimpleITK as sitk

    limit_memory(task["memory"])
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever is printed must not come between the voxels
        for path in task["paths"]:
            try:
                voxels = decode(sitk, path, tuple(task["size"]))
            except Exception as error:
                out.write(b"\0" + str(error).encode(errors="replace"))
                return
            out.write(b"\1")
            out.write(voxels)


def decode(sitk, path: str, size: tuple[int, ...]):
    """The voxels of one file."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    reader.ReadImageInformation()
    if reader.GetSize() != size or reader.GetNumberOfComponents() != 1:
        got = f"{reader.GetSize()} pixels of {reader.GetNumberOfComponents()} numbers"
        raise ValueError(f"GDCM finds {got}, not {size} of 1")
    image = sitk.Cast(reader.Execute(), sitk.sitkFloat32)
    return sitk.GetArrayFromImage(image).data


def limit_memory(size: int) -> None:
    """A bound on what this process may take, where the system has one."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
