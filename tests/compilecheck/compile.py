"""Compiles models for a GPU that is not there: small in width and depth, whole in structure, on tensors without data.

``python -m tests.compilecheck.compile FILE [WORD ...]``, in an environment by `no_gpu`, appends a line of JSON to FILE
for each case whose name has all WORDs.
"""

import json
import sys
import time
from contextlib import nullcontext

import torch
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

import planecycle_fast as pcf

from .. import standins
from ..host_models import BY_NAME
from .cases import MODES, OWN, PLANES, all_cases
from .watch import Watch, root

SIZES = (2, 4, (3, 5))  # batch, depth, patches of a slice
OTHERS = {"inference": (3, 5, (4, 6)), "training": (3, 5, (3, 5))}  # where sizes are dynamic
AXES = {"inference": (0, 2, 3, 4), "training": (0, 2)}  # of them; in training all four take many minutes per model
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}  # of parameters


def build(case):
    """The model of a case on the CPU, and a function from sizes to a volume's shape."""
    torch.manual_seed(0)
    if case.model == "accelerated":
        model = standins.DinoVisionTransformer("PlaneCycle", depth=len(PLANES), patch_size=16, swiglu=True)
        model = pcf.accelerate(standins.Converter(PLANES, case.mode)(model).eval())
        patch = 16
    else:
        host, attention = BY_NAME[case.model.removesuffix(OWN)], "triton" if case.model.endswith(OWN) else "auto"
        depth = "num_hidden_layers" if case.model.startswith("hf") else "depth"
        lifted = host.make(**{depth: len(PLANES)})
        model, patch = pcf.lift(lifted, attention=attention, **MODES[case.mode]), host.patch
    return model, lambda batch, depth, grid: (batch, 3, depth, *[n * patch for n in grid])


def compile_case(case, watch):
    """Compiles a case; what was seen."""
    torch._dynamo.reset()
    model, shape = build(case)
    dtype, training, dynamic = DTYPES[case.dtype], case.step == "training", case.sizes == "dynamic"
    sizes = (SIZES, OTHERS[case.step]) if dynamic else (SIZES,)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes:
        model._apply(lambda t: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="cuda"))
        saliency = training and case.model.endswith(OWN)
        volumes = [torch.empty(shape(*of), dtype=dtype, device="cuda", requires_grad=saliency) for of in sizes]
    for volume in volumes if dynamic else []:
        for axis in AXES[case.step]:
            torch._dynamo.mark_dynamic(volume, axis)

    def backend(graph, inputs):
        seen.graphs += 1
        compile_fx(graph, inputs)
        return graph_on_fakes(graph)

    def graph_on_fakes(graph):
        def run(*arguments):
            with fakes:
                return graph(*arguments)

        return run

    autocast = torch.autocast("cuda", torch.bfloat16) if case.dtype == "autocast" else nullcontext()
    graphs = torch._inductor.config.patch({"triton.cudagraphs": not dynamic})  # as mode="reduce-overhead" has it
    with watch.model() as seen, graphs:
        try:
            compiled = torch.compile(model.train(training), backend=backend, fullgraph=True)
            with torch.set_grad_enabled(training), autocast:
                for volume in volumes:
                    compiled(volume)
        except Exception as error:
            seen.fail(root(error))
    if not seen.ours:
        seen.fail("no kernel of ours is in the generated code")
    if seen.graphs > 1:
        seen.fail(f"compiled {seen.graphs} times: other sizes need another graph")
    return seen


def main(path, words):
    # one process, in which `Watch` sees all; nothing is measured or computed; backward is compiled with forward
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.shape_padding = False
    torch._inductor.config.joint_graph_constant_folding = False
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._logging.set_logs(inductor=50)  # errors are in the report
    watch = Watch()
    for case in all_cases():
        if all(word in case.name for word in words):
            begin = time.perf_counter()
            seen = compile_case(case, watch)
            with open(path, "a") as file:
                print(json.dumps(vars(case) | vars(seen)), file=file)
            print(f"{time.perf_counter() - begin:4.0f} s, {len(seen.failures)} failures: {case.name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
