"""Scans in, features out: reading, turning and resampling images, and files and pictures of what a model makes of them.

May import `lifted`, `cost`, `weights` and what is below them; nibabel, SimpleITK, pydicom and MONAI when needed.
Commands use it, and whoever has volumes of other sources. docs/scans.md says what is read and what is refused.

Start with `files.load_scan`, then `preprocess.prepare`: from a file to a `Scan`, and to a model's input.

| | |
| --- | --- |
| `formats/` | a reader each; `files.py` picks one; `checks.py`, `affines.py`, `orientation.py` are what they share |
| `scan.py`, `preprocess.py`, `transforms.py`, `windows.py`, `monai_transforms.py` | from a scan to a volume |
| `grids.py` | where the cells of features lie in the scan |
| `sliding.py`, `window_memory.py`, `volume_lists.py`, `volume_sets.py` | volumes that do not fit, differ, or are many |
| `extraction.py` | from files to files: what `planecycle-fast features` does |
| `feature_files.py`, `viz.py`, `progress.py` | what is kept and shown |
"""
