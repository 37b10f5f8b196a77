"""Which uses of which architectures give on latents what the untouched model gives, release by release.

    python -m bench.architectures [--table]

Every use of tests/support/uses.py, on tiny random models and at full rank, where nothing may differ. What this
environment's releases give takes the place of what they gave in bench/results/architectures.json; the exit status is 1
if a use is neither equal nor exempt. --table only prints the table of docs/architectures.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from bench.support import report

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

PATH = report.RESULTS / "architectures.json"
EXEMPT = "exempt: "
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what was found, try nothing")
    args = parser.parse_args()
    found = report.load(PATH)["rows"] if PATH.is_file() else []
    if args.table:
        print(table(found))
        return 0
    rows = tried()
    release = release_of(rows[0])
    save(sorted([row for row in found if release_of(row) != release] + rows, key=release_of))
    print(*faults(rows), f"{len(faults(rows))} faults", sep="\n")
    return 1 if faults(rows) else 0


def tried() -> list[Row]:
    """Every architecture, in this environment."""
    import uses
    from architectures import ARCHITECTURES

    transformers.logging.set_verbosity_error()
    releases = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    rows = []
    for architecture in tqdm(ARCHITECTURES, unit="architecture"):
        for near, keys in itertools.product(uses.NEARS, uses.KEYS):
            if found := uses.table(architecture, near, keys):
                rows.append({**releases, "architecture": architecture, "near": list(near), "keys": keys, "uses": found})
    return rows


def save(rows: Sequence[Row]) -> None:
    """A line a row."""
    PATH.write_text('{"rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n")


def release_of(row: Row) -> tuple[tuple[int, ...], ...]:
    """Of transformers and of torch, to sort by."""
    return tuple(tuple(map(int, row[name].split("."))) for name in ("transformers", "torch"))


def faults(rows: Sequence[Row]) -> list[str]:
    """What is neither equal nor exempt, in words."""
    return [
        f"{row['architecture']}, near={tuple(row['near'])}, keys {row['keys']}, {use}: {said}"
        for row in rows
        for use, said in row["uses"].items()
        if said != "equal" and not said.startswith(EXEMPT)
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown: architectures down, releases across, how many of the uses are exact; below, what is exempt and why."""
    releases = sorted({release_of(row) for row in rows})
    names = [[".".join(map(str, release[i])) for release in releases] for i in (0, 1)]
    lines = [["transformers", *names[0]], ["---", *["--:"] * len(releases)], ["torch", *names[1]]]
    exempt: dict[tuple[str, str, str], dict[str, None]] = {}
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        cells = []
        for release, name in zip(releases, names[0], strict=True):
            own = [row["uses"] for row in rows if (row["architecture"], release_of(row)) == (architecture, release)]
            said = [pair for uses in own for pair in uses.items()]
            cells.append(f"{sum(word == 'equal' for _, word in said)} of {len(said)}")
            for use, word in said:
                if word.startswith(EXEMPT):
                    exempt.setdefault((architecture, name, word.removeprefix(EXEMPT)), {})[use] = None
        lines.append([architecture, *cells])
    told = [f"* {a} in transformers {r}, {', '.join(uses)}: {why}." for (a, r, why), uses in exempt.items()]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), *(["", "Exempt:", "", *told] if told else [])])


if __name__ == "__main__":
    raise SystemExit(main())
