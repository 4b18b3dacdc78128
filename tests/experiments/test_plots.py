"""The plots of experiments from their committed figures: names stand where the arms are, nothing
hides anything, plain ticks.
"""

import itertools
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import plots, redraw, sparse_inputs


def test_a_plot_names_its_lines_where_they_are():
    figures = json.loads((redraw.RESULTS / "sparse_inputs" / "figures.json").read_text())
    figure = Figure(layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.set_size_inches(sparse_inputs.SIZE)
    sparse_inputs.draw(figures)(figure)
    figure.draw_without_rendering()
    for ax in figure.axes[:2]:
        assert {text.get_text() for text in ax.texts} == set(figures["1000"][0])
    for ax in figure.axes:
        assert ax.get_legend() is None
        boxes = [text.get_window_extent().shrunk(0.9, 0.9) for text in ax.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(
            figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and ax.bbox.y0 <= b.y0 for b in boxes
        )
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


def test_a_plot_that_there_is_not_is_one_line(capsys):
    assert redraw.main(["sparse_input"]) == 64
    assert capsys.readouterr().err.startswith(
        "error: 'sparse_input' has no figures to draw: choose from sparse_inputs"
    )
