"""A program in a process of its own: what it prints, how long it takes, and the most memory it ever holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe2gguf.errors import Moe2ggufError

# Between us and the program: Linux counts what a process held before exec, so a child of ours begins with our memory.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - start
peak_rss_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
with open(sys.argv[1], "w") as file:
    json.dump([status, seconds, peak_rss_bytes], file)
"""


@dataclass(frozen=True)
class Finished:
    output: str  # stdout and stderr together
    seconds: float
    peak_rss_bytes: int  # of the largest process among it and its children


def run_child(
    command: Sequence[object], log: Path, *, what: str, environment: Mapping[str, str] | None = None
) -> Finished:
    """Appends command and output to `log`. Raises Moe2ggufError, saying that `what` failed, unless it exits with 0."""
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(result), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **(environment or {})},
        )
        status, seconds, peak_rss_bytes = (
            json.loads(result.read_text(encoding="utf-8")) if result.exists() else (done.returncode, 0.0, 0)
        )
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n{done.stdout}\n")
    if status != 0:
        last = (done.stdout.strip().splitlines() or ["it prints nothing"])[-1]
        raise Moe2ggufError(f"{what} failed with exit status {status}: {last} (all of its output is in {log})")
    return Finished(done.stdout, seconds, peak_rss_bytes)
