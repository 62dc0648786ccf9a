"""The command line, ``planecycle-fast`` or ``python -m planecycle_fast``: collects the verbs, a file each."""

from __future__ import annotations

import logging
import os
import shlex
import sys

from ..optional import require
from ..version import __version__

INTERRUPTED = 130  # as shells have it
NOISY = ("torchao", "torch.utils._pytree")  # transformers imports torchao where it is, which logs what it cannot load


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Bad input is one line on stderr and status 1."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    words = shlex.join(["planecycle-fast", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        result = _collected()(args=arguments, standalone_mode=False, prog_name="planecycle-fast", obj=words)
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


def _collected():
    """The command of all verbs. What these need is imported when they run, as far as the package has not done so."""
    typer = require("typer", "scans")
    from . import bench, build, demo, export, features, info, plan, series, verify

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="PlaneCycle: pretrained 2D networks on 3D volumes, without training.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"planecycle-fast {__version__}")
            raise typer.Exit()

    @app.callback()
    def top(
        version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print and exit."),
    ) -> None:
        pass

    for run in (demo.run_demo, features.run_features, series.run_series, bench.run_bench, verify.run_verify,
                plan.run_plan, export.run_export, build.run_build, info.run_info):  # fmt: skip
        app.command(run.__name__.removeprefix("run_"))(run)
    return typer.main.get_command(app)


def entry() -> None:
    """The console script."""
    sys.exit(main())
