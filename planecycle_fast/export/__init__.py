"""A lifted model in a file that runs without this package: ONNX, torch.export, AOTInductor or torch.jit.

May import `pretrained`, `weights` and what is below them. `commands.export` is its command.

Start with `exporting.export_model`: what is asked is checked, the file written to a place of its own, run, and compared
with the model before it is there. `formats.py` says how each kind of file is written and run. docs/export.md is for
users.
"""
