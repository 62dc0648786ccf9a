"""Less waiting for Python: a CUDA graph on a GPU, torch.compile on a CPU. ``python examples/cuda_graph_or_compile.py``.

Small volumes wait for Python between kernels. Random weights; needs timm, and on a CPU a C++ compiler, half a minute.
"""

from time import perf_counter

import torch

import planecycle_fast as pcf

LAYERS, SIZE = 2, (1, 3, 4, 64, 64)  # (B, 3, D, height, width)


def milliseconds(run, volume: torch.Tensor, repeats: int = 20) -> float:
    """The least of several calls."""
    found = []
    for _ in range(repeats):
        began = perf_counter()
        run(volume)
        if volume.is_cuda:
            torch.cuda.synchronize()
        found.append(perf_counter() - began)
    return 1000 * min(found)


@torch.no_grad()
def main() -> None:
    import timm

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model("vit_small_patch16_dinov3", depth=LAYERS, num_classes=0).to(device).eval()
    lifted, volume = pcf.lift(model), torch.randn(SIZE, device=device)
    if device == "cuda":
        name, faster = "a CUDA graph", pcf.lift(model, graphs=True)  # captured when a shape comes for the second time
    else:
        name, faster = "torch.compile", torch.compile(lifted)
    difference = (faster(volume).patches - lifted(volume).patches).abs().max()
    eager, other = milliseconds(lifted, volume), milliseconds(faster, volume)
    print(f"{device}, {LAYERS} layers, {tuple(volume.shape)}: {eager:.1f} ms eager, {other:.1f} ms by {name}")
    print(f"features differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
