"""What a stranger sees: the report's tables, wins and losses alike, and pictures whose every axis says what it is."""

import json

import pytest

pytest.importorskip("matplotlib")

from planecycle_fast.bench import plots
from planecycle_fast.bench.cells import AUTHORS, FAST, MODES, PEER, REFERENCE
from planecycle_fast.bench.report import report_of

from .small_bench import HERE, STAMP, cell, row, small  # noqa: F401

CUBES = {"1x4x64": 4, "1x6x96": 6, "1x8x128": 8}


def sweep_rows():
    """Times n^3, attention n^5 but n^6 of flatten3d; the authors' code is faster at one volume."""
    rows = []
    for volume, n in CUBES.items():
        for mode in MODES:
            attention = 10**6 * n ** (6 if mode == "flatten3d" else 5)
            costs = {"flops": 10**9 * n**3 + attention, "attention_flops": attention}
            seconds = 1e-3 * n**3 * (2 if mode == "flatten3d" else 1)
            rows.append(row(cell(mode, FAST, volume), seconds, volume, **costs))
        for code, slower in ((REFERENCE, 2), (AUTHORS, 0.5 if n == 6 else 1.5)):
            found = row(cell("PCg", code, volume), 1e-3 * n**3 * slower, volume, flops=10**9, attention_flops=10**6)
            if code == AUTHORS:
                del found["planned_bytes"]
            rows.append(found)
    rows.append(row(cell("", PEER, "1x6x96", model="ViViT-B"), 0.432, "peers"))
    return rows


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    shares = [{"group": "rope: ViT-S", "contender": name, "share": share, "missing": None, "refused": None}
              for name, share in (("planecycle_fast", 0.9), ("reference", 0.3))]  # fmt: skip
    shares.append({"group": "rope: ViT-B", "contender": "liger", "missing": "not installed", "refused": None})
    (folder / "ops.json").write_text(json.dumps({"about": "A GPU, `make gpu`", "left_out": [], "rows": shares}))
    figures, close = [], plots.require("matplotlib.pyplot", "bench").close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.pyplot.close", figures.append)
        made = plots.draw(sweep_rows(), folder)
    yield dict(zip([picture.path.name for picture in made], zip(made, figures)))
    for figure in figures:
        close(figure)


def test_there_are_pictures_of_time_memory_and_operations(pictures):
    assert list(pictures) == ["time-vit-s-fp32.png", "memory-vit-s-fp32.png", "ops.png"]
    for picture, _ in pictures.values():
        assert picture.path.read_bytes().startswith(b"\x89PNG") and picture.path.stat().st_size < 200_000
        assert len(picture.caption) > 50


def test_pictures_carry_where_they_are_from(pictures):
    for name, (picture, figure) in pictures.items():
        below = " ".join([text.get_text() for text in figure.texts]).replace("\n", " ")
        within = picture.path.read_bytes()
        wanted = ["A GPU, `make gpu`"] if name == "ops.png" else [*STAMP.values(), HERE["device"], "torch 2.13"]
        for words in wanted:
            assert words in below and words.encode() in within


def test_axes_have_labels_units_scales_and_legends(pictures):
    labels = {
        "time-vit-s-fp32.png": [("patches", "(ms)"), ("patches", "(GFLOP)")],
        "memory-vit-s-fp32.png": [("patches", "(MiB)")],
        "ops.png": [("(%)", "")],
    }
    for name, wanted in labels.items():
        figure = pictures[name][1]
        assert figure.get_suptitle() and len(figure.axes) == len(wanted)
        for axis, (x, y) in zip(figure.axes, wanted):
            assert x in axis.get_xlabel() and y in axis.get_ylabel() and axis.get_legend() is not None
            if name != "ops.png":
                assert axis.get_xscale() == axis.get_yscale() == "log"
                assert [tick.get_text() for tick in axis.get_xticklabels()] == [
                    "64\n(4 slices)", "216\n(6 slices)", "512\n(8 slices)",
                ]  # fmt: skip


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_the_law_is_drawn_in(pictures):
    time, attention = pictures["time-vit-s-fp32.png"][1].axes
    drawn = lines(attention)
    law = drawn["D times PlaneCycle's"].get_ydata()
    assert law == pytest.approx(drawn["flatten3d: $D^{6.00}$"].get_ydata())
    assert law == pytest.approx([n * y for n, y in zip((4, 6, 8), drawn["PlaneCycle: $D^{5.00}$"].get_ydata())])
    slower = lines(time)["D-fold law: PlaneCycle's time\nif its attention cost D times as much"].get_ydata()
    expected = [n**3 * (10**9 * n**3 + 10**6 * n**6) / (10**9 * n**3 + 10**6 * n**5) for n in (4, 6, 8)]  # ms
    assert slower == pytest.approx(expected)
    assert "in proportion to the volume" in lines(pictures["memory-vit-s-fp32.png"][1].axes[0])


def test_every_mode_and_implementation_is_drawn_with_its_numbers(pictures):
    drawn = lines(pictures["time-vit-s-fp32.png"][1].axes[0])
    for name in (*plots.NAMES.values(), *[name for name, _ in plots.OTHERS.values()]):
        assert len(drawn[name].get_ydata()) == 3
    assert drawn[plots.NAMES["flatten3d"]].get_ydata() == pytest.approx([128, 432, 1024])
    memory = lines(pictures["memory-vit-s-fp32.png"][1].axes[0])
    assert memory["PlaneCycle (PCg)"].get_ydata() == pytest.approx([100] * 3)
    assert memory["PlaneCycle, predicted"].get_ydata() == pytest.approx([95] * 3)


def test_operations_show_their_shares(pictures):
    axis = pictures["ops.png"][1].axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["rope: ViT-S"]
    assert sorted([line.get_xdata()[0] for line in axis.get_lines() if len(line.get_xdata()) == 1]) == pytest.approx(
        [30, 90]
    )


def test_one_size_is_too_few_for_a_picture(tmp_path):
    assert plots.draw([row(cell(mode)) for mode in MODES], tmp_path) == [] and list(tmp_path.iterdir()) == []


@pytest.fixture
def text(small, pictures):  # noqa: F811
    return report_of(sweep_rows(), [picture for picture, _ in pictures.values()])


def test_the_report_says_of_what_it_is(text):
    assert text.startswith("# PlaneCycle, measured: A CPU\n")
    for words in (*STAMP.values(), "torch 2.13", "200 GFLOP/s", "20.0 GB/s", "compared with the reference's"):
        assert words in text


def test_losses_are_shown_like_wins(text):
    assert "| ViT-S | fp32 | 1x4x64 | inference | PCg | 64 | 2.00 | 1.50 |" in text
    assert "| ViT-S | fp32 | 1x6x96 | inference | PCg | 216 | 2.00 | **0.50** |" in text
    assert "| ViT-S | fp32 | 1x6x96 | inference | 216 | 1.00 | 2.00 |" in text
    assert "| ViViT-B | fp32 | 1x6x96 | inference | 432 | 2.00 |" in text


def test_every_cell_has_a_line(text):
    body = text.split("## Every cell")[1]
    assert body.count("| ViT-S | fp32 |") == len(sweep_rows()) - 1 and body.count("| ViViT-B |") == 1
    assert (
        "| ViT-S | fp32 | 1x4x64 | inference | PCg | planecycle_fast | 64 (57.6 to 70.4) | 15.6 | 1,312 | 1,016 | 508% "
        "| 100.0 | 95.0 | 1,234 | 5.00 |" in body
    )


def test_exponents_show_the_law(text):
    growth = text.split("## How cost grows")[1].split("##")[0]
    found = {line.split("|")[1].strip(): line.split("|")[2:5] for line in growth.splitlines() if line.startswith("| ")}
    assert float(found["flatten3d"][0]) - float(found["PCg"][0]) == pytest.approx(1.08, abs=0.02)
    assert float(found["PCg"][2]) == float(found["slice2d"][2]) == pytest.approx(3.0)
    assert "D-fold" in growth and "31.7 at D = 32" in growth


def test_predictions_are_beside_measurements(text):
    assert "95.0 MiB predicted, 100.0 measured, 5.0%" in text


def test_captions_and_pictures_are_in_it(text, pictures):
    for picture, _ in pictures.values():
        assert f"]({picture.path.name})" in text and f"*{picture.caption}*" in text


def test_what_is_not_measured_says_why(small):  # noqa: F811
    rows = [row(cell(mode), status="out of memory") for mode in ("PCg", "flatten3d")]
    rows.append(row(cell(code=AUTHORS), status="not here", reason="needs PLANECYCLE_REPO"))
    rows.append(row(cell(code=REFERENCE), status="refused: outputs differ", reason="off by 1.0e-01"))
    text = report_of(rows, [])
    assert "- **out of memory** (ViT-S, fp32, 1x4x64, inference, PCg, fast; ViT-S" in text
    assert (
        "- **not here**: needs PLANECYCLE_REPO (" in text and "- **refused: outputs differ**: off by 1.0e-01 (" in text
    )
    assert text.count("| out of memory |") == 2 and "not measured" in text
    assert "nan" not in text.lower().replace("finan", "")
