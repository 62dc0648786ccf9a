"""Benchmarks import timm, which needs a torchvision that imports; and say at the end what operations reach."""

import torch

import planecycle_fast  # noqa: F401  before what imports torchvision


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a stored run has to say of where it ran, besides pytest-benchmark's own."""
    machine_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine_info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def pytest_terminal_summary(terminalreporter):
    """Rates and shares of ceilings, which pytest-benchmark's own table has no columns for."""
    from . import op_benchmark, op_report
    from .compare import show

    if op_benchmark.MEASURED:
        terminalreporter.section("operations, all in turns in one run")
        show(op_report.once(op_report.rows(op_benchmark.MEASURED.items())), op_report.HEADINGS)
        print(op_report.ceilings(op_benchmark.MEASURED.items()), end="")
