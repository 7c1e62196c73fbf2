"""Thresholds for leaving out experts at run time: a share of all activations at the least predicted harm.

A token does without an expert whose gate weight is small against its largest one (ODP, MC-MoE, arXiv:2410.06270),
and in prompts without one that its sequence seldom selects (PESF, EAC-MoE, arXiv:2508.01625). Calibration measures what
either does to the output of the layer's experts; the layer's sensitivity makes that nats per token, so that layers
compare, and one price per activation left out finds the thresholds of all of them.

Shapes: L layers, n sampled tokens, K selected experts per token, E experts, D hidden, B bins of a ratio in [0, 1],
P classes of tokens by their norm, O options of a layer.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moe2gguf.capture import spread_tokens
from moe2gguf.errors import Moe2ggufError
from moe2gguf.experts import ExpertBlock
from moe2gguf.stats import CalibrationStats, DropHarm, MatrixErrors

BINS = 64
MAX_SAMPLE_TOKENS = 8192
# tokens whose L1 norm is above one of these quantiles may keep all their experts
PROTECTING_QUANTILES = (0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Skipping:
    """Shares of all expert activations to leave out; 0: none."""

    share: float = 0.0  # by the ratio of gate weights, for every token
    prompt_share: float = 0.0  # by the frequency of the expert, in prompts

    def check(self, n_selected: int) -> None:
        """Raises Moe2ggufError for shares of more than all experts but the top one of those selected."""
        _check_share(self.share, 1 - 1 / n_selected, "--skip")
        _check_share(self.prompt_share, max(0.0, 1 - 1 / n_selected - self.share), "--skip-prompt")


@dataclass(frozen=True)
class Thresholds:
    """By layer: all that one rule needs."""

    limit_L: dict[int, float]  # of the ratio, or of the frequency over the experts' mean
    protect_norm_L: dict[int, float]  # tokens of this L1 norm keep all experts; 0: no token does
    share: float  # of all activations, predicted
    kl: float  # nats per token, predicted


def drop_harm(block: ExpertBlock, x_TD: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor,
              counts_SE: torch.Tensor) -> DropHarm:  # fmt: skip
    """What leaving out single experts does to the output of a layer's experts, on a sample of tokens."""
    n_tokens, n_selected = ids_TK.shape
    sample_n = spread_tokens(n_tokens, MAX_SAMPLE_TOKENS)
    x_nD, ids_nK, gates_nK = x_TD[sample_n], ids_TK[sample_n], gates_TK[sample_n]
    harm_nK = _harm(block, x_nD, ids_nK, gates_nK)
    gates_nK = block.chosen_by(ids_nK, gates_nK)
    top_n1 = gates_nK.argmax(1, keepdim=True)
    other_nK = torch.ones_like(ids_nK, dtype=torch.bool).scatter(1, top_n1, False)

    norm_n = x_nD.abs().sum(1)
    protect_norm_P = torch.from_numpy(np.quantile(norm_n.numpy(), PROTECTING_QUANTILES)).float()
    class_nK = torch.bucketize(norm_n, protect_norm_P, right=True)[:, None].expand_as(ids_nK)
    ratio_nK = gates_nK / gates_nK.gather(1, top_n1).clamp_min(1e-20)
    sequence_n = sample_n // (n_tokens // len(counts_SE))
    often_nK = counts_SE[sequence_n[:, None], ids_nK] * (counts_SE.shape[1] / counts_SE[0].sum())

    def histogram(value_nK: torch.Tensor, class_nK: torch.Tensor, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
        bin_nK = (value_nK * BINS).long().clamp(max=BINS)  # the last bin: what no threshold reaches
        flat = (class_nK * (BINS + 1) + bin_nK)[other_nK]
        count, harm = (
            torch.bincount(flat, weights, n_classes * (BINS + 1)).view(n_classes, -1)[:, :BINS].double().numpy()
            for weights in (None, harm_nK[other_nK].double())
        )
        return count, harm

    ratio_count_PB, ratio_harm_PB = histogram(ratio_nK, class_nK, len(protect_norm_P) + 1)
    rare_count_RB, rare_harm_RB = histogram(often_nK, (ratio_nK * BINS).long().clamp(max=BINS), BINS + 1)
    return DropHarm(
        np.array([len(sample_n), n_selected]), protect_norm_P.numpy(), ratio_count_PB, ratio_harm_PB,
        rare_count_RB, rare_harm_RB,
    )  # fmt: skip


def _harm(block: ExpertBlock, x_nD: torch.Tensor, ids_nK: torch.Tensor, gates_nK: torch.Tensor) -> torch.Tensor:
    """Squared change of the output where the slot is left out and the others get its weight, f32 (n, K)."""
    output_nD = torch.zeros_like(x_nD)

    def gated(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        token_m, slot_m = torch.where(ids_nK == expert)
        output_mD = block.output(expert, block.activation(expert, x_nD[token_m]))
        return token_m, slot_m, gates_nK[token_m, slot_m, None] * output_mD

    for expert in range(block.n_experts):
        token_m, _, gated_mD = gated(expert)
        output_nD.index_add_(0, token_m, gated_mD)
    chosen_nK = block.chosen_by(ids_nK, gates_nK)
    total_n1 = chosen_nK.sum(1, keepdim=True)
    rescaled_nK = total_n1 / (total_n1 - chosen_nK).clamp_min(1e-20)
    harm_nK = torch.empty_like(gates_nK)
    for expert in range(block.n_experts):
        token_m, slot_m, gated_mD = gated(expert)
        rescaled_m1 = rescaled_nK[token_m, slot_m, None]
        changed_mD = (rescaled_m1 - 1) * output_nD[token_m] - rescaled_m1 * gated_mD
        harm_nK[token_m, slot_m] = changed_mD.square().sum(1)
    return harm_nK


@dataclass(frozen=True)
class _Options:
    """What a layer may do, by what it leaves out; the first: nothing."""

    share_O: np.ndarray  # of all layers' activations
    kl_O: np.ndarray
    limit_O: np.ndarray
    protect_norm_O: np.ndarray


def ratio_thresholds(stats: CalibrationStats, share: float) -> Thresholds:
    """Raises Moe2ggufError for a share that no thresholds below 1 reach."""
    return _cheapest({index: _ratio_options(stats, index) for index in stats.layers}, share, "--skip")


def frequency_thresholds(stats: CalibrationStats, share: float, ratio: Thresholds, n_layers: int) -> Thresholds:
    """As ratio_thresholds, of activations that those leave. None for the last of the model's layers, which in a prompt
    has only the tokens with an output, and none of its frequencies."""
    layers = (index for index in stats.layers if index < n_layers - 1)
    options = {index: _frequency_options(stats, index, ratio.limit_L.get(index, 0.0)) for index in layers}
    return _cheapest(options, share, "--skip-prompt")


def _ratio_options(stats: CalibrationStats, layer: int) -> _Options:
    harm = stats.layers[layer].drop_harm
    # class p and those above it are protected
    options = [
        _cumulated(stats, layer, harm.ratio_count_PB[:p].sum(0), harm.ratio_harm_PB[:p].sum(0), norm)
        for p, norm in enumerate([*harm.protect_norm_P, 0.0], 1)
    ]
    return _Options(*(np.concatenate(x) for x in zip(*(vars(o).values() for o in options), strict=True)))


def _frequency_options(stats: CalibrationStats, layer: int, ratio_limit: float) -> _Options:
    harm, left = stats.layers[layer].drop_harm, slice(round(ratio_limit * BINS), None)
    return _cumulated(stats, layer, harm.rare_count_RB[left].sum(0), harm.rare_harm_RB[left].sum(0), 0.0)


def _cumulated(
    stats: CalibrationStats, layer: int, count_B: np.ndarray, harm_B: np.ndarray, protect_norm: float
) -> _Options:
    n_tokens, n_selected = stats.layers[layer].drop_harm.sampled
    share_O = np.concatenate([[0.0], count_B.cumsum()]) / (n_tokens * n_selected * len(stats.layers))
    error_O = np.concatenate([[0.0], harm_B.cumsum()]) / n_tokens
    limit_O = np.arange(BINS + 1) / BINS
    return _Options(
        share_O,
        error_O * _sensitivity(stats.errors[f"layers.{layer}.down"], stats),
        limit_O,
        np.where(limit_O > 0, protect_norm, 0.0),
    )


def _sensitivity(errors: MatrixErrors, stats: CalibrationStats) -> float:
    """KL per squared error of the output of the layer's experts: the mean of the probes' in the logarithm."""
    probe_error = errors.error_EJ.sum(0)[[stats.types.index(t) for t in errors.probe_types]]
    return float(np.exp(np.log(np.maximum(errors.probe_kl, 1e-9) / np.maximum(probe_error, 1e-30)).mean()))


def _check_share(share: float, most: float, name: str) -> None:
    if share > most:
        raise Moe2ggufError(
            f"{name} {share:g} is out of reach: beside each token's top expert {most:.3f} of activations are left"
        )


def _cheapest(options: dict[int, _Options], share: float, name: str) -> Thresholds:
    most = sum(o.share_O.max() for o in options.values())
    _check_share(share, most, name)

    def chosen(price: float) -> dict[int, int]:
        return {index: int((o.kl_O - price * o.share_O).argmin()) for index, o in options.items()}

    def total(choice: dict[int, int]) -> float:
        return sum(options[index].share_O[i] for index, i in choice.items())

    low, high = 0.0, 1.0
    while total(chosen(high)) < share and high < 1e12:
        low, high = high, 4 * high
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if total(chosen(price)) > share else (price, high)
    choice = chosen(low)
    # what is left of the share goes where it costs least
    while steps := [
        ((o.kl_O[i] - o.kl_O[choice[index]]) / (o.share_O[i] - o.share_O[choice[index]]), index, i)
        for index, o in options.items()
        for i in range(len(o.share_O))
        if 0 < o.share_O[i] - o.share_O[choice[index]] <= share - total(choice)
    ]:
        _, index, i = min(steps)
        choice[index] = i
    return Thresholds(
        {index: float(options[index].limit_O[i]) for index, i in choice.items()},
        {index: float(options[index].protect_norm_O[i]) for index, i in choice.items()},
        total(choice),
        sum(float(options[index].kl_O[i]) for index, i in choice.items()),
    )
