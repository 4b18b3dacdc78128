"""Which cases of a test are of the normal suite, and which of the full one (`--full`) alone."""

import pytest


def normal(kept, cases):
    """Returns the cases; those that are not in `kept` are of the full suite. A tuple is the
    arguments of one case.
    """
    return [case if case in kept else _full(case) for case in cases]


def _full(case):
    arguments = case if isinstance(case, tuple) else (case,)
    return pytest.param(*arguments, marks=pytest.mark.full)
