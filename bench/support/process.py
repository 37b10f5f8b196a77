"""A measurement in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def apart(module: str, *words: str) -> dict[str, Any]:
    """Runs `python -m module words` and reads the JSON of its last line; its progress bars are shown.

    Raises: RuntimeError if it fails.
    """
    done = subprocess.run([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(words)}: exit status {done.returncode}\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> dict[str, int]:
    """Resident memory of this process in bytes, now and at its peak. Linux."""
    status = Path("/proc/self/status").read_text()
    return {
        name: 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])
        for name, field in (("now", "VmRSS"), ("peak", "VmHWM"))
    }
