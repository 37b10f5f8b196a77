"""A short run of the tests in environments of other releases: `make test-versions`.

    python locks/versions.py [NAME ...] [--with torch==2.15.0 ...] [--python python3.12] [--table]

Each environment is made in .venvs/ from a lock and the releases named below, and kept for the next run. What passed
where goes to bench/results/versions.json, a row an environment, and the table of architectures (bench/architectures.py)
to its own; the exit status is 0 if all of it did.
--with and --python try another release or Python in these environments, as a row of its own. --table only prints.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATH = ROOT / "bench" / "results" / "versions.json"
HOMES = ROOT / ".venvs"

# The lock, and what comes at another release than it says.
ENVIRONMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "oldest": ("oldest.txt", ()),
    "5.19": ("main.txt", ("transformers==5.19.0", "triton==3.6.0", "numpy==2.3.5")),  # its interpreter breaks on 2.4
    "5.23": ("main.txt", ("transformers==5.23.0", "triton==3.9.0")),
    "newest": ("main.txt", ("transformers==5.24.0", "triton==3.9.0")),
}
# The integration, the round trip of a cache and of its file, the operators, a kernel compiled, the command line.
TESTS = (
    "tests/integrations/test_architectures.py",
    "tests/integrations/test_latent_cache.py",
    "tests/integrations/test_compiled_step.py",
    "tests/integrations/test_fit.py",
    "tests/integrations/test_model_states.py",
    "tests/integrations/test_positions.py",
    "tests/integrations/test_uses.py",
    "tests/integrations/test_wrong_uses.py",
    "tests/attention/test_cache.py",
    "tests/attention/test_ops.py",
    "tests/factors",
    "tests/kernels/test_compiled.py",
    "tests/test_cli.py",
    "tests/test_cli_errors.py",
)
PACKAGES = ("transformers", "torch", "triton", "numpy", "safetensors", "tqdm", "huggingface-hub", "tokenizers")
ASK = """import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; default: all")
    parser.add_argument("--with", dest="instead", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument("--python", default=sys.executable, help="to make the environments with")
    parser.add_argument("--table", action="store_true", help="print what was found, try nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - set(ENVIRONMENTS):
        parser.error(f"expected names out of {list(ENVIRONMENTS)}, got {sorted(unknown)}")
    found = json.loads(PATH.read_text())["rows"] if PATH.is_file() else []
    failed = 0
    for name in () if args.table else args.names or ENVIRONMENTS:
        row = tried(name, made(name, args.instead, args.python))
        failed += row["failed"]
        found = [other for other in found if releases(other) != releases(row)] + [row]
        PATH.write_text(json.dumps({"tests": TESTS, "rows": sorted(found, key=releases)}, indent=1) + "\n")
    print(table(found))
    return 1 if failed else 0


def releases(row: dict[str, Any]) -> list[tuple[int, ...]]:
    """To sort by."""
    return [tuple(map(int, re.findall(r"\d+", row[name].split("+")[0]))) for name in (*PACKAGES, "python")]


def made(name: str, instead: Sequence[str], python: str) -> Path:
    """The environment of a name, with these releases instead: made, unless it is there as the lock has it now."""
    home = HOMES / "-".join((name, Path(python).name, *instead)).replace("=", "")
    lock, others = ENVIRONMENTS[name]
    theirs = [other for other in others if other.split("==")[0] not in {own.split("==")[0] for own in instead}]
    words = [word for other in (*theirs, *instead) for word in ("--with", other)]
    path = ROOT / "locks" / lock
    holds, stamp = " ".join(words) + "\n" + path.read_text(), home / "made"
    if not stamp.is_file() or stamp.read_text() != holds:
        shutil.rmtree(home, ignore_errors=True)
        print(f"{name}: making {home.relative_to(ROOT)}", flush=True)
        subprocess.run([python, "-m", "venv", str(home)], check=True)
        run = str(home / "bin" / "python")
        subprocess.run([run, str(ROOT / "locks" / "install.py"), str(path), *words], check=True)
        check_needs(run)
        stamp.write_text(holds)
    return home


def tried(name: str, home: Path) -> dict[str, Any]:
    """Runs the tests in an environment, and the table of architectures, which counts as one of them if it is wrong."""
    run, report = str(home / "bin" / "python"), home / "report.xml"
    asked = subprocess.run([run, "-c", ASK, *PACKAGES], check=True, capture_output=True, text=True, cwd=ROOT)
    row = {"environment": name, **json.loads(asked.stdout)}
    print(f"{name}: {', '.join(f'{package} {row[package]}' for package in ('python', *PACKAGES))}", flush=True)
    begin = time.monotonic()
    words = ["-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    words += ["-m", "not slow and not vllm", f"--junitxml={report}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    report.unlink(missing_ok=True)
    subprocess.run([run, "-m", "pytest", *words, *TESTS], cwd=ROOT, env=environment, check=False)
    if not report.is_file():
        raise RuntimeError(f"{name}: the tests ended without a report")
    (suite,) = ElementTree.parse(report).iter("testsuite")
    counts = {word: int(suite.get(word, 0)) for word in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    if subprocess.run([run, "-m", "bench.architectures"], cwd=ROOT, env=environment, check=False).returncode:
        bad += 1
    return {**row, "passed": passed, "failed": bad, "seconds": round(time.monotonic() - begin)}


def check_needs(run: str) -> None:
    """Raises RuntimeError where a package does not accept another's version; torch may be apart from its Triton."""
    found = subprocess.run([run, "-m", "pip", "check"], capture_output=True, text=True, check=False).stdout
    bad = [line for line in found.splitlines() if " has requirement " in line and not line.startswith("torch ")]
    if bad:
        raise RuntimeError("these packages do not go together: " + "; ".join(bad))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line an environment."""
    names = ("python", *PACKAGES)
    wide = {name: max(len(cell) for cell in (name, *(row[name] for row in rows))) for name in names}
    lines = ["  ".join(f"{name:{wide[name]}}" for name in names) + "  passed  failed"]
    for row in rows:
        cells = "  ".join(f"{row[name]:{wide[name]}}" for name in names)
        lines.append(f"{cells}  {row['passed']:6}  {row['failed']:6}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
