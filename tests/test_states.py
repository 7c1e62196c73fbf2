"""Hidden states beyond the limit lie on disk, and nobody can tell."""

import errno
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe2gguf.errors import OutputError
from moe2gguf.states import SCRATCH_PREFIX, States, by_sequence, remove_left_behind, write
from tests.test_calibrate import assert_same, run_calibration


@pytest.mark.parametrize("n_in_memory", [0, 2, 5])
def test_what_is_put_comes_back(n_in_memory: int, tmp_path: Path) -> None:
    given = {key: torch.randn(3, 8, 4) for key in "abcd"}
    states = States[str](n_in_memory * 3 * 8 * 4 * 4, tmp_path)
    for key, state_SLD in given.items():
        states[key] = torch.zeros_like(state_SLD)
    assert list(states) == list("abcd") and len(states) == 4
    for key in states:  # again, while they are gone through
        states[key] = given[key]
    assert len([*tmp_path.rglob("*.f32")]) == max(0, 4 - n_in_memory)
    for key, state_SLD in given.items():
        assert torch.equal(states[key], state_SLD)
        assert torch.equal(states.part(key, 1, slice(2, 6)), state_SLD[1:2, 2:6])
    assert torch.equal(states.parts("ca"), torch.cat([given["c"], given["a"]]))
    states.close()
    assert not [*tmp_path.iterdir()]


def test_several_streams_of_hidden_states(tmp_path: Path) -> None:
    """Of hyper-connections: (S, L, streams, D)."""
    given = {key: torch.randn(3, 8, 4, 5) for key in "ab"}
    states = States[str](given["a"].nbytes, tmp_path)
    for key, state in given.items():
        states[key] = state
    for key, state in given.items():
        assert torch.equal(states.part(key, 1, slice(2, 6)), state[1:2, 2:6])


def test_sequences_of_one_stream_by_themselves(tmp_path: Path) -> None:
    hidden_SLD = torch.randn(5, 8, 4)
    states = by_sequence(hidden_SLD, 2 * hidden_SLD[0].nbytes, tmp_path)
    assert len([*tmp_path.rglob("*.f32")]) == 3
    assert torch.equal(states.parts([4, 0, 2]), hidden_SLD[[4, 0, 2]])


def test_what_killed_runs_leave_goes(tmp_path: Path) -> None:
    """In the work folder and in a spool there; nothing else."""
    for folder in (tmp_path / f"{SCRATCH_PREFIX}1", tmp_path / "experts-1" / f"{SCRATCH_PREFIX}2"):
        folder.mkdir(parents=True)
        (folder / "0.f32").write_bytes(b"1234")
    (tmp_path / "experts-1" / "layer-0").write_bytes(b"")
    remove_left_behind(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["experts-1", "layer-0"]


def test_calibration_is_the_same_from_disk(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("qwen3_moe")
    in_memory = run_calibration(folder, 2, 32)
    monkeypatch.setattr("moe2gguf.probes.BRANCHES_BYTES", 100_000)  # of 17 streams of 32 KiB
    assert_same(run_calibration(folder, 2, 32), in_memory)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A limit on the size of a file stands in for it."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write 400,000 bytes to .*0\.f32: .*; make room there"):
            write(tmp_path / "0.f32", torch.zeros(1, 100, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_only_what_is_ours_and_of_no_running_process_is_removed(tmp_path: Path) -> None:
    """A user's folders stay, whatever they are called and wherever they lie, and so do those of a run beside."""
    ours = [tmp_path / f"{SCRATCH_PREFIX}x", tmp_path / f"experts-1/{SCRATCH_PREFIX}y"]
    others = [tmp_path / "streams-of-water", tmp_path / f"notes/{SCRATCH_PREFIX}z"]
    for folder in (*ours, *others):
        (folder / "deep").mkdir(parents=True)
    remove_left_behind(tmp_path)
    assert not any(folder.exists() for folder in ours) and all(folder.exists() for folder in others)
    states = States[str](0, tmp_path)
    states["a"] = torch.zeros(1, 2, 3)
    remove_left_behind(tmp_path)
    assert torch.equal(states["a"], torch.zeros(1, 2, 3))


def test_where_there_are_no_locks_all_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells then whether a run is killed or goes on."""

    def no_locks(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "")

    (left := tmp_path / f"{SCRATCH_PREFIX}x").mkdir()
    monkeypatch.setattr("fcntl.flock", no_locks)
    remove_left_behind(tmp_path)
    assert left.exists()
    monkeypatch.undo()
    remove_left_behind(tmp_path)
    assert not left.exists()
