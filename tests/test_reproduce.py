"""The scripts that reproduce tables on real models show, without network, a plan and what they would run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
# parameters as the models' cards state them
MODELS = [
    ("olmoe", "6.919 B", "allenai/OLMoE-1B-7B-0924"),
    pytest.param("mixtral_8x7b", "46.703 B", "mistralai/Mixtral-8x7B-v0.1", marks=pytest.mark.slow),
    pytest.param("qwen3_30b_a3b", "30.532 B", "Qwen/Qwen3-30B-A3B", marks=pytest.mark.slow),
    pytest.param("deepseek_v2_lite", "15.706 B", "deepseek-ai/DeepSeek-V2-Lite", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "n_params", "hub_id"), MODELS)
def test_dry_run(needs_runtime: None, tmp_path: Path, name: str, n_params: str, hub_id: str) -> None:
    done = subprocess.run(
        ["bash", SCRIPTS / f"reproduce_{name}.sh", "--dry-run", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{n_params} parameters" in done.stdout
    for expected in ("memory", "disk", "time", "curl -fL", f"moe2gguf.cli bench {hub_id} --bits", "Published"):
        assert expected in done.stdout
    assert list(tmp_path.iterdir()) == []
