"""The allocators that the global program is compared with."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe2gguf import allocators
from moe2gguf.allocate import Allocation, allocate
from moe2gguf.allocators import EXPERT_CLASSES, allocate_pmq, allocate_uniform
from moe2gguf.costs import CostTable, cost_table
from moe2gguf.errors import BudgetError, Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.pipeline import convert
from moe2gguf.source import Source, open_source
from moe2gguf.stats import CalibrationStats
from moe2gguf.verify import verify_file
from tests.conftest import N_EXPERTS, cheap_measurements


@pytest.fixture(scope="module")
def table(source: Source, stats: CalibrationStats) -> CostTable:
    return cost_table(source, stats)


def expert_types(allocation: Allocation, layer: int, projection: str) -> list[QuantType]:
    return [allocation.types[f"blk.{layer}.expert.{e}.{projection}"] for e in range(N_EXPERTS)]


def test_a_layers_program_against_all_choices() -> None:
    rng = np.random.default_rng(0)
    bytes_EC = np.tile([18, 21, 31], (4, 1))
    for available in (88, 95, 104, 124):
        cost_EC = np.sort(rng.random((4, 3)), 1)[:, ::-1]
        allowed = [
            c
            for c in itertools.product(range(3), repeat=4)
            if {1, 2} <= {*c} and sum(bytes_EC[0, j] for j in c) <= available
        ]
        best = min(allowed, key=lambda c: cost_EC[range(4), c].sum())
        assert tuple(allocators._layer_program(cost_EC, bytes_EC, available)) == best


def test_importance_is_the_papers(stats: CalibrationStats) -> None:
    """Every factor with its exponent, gamma too."""
    of_layer, importance_EC = stats.layers[1], allocators._importance_EC(stats, 1)
    for expert in range(N_EXPERTS):
        phi = of_layer.n_tokens_E[expert] / of_layer.n_tokens_E.sum()
        w = of_layer.gate_sum_E[expert] / of_layer.gate_sum_E.sum()
        for c, quant_type in enumerate(EXPERT_CLASSES):
            j = stats.types.index(quant_type)
            squared = sum(stats.errors[f"layers.1.{p}"].error_EJ[expert, j] for p in ("gate_up", "down"))
            assert importance_EC[expert, c] == pytest.approx(phi * w**1.5 * np.sqrt(squared) ** 2)


@pytest.mark.parametrize("bits", [2.3, 2.6, 3.0])
def test_pmq_keeps_its_rules(bits: float, table: CostTable, stats: CalibrationStats) -> None:
    budget_bytes = int(bits * table.n_params / 8)
    try:
        found = allocate_pmq(table, stats, budget_bytes, 7)
    except BudgetError:
        assert bits == 2.3  # the tiny model is half embedding
        return
    assert found.tensor_bytes <= budget_bytes and np.isfinite(found.predicted_kl)
    for layer in stats.layers:
        types = expert_types(found, layer, "gate_up")
        assert types == expert_types(found, layer, "down")
        assert {*EXPERT_CLASSES[1:]} <= {*types} <= {*EXPERT_CLASSES}
    best = allocate(table, budget_bytes)
    assert best.predicted_kl <= found.predicted_kl


def test_uniform_is_the_best_single_type(source: Source, table: CostTable, stats: CalibrationStats) -> None:
    budget_bytes = int(3.6 * table.n_params / 8)
    found = allocate_uniform(table, stats, budget_bytes, 7)
    types = {t for layer in stats.layers for p in ("gate_up", "down") for t in expert_types(found, layer, p)}
    assert len(types) == 1 and found.tensor_bytes <= budget_bytes
    # the program, allowed one type for experts at a time by the command line's own means
    for quant_type in table.types:
        pinned = cost_table(source, stats, overrides=((r"_exps", quant_type),))
        try:
            other = allocate(pinned, budget_bytes)
        except BudgetError:
            continue
        assert found.predicted_kl <= other.predicted_kl * (1 + 1e-4)


def test_what_pmq_cannot_do(source: Source, stats: CalibrationStats, table: CostTable) -> None:
    stock = cost_table(source, stats, layout="stock")
    with pytest.raises(Moe2ggufError, match="it needs --layout grouped"):
        allocate_pmq(stock, stats, 1 << 20, 7)
    narrow = cost_table(source, stats, types=(QuantType.Q4_K, QuantType.Q6_K))
    with pytest.raises(Moe2ggufError, match="IQ1_M, IQ2_XXS, IQ3_XXS, which --types"):
        allocate_pmq(narrow, stats, 1 << 20, 7)
    with pytest.raises(BudgetError, match="below what PMQ's classes reach"):
        allocate_pmq(table, stats, table.fixed_bytes, 7)
    with pytest.raises(BudgetError, match="no single type for all experts"):
        allocate_uniform(table, stats, table.fixed_bytes, 7)


@pytest.mark.parametrize("allocator", ["pmq", "uniform"])
def test_files_come_out_of_them(
    allocator: str, needs_runtime: None, tiny: Callable[..., Path], small_calibration, tmp_path: Path
) -> None:
    folder = tiny("qwen3_moe")
    with cheap_measurements():
        result = convert(
            folder, tmp_path / "out.gguf", bits=3.3, allocator=allocator, calibration=small_calibration,
            work_folder=tmp_path / "work",
        )  # fmt: skip
    assert verify_file(result.path, open_source(folder)).ok
    assert f'"allocator": "{allocator}"' in result.allocation.recipe
