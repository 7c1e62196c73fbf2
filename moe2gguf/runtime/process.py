"""Running compilers and pip: everything they print goes to a log file, and a failure becomes one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moe2gguf.errors import RuntimeMissing

UNTESTABLE = 4  # exit code of the smoke test where a driver the library needs is not installed

# What the tools print for the failures a user can do something about, and what to tell them.
_CAUSES = (
    ("No space left on device", "the disk is full: free some GB, or point XDG_CACHE_HOME to a larger disk"),
    ("externally-managed-environment", "this Python belongs to the operating system: use a virtual environment"),
    ("No module named pip", f"this Python environment has no pip: run `{sys.executable} -m ensurepip`"),
    ("DO NOT MATCH THE HASHES", "the download is not the pinned file: check the package index pip is configured for"),
    ("Temporary failure in name resolution", "there is no network: connect, or point pip to a local index"),
    ("Failed to establish a new connection", "there is no network: connect, or point pip to a local index"),
    ("Connection refused", "the package index refuses the connection: check the network and pip's proxy settings"),
    ("ReadTimeoutError", "the package index does not answer: check the network and pip's proxy settings"),
    ("No matching distribution found", "the package index does not have it: check the network and pip's configuration"),
    ("Permission denied", "a folder cannot be written: check the permissions named in the log"),
    ("Killed signal terminated program", "the compiler ran out of memory: try a smaller --jobs"),
    ("died due to signal 9", "the compiler ran out of memory: try a smaller --jobs"),
    ("Unsupported gpu architecture", "nvcc is too old, or too new, for this GPU: install another CUDA toolkit"),
    ("Disk quota exceeded", "the disk is full: free some GB, or point XDG_CACHE_HOME to a larger disk"),
)


def explain(output: str) -> str | None:
    """The advice for the first cause that OUTPUT, the end of a log, shows, or None."""
    return next((advice for sign, advice in _CAUSES if sign in output), None)


def run_logged(
    command: Sequence[str | Path],
    *,
    what: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Append the output of COMMAND to LOG, passing each line to ON_LINE.

    Raises RuntimeMissing, saying that WHAT failed and why, when the command is missing or exits with an error.
    """
    tail: deque[str] = deque(maxlen=200)  # a cause is near the end, even under ninja's parallel jobs
    words = [str(word) for word in command]
    with log.open("a", encoding="utf-8", errors="replace") as sink:
        sink.write(f"$ {' '.join(words)}\n")
        sink.flush()
        try:
            process = subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=env,
                cwd=cwd,
            )
        except FileNotFoundError:
            raise RuntimeMissing(f"{what} failed: the program {words[0]} is not installed") from None
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    sink.write(line)
                    tail.append(line)
                    if on_line is not None:
                        on_line(line)
            except BaseException:
                process.terminate()  # Ctrl-C: do not leave compilers behind
                raise
    if process.returncode != 0:
        cause = explain("".join(tail)) or f"exit code {process.returncode}"
        raise RuntimeMissing(f"{what} failed: {cause} (log: {log})")
