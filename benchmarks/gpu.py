"""``make gpu``: on a machine with an NVIDIA GPU, the GPU tests, and each operation's time against a measured copy.

Needs torch, triton and pytest, nothing else. Writes ``benchmarks/results/<gpu>/``: `tests.txt`, and `ops.md` with the
bytes that an operation declares, its time (median of many runs, caches flushed), its bandwidth, and that of a
`copy_` of as many bytes in the same run. Every file says which GPU, versions, commit and command it is of.
"""

import argparse
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
HOST_BAR = 600  # microseconds of the host per block
BAR = {True: 0.75, False: 0.85}  # of a copy's bandwidth, at up to 1024 channels and above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true", help="time operations only")
    parser.add_argument("--tiles", action="store_true", help="also other tiles of add_norm than the shipped ones")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device was found: nothing to run", file=sys.stderr)
        return 1
    folder = results_folder()
    status = 0 if arguments.skip_tests else run_tests(folder)
    text = table([time_call(*call) for call in calls()]) + "\n" + host_time()
    if arguments.tiles:
        faster = [
            f"- {kernel}, C = {channels}: {tile}, {ratio:.2f} times" for kernel, channels, tile, ratio in faster_tiles()
        ]
        text += "\nTiles of add_norm that are faster than `configs.tile`:\n\n" + ("\n".join(faster) or "none") + "\n"
    (folder / "ops.md").write_text(text)
    print(text)
    return status


def results_folder() -> Path:
    """That of this GPU."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def header() -> str:
    """Where and of what a result is, as lines of text."""
    import triton

    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name} (sm_{properties.major}{properties.minor}), CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}, "
        f"commit {commit or 'unknown'}, `{command}`\n"
    )


def run_tests(folder: Path) -> int:
    """Runs the tests marked gpu; writes what they printed. Returns pytest's status."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "--durations=5", *map(str, gpu_test_files())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (folder / "tests.txt").write_text(header() + "\n" + done.stdout[-20_000:])
    print("\n".join(done.stdout.splitlines()[-15:]))
    return done.returncode


def gpu_test_files() -> list[Path]:
    """Test files that need nothing but torch, triton and pytest, besides optional hosts."""
    return sorted((Path(__file__).parents[1] / "tests").glob("test_gpu*.py"))


SHAPES = [  # label, tokens (D, H, W), channels, heads, volumes
    ("ViT-S, 8 volumes of 64^3", (64, 4, 4), 384, 6, 8),
    ("ViT-S, 32 x 448^2", (32, 28, 28), 384, 6, 8),
    ("ViT-B, 32 x 448^2", (32, 28, 28), 768, 12, 8),
    ("ViT-L, 32 x 512^2", (32, 32, 32), 1024, 16, 8),
    ("ViT-H, 32 x 512^2", (32, 32, 32), 1280, 20, 8),
    ("ViT-7B, 32 x 512^2", (32, 32, 32), 4096, 32, 4),
]


def calls():
    """(operation, label, channels, arguments): each operation on shapes of real models, forward and backward."""
    from planecycle_fast.planes import DH, DW, HW
    from tests.specs import add_norm, plane_switch, rope, swiglu

    def tensors(c):
        return {name: t.cuda() for name, t in c.make(torch.bfloat16).items()}

    def both(spec, c, label, channels):
        for (op, arguments), direction in zip(spec.op_arguments(tensors(c), c.settings), ("forward", "backward")):
            yield op, f"{label}, {direction}", channels, arguments

    for label, sizes, channels, heads, batch in SHAPES:
        for old, new, pool_method in ((HW, DW, "PCg"), (DW, DH, "PCg"), (DH, HW, "PCg"), (HW, DW, "PCm")):
            where, args = f"{label}, {old} to {new}, {pool_method}", (old, new, sizes, 5, channels, batch, pool_method)
            yield from both(plane_switch.SPEC, plane_switch.case(*args), where, channels)
            yield from both(add_norm.SPEC, add_norm.case(*args), where, channels)
        rows = (batch * sizes[0], 5 + sizes[1] * sizes[2], 1)
        c = add_norm.case(HW, HW, rows, 0, channels, 1)
        yield from both(add_norm.SPEC, c, f"{label}, in place", channels)
        c = rope.case("axial", sizes[1:], 5, 3 * heads, channels // heads, batch * sizes[0], 2 * heads, device="cuda")
        for op, arguments in rope.SPEC.op_arguments(tensors(c), c.settings):
            yield op, f"{label}, packed", channels, arguments
        for packed in (False, True):
            c = swiglu.case(rows[:2], 4 * channels, packed)
            yield from both(swiglu.SPEC, c, f"{label}, {'packed' if packed else 'separate'}", channels)


def faster_tiles():
    """(kernel, channels, tile, how much faster): other tiles of add_norm that are at least 3 % faster than its own."""
    from triton.testing import do_bench

    from planecycle_fast.ops import configs
    from planecycle_fast.planes import DW, HW
    from tests.specs import add_norm

    for _, sizes, channels, _, batch in SHAPES[1:]:
        c = add_norm.case(HW, DW, sizes, 5, channels, batch)
        tensors = {name: t.cuda() for name, t in c.make(torch.bfloat16).items()}
        for (op, arguments), kernel in zip(add_norm.SPEC.op_arguments(tensors, c.settings), ("forward", "backward")):
            times, kept = {}, configs.tile(kernel, channels)
            for tile in configs.candidates(kernel, channels):
                configs.TABLE[kernel, channels] = tile
                times[tile] = do_bench(lambda: op.body(*arguments), quantiles=[0.5])  # noqa: B023
            configs.TABLE[kernel, channels] = kept
            best = min(times, key=times.get)
            if times[kept] > 1.03 * times[best]:
                yield kernel, channels, best, times[kept] / times[best]


def host_time() -> str:
    """What the host needs per block, of a model too small to keep the GPU busy, against a replayed CUDA graph."""
    try:
        import timm
    except ImportError:
        return "Time of the host per block: not measured, timm is not installed\n"
    from time import perf_counter

    import planecycle_fast as pcf

    model = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0).eval().cuda().bfloat16()
    lifted, volume = pcf.lift(model), torch.randn(1, 3, 16, 64, 64, device="cuda", dtype=torch.bfloat16)
    graph, found = pcf.cuda_graph(lifted, volume), []
    for function in (lifted, graph):
        times = []
        for _ in range(30):
            torch.cuda.synchronize()
            began = perf_counter()
            with torch.no_grad():
                function(volume)
            torch.cuda.synchronize()
            times.append(perf_counter() - began)
        found.append(sorted(times)[len(times) // 2] / len(lifted.blocks) * 1e6)
    return (
        f"ViT-S, 1 x 16 x 64^2, bf16, per block: {_bold(found[0], found[0] <= HOST_BAR)} us from the host "
        f"(bar {HOST_BAR}), {found[1]:.0f} us as a CUDA graph ({found[0] / found[1]:.1f} times)\n"
    )


def _bold(value: float, within: bool) -> str:
    return f"{value:.0f}" if within else f"**{value:.0f}**"


def time_call(op, label: str, channels: int, arguments: tuple) -> dict:
    """Times one call of an operation and a copy that moves as many bytes."""
    from triton.testing import do_bench

    cost = op.cost(*arguments)
    moved = cost.read + cost.written
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: op.body(*arguments), quantiles=[0.5])
    copy = do_bench(lambda: target.copy_(source), quantiles=[0.5])
    return {
        "label": f"{op.name}: {label}",
        "channels": channels,
        "megabytes": moved / 1e6,
        "microseconds": milliseconds * 1e3,
        "bandwidth": moved / milliseconds / 1e9,
        "copy": moved / copy / 1e9,
        "ratio": copy / milliseconds,
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown; a ratio below its bar stands in bold."""
    lines = [
        header(),
        "bf16, median of many runs with caches flushed. Bar: 75 % of the copy at up to 1024 channels, 85 % above;",
        "**bold** is below its bar. Bytes are those the operation declares.\n",
        "| call | C | MB | us | TB/s | copy, TB/s | of the copy |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        below = row["ratio"] < BAR[row["channels"] <= 1024]
        ratio = f"**{row['ratio']:.0%}**" if below else f"{row['ratio']:.0%}"
        lines.append(
            f"| {row['label']} | {row['channels']} | {row['megabytes']:.1f} | {row['microseconds']:.1f} "
            f"| {row['bandwidth']:.2f} | {row['copy']:.2f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
