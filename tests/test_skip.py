"""Thresholds for skipping: harm against a loop over tokens, the choice against all there are, the share at run time."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe2gguf import skip
from moe2gguf.errors import Moe2ggufError
from moe2gguf.evaluate import evaluate
from moe2gguf.experts import ExpertBlock, find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_file import KeyValues, Target, write_gguf
from moe2gguf.pipeline import calibrated
from moe2gguf.provenance import skip_values
from moe2gguf.quantize import encode_tensors, plan_uniform
from moe2gguf.run import Run
from moe2gguf.settings import Calibration
from moe2gguf.skip import BINS, PROTECTING_QUANTILES, Skipping
from moe2gguf.source import Source, open_source
from moe2gguf.stats import CalibrationStats
from moe2gguf.stream import LayerStream
from tests.conftest import cheap_measurements

TOP_K = 3


@pytest.fixture(scope="module")
def block(tiny: Callable[..., Path]) -> ExpertBlock:
    with LayerStream(tiny("qwen3_moe", top_k=TOP_K)).layer(1) as layer:
        found = find_experts(layer)
        assert found is not None
        weights = {name: getattr(found.module, name).clone() for name in ("gate_up_proj", "down_proj")}
    for name, weight in weights.items():  # the stream has emptied them
        setattr(found.module, name, torch.nn.Parameter(weight, requires_grad=False))
    n_experts, n_columns = len(weights["down_proj"]), weights["gate_up_proj"].shape[2]
    return ExpertBlock(found.module, torch.nn.Linear(n_columns, n_experts))


def routed(block: ExpertBlock, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x_TD = torch.randn(n_tokens, block.router_ED.shape[1], generator=rng)
    scores_TE = torch.rand(n_tokens, block.n_experts, generator=rng) ** 4
    gates_TK, ids_TK = scores_TE.topk(TOP_K)
    return x_TD, ids_TK, gates_TK


def output(block: ExpertBlock, x_D: torch.Tensor, ids_K: torch.Tensor, gates_K: torch.Tensor) -> torch.Tensor:
    parts = [
        g * block.output(int(e), block.activation(int(e), x_D[None]))[0] for e, g in zip(ids_K, gates_K, strict=True)
    ]
    return torch.stack(parts).sum(0)


def test_harm_is_the_change_of_the_output(block: ExpertBlock) -> None:
    x_TD, ids_TK, gates_TK = routed(block, 40)
    # experts before 3 of sequence 0 are seldom selected: 40 tokens are two sequences
    counts_SE = torch.tensor([[1, 1, 1, 19, 19, 19], [10, 10, 10, 10, 10, 10]], dtype=torch.int32)
    harm = skip.drop_harm(block, x_TD, ids_TK, gates_TK, counts_SE)

    ratio_count_PB, ratio_harm_PB = np.zeros((2, len(PROTECTING_QUANTILES) + 1, BINS))
    rare_count_RB, rare_harm_RB = np.zeros((2, BINS + 1, BINS))
    norms = x_TD.abs().sum(1).numpy()
    for t in range(40):
        whole_D = output(block, x_TD[t], ids_TK[t], gates_TK[t])
        group = sum(norms[t] >= np.quantile(norms, q) for q in PROTECTING_QUANTILES)
        for k in range(1, TOP_K):  # sorted: the first is the largest
            kept = [i for i in range(TOP_K) if i != k]
            rescaled_K = gates_TK[t, kept] * gates_TK[t].sum() / gates_TK[t, kept].sum()
            change = (output(block, x_TD[t], ids_TK[t, kept], rescaled_K) - whole_D).square().sum().item()
            ratio = int(gates_TK[t, k] / gates_TK[t, 0] * BINS)
            ratio_count_PB[group, ratio] += 1
            ratio_harm_PB[group, ratio] += change
            often = counts_SE[t // 20, ids_TK[t, k]] / 10
            if often < 1:
                rare_count_RB[ratio, int(often * BINS)] += 1
                rare_harm_RB[ratio, int(often * BINS)] += change
    assert harm.sampled.tolist() == [40, TOP_K]
    assert np.array_equal(harm.ratio_count_PB, ratio_count_PB) and np.array_equal(harm.rare_count_RB, rare_count_RB)
    np.testing.assert_allclose(harm.ratio_harm_PB, ratio_harm_PB, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(harm.rare_harm_RB, rare_harm_RB, rtol=1e-4, atol=1e-6)


def options(shares: list[float], kls: list[float]) -> skip._Options:
    n = len(shares)
    return skip._Options(np.array(shares), np.array(kls), np.arange(n) / n, np.zeros(n))


def test_the_choice_is_the_cheapest_there_is() -> None:
    layers = {
        0: options([0, 0.02, 0.05, 0.08], [0, 0.001, 0.004, 0.02]),
        1: options([0, 0.03, 0.05, 0.10], [0, 0.010, 0.030, 0.10]),
        2: options([0, 0.01, 0.04, 0.10], [0, 0.003, 0.005, 0.07]),  # not convex: the second is worth nothing
    }
    for share in (0.05, 0.09, 0.1, 0.12, 0.2):
        found = skip._cheapest(layers, share, "--skip")
        every = [
            (sum(l.share_O[i] for l, i in zip(layers.values(), c, strict=True)),
             sum(l.kl_O[i] for l, i in zip(layers.values(), c, strict=True)))
            for c in itertools.product(range(4), repeat=3)
        ]  # fmt: skip
        assert found.share <= share
        # nothing leaves out as much for less, and nothing that fits leaves out much more
        assert found.kl <= min(kl for s, kl in every if s >= found.share - 1e-9) + 1e-9
        assert found.share >= max(s for s, _ in every if s <= share) - 0.03


def test_nothing_is_skipped_unasked(stats: CalibrationStats, source: Source) -> None:
    assert skip_values(source, stats, Skipping()) == {}
    none = skip.ratio_thresholds(stats, 0.0)
    assert none.share == none.kl == 0 and not any(none.limit_L.values()) and not any(none.protect_norm_L.values())


def test_shares_of_both_rules_together() -> None:
    """Of two experts half the activations can go, whichever rule takes them."""
    Skipping(0.3, 0.2).check(2)
    Skipping(0.5).check(2)
    with pytest.raises(Moe2ggufError, match=r"--skip-prompt 0.3 is out of reach: .* 0\.200 of activations are left"):
        Skipping(0.3, 0.3).check(2)


def test_out_of_reach(stats: CalibrationStats) -> None:
    with pytest.raises(Moe2ggufError, match=r"--skip 0.9 is out of reach: beside each token.s top expert 0\."):
        skip.ratio_thresholds(stats, 0.9)


def test_what_is_skipped_by_ratio_is_not_skipped_again(stats: CalibrationStats) -> None:
    """Counted by hand: what is rare in prompts and above the layer's ratio. None in the model's last layer."""
    none = skip.ratio_thresholds(stats, 0.0)
    ratio = skip.ratio_thresholds(stats, 0.2)
    assert any(ratio.limit_L.values())
    alone, beside = (skip.frequency_thresholds(stats, 0.1, limits, 3) for limits in (none, ratio))
    for found, limits in ((alone, none), (beside, ratio)):
        count, n_slots = 0.0, 0
        for index, layer in stats.layers.items():
            harm = layer.drop_harm
            for r in range(BINS + 1):
                for b in range(BINS):
                    is_left = r >= limits.limit_L[index] * BINS
                    count += harm.rare_count_RB[r, b] * (is_left and b < found.limit_L[index] * BINS)
            n_slots += int(harm.sampled.prod())
        assert found.share == pytest.approx(count / n_slots) and 0.05 < found.share <= 0.1
    assert any(beside.limit_L[index] > alone.limit_L[index] for index in stats.layers)
    last = max(stats.layers)
    assert skip.frequency_thresholds(stats, 0.05, none, last + 1).limit_L.keys() == stats.layers.keys() - {last}


@pytest.mark.parametrize(("model_type", "skipping"), [("qwen3_moe", Skipping(0.2)), ("olmoe", Skipping(0.35)),
                                                      ("qwen3_moe", Skipping(prompt_share=0.2))])  # fmt: skip
def test_the_runtime_skips_the_share(
    model_type: str,
    skipping: Skipping,
    needs_runtime: None,
    tiny: Callable[..., Path],
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the text it was calibrated with, in sequences as long."""
    monkeypatch.setenv("LLAMA_EXPERT_SKIP_COUNT", "1")
    source = open_source(tiny(model_type, top_k=TOP_K))
    calibration = Calibration((small_text,), n_sequences=8, sequence_tokens=32, n_probe_tokens=64)
    with cheap_measurements():
        stats = calibrated(source, calibration, Run(tmp_path, 2))
    # in the last layer, where few tokens are left, prompts skip nothing
    stats = dataclasses.replace(stats, layers={0: stats.layers[0]})
    values = skip_values(source, stats, skipping)

    def write(name: str, values: KeyValues) -> Path:
        plan = plan_uniform(source, QuantType.BF16)
        return write_gguf(source, plan, encode_tensors(plan, 2, lambda *_: None), values, Target(tmp_path / name))[0]

    base, skips = write("base.gguf", {}), write("skips.gguf", values)
    plain, found = evaluate(base, [base, skips], small_text.read_text(), n_ctx=32, n_threads=2)
    assert plain.skipped == 0 and plain.kld_mean == 0
    assert found.skipped == pytest.approx((skipping.share or skipping.prompt_share) / source.n_layer, abs=0.03)
    assert found.kld_mean > 0
