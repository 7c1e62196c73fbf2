"""llama-quantize's opponents are as good as its options allow."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from moe2gguf import ggml
from moe2gguf.errors import BudgetError
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_reader import GgufTensor
from moe2gguf.peers import (
    LADDER,
    LADDER_OF_SMALL_BLOCKS,
    LADDER_WITHOUT_IMPORTANCE,
    LEAST_KLD,
    TensorClass,
    greedy_types,
    predicted_kld,
)


def tensor_class(name: str, n_rows: int, ladder: tuple[QuantType, ...] = LADDER, n_columns: int = 256) -> TensorClass:
    tensor = GgufTensor(name, QuantType.BF16, (n_rows, n_columns), Path("base.gguf"), 0)
    return TensorClass(name, (tensor,), ladder)


def probed_at(classes: list[TensorClass], kld: list[float], falls: list[float]) -> dict[str, dict[QuantType, float]]:
    """As if KLD fell by e^fall per bit exactly."""
    found = {}
    for c, at_two_bits, fall in zip(classes, kld, falls, strict=True):
        found[c.name] = {t: at_two_bits * math.exp(-fall * (ggml.bits_per_weight(t) - 2)) for t in c.probe_types()}
    return found


def test_ladders_rise() -> None:
    for ladder in (LADDER, LADDER_WITHOUT_IMPORTANCE, LADDER_OF_SMALL_BLOCKS):
        bits = [ggml.bits_per_weight(t) for t in ladder]
        assert bits == sorted(set(bits)) and len(bits) > 1


def test_two_probes_fix_the_line() -> None:
    ladders = (LADDER, LADDER_WITHOUT_IMPORTANCE, LADDER_OF_SMALL_BLOCKS)
    classes = [tensor_class(name, 8, ladder) for name, ladder in zip("abc", ladders, strict=True)]
    probed = probed_at(classes, [0.04, 0.02, 0.01], [1.2, 1.5, 0.9])
    for c, at_two_bits, fall in zip(classes, [0.04, 0.02, 0.01], [1.2, 1.5, 0.9], strict=True):
        low, high = c.probe_types()
        assert low != high and {low, high} <= set(c.ladder)
        for t in c.ladder:
            expected = at_two_bits * math.exp(-fall * (ggml.bits_per_weight(t) - 2))
            assert predicted_kld(probed[c.name], t) == pytest.approx(expected)


def test_noise_does_not_make_more_bits_worse() -> None:
    low, high = QuantType.IQ2_XXS, QuantType.IQ3_XXS
    # the second is above the first; below zero; both lost in noise
    for kld in ((0.01, 0.02), (0.01, -0.001), (-0.002, -0.001)):
        values = [predicted_kld(dict(zip((low, high), kld, strict=True)), t) for t in LADDER]
        assert values == sorted(values, reverse=True) and min(values) > 0
    assert predicted_kld({low: -1.0, high: -1.0}, low) == pytest.approx(LEAST_KLD)


def test_greedy_is_close_to_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    ladder = LADDER[1:6]
    for _ in range(20):
        classes = [tensor_class(f"t{i}", int(rng.integers(16, 200)), ladder) for i in range(5)]
        probed = probed_at(classes, rng.lognormal(-4, 1, 5).tolist(), rng.uniform(0.8, 1.8, 5).tolist())
        least, most = (sum(c.file_bytes(ladder[i]) for c in classes) for i in (0, -1))
        budget = int(rng.uniform(least, most))

        def cost(types: tuple[QuantType, ...], classes=classes, probed=probed) -> float:
            return sum(predicted_kld(probed[c.name], t) for c, t in zip(classes, types, strict=True))

        def n_bytes(types: tuple[QuantType, ...], classes=classes) -> int:
            return sum(c.file_bytes(t) for c, t in zip(classes, types, strict=True))

        best = min(cost(types) for types in itertools.product(ladder, repeat=5) if n_bytes(types) <= budget)
        chosen = greedy_types(classes, probed, budget)
        found = tuple(chosen[f"t{i}"] for i in range(5))
        assert n_bytes(found) <= budget
        assert cost(found) <= 1.25 * best  # the last step may not fit


def test_a_budget_out_of_reach() -> None:
    classes = [tensor_class("a", 64)]
    probed = probed_at(classes, [0.01], [1.0])
    least = classes[0].file_bytes(LADDER[0])
    assert greedy_types(classes, probed, least) == {"a": LADDER[0]}
    with pytest.raises(BudgetError, match=f"the smallest types take {least:,} bytes, more than the {least - 1:,}"):
        greedy_types(classes, probed, least - 1)
    assert greedy_types(classes, probed, 10**9) == {"a": LADDER[-1]}


def test_padding_counts() -> None:
    # 3 rows of 34 bytes are 102, and GGUF aligns to 32
    assert tensor_class("a", 3, LADDER_OF_SMALL_BLOCKS, 32).file_bytes(QuantType.Q8_0) == 128
