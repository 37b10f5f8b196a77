"""Tests on many drawn examples: some where it is quick, all of the profile where it is not."""

import functools

import pytest
from hypothesis import given, settings
from tqdm import tqdm

SOME = 16  # the slow tests draw so many times as many examples


def fuzz(share, **strategies):
    """Runs a test on 1 / share of the examples that the profile asks for, with a progress bar where one can be seen."""

    def wrap(test):
        def drawn(count):
            bar = tqdm(desc=test.__name__, total=count, position=0, disable=None)

            @functools.wraps(test)
            def one(*args, **kwargs):
                bar.update()
                test(*args, **kwargs)

            return settings(max_examples=count)(given(**strategies)(one))

        whole = max(1, settings.default.max_examples // share)

        @pytest.mark.parametrize(
            "count", [max(1, whole // SOME), pytest.param(whole, marks=pytest.mark.slow)], ids=["some", "all"]
        )
        def counted(count, device):
            drawn(count)(device=device)

        return counted

    return wrap
