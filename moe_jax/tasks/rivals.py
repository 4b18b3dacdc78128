"""What a model has to beat: majority and popularity, and the classical method of each kind of task,
on the same rows.

Each module has `baseline_figures(data) -> {baseline: {figure: number}}` of `examples.Examples`.
BaselineFigures are of the held-out part; whatever is tuned is tuned on the training part alone.
"""

from moe_jax.data.examples import Classes, Examples, Market, Pairs
from moe_jax.tasks.classification import rivals as text
from moe_jax.tasks.recommendation import rivals as recommendation
from moe_jax.tasks.translation import rivals as translation
from moe_jax.tasks.vision import rivals as vectors

# Baseline -> figure -> number.
BaselineFigures = dict[str, dict[str, float | str]]


def baseline_figures(data: Examples, tune: bool = True) -> BaselineFigures:
    """Returns the figures of the baselines of a data set of any kind.

    Without `tune` those that try several settings take the first.
    """
    about = data.about
    if isinstance(about, Pairs):
        return translation.baseline_figures(data)
    if isinstance(about, Market):
        return recommendation.baseline_figures(data, tune)
    assert isinstance(about, Classes)
    # Vectors have no tokenizer.
    of_kind = text if about.tokenizer is not None else vectors
    return of_kind.baseline_figures(data)
