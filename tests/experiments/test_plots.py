"""The plots of experiments from their committed figures: names stand where the arms are, nothing
hides anything, plain ticks.
"""

import itertools
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import pays, plots, redraw, sparse_inputs


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


def test_the_picture_of_the_readme_has_every_model_once(tmp_path):
    """The dense model that both studies have is one point; an arm without runs is none."""

    def arm(loss, parameters, experts, a_token):
        run = {
            "train_flops": 2e9 * a_token,
            "total_parameters": parameters,
            "num_experts": experts,
            "granularity": a_token,
        }
        return {"runs": {str(seed): run | {"bits_per_byte": loss + seed} for seed in range(3)}}

    ladder = {"dense_24": arm(3.0, 20_000, 1, 1), "dense_32": arm(2.9, 30_000, 1, 1)}
    ladder |= {"sparse_24": arm(2.8, 40_000, 8, 2), "sparse_32": {"runs": {}}}
    switch = {"dense": ladder["dense_32"], "e32": arm(2.7, 400_000, 32, 1)}
    floor = {"switch": switch["e32"], "hash": arm(2.6, 400_000, 16, 1)}
    studies = {"dense_sparse_ladder": ladder, "switch_steps": switch, "hash_floor": floor}
    for name, arms in studies.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "figures.json").write_text(json.dumps({"arms": arms}))
    shown = pays.points(tmp_path)
    assert [(each.family, each.name, round(each.loss.mean, 1)) for each in shown] == [
        ("dense", "", 4.0),
        ("dense", "", 3.9),
        ("top-2 of 8 experts", "", 3.8),
        ("Switch: 1 expert a token", "32 experts", 3.7),
    ]
    figure = Figure(layout="constrained", dpi=110, figsize=pays.SIZE)
    FigureCanvasAgg(figure)
    pays.draw(shown, figure)
    figure.draw_without_rendering()
    right = figure.axes[1]
    # The line of dense models: thousand parameters, and the means of seeds.
    line = right.containers[0].lines[0]
    assert line.get_xydata().round(3).tolist() == [[20.0, 4.0], [30.0, 3.9]]
    assert right.get_xlabel().startswith("thousand parameters")
