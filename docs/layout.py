"""The site has the repository's layout, so that links between README, docs and results are the same in both.

A hook of mkdocs: in place of the files of docs/ alone it publishes those of the repository that pages link to.
"""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PUBLISHED = ("*.md", "CITATION.cff", "LICENSE", "csrc/README.md", "docs/*.md", "docs/*.png", "examples/*.py",
             "benchmarks/results/**/*.*")  # fmt: skip


def on_files(files, config):
    paths = sorted({path for pattern in PUBLISHED for path in ROOT.glob(pattern)})
    theme = [file for file in files if file.src_dir != config.docs_dir]
    own = [File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in paths]
    return Files([*theme, *own])
