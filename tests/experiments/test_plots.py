"""The plots of experiments from their committed figures: names stand where the arms are, nothing
hides anything, plain ticks.
"""

import itertools
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import plots, redraw


def painted(name):
    figure = Figure(layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    paint, size = redraw.DRAWINGS[name](
        json.loads((redraw.RESULTS / name / "figures.json").read_text())
    )
    figure.set_size_inches(size)
    paint(figure)
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("name", redraw.DRAWINGS)
def test_a_plot_names_its_arms_where_they_are(name):
    figure = painted(name)
    figures = json.loads((redraw.RESULTS / name / "figures.json").read_text())
    arms = {
        "sparsity_vs_quality": lambda: figures["runs"],
        "sparse_training_rules": lambda: figures,
    }
    wanted = set(arms[name]() if name in arms else figures["1000"][0])
    for ax in figure.axes[:2]:
        assert {text.get_text() for text in ax.texts} == wanted
    for ax in figure.axes:
        assert ax.get_legend() is None
        boxes = [text.get_window_extent().shrunk(0.9, 0.9) for text in ax.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(
            figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and ax.bbox.y0 <= b.y0 for b in boxes
        )
        bars = [line.get_window_extent() for group in ax.containers for line in group[2]]
        upright = [bar.padded(1) for bar in bars if bar.height > bar.width]
        if name != "sparse_inputs":
            assert not any(a.overlaps(b) for a, b in itertools.combinations(upright, 2))
        ticks = [
            label.get_text()
            for axis in (ax.xaxis, ax.yaxis)
            for label in axis.get_ticklabels(which="both")
        ]
        assert ticks and not any(
            "times" in tick or "^" in tick or "e+" in tick or "e-" in tick for tick in ticks
        )


def test_places_move_as_little_as_they_must():
    assert plots.spread([1.0, 5.0, 9.0], 2) == [1, 5, 9]
    assert plots.spread([5.0, 5.0, 5.0], 2) == pytest.approx([3, 5, 7])
    assert plots.spread([6.0, 5.0], 2) == pytest.approx([6.5, 4.5])  # in their order
    assert plots.spread([0.0, 1.0, 10.0], 2) == pytest.approx([-0.5, 1.5, 10])


def test_numbers_are_written_as_people_write_them():
    assert [plots.plain(z) for z in (0.6, 0.02, 5.0, 2000.0, 1e6)] == [
        "0.6",
        "0.02",
        "5",
        "2,000",
        "1,000,000",
    ]


def test_one_seed_has_no_interval_and_one_arm_has_a_place():
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    plots.arms(
        ax, [plots.Arm("alone", 3.0, 2.0, float("inf"), {"color": "C0", "marker": "o"})], log=True
    )
    figure.draw_without_rendering()
    assert [text.get_text() for text in ax.texts] == ["alone"] and ax.get_xlim()[
        0
    ] < 3 < ax.get_xlim()[1]


def test_a_plot_that_there_is_not_is_one_line(capsys):
    assert redraw.main(["sparse_input"]) == 64
    assert capsys.readouterr().err.startswith(
        "error: 'sparse_input' has no figures to draw: choose from sparsity_vs_quality"
    )
