"""Faults that parallel mixtures of experts have in practice, planted one at a time, and what of
`verify` must find each.

`contract.py` says what a fault is; the other files have a kind each.
"""

from mutations import context, dispatch, exchange, losses, pipeline, state
from mutations.contract import Mutation

MUTATIONS: dict[str, Mutation] = {
    **exchange.FAULTS,
    **context.FAULTS,
    **dispatch.FAULTS,
    **losses.FAULTS,
    **state.FAULTS,
    **pipeline.FAULTS,
}
