"""Every kernel becomes machine code of several GPUs, where none is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FEW = ("moments", "IQ4_XS", "IQ2_XS")
# one of each kind: levels looked up, with minimums; codebooks without signs, with even and with free ones
NAMES = {90: (*FEW, "Q2_K", "IQ1_S", "IQ3_XXS", "IQ3_S")}
# of a program, by compute capability: A40 and its like, which have least; H100; RTX 5090
SHARED_BYTES = {86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile(tmp_path: Path, capability: int) -> None:
    root, names = Path(__file__).parents[2], NAMES.get(capability, FEW)
    found = subprocess.run(
        [sys.executable, "-m", "tests.kernels.machine_code", str(capability), *names],
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
    assert len(kernels) == 2 + 3 * (len(names) - 1)
    assert all(k["bytes"] > 0 and k["shared"] <= SHARED_BYTES[capability] for k in kernels)
