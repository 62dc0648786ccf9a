"""``make bench-cpu``: PlaneCycle on a CPU, inference, against the authors' code, slice2d and a floor, in one run.

    PLANECYCLE_REPO=... python -m benchmarks.cpu [--rounds 5] [--dtype fp32] [--volume 1x32x256]

The floor is what no implementation avoids: the same patch embedding, linear layers and attention calls, nothing else,
on contiguous tensors of random values and of the shapes that each plane has. Contenders take turns, so that a machine
whose speed drifts treats all alike; outputs are compared before anything is timed. Memory is the peak of what lives
above weights and input, by torch's own record of every allocation. Also what Python costs at small volumes: the time
of a pass against that of the very operations it calls, called again one after another.
"""

import argparse
import copy
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import planecycle_fast as pcf
from planecycle_fast.bench.costs import peak_bytes
from planecycle_fast.geometry.planes import DH, DW, HW
from planecycle_fast.runtime import native

RESULT = Path(__file__).parent / "results" / "cpu.md"
CHANNELS, HEADS, DEPTH, PATCH, GLOBALS = 384, 6, 12, 16, 5  # ViT-S/16
VOLUMES = {f"{b}x{d}x{s}": (b, 3, d, s, s) for b, d, s in
           [(1, 32, 256), (4, 64, 64), (1, 32, 448), (1, 16, 256), (1, 28, 448)]}  # fmt: skip
CUBIC = ("1x16x256", "1x28x448")  # as many tokens along each axis: all planes are alike
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR, OURS, SLICES, REFERENCE = "floor", "planecycle_fast", "slice2d", "reference"
EAGER, COMPILED = "authors' code", "authors' code, compiled"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the largest value, against float32
BARS = {FLOOR: 1.10, COMPILED: 1.0, EAGER: 1.0, SLICES: 1.05}  # our time over theirs at most; slice2d: cubic volumes
MEMORY_BAR, DISPATCH_BAR = 0.6, 0.05
THREADS = 2
SECONDS = 4  # of one contender at least: the fewer a pass takes, the more rounds


def backbone() -> nn.Module:
    """The authors' model where PLANECYCLE_REPO is, else timm's of the same size; random weights."""
    if "PLANECYCLE_REPO" in os.environ:
        from tests import peers

        model = peers.authors()[0](
            embed_dim=CHANNELS, depth=DEPTH, num_heads=HEADS, patch_size=PATCH, layerscale_init=1e-5,
            n_storage_tokens=GLOBALS - 1, mask_k_bias=True, pos_embed_rope_dtype="fp32",
        )  # fmt: skip
        return peers.randomise(model).eval()
    import timm

    return timm.create_model("vit_small_patch16_dinov3", num_classes=0).eval()


def contenders(model: nn.Module, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """{name: from a volume to its patch tokens (B, D*H*W, C)}; the floor's are not compared."""

    def lifted(**settings: str) -> Callable[[Tensor], Tensor]:
        found = pcf.lift(model, **settings)
        return lambda volume: found(volume).patches.flatten(1, 3)

    found = {OURS: lifted(backend="cpu"), SLICES: lifted(mode="slice2d", backend="cpu"),
             REFERENCE: lifted(backend="reference")}  # fmt: skip
    if "PLANECYCLE_REPO" in os.environ:
        from tests import peers

        theirs = peers.authors()[1]()(copy.deepcopy(model)).eval()

        def patches(run: Callable) -> Callable[[Tensor], Tensor]:
            return lambda volume: run(volume)["x_norm_patchtokens"].reshape(len(volume), -1, CHANNELS)

        found[EAGER] = patches(theirs)
        if compiled:
            found[COMPILED] = patches(torch.compile(theirs, dynamic=False))
    return found


def floor(dtype: torch.dtype, shape: tuple[int, ...], qkv_bias: bool) -> Callable[[Tensor], None]:
    """Patch embedding, linear layers and attention of all layers, on tensors of their own."""
    batch, _, depth, height, width = shape
    sizes = (depth, height // PATCH, width // PATCH)
    embed = nn.Conv2d(3, CHANNELS, PATCH, PATCH).to(dtype)
    qkv, out, wide, narrow = [
        nn.Linear(i * CHANNELS, o * CHANNELS, bias).to(dtype)
        for i, o, bias in ((1, 3, qkv_bias), (1, 1, True), (1, 4, True), (4, 1, True))
    ]
    made = {}
    for plane in (HW, DW, DH):
        rows = batch * plane.slices(sizes), GLOBALS + plane.length(sizes)
        made[plane] = [torch.randn(*rows, n * CHANNELS).to(dtype) for n in (1, 4)]

    def run(volume: Tensor) -> None:
        embed(volume.transpose(1, 2).flatten(0, 1).contiguous())
        for i in range(DEPTH):
            x, hidden = made[(HW, DW, DH, HW)[i % 4]]
            q, k, v = qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            out(attended), wide(x), narrow(hidden)

    return run


def check(found: dict[str, Callable], exact: Tensor, volume: Tensor) -> None:
    """RuntimeError where a contender's patches are not those of float32."""
    for name, run in found.items():
        if name not in (FLOOR, SLICES):
            error = ((run(volume).float() - exact).abs().max() / exact.abs().max()).item()
            if not error <= TOLERANCE[volume.dtype]:
                raise RuntimeError(f"{name} is off by {error:.1e} of the largest value: nothing is timed")


def interleaved(found: dict[str, Callable], volumes: list[Tensor], rounds: int) -> dict[str, float]:
    """{name: median of seconds}, contenders in turn."""
    times = {name: [] for name in found}
    for i in range(rounds + 1):
        for name, run in found.items():
            began = perf_counter()
            run(volumes[i % len(volumes)])
            times[name].append(perf_counter() - began)
    return {name: sorted(of_one[1:])[rounds // 2] for name, of_one in times.items()}  # the first is a warm-up


def peak(run: Callable, volume: Tensor) -> int:
    """Bytes that live at once above what does before; of the second pass, as the first fills caches of libraries."""
    run(volume)
    return peak_bytes(run, volume)


class _Calls(TorchDispatchMode):
    """All operations that run, with their arguments as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made.append((func, own(func, args), kwargs or {}))
        if func._schema.name.endswith("::blocks_"):  # takes its arguments, which others that were recorded need
            args = own(func, args)
        return func(*args, **(kwargs or {}))


def own(func: torch._ops.OpOverload, args: tuple) -> tuple:
    """Arguments with copies of those that are written to."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    return tuple([arg.clone() if write else arg for arg, write in zip(args, written)])


def dispatch(model: nn.Module, dtype: torch.dtype, rounds: int = 200) -> tuple[float, float]:
    """Seconds of a pass at 1 x 16 x 64^2, and of the operations that it calls by themselves."""
    lifted, volume = pcf.lift(model), torch.randn(1, 3, 16, 64, 64).to(dtype)
    with _Calls() as calls:
        lifted(volume)

    prepared = [[(func, own(func, args), kwargs) for func, args, kwargs in calls.made] for _ in range(rounds + 1)]

    def again(_: Tensor) -> None:
        for func, args, kwargs in prepared.pop():
            func(*args, **kwargs)

    found = interleaved({"pass": lifted, "operations": again}, [volume], rounds)
    return found["pass"], found["operations"]


def cells(arguments: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    model, rows = backbone(), []
    for dtype_name in arguments.dtype:
        dtype = DTYPES[dtype_name]
        for name in arguments.volume:
            torch._dynamo.reset()
            volumes = [torch.randn(VOLUMES[name]).to(dtype) for _ in range(2)]
            exact = pcf.lift(model.float(), backend="reference")(volumes[0].float()).patches.flatten(1, 3)
            found = contenders(model.to(dtype), arguments.compile)
            check(found, exact, volumes[0])
            found[FLOOR] = floor(dtype, VOLUMES[name], model.blocks[0].attn.qkv.bias is not None)
            began = perf_counter()
            found[OURS](volumes[1])
            rounds = max(arguments.rounds, min(25, int(SECONDS / (perf_counter() - began))) | 1)
            row = {"dtype": dtype_name, "volume": name, "times": interleaved(found, volumes, rounds)}
            row["memory"] = {who: peak(found[who], volumes[0]) for who in (OURS, EAGER) if who in found}
            rows.append(row)
            print(dtype_name, name, {who: round(t, 4) for who, t in row["times"].items()}, row["memory"], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown; a ratio past its bar stands in bold."""
    bars = ", ".join([f"{who} {bar:.2f}" for who, bar in BARS.items()])
    columns = [FLOOR, COMPILED, EAGER, REFERENCE, SLICES]
    lines = [
        "Seconds of planecycle_fast, then its time divided by the others'; its peak of memory, over the authors'.",
        f"Bars: {bars} (cubic volumes: {', '.join(CUBIC)}), memory {MEMORY_BAR}. **Bold** is past its bar.\n",
        "| dtype | volume | s | " + " | ".join([f"/ {who}" for who in columns]) + " | peak MiB | / authors' |",
        "| --- | --- | ---: " + "| ---: " * (len(columns) + 2) + "|",
    ]  # fmt: skip
    for row in rows:
        ours, texts = row["times"][OURS], []
        for who in columns:
            if who not in row["times"]:
                texts.append("not measured")
                continue
            bar = BARS.get(who) if who != SLICES or row["volume"] in CUBIC else None
            ratio = ours / row["times"][who]
            texts.append(f"**{ratio:.2f}**" if bar and ratio > bar else f"{ratio:.2f}")
        memory = row["memory"]
        share = memory[OURS] / memory[EAGER] if EAGER in memory else None
        texts.append(f"{memory[OURS] / 2**20:.0f}")
        texts.append("not measured" if share is None else f"**{share:.2f}**" if share > MEMORY_BAR else f"{share:.2f}")
        lines.append(f"| {row['dtype']} | {row['volume']} | {ours:.3f} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def header() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    command = shlex.join(["python", "-m", "benchmarks.cpu", *sys.argv[1:]])
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return (
        f"# PlaneCycle on a CPU: ViT-S/16, inference\n\n{name or platform.processor()}, {THREADS} threads, torch "
        f"{torch.__version__}, {native.capability()}, commit {described}, {datetime.now(timezone.utc):%Y-%m-%d}, "
        f"`{command}`\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="at least; more where a pass is short")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--volume", nargs="+", choices=VOLUMES, default=list(VOLUMES))
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        text = header() + "\n" + table(cells(arguments)) + "\nWhat Python costs at 1x16x64:\n\n"
        for name in arguments.dtype:
            whole, operations = dispatch(backbone().to(DTYPES[name]), DTYPES[name])
            share = 1 - operations / whole
            shown = f"**{share:.1%}**" if share > DISPATCH_BAR else f"{share:.1%}"
            text += f"- {name}: {shown} of {whole * 1e3:.1f} ms (bar {DISPATCH_BAR:.0%})\n"
    arguments.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
