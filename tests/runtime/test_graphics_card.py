"""Logits wherever the layers and the experts lie: on a graphics card, in main memory, some here, some there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gguf_files import rewritten
from tests.runtime.ops import Type
from tests.runtime.test_grouped_files import evaluate
from tests.runtime.tiny_gguf import N_EXPERT, N_LAYER, write_model

pytestmark = pytest.mark.slow

# as --cpu-moe has it
CPU_MOE = r"cpu=\.ffn_(up|down|gate|gate_up)_(ch|)exps"
ALL = f"gpu_layers={N_LAYER + 1}"
PLACES = {
    "all on the card": (ALL,),
    "one layer on the card": ("gpu_layers=1",),
    # a batch goes to the card, and with it the experts that it selects; single tokens stay
    "experts in main memory": (ALL, CPU_MOE),
    "experts in main memory, computed there": (ALL, CPU_MOE, "stay"),
}


@pytest.mark.parametrize("place", PLACES)
def test_grouped_as_plain(ops, cards, tmp_path, place) -> None:
    """The same experts in three groups and in one tensor, which is what ggml had before."""
    plain = write_model(tmp_path / "plain.gguf", ops, groups=[(Type.Q4_K, N_EXPERT)])
    grouped = write_model(tmp_path / "grouped.gguf", ops, groups=[(Type.Q4_K, 3), (Type.Q4_K, 4), (Type.Q4_K, 1)])
    expected, buffers = evaluate(plain, *PLACES[place])
    assert f"{cards[0].name} model buffer size" in buffers
    found, buffers = evaluate(grouped, *PLACES[place])
    assert f"{cards[0].name} model buffer size" in buffers
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * expected.std())


@pytest.mark.parametrize("pattern", [r"_exps\.weight", r"^blk\.\d+\.ffn_(up|gate|down)_exps\.weight$", r"exps\.g1"])
def test_groups_of_a_tensor_stay_together(ops, cards, tmp_path, pattern) -> None:
    """Whether an override names the tensor or one of its groups."""
    grouped = write_model(tmp_path / "grouped.gguf", ops, groups=[(Type.Q4_K, 3), (Type.Q5_K, 5)])
    _, all_experts = evaluate(grouped, ALL, CPU_MOE)
    _, found = evaluate(grouped, ALL, f"cpu={pattern}")
    _, none = evaluate(grouped, ALL)
    assert found == all_experts != none


@pytest.mark.parametrize("place", PLACES)
def test_mixed_types_as_on_the_cpu(ops, cards, tmp_path, place) -> None:
    """Three types. The CPU rounds activations to 8 bits and the card need not, so that a token may change experts.

    A wrong row puts every token off by tens of per cent.
    """
    model = write_model(tmp_path / "mixed.gguf", ops, groups=[(Type.Q8_0, 3), (Type.F16, 1), (Type.Q6_K, 4)])
    expected, _ = evaluate(model)
    found, _ = evaluate(model, *PLACES[place])
    assert np.median(relative_error(found, expected)) < 0.05


def test_skipping_as_on_the_cpu(ops, cards, tmp_path) -> None:
    """Half of the slots skipped, in a batch and in single tokens."""
    model = write_model(tmp_path / "mixed.gguf", ops, groups=[(Type.Q8_0, 4), (Type.F16, 4)])
    skipping = rewritten(model, tmp_path / "skipping.gguf", arrays={"expert_skip_ratio": [0.6] * N_LAYER})
    expected, _ = evaluate(skipping)
    found, _ = evaluate(skipping, ALL)
    assert np.median(relative_error(found, expected)) < 0.05
    assert np.median(relative_error(found, evaluate(model, ALL)[0])) > 0.1  # skipping changes the logits


def relative_error(found_TV: np.ndarray, expected_TV: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found_TV - expected_TV, axis=1) / np.linalg.norm(expected_TV, axis=1)
