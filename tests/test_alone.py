"""Two runs in one folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe2gguf.alone import alone_in
from moe2gguf.errors import Moe2ggufError

HOLDER = """
import sys
from pathlib import Path
from moe2gguf.alone import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(Moe2ggufError, match=r"another run works in .*; wait until it is done"), alone_in(tmp_path):
            pass
        said: list[str] = []

        def waiting() -> None:
            said.append("waiting")
            other.kill()  # the lock goes with it

        with alone_in(tmp_path, waiting):
            assert said == ["waiting"]
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
