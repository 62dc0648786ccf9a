"""Reading a lifted model from a folder or the hub: the 2D model and, where they are there, the settings of its lift."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .engine.graph_store import GraphOptions
from .geometry.planes import Plane
from .hosts import Adapter
from .lifted import LiftedModel, check_names, lift
from .weights.hub import hub_file
from .weights.load import load_model
from .weights.saving import DEFAULTS, SETTINGS
from .weights.saving import save_pretrained as save_pretrained  # found beside what reads it


def from_pretrained(
    name: str | os.PathLike[str],
    mode: str | None = None,
    cycle_order: str | Sequence[str | Plane] | None = None,
    pool_method: str | None = None,
    globals_at: str | None = None,
    backend: str = "auto",
    attention: str = "auto",
    strict: bool = True,
    adapter: Callable[[nn.Module], Adapter] | None = None,
    depth_position: str | None = None,
    gelu: str | None = None,
    random_weights: bool = False,
    graphs: bool | GraphOptions = False,
) -> LiftedModel:
    """`lift` of `load_model`, with the settings that `LiftedModel.save_pretrained` recorded, where it did.

    Args:
        name: a folder or a name, as `load_model` takes it.
        mode, cycle_order, pool_method, globals_at, depth_position, gelu: as of `lift`; None: what is recorded, or else
            its default.
        backend, attention, strict, adapter, graphs: as of `lift`.
        random_weights: take a model whose weights cannot be found, with random ones.

    Raises whatever `load_model` and `lift` raise, and ValueError for weights that cannot be found, unless
    `random_weights`; for a damaged file of settings; and for a model that was lifted by an adapter which is not given.
    """
    name = os.fspath(name)
    host, note = load_model(name)
    if note.startswith("RANDOM") and not random_weights:
        raise ValueError(f"model {name} must have weights, got {note}; random_weights=True takes it anyway")
    given = dict(mode=mode, cycle_order=cycle_order, pool_method=pool_method, globals_at=globals_at)
    settings = settings_of(name, **given, depth_position=depth_position, gelu=gelu, has_adapter=adapter is not None)
    return lift(host, **settings, backend=backend, attention=attention, strict=strict, adapter=adapter, graphs=graphs)


def settings_of(name: str, has_adapter: bool = False, **given: Any) -> dict[str, Any]:
    """Arguments of `lift` for a model by name: those given (not None), else those recorded, else its defaults.

    Raises ValueError for a damaged file of settings, and for one of a model that was lifted by an adapter of its own.
    """
    file: str | Path | None
    if Path(name).is_dir():
        file = Path(name, SETTINGS) if Path(name, SETTINGS).exists() else None
    else:
        file = hub_file(name, SETTINGS) if name.count("/") == 1 and not name.startswith("timm/") else None
    recorded = {} if file is None else _recorded(name, Path(file))
    adapter = recorded.pop("adapter", None)
    if adapter is not None and not has_adapter:
        raise ValueError(
            f"model {name} was lifted by an adapter of its own, {adapter}; give it: from_pretrained(name, adapter=...)"
        )
    return DEFAULTS | recorded | {key: value for key, value in given.items() if value is not None}


def _recorded(name: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} must have settings as JSON in {file}: {error}") from error
    found = found if isinstance(found, dict) else {"": found}
    found.pop("planecycle_fast", None)
    for key, value in found.items():
        if key not in (*DEFAULTS, "adapter"):
            raise ValueError(
                f"model {name} must have settings of a lift in {file}, {', '.join(DEFAULTS)}, got "
                f"{key or found[key]!r}; a newer version of planecycle_fast may have written it"
            )
        planes = key == "cycle_order" and isinstance(value, list)
        if not all([isinstance(each, str) for each in (value if planes else [value])]):
            raise ValueError(f"model {name} must have a name as {key} in {file}, got {value!r}")
    if "cycle_order" in found and not isinstance(found["cycle_order"], str):
        found["cycle_order"] = tuple(found["cycle_order"])
    try:
        check_names(**{name: found.get(name, default) for name, default in DEFAULTS.items()})
    except ValueError as error:
        raise ValueError(f"model {name} must have settings of a lift in {file}: {error}") from error
    return found
