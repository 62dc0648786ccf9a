"""`make compile-check` as far as a CPU build of torch goes: its refusal, what it listens to, its page and status."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")

from .compilecheck import __main__ as command
from .compilecheck import no_gpu
from .compilecheck.cases import MODES, all_cases
from .compilecheck.watch import Watch, root
from .specs import OUTPUTS

NAMES = [case.name for case in all_cases()]
ROW = {"graphs": 1, "ours": dict.fromkeys(OUTPUTS, 2), "inductors": 3, "copies": 0, "failures": []}


def rows(*failures):
    """Results of all cases, the last one with failures."""
    results = [vars(case) | ROW for case in all_cases()]
    results[-1] = results[-1] | {"failures": list(failures)}
    return results


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULT", tmp_path / "compile-check.md")
    return command.RESULT


def test_cases_are_different_and_cover_everything():
    assert len(set(NAMES)) == len(NAMES)
    assert {case.mode for case in all_cases()} == set(MODES)
    for training in ("inference", "training"):
        assert {case.sizes for case in all_cases() if case.step == training} == {"static", "dynamic"}
        assert {case.dtype for case in all_cases() if case.step == training} == {"bf16", "fp32", "autocast"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_a_cpu_build_of_torch_is_refused_in_one_line(page, capsys):
    assert command.main() == 2
    assert capsys.readouterr().err == (
        f"compile-check: torch {torch.__version__} is no CUDA build; `make compile-check` installs one of its own\n"
    )
    assert not page.exists()


def test_all_that_passes_is_status_0(page, capsys):
    assert command.write(command.about(), rows(), NAMES) == 0
    text = page.read_text()
    assert f"**Passed**: no failure in any of {len(NAMES)} cases." in text and "## Failures" not in text
    assert "| timm-dinov3-s | PCg | inference | static | bf16 | 1 | 2 add_norm, 2 add_norm_backward, " in text
    assert f", {2 * len(NAMES)} swiglu_backward." in text and f"torch {torch.__version__}" in text
    assert "0 different failures" in capsys.readouterr().out


def test_a_failure_is_status_1_and_is_shown(page, capsys):
    assert command.write(command.about(), rows("rope_kernel: something", "another"), NAMES) == 1
    text = page.read_text()
    assert f"**FAILED**: 2 different failures, in 1 of {len(NAMES)} cases." in text
    assert f"- `rope_kernel: something` in 1: {NAMES[-1]}" in text and "| 2 |" in text
    assert "FAILED in 1 cases: rope_kernel: something" in capsys.readouterr().out


def test_a_case_without_a_result_is_a_failure(page):
    assert command.write(command.about(), rows()[:-1], NAMES) == 1
    assert f"the process ended before` in 1: {NAMES[-1]}" in page.read_text()
    assert command.write(command.about(), [], NAMES) == 1


def test_a_kernel_that_no_case_brings_is_a_failure(page):
    results = [row | {"ours": {name: 1 for name in OUTPUTS if name != "rope_kernel"}} for row in rows()]
    assert command.write(command.about(), results, NAMES) == 1
    assert f"- `rope_kernel is in no generated code` in all {len(NAMES)}\n" in page.read_text()


def test_a_compiler_that_fails_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(no_gpu, "headers", lambda: [])
    monkeypatch.setenv("CC", "false")
    with pytest.raises(no_gpu.Unavailable, match=r"false failed on no_gpu\.c: \?"):
        no_gpu.environment(tmp_path)


SWIGLU = SimpleNamespace(fn=SimpleNamespace(__name__="swiglu_kernel"), params=[], arg_names=[])
TENSORS = {"gate": torch.ones(2), "value": None, "out": torch.ones(2), "rows": 1}


def analysed(found, kernel=SWIGLU, tensors=TENSORS):
    watch = Watch()
    watch._analysis(lambda *_: found)(kernel, tensors, {})
    return watch.seen.failures


def accesses(*names):  # as torch reports them since 2.13
    return SimpleNamespace(read_writes=SimpleNamespace(writes=[SimpleNamespace(name=name) for name in names]))


def test_exactly_the_outputs_are_written_to():
    assert analysed(["out"]) == analysed(accesses("out", "rows")) == []
    assert analysed(["gate", "out"]) == ["swiglu_kernel: gate, out found to be written to, not out"]
    assert analysed(accesses()) == ["swiglu_kernel: nothing found to be written to, not out"]
    assert analysed([], tensors=TENSORS | {"out": torch.ones(0)}) == []  # nothing could be written there
    other = SimpleNamespace(fn=SimpleNamespace(__name__="new_kernel"), params=[], arg_names=[])
    assert analysed(["out"], other) == ["new_kernel has its outputs in no Spec of tests/specs"]


def test_every_kernel_is_known():
    from planecycle_fast import ops

    from .ops.test_every_operation import modules_of

    kernels = {}
    for module in modules_of(ops):
        kernels |= {
            n: k for n, k in vars(module).items() if isinstance(k, triton.JITFunction) and n.endswith("_kernel")
        }
    assert set(OUTPUTS) == set(kernels)
    assert all([OUTPUTS[name] <= set(kernel.arg_names) for name, kernel in kernels.items()])


def test_a_kernel_that_does_not_compile_fails_once_per_model():
    watch, calls = Watch(), []

    def original(pool, name, source):
        calls.append(name)
        raise RuntimeError("first") from ValueError("the cause\nmore")

    compile_kernel = watch._compilation(original)
    for name in ("rope_kernel_0", "rope_kernel_0", "triton_poi_fused_add_0"):
        compile_kernel(None, name, "source")
    assert calls == ["rope_kernel_0"]  # once; Inductor's own never
    assert watch.seen.ours == {"rope_kernel": 2} and watch.seen.inductors == 1
    assert watch.seen.failures == ["rope_kernel: ValueError: the cause"]


WIDE = "%2 = tt.addptr %0, %1 : !tt.ptr<f32>, i64\n"
NARROW = "%2 = tt.addptr %0, %1 : tensor<4x!tt.ptr<f32>>, tensor<4xi32>\n"
LATE = "%2 = arith.muli %0, %1 : i32\n%3 = arith.extsi %2 : i32 to i64\n"


@pytest.mark.parametrize(
    "ttir, says", [(WIDE, None), (NARROW, "1 added"), (LATE, "1 products"), (None, "compiled nothing")]
)
def test_offsets_in_32_bits_are_a_failure(tmp_path, ttir, says):
    watch = Watch()

    def original(pool, name, source):
        if ttir is not None:
            (tmp_path / "k.ttir").write_text(ttir)
            watch._listen(metadata_group={"k.ttir": tmp_path / "k.ttir", "k.json": ""}, cache_hit=False)

    watch._compilation(original)(None, "rope_kernel_0", "source")
    assert [says in text for text in watch.seen.failures] == ([] if says is None else [True])


def test_copies_in_generated_code_are_counted():
    watch = Watch()
    watch._code(
        "        triton_poi_fused_clone_3.run(buf0, buf1, 20, stream=stream0)\n"
        "        rope_kernel_0.run(buf0, stream=stream0)\n"
        "        buf2 = torch.ops.aten.clone.default(buf1)\n"
    )
    assert watch.seen.copies == 2


def test_what_cannot_be_one_cuda_graph_is_a_failure():
    fits, not_ = SimpleNamespace(skip_cudagraph=False), SimpleNamespace(skip_cudagraph=True)
    watch = Watch()
    assert watch._parts(lambda scheduler: ([1], [fits]))(None) == ([1], [fits]) and watch.seen.failures == []
    watch.found_parts([fits, not_, fits])
    assert watch.seen.failures == ["1 of 3 parts cannot be a CUDA graph, as all should be in one"]


def test_the_root_of_an_error_is_one_line():
    try:
        try:
            raise KeyError("a")
        except KeyError as error:
            raise ValueError("b") from error
    except ValueError as error:
        assert root(error) == "KeyError: 'a'"
    text = 'no\n  Explanation: why\n File "/x/planecycle_fast/a.py", line 3\n File "/y/torch.py", line 4'
    assert root(TypeError(text)) == "TypeError at planecycle_fast/a.py:3: no. Explanation: why"
