"""Speeds of the types: what is timed, when it is timed anew, and what it does to a conversion."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moe2gguf import speeds
from moe2gguf.cli import main
from moe2gguf.costs import CANDIDATES, NATIVE, cost_table
from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType as Q
from moe2gguf.pipeline import convert
from moe2gguf.recipe import load_recipe
from moe2gguf.runtime import find_runtime
from moe2gguf.settings import Choice
from moe2gguf.source import Source, open_source
from moe2gguf.speeds import Conditions, Speeds, conditions, measure, measured_speeds, with_seconds
from moe2gguf.stats import CalibrationStats
from tests.conftest import Converted, cheap_measurements


@pytest.fixture(scope="module")
def asked(needs_runtime: None, tiny) -> Conditions:
    """Few bytes of every type."""
    return dataclasses.replace(conditions(open_source(tiny("qwen3_moe")), 1), n_experts=6, n_layers=1)


def test_every_type_is_timed_and_more_work_takes_longer(asked: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "N_ROUNDS", 3)
    said: list[int] = []
    small = measure(asked, lambda _, done, total: said.append(done))
    assert said == [0, 1, 2, 3]
    assert {*small.seconds_per_byte} == {*CANDIDATES, NATIVE}
    assert all(1e-12 < seconds < 1e-6 for seconds in small.seconds_per_byte.values())
    # per byte 16 times the rows are no slower; a program that forgot to compute them would be 16 times as fast
    large = measure(dataclasses.replace(asked, n_rows=16 * asked.n_rows), lambda *_: None)
    ratios = [large.seconds_per_byte[t] / small.seconds_per_byte[t] for t in CANDIDATES]
    assert 0.2 < np.median(ratios) < 2


def test_the_shape_is_the_models(needs_runtime: None, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tiny("qwen3_moe"))
    asked = conditions(source, 2)
    assert (asked.n_layers, asked.n_experts, asked.n_selected) == (2, 6, 2) and asked.in_cache
    assert (asked.n_rows, asked.n_columns, asked.n_threads) == (256, 256, 2)
    # of a large model a part, and nothing stays in the caches
    monkeypatch.setattr(speeds, "MAX_BYTES", 4 * 256 * 272)
    assert (conditions(source, 2).n_experts, conditions(source, 2).n_layers) == (4, 1)
    assert not conditions(source, 2).in_cache
    # columns that only types of small blocks fit are timed at the next number that all do
    assert conditions(open_source(tiny("granitemoe", hidden=96)), 1).n_columns == 256


def test_measured_once(needs_runtime: None, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, n_measured = open_source(tiny("qwen3_moe")), 0

    def count(wanted: Conditions, progress: object) -> Speeds:
        nonlocal n_measured
        n_measured += 1
        return Speeds(wanted, dict.fromkeys(CANDIDATES, float(n_measured)))

    monkeypatch.setattr(speeds, "measure", count)

    def get(n_threads: int = 2, save: bool = True) -> float:
        return measured_speeds(source, n_threads, tmp_path, save=save, progress=lambda *_: None).seconds_per_byte[
            Q.Q4_K
        ]

    assert get(save=False) == 1 and [*tmp_path.iterdir()] == []
    assert get() == get() == get(save=False) == 2
    assert get(n_threads=3) == get(n_threads=3) == 3
    (tmp_path / "speeds.json").write_text('{"format": 1, "cond')
    assert get() == 4
    content = json.loads((tmp_path / "speeds.json").read_text())
    for change in ({"format": 0}, {"conditions": content["conditions"] | {"processor": "another"}}):
        (tmp_path / "speeds.json").write_text(json.dumps(content | change))
        assert get() > 4


def test_a_runtime_that_fails(asked: Conditions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = dataclasses.replace(find_runtime(), libraries=tmp_path)
    monkeypatch.setattr(speeds, "find_runtime", lambda: elsewhere)
    with pytest.raises(Moe2ggufError, match=r"cannot be measured: .*run `moe2gguf runtime check`"):
        measure(asked, lambda *_: None)


def test_experts_count_as_often_as_they_are_selected(source: Source, stats: CalibrationStats) -> None:
    table = cost_table(source, stats)
    found = with_seconds(table, Speeds(conditions(source, 1), dict.fromkeys(CANDIDATES, 1.0)), stats)
    assert found.seconds_UJ is not None
    for u, unit in enumerate(table.units):
        if unit.expert is not None:
            share = stats.layers[unit.layer].n_tokens_E[unit.expert] / stats.n_tokens
        else:
            share = 0 if unit.name == "token_embd.weight" else 1
        assert found.seconds_UJ[u] == pytest.approx(share * table.bytes_UJ[u])
    # of each layer and projection as much as a token selects
    experts = [u for u, unit in enumerate(table.units) if (unit.layer, unit.projection) == (0, "down")]
    assert found.seconds_UJ[experts].sum(0) == pytest.approx(source.n_expert_used * table.bytes_UJ[experts[0]])
    # where the embedding is the output matrix too, it is multiplied with
    embedding = next(u for u, unit in enumerate(table.units) if unit.role == "embedding")
    tied = dataclasses.replace(table, units=tuple(dataclasses.replace(unit, role="output") if u == embedding else unit
                                                  for u, unit in enumerate(table.units)))  # fmt: skip
    found = with_seconds(tied, Speeds(conditions(source, 1), dict.fromkeys(CANDIDATES, 1.0)), stats)
    assert found.seconds_UJ is not None and found.seconds_UJ[embedding] == pytest.approx(table.bytes_UJ[embedding])


def test_a_conversion_and_its_replay(
    converted, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line: faster than the file of least KL divergence, at little more of it, and the same again."""
    done: Converted = converted("qwen3_moe")
    monkeypatch.setattr(speeds, "N_ROUNDS", 2)
    base = [str(done.folder), "--text", str(small_text), "--work", str(tmp_path / "work")]
    shape = ["--sequences", "4", "--length", "32", "--probe-tokens", "64", "--bits", "3.6", "--no-feedback"]
    with cheap_measurements():
        out = ["--outfile", str(tmp_path / "a.gguf"), "--recipe", str(tmp_path / "recipe.json")]
        result = CliRunner().invoke(main, ["convert", *base, *shape, "--objective", "speed", *out])
        assert result.exit_code == 0, result.output
        allocation = load_recipe(tmp_path / "recipe.json").allocation
        best = done.results["grouped"].allocation
        assert allocation.decode_seconds is not None and allocation.best_decode_seconds is not None
        assert allocation.decode_seconds < allocation.best_decode_seconds
        assert best.predicted_kl <= allocation.predicted_kl <= 1.1001 * best.predicted_kl
        assert allocation.tensor_bytes <= allocation.budget_bytes
        assert f"predicted decoding: {allocation.decode_seconds * 1e3:.3g} ms per token" in result.output
        written = json.loads(allocation.recipe)
        assert written["objective"] == "speed" and written["speeds"]["seconds_per_byte"].keys() == {
            t.name for t in (*CANDIDATES, NATIVE)
        }
        plan = CliRunner().invoke(main, ["convert", *base, *shape[:-1], "--objective", "speed", "--dry-run"])
        assert plan.exit_code == 0 and "ms per token in matrix products" in plan.output

        # another machine's speeds change nothing about a replay
        (tmp_path / "work" / "speeds.json").unlink()
        monkeypatch.setattr(speeds, "measure", None)
        again = ["--outfile", str(tmp_path / "b.gguf"), "--recipe", str(tmp_path / "recipe.json")]
        result = CliRunner().invoke(main, ["convert", *base, *again])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_other_allocators_know_no_speed(tiny, tmp_path: Path) -> None:
    with pytest.raises(Moe2ggufError, match="--allocator pmq knows no speed"):
        Choice(allocator="pmq", objective="speed")
    with pytest.raises(Moe2ggufError, match="--allocator uniform knows no speed"):
        convert(tiny("mixtral"), tmp_path / "a.gguf", bits=3, allocator="uniform", objective="speed")
