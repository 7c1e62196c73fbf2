"""llama.cpp's own test of operations: each backend of the installed runtime against the CPU's reference kernels."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from moe2gguf.runtime import tool

OPS = ("MUL_MAT_ID_GRP", "MUL_MAT_ID")
# Of the many plain cases, each type with one token and with a batch; with groups or router weights (groups=) all. The
# types that ggml takes seconds to prepare to encode are left to test_mul_mat_id.py.
ON_CPU = "^(?!.*(iq1_|iq2_s|iq2_xs,|iq2_xs[]]))(groups=|.*n_mats=4,n_used=2,b=0,m=(64|512))"
# lavapipe compiles shaders for seconds a case
ON_LAVAPIPE = r"groups=\[(1xq4_0,11xq8_0|8xq4_K)\],n_used=4,b=0,.*,n=(1|65),"
# another backend may lack the new operation: the scheduler gives it to the CPU
KNOWS_GROUPS = re.compile("CPU|Vulkan|CUDA")

_BACKEND = re.compile(r"^Backend \d+/\d+: (.+)$", re.MULTILINE)
_CASE = re.compile(r"(\w+)\(\w+=.*\): (?:\x1b\[[\d;]*m)?(OK|FAIL|not supported)")
_SUMMARY = re.compile(r"^\s*(\d+)/(\d+) tests passed$", re.MULTILINE)


def run_tests(*arguments: str) -> tuple[dict[str, Counter[tuple[str, str]]], str]:
    """(count of (operation, outcome) by backend, lines of the failed cases)."""
    program = tool("test-backend-ops")
    if not program.is_file():
        pytest.skip("the installed runtime was built without test-backend-ops")
    command: list[str | Path] = [program, "test", "-o", ",".join(OPS), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    failed = "\n".join(line for line in result.stdout.splitlines() if "FAIL" in line)
    assert result.returncode == (1 if failed else 0), (result.returncode, result.stdout[-500:], result.stderr[-2000:])
    return count_cases(result.stdout), failed


def count_cases(output: str) -> dict[str, Counter[tuple[str, str]]]:
    """What test-backend-ops printed, by backend; one that it left out has no entry."""
    _, *parts = _BACKEND.split(output)
    backends = {}
    for name, section in zip(parts[::2], parts[1::2], strict=True):
        if summary := _SUMMARY.search(section):
            cases = Counter(_CASE.findall(section))
            n_run = sum(n for (_, outcome), n in cases.items() if outcome != "not supported")
            assert n_run == int(summary[2]), f"{summary[2]} cases ran, {n_run} were read"
            backends[name] = cases
    return backends


def test_cpu(needs_runtime) -> None:
    """The tiled kernels against the reference. Nothing here is beyond the CPU."""
    backends, failed = run_tests("-b", "CPU", "-p", ON_CPU)
    assert not failed, failed
    assert backends.keys() == {"CPU"}
    assert {outcome for _, outcome in backends["CPU"]} == {"OK"}
    assert all(backends["CPU"][op, "OK"] > 100 for op in OPS), backends["CPU"]


@pytest.mark.slow
def test_other_backends(cards) -> None:
    arguments = ("-p", ON_LAVAPIPE) if all("llvmpipe" in card.description for card in cards) else ()
    backends, failed = run_tests(*arguments)
    assert backends
    assert not failed, failed
    for name, cases in backends.items():
        if KNOWS_GROUPS.match(name):
            assert all(cases[op, "OK"] > 0 for op in OPS), (name, cases)


def test_count_cases() -> None:
    output = """Testing 3 devices

Backend 1/3: Vulkan0
  Device description: a device
  MUL_MAT_ID_GRP(groups=[2xq2_K,3xf16],n=1): \x1b[1;32mOK\x1b[0m
[MUL_MAT_ID_GRP] ERR = 1.0 > 0.0005   MUL_MAT_ID_GRP(groups=[2xq2_K,3xf16],n=2): \x1b[1;31mFAIL\x1b[0m
  MUL_MAT_ID(type_a=q1_0): not supported [Vulkan0]
  1/2 tests passed
  Backend Vulkan0: \x1b[1;31mFAIL\x1b[0m
Backend 2/3: BLAS
  0/0 tests passed
  Backend BLAS: OK
Backend 3/3: CPU
  Skipping CPU backend
2/3 backends passed
FAIL
"""
    grouped, plain = OPS
    assert count_cases(output) == {
        "Vulkan0": {(grouped, "OK"): 1, (grouped, "FAIL"): 1, (plain, "not supported"): 1},
        "BLAS": {},
    }
    with pytest.raises(AssertionError, match="2 cases ran, 1 were read"):
        count_cases(output.replace("FAIL", "CRASH"))
