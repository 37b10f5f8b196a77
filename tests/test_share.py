"""pytest --share: what .ci/run takes of the long tests."""

import conftest
import pytest

TESTS = """
import pytest
@pytest.mark.slow
@pytest.mark.parametrize("i", range({}))
def test_long(i): pass
@pytest.mark.parametrize("i", range(9))
def test_quick(i): pass
"""


class Told:
    """What ran."""

    def __init__(self):
        self.names = set()

    def pytest_runtest_call(self, item):
        self.names.add(item.nodeid)


@pytest.fixture
def runs(tmp_path):
    """Names of those that run with these options, of n long tests."""
    options = "--import-mode=importlib -p no:hypothesispytest -p no:terminal"
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers = slow\naddopts = {options}\n")

    def run(n, *options):
        (tmp_path / f"test_{n}.py").write_text(TESTS.format(n))  # a module of its own: it is imported once
        told = Told()
        done = pytest.main([str(tmp_path), "-m", "slow", *options], plugins=[conftest, told])
        assert done in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        return told.names

    return run


def test_a_share_is_a_commits_own(runs):
    one, again, other = (runs(400, "--share", "8", "--salt", commit) for commit in ("c0ffee", "c0ffee", "c0ffef"))
    assert one == again and 25 <= len(one) <= 80 and 25 <= len(other) <= 80 and len(one & other) < 25


def test_every_test_has_its_turn(runs):
    assert set().union(*(runs(5, "--share", "2", "--salt", str(i)) for i in range(6))) == runs(5)
