"""Runs a program that a model wrote: a process of its own, with limits of time and memory, no network and no files.

The limits are the kernel's (setrlimit). What reaches out of the process (sockets, other processes, files opened for
writing, foreign libraries, signals) is refused by an audit hook, which Python code cannot take away. It is made for
what a small model writes by accident, not against an attacker who knows it.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile

SECONDS, MEGABYTES = 10, 1024
GUARD = """
import os, resource, sys
for what, most in ((resource.RLIMIT_CPU, {seconds}), (resource.RLIMIT_AS, {megabytes} << 20),
                   (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (most, most))
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
             "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
             "os.truncate", "os.putenv", "shutil.", "ctypes.", "signal.", "pty.", "urllib.", "ftplib.", "smtplib.",
             "http.", "resource.setrlimit", "resource.prlimit")
def guard(event, args):
    if event.startswith(FORBIDDEN):
        raise PermissionError(f"not in here: {{event}}")
    if event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+") or args[2] & 3):
        raise PermissionError(f"not in here: a file to write, {{args[0]}}")
source, out = sys.stdin.read(), os.fdopen(os.dup(1), "w")
for number in (1, 2):
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # whatever it prints is nobody's
sys.addaudithook(guard)
try:
    exec(compile(source, "program", "exec"), {{"__name__": "program"}})
    out.write("{token}")
except BaseException as error:
    out.write(f"{{type(error).__name__}}: {{error}}"[:200])
out.flush()
"""


def passes(program: str, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> tuple[bool, str]:
    """Whether a program comes to its end without an error, within `seconds` of a processor; and if not, why."""
    token = secrets.token_hex(16)  # what says so: a program that leaves early cannot
    guard = GUARD.format(seconds=seconds, megabytes=megabytes, token=token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", guard],
                input=program,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=4 * seconds,
                cwd=folder,
                env={"OMP_NUM_THREADS": "1"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False, f"no end within {4 * seconds} s"
    if done.stdout == token:
        return True, ""
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return False, done.stdout or f"left early: {ended}"
