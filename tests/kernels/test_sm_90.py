"""Every kernel becomes machine code of an H100, where no GPU is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# one of each kind: levels looked up, with minimums; codebooks without signs, with even and with free ones
NAMES = ("moments", "IQ4_XS", "Q2_K", "IQ1_S", "IQ2_XS", "IQ3_XXS", "IQ3_S")
SHARED_BYTES = 227 * 1024  # of a program, on an H100


@pytest.mark.slow
def test_kernels_compile(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sm_90", *NAMES],
        cwd=root,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
        },
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    kernels = [json.loads(line) for line in found.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {"_decode", "_pack", "_walk_levels", "_walk_codebook", "_moments"}
    assert len(kernels) == 2 + 3 * (len(NAMES) - 1)
    assert all(k["bytes"] > 0 and k["shared"] <= SHARED_BYTES for k in kernels)
