"""What `host` measures, in a process of its own: this package, or that of an older commit where PYTHONPATH says so.

A GPU's part is taken away, and nothing else: triton's driver is one that launches nothing, backend `triton` is told to
take tensors on the CPU, and those are so small that torch's own operations cost what calling them costs. Kernels are
compiled for an H100 once, and looked up ever after. Tensors without data would not do: on "meta" torch runs linear, add
and gelu by decompositions in Python, which cost more than all that is to be measured, for us and for the authors' code.

What a GPU adds is not seen: the launches themselves, of which the authors' code has some four times as many,
`torch.cuda.device` around each of ours, and what is only done there: the table of attentions, which a name leaves out,
fc1's epilogue, and at 8a2b271 `sdpa_kernel`, 12 to 21 us a block.

Orders come as lines of JSON on the standard input, results go to the standard output.
"""

from __future__ import annotations

import ast
import builtins
import dis
import gc
import importlib
import importlib.util
import json
import linecache
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter, thread_time
from types import CodeType, FrameType
from typing import Any, NamedTuple

PARTS = ("checks", "choice", "dispatch", "launch arguments", "torch's own calls", "rest")
CHECKS, CHOICE, DISPATCH, LAUNCH, TORCH, REST = PARTS
MODELS = ("lifted", "accelerated", "authors")
STEPS = ("inference", "forward + backward")
DEPTHS = (4, 12)  # blocks; one cycle of planes, and a ViT-S
WIDTH, HEADS, VOLUME, PATCH = 8, 1, (1, 3, 2, 32, 32), 16  # next to nothing to multiply; 8 tokens
REPO = "PLANECYCLE_REPO"  # a checkout of github.com/HINTLab/PlaneCycle at 1a1129c
INTERVAL = 0.0005  # seconds between samples
DEEPEST = 48  # frames of a sample
SHOWN = 200  # functions


# --- Whose time it is -------------------------------------------------------------------------------------------------

QUESTIONS = ("check", "why_", "refuse", "takes", "lie_as", "starts_", "transforms_active", "recorder", "may_", "is_",
             "known", "pays", "fits")  # fmt: skip
CALLED = ("calls_of", "forward", "backward", "setup_context", "keep", "save", "apply", "jvp")  # around our operations
FILES = {  # of the package by how their path ends, as they are called now and were before
    CHECKS: ("hosts/description.py", "hosts/known.py", "hosts/wrapped.py", "hosts/placement.py", "hosts/buffers.py",
             "parts.py", "reading.py"),
    CHOICE: ("ops/choice.py", "backends.py", "attentions.py", "attention_table.py", "tracing.py", "sizes_seen.py"),
    DISPATCH: ("ops/registration.py", "ops/registry.py", "ops/custom.py", "_autograd.py", "_reverse.py"),
    LAUNCH: ("_triton.py", "_shapes.py", "tiles.py", "ops/configs.py"),
}  # fmt: skip
IN_TORCH = {  # by how the path begins; None: questions that others ask; the rest is what torch does
    DISPATCH: ("_ops.py", "_library/", "library.py", "_higher_order_ops/", "autograd/function.py", "_dynamo/",
               "_compile.py", "_functorch/", "utils/_python_dispatch.py", "utils/_pytree.py"),
    None: ("compiler/", "backends/", "jit/", "cuda/", "amp/", "_jit_internal.py", "overrides.py", "_VF.py"),
}  # fmt: skip
QUERIES = {"size", "stride", "dim", "numel", "element_size", "storage_offset", "is_contiguous", "is_floating_point",
           "data_ptr", "get_device", "is_grad_enabled", "is_autocast_enabled", "get_autocast_dtype", "is_complex",
           "promote_types", "load", "save", "compile", "prod"}  # fmt: skip


def part_of(path: str, function: str, package: str) -> str | None:
    """The part that a frame belongs to, or None where its caller says more.

    Args:
        path: the file's.
        function: its name.
        package: the folder of planecycle_fast, whichever commit's.
    """
    if function.startswith("<"):  # a comprehension, a lambda: as the function around them
        return None
    if path.startswith(package + "/"):
        inside, name = path[len(package) + 1 :], function.lstrip("_")
        if name.startswith(QUESTIONS):
            return CHECKS
        if inside.startswith("ops/") and name.startswith(CALLED):
            return DISPATCH
        return next((part for part, files in FILES.items() if inside.endswith(files)), REST)
    _, found, inside = path.rpartition("/site-packages/")
    if found and inside.startswith("torch/"):
        return next((part for part, files in IN_TORCH.items() if inside[len("torch/") :].startswith(files)), TORCH)
    if found and inside.startswith("triton/"):
        return LAUNCH
    return REST if found or _is_authors(path) else None  # a host's; or Python's own library


def _is_authors(path: str) -> bool:
    return REPO in os.environ and path.startswith(os.path.realpath(os.environ[REPO]) + "/")


@cache
def called(code: CodeType, at: int) -> str | None:
    """The name that a frame's instruction calls, "" at the function's beginning, None where it does something else."""
    if at < 0:
        return ""
    name = dis.opname[code.co_code[at]]
    if name == "RESUME":
        return ""
    if "CALL" not in name or not hasattr(code, "co_positions"):
        return None
    first, last, begin, end = list(code.co_positions())[at // 2]
    if None in (first, last, begin, end):
        return None
    lines = [linecache.getline(code.co_filename, i).encode() for i in range(first, last + 1)]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][begin:]
    try:
        node = ast.parse(b"(" + b"".join(lines) + b")", mode="eval").body
    except (SyntaxError, ValueError):
        return None
    function = getattr(node, "func", None)
    if isinstance(function, ast.Name):
        return None if hasattr(builtins, function.id) else function.id
    return getattr(function, "attr", None)


@cache
def _operations() -> frozenset[str]:
    """Names of torch's own functions and methods that do something."""
    import torch

    methods = {name for name in dir(torch.Tensor) if not name.startswith("_")}
    functions = {
        name
        for of in (torch, torch.nn.functional)
        for name in dir(of)
        if callable(getattr(of, name)) and not isinstance(getattr(of, name), type)
    }
    return frozenset((methods | functions) - QUERIES - set(dir(list)) - set(dir(dict)))


Sample = tuple[tuple[CodeType, int], ...]  # of frames, the innermost first: code, and the instruction it is at


def place(sample: Sample, package: str) -> tuple[str, str]:
    """(part, where in words) of a sample."""
    frames = list(sample)
    if len(frames) > 1 and called(*frames[0]) == "":  # just called: until then its caller ran, or what that called
        del frames[0]
    for i, (code, at) in enumerate(frames):
        part = part_of(code.co_filename, code.co_name, package)
        if part is None:
            continue
        operation = called(code, at) if i == 0 and not _is_of(code, "torch", "triton") else None
        where = _where(code, package)
        if operation and operation in _operations():
            return TORCH, f"{where} -> {operation}"
        return part, where
    return REST, f"elsewhere: {_where(frames[0][0], package)}"


def _is_of(code: CodeType, *libraries: str) -> bool:
    return any([f"/site-packages/{library}/" in code.co_filename for library in libraries])


def _is_in(code: CodeType, package: str) -> bool:
    return code.co_filename.startswith(package + "/")


def _where(code: CodeType, package: str) -> str:
    path = code.co_filename
    if _is_in(code, package):
        path = path[len(package) + 1 :]
    elif "/site-packages/" in path:
        path = path.rpartition("/site-packages/")[2]
    else:
        path = "/".join(path.split("/")[-2:])
    return f"{path}:{getattr(code, 'co_qualname', code.co_name)}"


def sampled(call: Callable[[], Any], seconds: float) -> dict[Sample, float]:
    """Where the time goes while `call` runs again and again: seconds of this thread by what it was doing.

    A signal is seen between two instructions of Python only, after whatever C was doing. So a sample stands for all the
    time since the one before.
    """
    found: Counter[Sample] = Counter()
    last, looks = thread_time(), True

    def look(_: int, frame: FrameType | None) -> None:
        nonlocal last
        now, frames = thread_time(), []
        while frame is not None and len(frames) < DEEPEST:
            frames.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        found[tuple(frames)] += now - last
        last = thread_time()
        if looks:
            signal.setitimer(signal.ITIMER_REAL, INTERVAL)  # once: it would come while we look

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, INTERVAL)
    try:
        end = perf_counter() + seconds
        while perf_counter() < end:
            call()
    finally:
        looks = False  # a signal may wait to be seen
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return found


class Shares(NamedTuple):
    """Of the time, as shares of 1."""

    parts: dict[str, float]  # of each of PARTS
    places: list[tuple[float, str, str]]  # of innermost functions: share, part, where; the largest first
    within: list[tuple[float, str]]  # of the package's functions with all that they call: share, where


def shares(found: dict[Sample, float], package: str) -> Shares:
    """What samples say. Raises ValueError where there are none."""
    total = sum(found.values())
    if not total:
        raise ValueError("samples must be of some time, got none")
    parts, places, within = dict.fromkeys(PARTS, 0.0), Counter(), Counter()
    for sample, seconds in found.items():
        part, where = place(sample, package)
        parts[part] += seconds / total
        places[part, where] += seconds / total
        within.update(
            dict.fromkeys({_where(code, package) for code, _ in sample if _is_in(code, package)}, seconds / total)
        )
    return Shares(
        parts,
        [(share, *key) for key, share in places.most_common()],
        [(share, where) for where, share in within.most_common()],
    )


# --- Without a GPU ----------------------------------------------------------------------------------------------------


class _Utils:
    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), 0, 32, 0, 1024  # module, function, registers, spills, most threads

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Driver:
    """Of an H100 that launches nothing."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda


def keep_to_path() -> None:
    """Imports what PYTHONPATH has: nothing from this script's folder, no module that only an editable install has."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]
    sys.meta_path[:] = [each for each in sys.meta_path if "__editable__" not in getattr(each, "__module__", "")]


def module_of(name: str) -> Any:
    """A module of the package's folder runtime, which lay beside the package's other files once."""
    for path in (f"planecycle_fast.runtime.{name}", f"planecycle_fast.{name}"):
        try:
            found = importlib.util.find_spec(path)
        except ModuleNotFoundError:  # of the folder
            found = None
        if found is not None:
            return importlib.import_module(path)
    raise ValueError(f"planecycle_fast at {package()} must have a module {name}, in runtime or beside it")


def package() -> str:
    """The folder of the package that runs."""
    import planecycle_fast

    return str(Path(planecycle_fast.__file__).resolve().parent)


def stand_in() -> None:
    """From now on this process has a GPU that does nothing."""
    import triton

    triton.runtime.driver.set_active(_Driver())
    backends = module_of("backends")
    backends._found["triton"] = None
    backends._interpreted = lambda: True  # it takes tensors on any device
    if importlib.util.find_spec("planecycle_fast.ops.registration"):  # operations may run past torch's dispatcher
        importlib.import_module("planecycle_fast.ops.registration").DEVICES = ("cpu",)


# --- What is timed ----------------------------------------------------------------------------------------------------


class NotHereError(Exception):
    """What a model needs is not on this machine; the message says what."""


def model_of(kind: str, depth: int) -> Any:
    """One of MODELS. Raises NotHereError with the reason where there is none."""
    import planecycle_fast as pcf

    attention = "triton" if module_of("attentions").attentions()["triton"] is None else "sdpa"
    how = {"backend": "triton", "attention": attention, "strict": False}  # "auto" is not checked in every pass either
    if kind == "lifted":
        import timm

        host = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, depth=depth,
                                 embed_dim=WIDTH, num_heads=HEADS, dynamic_img_size=True)  # fmt: skip
        return pcf.lift(host.eval(), **how)
    theirs = _authors(depth)
    return theirs if kind == "authors" else pcf.accelerate(theirs, **how)


def _authors(depth: int) -> Any:
    if REPO not in os.environ:
        raise NotHereError(f"{REPO} names no checkout of the authors' code")
    import torch

    folder, config = os.path.realpath(os.environ[REPO]), torch._dynamo.config
    limits = config.accumulated_recompile_limit, config.automatic_dynamic_shapes
    sys.path.insert(0, folder)
    try:
        models = importlib.import_module("models.vision_transformer")
        converters = importlib.import_module("planecycle.converters.converter")
    finally:
        sys.path.remove(folder)
        config.accumulated_recompile_limit, config.automatic_dynamic_shapes = limits  # theirs, for the whole process
    made = models.DinoVisionTransformer(
        patch_size=PATCH, embed_dim=WIDTH, depth=depth, num_heads=HEADS, ffn_layer="mlp", ffn_ratio=4, qkv_bias=False,
        layerscale_init=1e-5, norm_layer="layernormbf16", n_storage_tokens=4, pos_embed_rope_dtype="fp32",
        pos_embed_rope_rescale_coords=2.0, block_type="PlaneCycle",
    )  # fmt: skip
    made.init_weights()
    return converters.PlaneCycleConverter(pool_method="PCg")(made).eval()


@cache
def step_of(kind: str, step: str, depth: int) -> Callable[[], None]:
    """One pass, ready to be timed; gradients that it finds are those of no pass before."""
    import torch

    torch.manual_seed(0)
    model, volume = model_of(kind, depth), torch.randn(VOLUME)
    patches = "x_norm_patchtokens"

    def inference() -> None:
        with torch.no_grad():
            model(volume)

    def train() -> None:
        out = model(volume)
        (out[patches] if isinstance(out, dict) else out.patches).sum().backward()

    run = inference if step == STEPS[0] else train
    run.parameters = list(model.parameters())
    for _ in range(5):
        run()
        forget_gradients(run.parameters)
    return run


def forget_gradients(parameters: list[Any]) -> None:
    """Not part of a pass."""
    for parameter in parameters:
        parameter.grad = None


def timed(run: Callable[[], None], calls: int) -> float:
    """Microseconds of the fastest of some calls: of this thread, which does all of it, whatever else runs meanwhile."""
    gc.collect()
    least = float("inf")
    for _ in range(calls):
        began = thread_time()
        run()
        least = min(least, thread_time() - began)
        forget_gradients(run.parameters)
    return least * 1e6


def parts_of(run: Callable[[], None], seconds: float) -> dict[str, Any]:
    """`Shares` of a pass."""

    def call() -> None:
        run()
        forget_gradients(run.parameters)

    found, forgetting = sampled(call, seconds), forget_gradients.__code__
    kept = {sample: time for sample, time in found.items() if forgetting not in [code for code, _ in sample]}
    parts, places, within = shares(kept, package())
    return {"parts": parts, "places": places[:SHOWN], "within": within[:SHOWN]}


def answer(order: dict[str, Any]) -> dict[str, Any]:
    """Of an order {"do": "time", "row", "calls"} or {"do": "parts", "row", "seconds"}; a row as `step_of` takes it."""
    try:
        run = step_of(*order["row"])
    except NotHereError as error:
        return {"missing": str(error)}
    if order["do"] == "time":
        return {"us": timed(run, order["calls"])}
    return parts_of(run, order["seconds"])


def main() -> None:
    """Serves until the standard input ends."""
    keep_to_path()
    if hasattr(os, "sched_setaffinity"):  # the same for all commits, so that other work there meets all of them
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    orders, sys.stdout = sys.stdout, sys.stderr  # what others print is no answer
    import torch

    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # which prepares more than such products and GELUs take
    torch.set_flush_denormal(True)  # what no kernel has written holds anything, and slow numbers too
    module_of("torchvision_fix").mend_torchvision()
    stand_in()
    print(json.dumps({"package": package()}), file=orders, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=orders, flush=True)


if __name__ == "__main__":
    main()
