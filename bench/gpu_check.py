"""Everything worth running on a GPU, in one command that keeps its time: the most valuable steps first.

    python -m bench.gpu_check --minutes 9 --out FOLDER [--commit HASH] [--steps NAME ...] [--without PROVIDER] [--dry]

First comes what nothing has measured: products of subnormal numbers, and keys before RoPE by a band, first their tests
in bfloat16, then each of their kernels alone (bench.decode.band_minutes).

FOLDER gets gpu_check.json (what ran, for how long, and how it ended), tests.txt, each benchmark's JSON, and the plot of
the decode latency (Palu's is drawn later, from its JSON): at most 8 files of 16 MiB. A step that fails is reported and
the next one begins; a step is begun only if there is time enough left for it to be worth it, and is ended when its time
is up. The exit status is 0 if all went well. --dry runs the same commands on a CPU, in Triton's interpreter at tiny
shapes: a rehearsal, never a result.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.support import report

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/kernels/test_gpu.py",
    "tests/attention/test_ways.py",
    "tests/kernels/test_kernels.py",
    "tests/attention/test_ops.py",
)
BANDED = ("tests/kernels/test_banded.py",)
FIRST = "first_that or (bfloat16 and (loud or far_positions))"  # of these: what is right in bfloat16
ONLY_PYTEST = "band, tests"  # without it one step runs all cases
FILES, FILE_BYTES, TEXT_BYTES = 8, 16 << 20, 4 << 20
TAIL = 6000  # characters of a step's output in the report
SPARE = 5.0  # seconds kept for the report


class Step(NamedTuple):
    """One command."""

    name: str
    command: Callable[[float], list[str]]  # of the seconds it may take
    share: float  # of all the time, at most
    worth: float  # seconds: with fewer it is not begun
    text: str = ""  # file of its output; else only the end is kept, in the report


def steps(out: Path, dry: bool, without: Sequence[str] = ()) -> list[Step]:
    """By value. What time a step leaves goes to those after it. without: providers of the decode latency."""
    extra = ["--dry"] if dry else []

    def module(name: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"bench.{name}", *words, *extra]

    def latency(share: float, *words: str) -> Callable[[float], list[str]]:
        """Within its time, as the benchmark keeps it itself: so that it draws its plot too."""
        words += tuple(f"--without={name}" for name in without)
        return lambda seconds: module(
            "decode_latency", "--out", str(out), "--minutes", f"{share * seconds / 60:.3f}", *words
        )

    found = [
        Step("subnormal numbers", lambda _: module("decode.subnormals", "--out", str(out)), 0.07, 10),
        Step("smoke test", lambda _: module("decode.gpu_smoke"), 0.07, 10),
        Step(ONLY_PYTEST, lambda _: tests(dry, BANDED, "first_that and lanes-160-64" if dry else FIRST), 0.13, 20),
        Step("band, kernels", lambda s: module("decode.band_minutes", "--out", str(out), "--minutes",
                                               f"{0.8 * s / 60:.3f}"), 0.23, 30),
        Step("tests", lambda _: tests(dry, TESTS, "cases_of_the_reference and float32-plain" if dry else ""),
             0.18, 30, "tests.txt"),
        Step("compile", lambda _: module("decode_latency", "--compile", "--out", str(out)), 0.1, 20),
        Step("decode latency, first cases", latency(0.001 if dry else 0.8), 0.12, 20),
        Step("Palu's kernel", lambda s: module("decode.palu_decode", "--no-plot", "--out", str(out), "--minutes",
                                               f"{0.7 * s / 60:.3f}"), 0.06, 20),
        Step("host microseconds", lambda _: module("decode.host_cost", "--out", str(out)), 0.04, 15),
        Step("decode latency, more cases", latency(0.8, "--resume"), 1.0, 15),
    ]  # fmt: skip
    return [s for s in found if s.name != ONLY_PYTEST or importlib.util.find_spec("pytest")]


def tests(dry: bool, files: Sequence[str], chosen: str = "") -> list[str]:
    """The kernels' tests on the GPU, many at a time where pytest can; without pytest, their cases alone. chosen: as -k
    of pytest takes it; "": all of the files."""
    if importlib.util.find_spec("pytest") is None:
        words = ["--cases", "--dry"] if dry else ["--cases"]
        return [sys.executable, "-c", "print('pytest is not installed: the cases are run without it', flush=True); "
                "import runpy; runpy.run_module('bench.decode.gpu_smoke', run_name='__main__')", *words]  # fmt: skip
    words = [sys.executable, "-m", "pytest", "-v", "-v", "--tb=short", "-p", "no:cacheprovider", *files]
    words += ["-k", chosen] if chosen else []
    if dry:
        return words
    many = importlib.util.find_spec("xdist") is not None
    return [*words, "--gpu", *(["-n", str(max(1, len(os.sched_getaffinity(0)) - 2))] if many else [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree, where git cannot tell")
    parser.add_argument("--steps", nargs="+", help="only these, by the beginning of their names")
    parser.add_argument("--without", action="append", default=[], metavar="PROVIDER", help="of the decode latency")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch: --dry rehearses on a CPU")
    if args.out.resolve() == report.RESULTS.resolve():
        parser.error(f"--out: expected a folder of its own, got {args.out}")
    if args.commit:
        os.environ["LRATTN_COMMIT"] = args.commit
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [
        s for s in steps(args.out, args.dry, args.without) if not args.steps or s.name.startswith(tuple(args.steps))
    ]
    return run(chosen, 60 * args.minutes, args.out, args.dry)


def run(chosen: Sequence[Step], seconds: float, out: Path, dry: bool) -> int:
    """Every step in turn; the report is written after each. 0 if all of them ended well."""
    end = time.monotonic() + seconds - SPARE
    done: list[dict[str, Any]] = []
    results = {"machine": report.machine(), "dry": dry, "seconds": seconds, "steps": done, "files": {}, "faults": []}
    for step in chosen:
        left = end - time.monotonic()
        if left < step.worth:
            done.append(
                {"name": step.name, "status": f"not begun: {left:.0f} s are left, {step.worth:.0f} s are worth it"}
            )
        else:
            print(f"\n== {step.name}, at most {min(left, step.share * seconds):.0f} s", flush=True)
            done.append(perform(step, min(left, step.share * seconds), out, dry))
        report.write(out / "gpu_check.json", results)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    faults = [f"{row['name']}: {row['status']}" for row in done if row["status"] != "done"]
    if len(files) > FILES or max(files.values()) > FILE_BYTES:
        faults.append(f"expected at most {FILES} files of {FILE_BYTES} bytes, got {files}")
    report.write(out / "gpu_check.json", results | {"files": files, "faults": faults})
    print("\n== summary")
    for row in done:
        print(f"{row['name']:<30} {row.get('seconds', 0.0):6.1f} s  {row['status']}")
    print(*faults, f"{len(faults)} faults", sep="\n")
    return 1 if faults else 0


def perform(step: Step, limit: float, out: Path, dry: bool) -> dict[str, Any]:
    """One step in a process group of its own, ended with all it started when its time is up."""
    command, begin = step.command(limit), time.monotonic()
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if dry else {}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), *filter(None, [env.get("PYTHONPATH")])])
    env |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            status = "done" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"ended after its {limit:.0f} s"
        output.seek(0)
        text = output.read()
    if step.text:
        (out / step.text).write_text(text[-TEXT_BYTES:])
    print(text[-TAIL:], flush=True)
    return {"name": step.name, "status": status, "seconds": time.monotonic() - begin, "limit": limit,
            "command": command[1:], "output": text[-TAIL:]}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
