"""Whole models on a GPU: PlaneCycle, slice2d, flatten3d, and the authors' code, eager and compiled.

``PLANECYCLE_REPO=... python -m benchmarks.gpu_models`` writes ``benchmarks/results/<gpu>/models.md``, or
``models-<model>-<step>.md`` of a part. The authors' model and ours have the same weights and are compared in float32
before anything is timed. Contenders take turns on volumes that change; times are medians by CUDA events, memory is
the peak above what lies there before.
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import planecycle_fast as pcf

SIZES = {"ViT-S": (384, 6), "ViT-B": (768, 12)}  # channels, heads; 12 blocks, patches of 16
VOLUMES = [(1, 3, 64, 64, 64), (4, 3, 64, 64, 64), (8, 3, 32, 512, 512)]  # the last: planes of 1029 tokens, 2**18 rows
EAGER, COMPILED = "authors' code", "authors' code, compiled"
OURS, GRAPH, SLICES = "PlaneCycle, PCg", "PlaneCycle, PCg, CUDA graph", "slice2d"
TOLERANCE = 1e-3  # of the largest value, float32
ROUNDS, WARM_UPS = 20, 3

# (model, volume): (contender, other contender, how many times faster it must be)
SMALL = [(GRAPH, EAGER, 4.0)]
BARS = {
    ("ViT-S", VOLUMES[0]): SMALL, ("ViT-S", VOLUMES[1]): SMALL,
    ("ViT-B", VOLUMES[0]): SMALL, ("ViT-B", VOLUMES[1]): SMALL,
    ("ViT-S", VOLUMES[2]): [(OURS, EAGER, 2.0), (OURS, COMPILED, 1.15), (OURS, SLICES, 1 / 1.03)],
    ("ViT-B", VOLUMES[2]): [(OURS, EAGER, 1.7), (OURS, COMPILED, 1.15), (OURS, SLICES, 1 / 1.03)],
}  # fmt: skip


def backbone(channels: int, heads: int, depth: int = 12) -> nn.Module:
    """The authors' model before it is converted, where PLANECYCLE_REPO is; else timm's of the same size."""
    settings = dict(embed_dim=channels, depth=depth, num_heads=heads)
    if "PLANECYCLE_REPO" in os.environ:
        from tests import peers

        model = peers.authors()[0](
            patch_size=16, layerscale_init=1e-5, n_storage_tokens=4, mask_k_bias=True, pos_embed_rope_dtype="fp32",
            pos_embed_rope_normalize_coords="separate", pos_embed_rope_rescale_coords=2.0, **settings,
        )  # fmt: skip
        return peers.randomise(model).eval()
    import timm

    return timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, **settings).eval()


def contenders(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """{name: from a volume to its patch tokens (B, D*H*W, C)}; the authors' code only if it is that."""

    def ours(**settings) -> Callable[[Tensor], Tensor]:
        lifted = pcf.lift(copy.deepcopy(model), **settings)
        return _Patches(lifted, lambda features: features.patches.flatten(1, 3)).eval()

    found = {OURS: ours(), "PlaneCycle, PCm": ours(pool_method="PCm"), SLICES: ours(mode="slice2d"),
             "flatten3d": ours(mode="flatten3d")}  # fmt: skip
    if "PLANECYCLE_REPO" in os.environ:
        from tests import peers

        theirs = peers.authors()[1]()(copy.deepcopy(model))
        found[EAGER] = _Patches(theirs, lambda out: out["x_norm_patchtokens"].flatten(1, -2)).eval()
    return found


class _Patches(nn.Module):
    def __init__(self, model: nn.Module, take: Callable) -> None:
        super().__init__()
        self.model, self.take = model, take

    def forward(self, volume: Tensor) -> Tensor:
        return self.take(self.model(volume))


def check(found: dict[str, nn.Module], device: str) -> None:
    """The authors' code and ours give the same for a small volume in float32; RuntimeError if not."""
    if EAGER not in found:
        return
    volume = torch.randn(2, 3, 5, 48, 64, device=device)
    with torch.no_grad():
        theirs, ours = (found[name].float()(volume) for name in (EAGER, OURS))
    theirs = theirs.reshape(ours.shape)
    error = ((theirs - ours).abs().max() / theirs.abs().max()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"the authors' code and ours differ by {error:.1e} of the largest value: nothing is timed")


def inference(model: Callable[[Tensor], Tensor], volume: Tensor) -> None:
    with torch.no_grad():
        model(volume)


def training(model: nn.Module, volume: Tensor) -> None:
    """Forward and backward for all weights."""
    model(volume).float().square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


STEPS = {"inference": inference, "training": training}


def measure(step: Callable, found: dict[str, Callable], shape: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """{name: (median of milliseconds, peak of bytes)} on bf16 volumes; what does not fit in memory is left out."""
    volumes = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    times, memory = {}, {}
    for name, model in found.items():
        try:
            for volume in volumes[:WARM_UPS]:
                step(model, volume)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(model, volumes[0])
            memory[name], times[name] = torch.cuda.max_memory_allocated() - before, []
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    for i in range(ROUNDS):
        for name in times:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            step(found[name], volumes[i % len(volumes)])
            ended.record()
            ended.synchronize()
            times[name].append(began.elapsed_time(ended))
    return {name: (sorted(of_one)[ROUNDS // 2], memory[name]) for name, of_one in times.items()}


def rows(models: list[str], steps: list[str]) -> Iterator[tuple]:
    """(model, volume, step, contender, milliseconds, bytes) of everything."""
    for label in models:
        model = backbone(*SIZES[label]).cuda()
        found = contenders(model)
        check(found, "cuda")
        found = {name: contender.bfloat16() for name, contender in found.items()}
        if EAGER in found:
            found[COMPILED] = torch.compile(found[EAGER])
        for shape in VOLUMES:
            volume = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
            graph = {GRAPH: pcf.cuda_graph(found[OURS], volume)}
            for step in steps:
                those = found | graph if step == "inference" else found
                for name, result in measure(STEPS[step], those, shape).items():
                    yield label, shape, step, name, *result


def table(results: list[tuple]) -> str:
    """Markdown: every row with its speed against the authors' code; then the bars."""
    times = {tuple(key): milliseconds for *key, milliseconds, _ in results}
    lines = [
        "| model | volume | step | | ms | volumes/s | peak MB | authors' time / this |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for label, shape, step, name, milliseconds, peak in results:
        theirs = times.get((label, shape, step, EAGER))
        against = "not measured" if theirs is None else f"{theirs / milliseconds:.2f}"
        lines.append(
            f"| {label} | {'x'.join(map(str, shape))} | {step} | {name} | {milliseconds:.2f} "
            f"| {shape[0] / milliseconds * 1e3:.1f} | {peak / 1e6:.0f} | {against} |"
        )
    lines += ["", "Bars, of inference (**bold** is missed):", ""]
    for (label, shape), bars in BARS.items():
        for name, other, least in bars:
            ours, theirs = (times.get((label, shape, "inference", one)) for one in (name, other))
            found = "not measured" if None in (ours, theirs) else f"{theirs / ours:.2f}"
            found = f"**{found}**" if ours and theirs and theirs / ours < least else found
            where = f"{label}, {'x'.join(map(str, shape))}"
            lines.append(f"- {where}: time of {other} / {name}: {found}, bar {least:.2f}")
    return "\n".join(lines) + "\n"


def main() -> int:
    from . import gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--step", nargs="+", choices=STEPS, default=list(STEPS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device was found: nothing to run", file=sys.stderr)
        return 1
    text = gpu.header() + "\nbf16, medians by turns.\n\n" + table(list(rows(arguments.model, arguments.step)))
    part = [arguments.model, list(SIZES)], [arguments.step, list(STEPS)]
    name = "-".join(["models", *(one for some, every in part if some != every for one in some)]).lower()
    (gpu.results_folder() / f"{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
