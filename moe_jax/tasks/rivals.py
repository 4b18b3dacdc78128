"""What a model has to beat: majority and popularity, and the classical method of each kind of task,
on the same rows.

Each module has `table(data) -> {baseline: {figure: number}}` of `examples.Examples`. Figures are of
the held-out part; whatever is tuned is tuned on the training part alone.
"""

from moe_jax.data.examples import Classes, Examples, Market, Pairs
from moe_jax.tasks.classification import rivals as text
from moe_jax.tasks.recommendation import rivals as recommendation
from moe_jax.tasks.translation import rivals as translation
from moe_jax.tasks.vision import rivals as vectors

Table = dict[str, dict[str, float | str]]


def table(data: Examples, tune: bool = True) -> Table:
    """The baselines of a data set of any kind; without `tune` those that try several settings take
    the first.
    """
    about = data.about
    if isinstance(about, Pairs):
        return translation.table(data)
    if isinstance(about, Market):
        return recommendation.table(data, tune)
    assert isinstance(about, Classes)
    return text.table(data) if about.tokenizer is not None else vectors.table(data)
