"""All metadata is in pyproject.toml. Here: which packages there are, and how csrc is compiled where torch is there.

``pip install .`` builds in an environment of its own, without torch: a pure-Python package, whose extension is built on
first use. ``pip install --no-build-isolation .`` sees torch and compiles, unless PLANECYCLE_FAST_BUILD is "never"; a
failure is a warning, or with "require" an error.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SETTING = os.environ.get("PLANECYCLE_FAST_BUILD") or "auto"


def compiling():
    """planecycle_fast/runtime/compiling.py by itself: importing the package would import all of it."""
    spec = importlib.util.spec_from_file_location("compiling", ROOT / "planecycle_fast" / "runtime" / "compiling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiles():
    return SETTING != "never" and importlib.util.find_spec("torch") is not None


class Build(build_ext):
    """One library per CPU capability, beside the modules; `planecycle_fast.runtime.native` loads what fits."""

    def run(self):
        if self.editable_mode:  # sources change under it: built on first use, by a key of theirs
            return
        tools = compiling()
        package = ROOT if self.inplace else Path(self.build_lib)
        folder = package / "planecycle_fast"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("planecycle_fast_cpu-*"):
            old.unlink()
        for variant in tools.variants():
            try:
                tools.compile_library(ROOT / "csrc", folder / tools.library_name(variant), variant)
            except tools.BuildError as error:
                if SETTING == "require":
                    raise
                self.warn(f"csrc was not compiled for {variant}: {error}")
                return

    def get_outputs(self):  # each with the record of its size and digest
        return [str(path) for path in (Path(self.build_lib) / "planecycle_fast").glob("planecycle_fast_cpu-*")]

    get_output_mapping = dict  # of editable installs: nothing is linked, files are where they are used


class Wheel(bdist_wheel):
    """Libraries hold no Python: one wheel serves all versions of Python 3, on one platform."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if compiles() else (python, abi, platform)


class WithLibraries(Distribution):
    def has_ext_modules(self):
        return compiles()


PACKAGES = [*find_packages(ROOT, include=["planecycle_fast*"]), "planecycle_fast.csrc"]
setup(packages=PACKAGES, distclass=WithLibraries, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
