"""`planecycle-fast series`: what `features --series` can pick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..optional import one_line
from ..scans.formats.dicom_series import list_series
from .options import Argument


def run_series(folder: Annotated[Path, Argument(help="With DICOM files in it, or in its folders.")]) -> None:
    """The image series in a folder, to pick one by `features --series`: a line each."""
    for each in list_series(folder):
        print(one_line(f"{each}, UID {each.uid}"))
