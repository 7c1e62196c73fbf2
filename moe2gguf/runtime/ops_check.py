"""Compare a backend's matrix multiplications over experts with the CPU's reference: llama.cpp's test-backend-ops."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# of every type and shape upstream tests, with our groups and router weights
OPS = ("MUL_MAT_ID_GRP", "MUL_MAT_ID")

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CASE = re.compile(r"^\s*(\w+)\((.*?)\): (.*)$")


@dataclass(frozen=True)
class OpResult:
    """How the cases of one operation went on one device."""

    device: str
    op: str
    n_passed: int
    n_unsupported: int  # left to the CPU
    failed: tuple[str, ...]  # the parameters of each case
    exit_code: int

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and not self.failed and self.n_passed + self.n_unsupported > 0


def check_op(program: Path, device: str, op: str, *, on_case: Callable[[int], None] = lambda n_done: None) -> OpResult:
    """Run PROGRAM, a test-backend-ops, for OP on DEVICE ("CPU", "CUDA0"). ON_CASE gets the number of cases done."""
    n_passed, n_unsupported, failed = 0, 0, []
    command = [str(program), "test", "-b", device, "-o", op]
    # a failed case writes its reason to stderr in the middle of its line
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                case = _CASE.match(_COLOUR.sub("", line.rstrip()))
                if case is None or case[1] != op:
                    continue
                if case[3].endswith("OK"):
                    n_passed += 1
                elif case[3].startswith("not supported") or case[3].startswith("skipping"):
                    n_unsupported += 1
                else:
                    failed.append(case[2])
                on_case(n_passed + n_unsupported + len(failed))
        except BaseException:
            process.terminate()
            raise
    return OpResult(device, op, n_passed, n_unsupported, tuple(failed), process.returncode)
