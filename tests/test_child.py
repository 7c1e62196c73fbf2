"""A child's time and memory are its own."""

import sys
from pathlib import Path

import numpy as np
import pytest

from moe2gguf.child import run_child
from moe2gguf.errors import Moe2ggufError

MIB = 1 << 20


def test_output_log_and_environment(tmp_path: Path) -> None:
    log = tmp_path / "python.log"
    code = "import os, sys; print(os.environ['GREETING']); print('aside', file=sys.stderr)"
    done = run_child([sys.executable, "-c", code], log, what="python", environment={"GREETING": "hello"})
    assert set(done.output.splitlines()) == {"hello", "aside"}
    assert done.seconds > 0
    assert "hello" in log.read_text(encoding="utf-8") and log.read_text(encoding="utf-8").startswith(
        f"$ {sys.executable}"
    )


def test_memory_is_the_childs_not_ours(tmp_path: Path) -> None:
    ours = np.ones(300 * MIB, np.uint8)  # what a child forked from here would be charged with
    small = run_child([sys.executable, "-S", "-c", "pass"], tmp_path / "log", what="python")
    large = run_child([sys.executable, "-S", "-c", f"x = b'1' * {200 * MIB}"], tmp_path / "log", what="python")
    assert small.peak_rss_bytes < 100 * MIB < 200 * MIB <= large.peak_rss_bytes < 300 * MIB
    assert ours.size


def test_a_failure_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Moe2ggufError, match=r"the tool failed with exit status 3: no such thing \(all of its output"):
        run_child([sys.executable, "-c", "print('no such thing'); exit(3)"], tmp_path / "log", what="the tool")
    with pytest.raises(Moe2ggufError, match=r"failed with exit status 1"):
        run_child([tmp_path / "absent"], tmp_path / "log", what="the tool")
