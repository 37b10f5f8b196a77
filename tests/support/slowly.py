"""Parameters of which some are quick and the others for make test-all."""

import pytest


def slow_unless(quick, values):
    """Parameters; those that `quick` does not hold, or is false of, are slow."""
    is_quick = quick if callable(quick) else quick.__contains__
    return [x if is_quick(x) else pytest.param(*_all(x), marks=pytest.mark.slow) for x in values]


def _all(x):
    """The values of several parameters, or of one."""
    return x if type(x) is tuple else (x,)
