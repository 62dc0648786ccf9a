"""The command line, ``planecycle-fast`` or ``python -m planecycle_fast``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Optional

from ..optional import require

INTERRUPTED = 130  # as shells have it
NOISY = ("torchao", "torch.utils._pytree")  # transformers imports torchao where it is, which logs what it cannot load


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Bad input is one line on stderr and status 1."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app = _build(arguments)
        result = app(args=arguments, standalone_mode=False, prog_name="planecycle-fast")
        if result == INTERRUPTED:  # typer makes it the result
            return _fail("interrupted", INTERRUPTED)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:  # what reads our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError) as error:
        return _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of the command line itself
            raise
        message, status = error.format_message(), getattr(error, "exit_code", 1)
        return _fail(message, status) if message else status  # no message: help was printed instead


def _fail(message: str, status: int = 1) -> int:
    print(f"planecycle-fast: {' '.join(message.split())}", file=sys.stderr)
    return status


def _build(arguments: list[str] | None):
    typer = require("typer", "scans")
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="PlaneCycle: pretrained 2D networks on 3D volumes, without training.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            from .. import __version__

            print(f"planecycle-fast {__version__}")
            raise typer.Exit()

    @app.callback()
    def top(
        version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print and exit."),
    ) -> None:
        pass

    from ..weights.load import DEMO_MODEL

    fill_nan_option = typer.Option(None, help="Takes the place of NaN voxels, which else are refused.")
    index_option = typer.Option(None, help="Which volume of a file of several, from 0.")
    series_option = typer.Option(
        None, help="Of DICOM folders with several: number, UID, its end, or description, as `series` lists them."
    )
    mode_option = typer.Option(
        None,
        help="planecycle, slice2d or flatten3d. Default, of this and the next four: what the model's folder records "
        "(LiftedModel.save_pretrained), else planecycle.",
    )
    cycle_option = typer.Option(None, help="Planes that layers take in turn. Default: HW,DW,DH,HW.")
    pool_option = typer.Option(None, help="How globals pass between planes: PCg or PCm. Default: PCg.")
    globals_option = typer.Option(None, help="Where they rest between layers: depth or plane. Default: depth.")
    depth_option = typer.Option(
        None, help="A place along D for models without one: none, sincos or rope1d. Default: none."
    )

    def planes_of(cycle_order: str | None) -> tuple[str, ...] | None:
        from ..geometry.planes import parse_cycle

        return None if cycle_order is None else tuple(plane.name for plane in parse_cycle(cycle_order))

    @app.command()
    def demo(
        model: str = typer.Option(
            DEMO_MODEL,
            help="A timm or Hugging Face name, or a folder: docs/models.md. Random weights without a hub.",
        ),
        volume: Optional[Path] = typer.Option(None, help="A scan, as for features. Default: MNI152."),
        out: Path = typer.Option(Path("demo.png"), help="The picture."),
        size: int = typer.Option(448, help="Pixels of the longest side of a slice."),
        fill_nan: Optional[float] = fill_nan_option,
        index: Optional[int] = index_option,
        array: Optional[str] = typer.Option(None, help="Which array of an .npz."),
        series: Optional[str] = series_option,
    ) -> None:
        """Features of a volume, slice by slice and by PlaneCycle: a table and a picture."""
        from ..scans.options import ScanOptions
        from .demo import run_demo

        run_demo(model, volume, out, size, ScanOptions(fill_nan=fill_nan, index=index, array=array, series=series))

    @app.command()
    def features(
        scans: list[Path] = typer.Argument(help="NIfTI, NRRD, MetaImage, MGH, Analyze, .npy, .npz, DICOM folders."),
        out: Path = typer.Option(..., help="A folder, or for one scan a file, .safetensors or .npz."),
        model: str = typer.Option(DEMO_MODEL, help="A timm or Hugging Face name, or a folder: docs/models.md."),
        mode: Optional[str] = mode_option,
        cycle_order: Optional[str] = cycle_option,
        pool_method: Optional[str] = pool_option,
        globals_at: Optional[str] = globals_option,
        depth_position: Optional[str] = depth_option,
        layers: Optional[str] = typer.Option(
            None, help="Indices of layers, 2,5,8,11 or -1 for the last, whose features get names of their own."
        ),
        pool: bool = typer.Option(False, "--pool", help="Only one vector per scan (and layer)."),
        window: str = typer.Option("0.5%,99.5%", help="Black and white: intensities (-160,240) or percentiles."),
        axes: Optional[str] = typer.Option(
            None, help="Where D, H, W of the features point: one letter each of R/L, A/P, S/I. Default: SPR."
        ),
        fill_nan: Optional[float] = fill_nan_option,
        index: Optional[int] = index_option,
        array: Optional[str] = typer.Option(None, help="Which array of an .npz; all volumes, where it holds several."),
        series: Optional[str] = series_option,
        spacing: Optional[str] = typer.Option(
            None,
            help="Resample to these mm along D, H, W, or to one for all, and to right angles and even slices. "
            "Default: the scan's own.",
        ),
        allow_shear: bool = typer.Option(
            False, "--allow-shear", help="Keep axes that are not at right angles, as of a tilted gantry, as they are."
        ),
        fit: str = typer.Option("pad", help="Make slices a multiple of the patch: pad or resize."),
        tile: Optional[str] = typer.Option(
            None, help="The model sees windows of slices x pixels x pixels, 32x224x224, a quarter of each overlapping."
        ),
        picture: bool = typer.Option(False, "--picture", help="Also draw the features, as a .png beside each file."),
        format: str = typer.Option("safetensors", help="Of the files in a folder: safetensors or npz."),
        device: str = typer.Option("auto", help="cpu, cuda, cuda:1, mps; auto takes CUDA where there is one."),
        dtype: str = typer.Option("fp32", help="What the model computes in: fp32, bf16, fp16, fp64."),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace files that hold something else."),
        random_weights: bool = typer.Option(
            False, "--random-weights", help="Run a model whose weights cannot be found, with random ones."
        ),
    ) -> int:
        """Features of scans, with the affine that places them. Run it again to finish what was interrupted."""
        from ..scans.options import ScanOptions
        from ..scans.preprocess import parse_spacing, parse_window
        from ..scans.sliding import parse_tile
        from .features import Settings, run_features
        from .features import plan as plan_files

        settings = Settings(
            model=model,
            mode=mode,
            cycle_order=planes_of(cycle_order),
            pool_method=pool_method,
            globals_at=globals_at,
            depth_position=depth_position,
            layers=None if layers is None else _indices(layers),
            pool=pool,
            window=parse_window(window),
            reading=ScanOptions(
                axes=axes,
                fill_nan=fill_nan,
                index=index,
                array=array,
                series=series,
                allow_shear=allow_shear,
                regrid=spacing is not None,
            ),
            spacing=None if spacing is None else parse_spacing(spacing),
            fit=fit,
            dtype=dtype,
            tile=None if tile is None else parse_tile(tile),
        )
        jobs = plan_files(scans, out, format, series)
        complaints = run_features(jobs, settings, device, picture, overwrite, random_weights)
        for complaint in complaints:
            _fail(complaint)
        return 1 if complaints else 0

    @app.command()
    def series(folder: Path = typer.Argument(help="With DICOM files in it, or in its folders.")) -> None:
        """The image series in a folder, to pick one by `features --series`: a line each."""
        from ..scans.checks import one_line
        from ..scans.formats.dicom_series import list_series

        for each in list_series(folder):
            print(one_line(f"{each}, UID {each.uid}"))

    @app.command()
    def bench(
        full: bool = typer.Option(False, "--full/--quick", help="Every combination, or a few: minutes on a laptop."),
        device: str = typer.Option("auto", help="cpu, cuda, cuda:1, mps; auto takes CUDA where there is one."),
        models: Optional[str] = typer.Option(None, help="ViT-S, ViT-B, ViT-L, ViT-7B, and peers: docs/benchmarks.md."),
        volumes: Optional[str] = typer.Option(None, help="Batch x slices x pixels: 1x32x256,4x64x64."),
        dtype: Optional[str] = typer.Option(None, help="fp32, bf16, fp16. Default: bf16 on CUDA, fp32 elsewhere."),
        steps: Optional[str] = typer.Option(None, help="inference, probe, finetune. Default: all."),
        out: Path = typer.Option(Path("bench"), help="A folder: rows.jsonl, report.md and pictures."),
    ) -> int:
        """2D, 3D and PlaneCycle side by side on this machine: a table and plots. Run it again to finish one."""
        from .bench import run_bench

        words = shlex.join(["planecycle-fast", *(sys.argv[1:] if arguments is None else arguments)])
        return run_bench(full, device, models, volumes, dtype, steps, out, words)

    @app.command()
    def verify(
        model: str = typer.Argument(
            help="A timm or Hugging Face name, or a folder; without a hub a name's weights are random."
        ),
        volume: str = typer.Option("1x8x64", help="Batch x slices x pixels: 1x32x256, or 1x32x256x192."),
        dtype: str = typer.Option("fp32", help="fp32, bf16, fp16."),
        device: str = typer.Option("auto", help="cpu, cuda, cuda:1; auto takes CUDA where there is one."),
        backend: str = typer.Option("auto", help="auto, triton, cpu."),
        mode: Optional[str] = mode_option,
        cycle_order: Optional[str] = cycle_option,
        pool_method: Optional[str] = pool_option,
        globals_at: Optional[str] = globals_option,
        depth_position: Optional[str] = depth_option,
    ) -> int:
        """The fast path against the reference on this machine: outputs and gradients, block by block."""
        from .verify import run_verify

        return run_verify(
            model,
            volume,
            dtype,
            device,
            backend,
            mode=mode,
            cycle_order=planes_of(cycle_order),
            pool_method=pool_method,
            globals_at=globals_at,
            depth_position=depth_position,
        )

    @app.command()
    def plan(
        model: str = typer.Argument(help="A timm or Hugging Face name, or a folder; weights are not needed."),
        volume: str = typer.Option(..., help="Batch x slices x pixels: 1x32x256, or 1x32x256x192."),
        gpu: Optional[str] = typer.Option(None, help="h100, h200, a100, ...; it need not be there. Default: this CPU."),
        dtype: Optional[str] = typer.Option(None, help="fp32, bf16, fp16. Default: bf16 on GPUs, fp32 on the CPU."),
        step: str = typer.Option("inference", help="inference, probe (a linear head is trained) or finetune."),
        modes: Optional[str] = typer.Option(None, help="slice2d,PCg,PCm,flatten3d. Default: all."),
        graph: bool = typer.Option(False, "--graph", help="Replayed as a CUDA graph: the GPU waits for no host."),
        launch_us: Optional[float] = typer.Option(None, help="Of the GPU's host: microseconds per launch."),
        block_us: Optional[float] = typer.Option(None, help="And per block: docs/command-line.md."),
    ) -> int:
        """What a volume will cost before anything runs: FLOPs, traffic, time, memory, and the largest that fits."""
        from .plan import run_plan

        return run_plan(model, volume, gpu, dtype, step, modes, graph, launch_us, block_us)

    @app.command()
    def export(
        model: str = typer.Argument(help="A timm or Hugging Face name, or a folder: docs/models.md."),
        to: str = typer.Option(..., help="onnx, export (torch.export), aoti (AOTInductor) or jit (torch.jit.trace)."),
        volume: str = typer.Option(..., help="Batch x slices x pixels: 1x32x256, or 1x32x256x192."),
        out: Optional[Path] = typer.Option(
            None, help=".onnx, .pt2 for export and aoti, .pt for jit. Default: the model's name."
        ),
        dynamic: Optional[str] = typer.Option(
            None, help="Sizes that may be others: none, all, or names of B,D,H,W. Default: D; none for jit."
        ),
        mode: Optional[str] = mode_option,
        cycle_order: Optional[str] = cycle_option,
        pool_method: Optional[str] = pool_option,
        globals_at: Optional[str] = globals_option,
        depth_position: Optional[str] = depth_option,
        dtype: str = typer.Option("fp32", help="What the model computes in: fp32, bf16, fp16, fp64."),
        device: str = typer.Option("cpu", help="What it is exported for, and checked on: cpu, cuda, cuda:1."),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace files that are there."),
        random_weights: bool = typer.Option(
            False, "--random-weights", help="Export a model whose weights cannot be found, with random ones."
        ),
    ) -> None:
        """A lifted model in a file that runs without this package, checked against it: docs/export.md."""
        from ..export.exporting import run_export

        run_export(
            model,
            to,
            volume,
            out,
            dynamic,
            dtype,
            device,
            overwrite,
            random_weights,
            mode=mode,
            cycle_order=planes_of(cycle_order),
            pool_method=pool_method,
            globals_at=globals_at,
            depth_position=depth_position,
        )

    @app.command()
    def build() -> None:
        """Builds the operations of backend "cpu" now; otherwise that happens when they are first used."""
        from ..runtime.native import build as build_library

        print(build_library())

    @app.command()
    def info() -> None:
        """Versions, devices, what runs here and what does not and why, and where caches are."""
        from .info import run_info

        run_info()

    return typer.main.get_command(app)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"layers must be indices such as 2,5,8,11, got {text!r}") from None


def entry() -> None:
    """The console script."""
    sys.exit(main())
