"""``make bench-compare``: whether we became slower, judged against others in the same run, between two stored runs.

    python -m benchmarks.compare [OLD NEW] [--storage .benchmarks] [--limit 0.10]

OLD and NEW are JSON files as pytest-benchmark stores them; without them the last two of the storage. Within a run each
of our times is divided by that of every peer of its group, so that a slower machine changes nothing; a ratio that grew
by more than the limit is a failure. Benchmarks take part whose `extra_info` names a `contender` and says whether it is
`ours`. Exit status: 0, 1 if a ratio worsened, 2 if there was nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

STORAGE = Path(__file__).parents[1] / ".benchmarks"  # where pytest-benchmark stores what `make bench` measures
LIMIT = 0.10
Key = tuple[str, str, str]  # group, ours, peer


class Run(NamedTuple):
    """One stored run."""

    path: Path
    about: str  # when, where, of which commit
    machine: str
    ratios: dict[Key, float]  # our median over a peer's
    groups: frozenset[str]
    ignored: int  # benchmarks that name no contender


class Change(NamedTuple):
    """One ratio in both runs."""

    key: Key
    old: float
    new: float

    @property
    def growth(self) -> float:
        return self.new / self.old - 1


def read(path: Path) -> Run:
    """One stored run. Raises ValueError, naming the file, for what pytest-benchmark did not store, or stored twice."""
    try:
        stored = json.loads(path.read_text())
        found, groups, ignored = [], set(), 0
        for benchmark in stored["benchmarks"]:
            info = benchmark["extra_info"]
            if "contender" not in info or "ours" not in info:
                ignored += 1
                continue
            groups.add(benchmark["group"])
            found.append((benchmark["group"], info["contender"], info["ours"], float(benchmark["stats"]["median"])))
        node = stored["machine_info"]
        machine = node.get("gpu") or node.get("cpu", {}).get("brand_raw") or node.get("node") or "unknown machine"
        commit = stored["commit_info"].get("id") or "unknown"
        about = f"{stored['datetime'][:16]}, {machine}, commit {commit[:7]}"
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no run stored by pytest-benchmark: {type(error).__name__}: {error}") from None
    twice = [key for key, times in Counter([entry[:2] for entry in found]).items() if times > 1]
    if twice:
        raise ValueError(f"{path} has contender {twice[0][1]!r} twice in group {twice[0][0]!r}")
    bad = next((entry for entry in found if not 0 < entry[3] < float("inf")), None)
    if bad is not None:
        raise ValueError(f"{path} has a median of {bad[3]} for {bad[1]!r} in group {bad[0]!r}")
    return Run(path, about, machine, _ratios(found), frozenset(groups), ignored)


def _ratios(found: list[tuple[str, str, bool, float]]) -> dict[Key, float]:
    ours, peers = defaultdict(list), defaultdict(list)
    for group, contender, is_ours, median in found:
        (ours if is_ours else peers)[group].append((contender, median))
    return {
        (group, name, peer): time / theirs
        for group, of_group in ours.items()
        for name, time in of_group
        for peer, theirs in peers[group]
    }


def changes(old: Run, new: Run) -> list[Change]:
    """Ratios that both runs have, in the order of the new one."""
    return [Change(key, old.ratios[key], ratio) for key, ratio in new.ratios.items() if key in old.ratios]


def vanished(old: Run, new: Run) -> list[str]:
    """What only the old run has, in words: whole groups, then single ratios of groups that are still there."""
    gone = [f"group vanished: {group}" for group in sorted(old.groups - new.groups)]
    for group, ours, peer in old.ratios:
        if group in new.groups and (group, ours, peer) not in new.ratios:
            gone.append(f"ratio vanished: {group}: {ours} / {peer}")
    return gone


def last_two(storage: Path) -> tuple[Path, Path]:
    """The two runs of the storage that were made last. Raises ValueError where there are fewer."""
    found = sorted(storage.glob("**/[0-9]*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if len(found) < 2:
        raise ValueError(f"{storage} must hold two stored runs, got {len(found)}; `make bench` stores one")
    return found[-2], found[-1]


def show(rows: list[tuple[str, ...]], headings: tuple[str, ...]) -> None:
    """A table, by rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max([len(row[i]) for row in [headings, *rows]]) for i in range(len(headings))]
        for row in [headings, *rows]:
            print("  ".join([cell.ljust(width) for cell, width in zip(row, widths)]).rstrip())
        return
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160).print(table)


def compare(old: Run, new: Run, limit: float = LIMIT) -> int:
    """Prints both runs side by side. Returns the exit status."""
    print(f"old: {old.about} ({old.path})\nnew: {new.about} ({new.path})")
    if old.machine != new.machine:
        print("machines differ: ratios are of one machine each, but what is fast on one need not be on another")
    for run in (old, new):
        if run.ignored:
            print(f"{run.path}: {run.ignored} benchmarks name no contender and are not compared")
    both = changes(old, new)
    worse = [change for change in both if change.growth > limit]
    show(
        [
            (*change.key, f"{change.old:.3f}", f"{change.new:.3f}",
             f"{change.growth:+.1%}" + (" WORSE" if change in worse else ""))
            for change in both
        ],
        ("group", "ours", "peer", "old ratio", "new ratio", "change"),
    )  # fmt: skip
    for line in vanished(old, new):
        print(line)
    if not both:
        print("nothing to compare: the runs have no ratio in common", file=sys.stderr)
        return 2
    for change in worse:
        group, ours, peer = change.key
        print(
            f"WORSE by {change.growth:.1%}: {group}: time of {ours} / {peer}: {change.old:.3f} became {change.new:.3f}"
        )
    print(f"{len(both)} ratios compared, {len(worse)} worsened by more than {limit:.0%}")
    return 1 if worse else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="two stored runs, the old one first")
    parser.add_argument("--storage", type=Path, default=STORAGE)
    parser.add_argument("--limit", type=float, default=LIMIT)
    given = parser.parse_args(arguments)
    try:
        if len(given.runs) not in (0, 2):
            raise ValueError(f"runs must be two files or none, got {len(given.runs)}")
        old, new = given.runs or last_two(given.storage)
        return compare(read(old), read(new), given.limit)
    except ValueError as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
