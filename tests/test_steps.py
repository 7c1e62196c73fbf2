"""A step runs once for the same inputs and outputs."""

from pathlib import Path

import pytest

from moe2gguf.steps import Steps


@pytest.fixture
def counted(tmp_path: Path):
    """run(**inputs) -> (result, how often the work was done)."""
    n_done = 0
    output = tmp_path / "output"

    def work() -> dict:
        nonlocal n_done
        n_done += 1
        output.write_text(f"{n_done}")
        return {"n": n_done}

    def run(**inputs) -> tuple[int, int]:
        return Steps(tmp_path / "steps").run("one", inputs, [output], work)["n"], n_done

    return run, output


def test_unchanged_is_not_done_again(counted) -> None:
    run, _ = counted
    assert run(bits=2.5, names=["a"]) == (1, 1)
    assert run(bits=2.5, names=["a"]) == (1, 1)
    assert run(bits=3.0, names=["a"]) == (2, 2)
    assert run(bits=2.5, names=["a"]) == (3, 3)  # only the last is kept: its output is what lies there


def test_changed_files_count(counted, tmp_path: Path) -> None:
    run, output = counted
    given = tmp_path / "input"
    given.write_text("a")
    assert run(file=given) == (1, 1)
    given.write_text("ab")
    assert run(file=given) == (2, 2)
    output.write_text("changed by hand")
    assert run(file=given) == (3, 3)
    output.unlink()
    assert run(file=given) == (4, 4)
    assert run(file=given) == (4, 4)


def test_what_fails_is_not_remembered(tmp_path: Path) -> None:
    steps = Steps(tmp_path)

    def fails() -> dict:
        raise KeyboardInterrupt

    assert steps.run("one", {"n": 1}, [], lambda: {"n": 1}) == {"n": 1}
    with pytest.raises(KeyboardInterrupt):
        steps.run("one", {"n": 2}, [], fails)
    assert steps.run("one", {"n": 1}, [], lambda: {"n": 3}) == {"n": 3}
    assert steps.n_found == 0


def test_a_record_that_is_cut_off_is_none(tmp_path: Path) -> None:
    """As after a power failure."""
    Steps(tmp_path).run("one", {"n": 1}, [], lambda: {"n": 1})
    (tmp_path / "one.json").write_text("")
    steps = Steps(tmp_path)
    assert steps.run("one", {"n": 1}, [], lambda: {"n": 2}) == {"n": 2} and steps.n_found == 0


def test_only_what_an_earlier_run_did_counts_as_found(tmp_path: Path) -> None:
    first, second = Steps(tmp_path), Steps(tmp_path)
    for _ in range(2):
        first.run("one", {}, [], lambda: {})
    assert first.n_found == 0
    for _ in range(2):
        second.run("one", {}, [], lambda: {})
    assert second.n_found == 1
