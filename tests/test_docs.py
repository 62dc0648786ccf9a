"""README, docs and what is beside them: links lead somewhere, what is named is there, and Python runs as it stands."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch

import planecycle_fast as pcf
from planecycle_fast.commands.cli import main

from . import standins
from .host_models import BY_NAME
from .pages import PAGES, ROOT, python, read
from .saved_models import cached, saved, with_statistics
from .scan_writers import write_nifti

TEXTS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "benchmarks/results/PENDING.md"]
FOLDERS = ("planecycle_fast", "tests", "benchmarks", "csrc", "examples", "docs")  # whose paths texts name


def prose(page):
    """A page without its fenced blocks, of which links and headings are none."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])  # which tells of names of then
def test_paths_and_modules_that_texts_name_are_there(page):
    text = read(page)
    for path in re.findall(rf"(?:^|[\s`(])((?:{'|'.join(FOLDERS)})/[\w/.-]*\w/?)(?=[`\s),;:#]|\.?(?:\s|$))", text):
        assert (ROOT / path).exists(), f"{page}: {path}"
    for name in re.findall(r"\bplanecycle_fast(?:\.\w+)+", text):
        assert is_there(name), f"{page}: {name}"


def is_there(name):
    """A module by the name that its file has now, not by an old one, or what is in a module."""
    place, rest = ROOT, name.split(".")
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").exists()):
        place = place / rest.pop(0)
    found = importlib.import_module(".".join(place.relative_to(ROOT).parts)) if rest else None
    for part in rest:
        found = getattr(found, part, None)
    return not rest or (found is not None and not isinstance(found, ModuleType))


def test_what_is_not_there_is_noticed():
    assert is_there("planecycle_fast.geometry.planes.HW") and is_there("planecycle_fast.ops")
    for name in ("planecycle_fast.geometry.plane", "planecycle_fast.geometry.planes.HX", "planecycle_fast.planes"):
        assert not is_there(name)


def test_tests_that_the_makefile_names_are_there():
    words = set(re.findall(r"\btest_\w+", read("Makefile")))
    assert words and words <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


def test_the_readme_is_short():
    assert read("README.md").count("\n") <= 150


def test_every_page_has_its_place():
    """In the site's navigation and on the first page of docs, once each."""
    nav = re.findall(r"^ *- .*?(\S+\.md)$", read("mkdocs.yml"), re.M)
    assert sorted(nav) == sorted([*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md"])
    first = re.findall(r"\]\(([\w-]+\.md)\)", read("docs/index.md"))
    assert sorted({*first, "index.md"}) == sorted(page.removeprefix("docs/") for page in PAGES[1:])


def test_the_site_builds_and_its_links_are_right(tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs, of the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "docs/method/index.html", "benchmarks/results/demo.png", "examples/own_adapter.py"):
        assert (tmp_path / "site" / page).exists()


# ----- Python of the pages. Blocks of a page run one after another in one namespace, beside what `GIVEN` makes.

SKIPPED = {  # by what a block holds: why it does not run here
    "pcf.cuda_graph": "needs a GPU: tests/gpu/test_gpu_graphs.py",
    "fully_shard(block)": "needs a process group: tests/integrations/test_sharding.py",
    "onnxruntime.InferenceSession": "tests/export/test_export_command.py runs it, without this package",
    'torch.export.load("program.pt2"': "tests/export/test_export_command.py runs it, without this package",
    "aoti_load_package": "tests/export/test_export_command.py runs it, without this package",
    'torch.jit.load("traced.pt"': "tests/export/test_export_command.py runs it, without this package",
}
FULL = {"docs/pipelines.md", "docs/export.md"}  # exporting takes its time
VOLUME = torch.randn(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0))


def readme():
    write_nifti("scan.nii.gz", 100 * np.random.default_rng(0).random((24, 20, 6), np.float32), np.diag([3, 3, 4, 1.0]))
    return {"volume": VOLUME}


def hugging_face(layers=2):
    model = BY_NAME["hf-dinov3"].make(num_hidden_layers=layers)
    return {"model": model, "volume": VOLUME, "another_volume": VOLUME + 1}


def lifted(layers=2):
    given = hugging_face(layers)
    return given | {"pcf": pcf, "torch": torch, "lifted": pcf.lift(given["model"])}


def attention():
    return lifted(12) | {"volume": torch.randn(1, 3, 15, 272, 144)}


def authors():
    model, other = standins.DinoVisionTransformer("PlaneCycle"), standins.DinoVisionTransformer(patch_size=4)
    theirs = standins.Converter()(standins.DinoVisionTransformer("PlaneCycle")).state_dict()
    torch.save({"net": {f"backbone.{key}": value for key, value in theirs.items()}}, "fine_tuned.pth")
    return {"model": model, "lifted": pcf.lift(other)}


def command_line():
    """A file of features that the command wrote."""
    affine = np.diag([3.0, 3.0, 20.0, 1.0])
    affine[:3, 3] = -50
    write_nifti("scan.nii", np.random.default_rng(0).random((40, 50, 6), np.float32), affine)
    folder = Path("model").absolute()
    assert main(["features", "scan.nii", "--model", with_statistics(folder, 2), "--out", "scan.safetensors"]) == 0
    return {}


def for_explanations():
    pytest.importorskip("monai", reason="needs monai, of the extra monai")
    pytest.importorskip("captum", reason="needs captum, of the extra integrations")

    class Classifier(torch.nn.Module):
        def __init__(self, lifted):
            super().__init__()
            self.lifted, self.head = lifted, torch.nn.Linear(64, 4)

        def forward(self, volume):
            return self.head(self.lifted(volume).pooled())

    return lifted(9) | {"Classifier": Classifier}


def of_a_folder():
    saved(Path("my_models/dinov3_finetuned").absolute())
    return {}


def in_pipelines():
    pytest.importorskip("monai", reason="needs monai, of the extra monai")
    scan = 100 * np.random.default_rng(0).random((40, 50, 6), np.float32)
    files = [write_nifti(f"{name}.nii.gz", scan, np.diag([3, 3, 4, 1.0])) for name in ("ct", "mr")]
    pair = torch.cat([VOLUME, VOLUME])
    given = lifted() | {"volumes": pair, "volume": pair}  # export wants at least two of what is dynamic
    return given | {"items": [{"image": str(file)} for file in files], "mask": np.ones((9, 40, 50), np.uint8)}


GIVEN = {
    "README.md": readme,
    "docs/attention.md": attention,
    "docs/authors.md": authors,
    "docs/backends.md": lifted,
    "docs/command-line.md": command_line,
    "docs/export.md": lifted,
    "docs/features.md": for_explanations,
    "docs/graphs.md": lifted,
    "docs/lifting.md": hugging_face,
    "docs/models.md": of_a_folder,
    "docs/pipelines.md": in_pipelines,
    "docs/training.md": lambda: hugging_face() | {"labels": torch.tensor([1])},
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder to work in, where published names give small models with random weights."""
    monkeypatch.chdir(tmp_path)
    create, compiled = timm.create_model, torch.compile
    sizes = dict(depth=2, embed_dim=96, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: create(name, **(sizes | more)))
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled(model, backend="eager"))  # Inductor takes minutes
    for name, host in (("facebook/dinov3-vits16-pretrain-lvd1689m", "dinov3"), ("facebook/dinov2-base", "dinov2")):
        saved(tmp_path / host, host)
        cached(tmp_path / "cache", name, tmp_path / host)
    for place in ("constants", "file_download.constants"):
        monkeypatch.setattr(f"huggingface_hub.{place}.HF_HUB_CACHE", str(tmp_path / "cache"))


PYTHON = [page for page in PAGES if python(page)]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.full) if page in FULL else page for page in PYTHON]
)
def test_python_runs_as_it_stands(page, small):
    names = GIVEN[page]()
    for block in python(page):
        if not any(word in block.code for word in SKIPPED):
            code = "\n" * (block.line - 1) + block.code  # so that tracebacks show the page's own lines
            exec(compile(code, str(ROOT / page), "exec"), names)


def test_what_is_skipped_is_there():
    code = "".join([block.code for page in PYTHON for block in python(page)])
    assert all(word in code for word in SKIPPED) and set(GIVEN) == set(PYTHON)


def test_the_lines_that_an_example_adds_are_those_of_the_code():
    [example] = re.findall(r"^```diff\n(.*?)^```$", read("docs/extending.md"), re.M | re.S)
    assert len(example.splitlines()) < 60
    for part in example.strip().split("\n\n"):
        path, *lines = part.splitlines()
        added = [line[1:] for line in lines if line.startswith("+")]
        assert added and set(added) <= set(read(path.split(",")[0]).splitlines()), path
