"""What this process may use."""

from pathlib import Path

import pytest

from moe2gguf.llama import _limits

GIB = 2**30


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        # a job of Slurm or systemd; the group above it has more
        ("0::/job/step\n", {"job/memory.max": 8 * GIB, "job/step/memory.max": 4 * GIB}, [4 * GIB, 8 * GIB]),
        # "max" is no limit
        ("0::/job\n", {"job/memory.max": "max"}, []),
        # a container of which only the root is there, under the host's name or its own
        ("0::/docker/0123\n", {"memory.max": 16 * GIB}, [16 * GIB]),
        ("0::/\n", {"memory.max": 16 * GIB}, [16 * GIB]),
        # version 1, beside version 2 without controllers
        (
            "4:memory:/docker/0123\n3:cpuset:/\n0::/\n",
            {"memory/docker/0123/memory.limit_in_bytes": 2 * GIB, "memory/memory.limit_in_bytes": 2**63 - 4096},
            [2 * GIB, 2**63 - 4096],
        ),
        ("", {}, []),
    ],
)
def test_limits_of_memory(membership: str, files: dict[str, object], limits: list[int], tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, value in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    assert list(_limits(tmp_path / "cgroup", tmp_path / "mount")) == limits


def test_without_control_groups(tmp_path: Path) -> None:
    assert list(_limits(tmp_path / "cgroup", tmp_path)) == []
