"""Readers of scans, one per kind of file: each gives voxels and an affine, or raises `checks.Refused` in words.

May import what `scans` shares (`checks`, `affines`, `orientation`); `scans.files` picks one by the file's name.
nibabel, SimpleITK and pydicom read; here is what they would let pass, found out and refused.

Start with `nrrd.py` or `nifti.py`. DICOM takes several: `dicom.py` makes one series a volume, `dicom_series.py` finds
the series of a folder, `dicom_units.py` what their numbers mean, `dicom_values.py` and `dicom_pixels.py` headers and
pixels of a file, `gdcm_child.py` the process in which GDCM decodes them. `arrays.py` are numpy's, `metaimage.py` .mha.
"""
