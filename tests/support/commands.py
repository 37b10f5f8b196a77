"""Commands of python -m lrattn, run in this process; shown: pytest's capsys or capfd."""

import re

import pytest

from lrattn import __main__ as cli


def run(shown, *words):
    """What a command prints."""
    shown.readouterr()
    cli.main([str(word) for word in words])
    return shown.readouterr().out


def refused(shown, *words):
    """The one line on stderr, where progress bars aside nothing else is; exit code 1, or 2 for usage."""
    shown.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    printed, code = shown.readouterr(), stopped.value.code
    lines = [line for line in printed.err.splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
    lines += [code] if isinstance(code, str) else []  # which Python prints, and ends with 1
    assert printed.out == "" and (isinstance(code, str) or code == 2)
    assert len(lines) == 1 and len(lines[0].splitlines()) == 1 and lines[0].startswith("lrattn: "), lines
    return lines[0]
