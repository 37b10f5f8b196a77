"""Parameters of which some are quick and the others for make test-all."""

import pytest


def slow_unless(quick, values):
    """Parameters; those that `quick` does not hold, or is false of, are slow."""
    is_quick, slow = quick if callable(quick) else quick.__contains__, pytest.mark.slow
    return [x if is_quick(x) else pytest.param(*(x if type(x) is tuple else (x,)), marks=slow) for x in values]
