"""A router that sends all tokens to few experts is told, once, with the metric that shows it."""

from moe_jax.report.step_row import CollapseAlert


class Said:
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def test_it_is_told_once_and_again_when_it_spreads():
    said = Said()
    alert = CollapseAlert(said)
    for step, layers in enumerate((0, 1, 1, 0, 1, 2, 2)):
        alert.look(step, {"moe/collapsed_layers": layers})
    assert [line.split(":")[0] for line in said.lines] == ["step 1", "step 5"]


def test_a_model_without_experts_says_nothing():
    said = Said()
    CollapseAlert(said).look(1, {"train/loss": 1.0})
    assert not said.lines
