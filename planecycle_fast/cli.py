"""The command line, ``planecycle-fast`` or ``python -m planecycle_fast``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

from .optional import require


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Bad input is one line on stderr and status 1."""
    try:
        app = _build()
        result = app(args=arguments, standalone_mode=False, prog_name="planecycle-fast")
        return result if isinstance(result, int) else 0
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of the command line itself
            raise
        message, status = error.format_message(), getattr(error, "exit_code", 1)
        return _fail(message, status) if message else status  # no message: help was printed instead


def _fail(message: str, status: int = 1) -> int:
    print(f"planecycle-fast: {' '.join(message.split())}", file=sys.stderr)
    return status


def _build():
    typer = require("typer", "demo")
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="PlaneCycle: pretrained 2D networks on 3D volumes, without training.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            from . import __version__

            print(f"planecycle-fast {__version__}")
            raise typer.Exit()

    @app.callback()
    def top(
        version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print and exit."),
    ) -> None:
        pass

    from .models import DEMO_MODEL

    @app.command()
    def demo(
        model: str = typer.Option(
            DEMO_MODEL,
            help="A timm or Hugging Face name, or a folder of save_pretrained. Random weights without a hub.",
        ),
        volume: Optional[Path] = typer.Option(None, help="A scan, .nii, .nii.gz or .npy (D, H, W). Default: MNI152."),
        out: Path = typer.Option(Path("demo.png"), help="The picture."),
        size: int = typer.Option(448, help="Pixels of the longest side of a slice."),
    ) -> None:
        """Features of a volume, slice by slice and by PlaneCycle: a table and a picture."""
        from .demo import run_demo
        from .torchvision_fix import mend_torchvision

        mend_torchvision()
        run_demo(model, volume, out, size)

    return typer.main.get_command(app)


def entry() -> None:
    """The console script."""
    sys.exit(main())
