"""One pass over the checkpoint: what the experts see, what each type would break, and how much the model minds.

Layer by layer, on the full-precision stream, three things are gathered while the layer is in memory: statistics and
importance (here), output errors of the candidate types (measure.py), probes of the KL divergence (probes.py). If asked
for, a second pass goes back through the layers (backward.py), and experts' errors are weighed by the loss's gradient.

Shapes: S sequences, L tokens of each, T = S·L tokens, D hidden, I intermediate, E experts, K selected per token,
J candidate types, n tokens of one expert or of a sample.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moe2gguf.backward import backward
from moe2gguf.capture import GradedCapture, LayerCapture, MatrixCapture, layer_sample, tokens_of
from moe2gguf.experts import ExpertBlock, find_experts
from moe2gguf.ggml import QuantType, encoding_threads
from moe2gguf.measure import ExpertErrors, Measure
from moe2gguf.moments import Sums
from moe2gguf.probes import Probe, Probes
from moe2gguf.skip import drop_harm
from moe2gguf.stats import SHRINKAGE_TOKENS, CalibrationStats, ExpertStats, MatrixErrors
from moe2gguf.stream import LayerStream
from moe2gguf.text import CalibrationText

Progress = Callable[[str, int, int], None]  # what, done, total

RATIO_BINS = 64
NORM_QUANTILES = 101
# enough tokens to fill the cores, few enough that one batch's activations stay small beside the layer
BATCH_TOKENS = 4096
# through the model and back
GRADED_TOKENS = 16384


@torch.inference_mode()
def calibrate(
    stream: LayerStream,
    text: CalibrationText,
    types: tuple[QuantType, ...],
    *,
    source_sha256: str,
    request: str,
    n_probe_tokens: int,
    sensitivity: str = "probe",
    n_threads: int,
    seed: int,
    scratch_folder: Path,
    progress: Progress,
) -> CalibrationStats:
    """Runs all of the text through the model once, and n_probe_tokens of it through the probes, whose hidden states
    lie in the scratch folder where they are many."""
    tokens_SL = torch.from_numpy(text.tokens_SL)
    n_sequences, length = tokens_SL.shape
    rng = np.random.default_rng(seed)
    batch_sequences = max(1, BATCH_TOKENS // length)
    n_probe_sequences = min(n_sequences, max(1, n_probe_tokens // length))
    layers: dict[int, ExpertStats] = {}
    importance: dict[str, np.ndarray] = {}
    error_EJ: dict[str, np.ndarray] = {}
    expert_errors: dict[int, ExpertErrors] = {}
    graded: Graded | None = None

    with encoding_threads(n_threads) as pool:
        measure = Measure(types, pool)
        # spread over the text, which may be several files of different kinds
        probed = torch.linspace(0, n_sequences - 1, n_probe_sequences).round().long()
        probes = Probes(stream, pool, batch_sequences, tokens_SL[probed], scratch_folder)
        n_vocabulary = len(stream.embedding_VD)
        share_V = np.bincount(text.tokens_SL.ravel(), minlength=n_vocabulary) / text.tokens_SL.size
        error_EJ["embed_tokens"] = measure.embedding(stream.embedding_VD.numpy(), share_V, rng)

        hidden_SLD = torch.cat([stream.embed(batch) for batch in tokens_SL.split(batch_sequences)])
        for index in range(stream.n_layers):

            def step(what: str, done: int, total: int, index: int = index) -> None:
                progress(f"layer {index + 1}/{stream.n_layers}: {what}", done, total)

            with stream.layer(index) as layer:
                block = find_experts(layer)
                capture = LayerCapture(layer, block)
                with capture.listening():
                    for start in range(0, n_sequences, batch_sequences):
                        step("statistics", start, n_sequences)
                        batch = hidden_SLD[start : start + batch_sequences]
                        batch.copy_(stream.run(index, layer, batch))
                probes.advance(index, layer, lambda done, total: step("probes", done, total))
                for path, matrix in capture.matrices.items():
                    name = f"layers.{index}.{path}"
                    importance[name] = matrix.importance_K()
                    error_EJ[name] = measure.matrix(matrix, rng)
                    probes.branch_matrix(index, layer, name, matrix)
                if block is not None:
                    stats = expert_statistics(block, capture, n_sequences)
                    layers[index] = stats
                    if sensitivity == "probe":
                        expert_errors[index] = measure.experts(
                            block, capture, stats, rng, lambda done, total: step("errors", done, total)
                        )
                    probes.branch_experts(index, layer, block, stats)
                del capture
                probes.pass_layer(index, layer)

        head = MatrixCapture(stream.head)
        with head.listening():
            for batch in hidden_SLD.split(batch_sequences):
                # the head's inputs are what the final norm makes of the stream; a part of it is sample enough
                stream.logits(batch[:, -length // 8 :])
        importance["lm_head"] = head.importance_K()
        error_EJ["lm_head"] = measure.matrix(head, rng)
        found = probes.finish(head, lambda done, total: progress("probes: KL divergence", done, total))
        del hidden_SLD
        if sensitivity == "gradient":
            n_chosen = min(n_sequences, max(1, GRADED_TOKENS // length))
            chosen = torch.linspace(0, n_sequences - 1, n_chosen).round().long()
            graded = graded_errors(
                stream, tokens_SL[chosen], layers, measure, rng, seed, batch_sequences, scratch_folder, progress
            )
            expert_errors = graded.errors
    errors = {name: MatrixErrors(error_1J, *_columns(found[name])) for name, error_1J in error_EJ.items()}
    for index, of in expert_errors.items():
        gate_up, down = f"layers.{index}.gate_up", f"layers.{index}.down"
        errors[gate_up] = MatrixErrors(of.gate_up_EJ, *_columns(found[gate_up]), of.gate_share_EJ, of.graded_gate_up_EJ)
        errors[down] = MatrixErrors(of.down_EJ, *_columns(found[down]), None, of.graded_down_EJ)

    return CalibrationStats(
        types=types,
        source_sha256=source_sha256,
        n_tokens=tokens_SL.numel(),
        n_probe_tokens=n_probe_sequences * length,
        seed=seed,
        tokens_SL=text.tokens_SL.astype(np.int32),
        text=text.origin,
        digest=text.digest,
        request=request,
        layers=layers,
        importance=importance,
        errors={name: errors[name] for name in found},
        embedding_moments_2DD=None if graded is None else graded.embedding_moments_2DD,
        output_moments={} if graded is None else graded.output_moments,
    )


def _columns(probes: tuple[Probe, ...]) -> tuple[tuple[QuantType, ...], np.ndarray]:
    return tuple(probe.quant_type for probe in probes), np.array([probe.kl for probe in probes], np.float64)


@dataclasses.dataclass(frozen=True)
class Graded:
    """By layer, errors and what they cost by the loss's gradient, and its second moments: by the experts' output, f16
    (D, D), over the mean of the diagonal; by an embedding, f32 (2, D, D), of most tokens and of those held out."""

    errors: dict[int, ExpertErrors]
    output_moments: dict[int, np.ndarray]
    embedding_moments_2DD: np.ndarray


@torch.inference_mode(False)
@torch.enable_grad()
def graded_errors(
    stream: LayerStream,
    tokens_SL: torch.Tensor,
    layers: dict[int, ExpertStats],
    measure: Measure,
    rng: np.random.Generator,
    seed: int,
    batch_sequences: int,
    scratch_folder: Path,
    progress: Progress,
) -> Graded:
    """By the gradient of the loss on labels drawn from the model: the mean of its square is the curvature of the KL
    divergence."""
    labels = torch.Generator().manual_seed(seed)
    captures: dict[int, GradedCapture] = {}
    found: dict[int, ExpertErrors] = {}
    output_moments: dict[int, np.ndarray] = {}

    def loss(logits_lV: torch.Tensor, _sequence: int, _tokens: slice) -> torch.Tensor:
        label_l1 = torch.multinomial(logits_lV.detach().softmax(-1), 1, generator=labels)
        return torch.nn.functional.cross_entropy(logits_lV, label_l1[:, 0], reduction="sum")

    def listen(index: int, layer: nn.Module) -> AbstractContextManager:
        block = find_experts(layer)
        if block is None:
            return nullcontext()
        captures[index] = GradedCapture(block)
        return captures[index].listening()

    def finish(index: int, layer: nn.Module) -> None:
        if (block := find_experts(layer)) is None:
            return
        capture = captures.pop(index)
        with torch.no_grad():
            gradient_TD = capture.gradient_TD()
            moments_DD = gradient_TD.T @ gradient_TD
            output_moments[index] = (moments_DD / moments_DD.diagonal().mean().clamp_min(1e-30)).half().numpy()
            found[index] = measure.experts(
                block, capture, layers[index], rng,
                lambda done, total: progress(f"layer {index + 1}/{stream.n_layers}: errors by gradient", done, total),
                gradient_TD,
            )  # fmt: skip

    hidden_SLD = torch.cat([stream.embed(batch) for batch in tokens_SL.split(batch_sequences)])
    _, gradient_SLD = backward(
        stream, hidden_SLD, loss, prepare=lambda *_: None, finish=finish, batch_sequences=batch_sequences,
        scratch_folder=scratch_folder, listen=listen,
    )  # fmt: skip
    sums = Sums.zeros(gradient_SLD.shape[-1])
    for gradient_LD in gradient_SLD:
        sums.add(gradient_LD)
    return Graded(found, output_moments, torch.stack([sums.fit_KK, sums.held_out_KK]).numpy())


def expert_statistics(block: ExpertBlock, capture: LayerCapture, n_sequences: int) -> ExpertStats:
    """Counts, gate weights and importance of one layer's experts over all tokens (MC-MoE, arXiv 2410.06270)."""
    x_TD, ids_TK, gates_TK = capture.routed()
    n_experts, n_selected = block.n_experts, ids_TK.shape[1]
    probability_TE = torch.softmax(x_TD @ block.router_ED.T, dim=-1)
    sample_nD, sample_probability_nE = layer_sample(block, x_TD)
    layer_sq_D = x_TD.square().mean(0)

    counts_SE = torch.zeros(n_sequences, n_experts, dtype=torch.int32)
    sequence_TK = torch.arange(len(ids_TK))[:, None].expand_as(ids_TK) // (len(ids_TK) // n_sequences)
    counts_SE.index_put_((sequence_TK, ids_TK), torch.ones_like(ids_TK, dtype=torch.int32), accumulate=True)

    sorted_TK = gates_TK.sort(dim=-1, descending=True).values
    ratios_TK = sorted_TK[:, 1:] / sorted_TK[:, :1].clamp_min(1e-20)
    ratio_histogram = np.zeros((n_selected - 1, RATIO_BINS), np.int64)
    for k in range(n_selected - 1):
        ratio_histogram[k] = torch.histc(ratios_TK[:, k], RATIO_BINS, 0, 1).numpy()

    gate_sum_E, softmax_sum_E, output_norm_E, gated_norm_E = np.zeros((4, n_experts))
    importance_gate_up_ED = np.zeros((n_experts, x_TD.shape[1]), np.float32)
    importance_down_EI = np.zeros((n_experts, block.n_intermediate), np.float32)
    for expert in range(n_experts):
        tokens_n, gates_n = tokens_of(expert, ids_TK, gates_TK)
        x_nD = x_TD[tokens_n]
        hidden_nI = block.activation(expert, x_nD)
        norm_n = block.output(expert, hidden_nI).norm(dim=-1)
        gate_sum_E[expert] = gates_n.sum()
        softmax_sum_E[expert] = probability_TE[tokens_n, expert].sum()
        output_norm_E[expert] = norm_n.sum() / max(len(tokens_n), 1)
        gated_norm_E[expert] = (gates_n * norm_n).sum() / max(len(tokens_n), 1)
        importance_gate_up_ED[expert] = shrunk_importance(x_nD, gates_n, layer_sq_D)
        sample_sq_I = _weighted_mean_square(block.activation(expert, sample_nD), sample_probability_nE[:, expert])
        importance_down_EI[expert] = shrunk_importance(hidden_nI, gates_n, sample_sq_I)
    quantiles = np.quantile(x_TD.abs().sum(-1).numpy(), np.linspace(0, 1, NORM_QUANTILES))
    return ExpertStats(
        n_tokens_E=torch.bincount(ids_TK.flatten(), minlength=n_experts).numpy(),
        gate_sum_E=gate_sum_E,
        softmax_sum_E=softmax_sum_E,
        counts_SE=counts_SE.numpy(),
        ratio_histogram=ratio_histogram,
        token_norm_quantiles=quantiles.astype(np.float32),
        output_norm_E=output_norm_E.astype(np.float32),
        gated_norm_E=gated_norm_E.astype(np.float32),
        importance_gate_up_ED=importance_gate_up_ED,
        importance_down_EI=importance_down_EI,
        drop_harm=drop_harm(block, x_TD, ids_TK, gates_TK, counts_SE),
    )


def shrunk_importance(x_nK: torch.Tensor, gates_n: torch.Tensor, layer_sq_K: torch.Tensor) -> torch.Tensor:
    """Diagonal of (n·H_e + n₀·H_layer) / (n + n₀): both are means, the expert's weighted by its gate. -> f32 (K,)"""
    n = len(gates_n)
    return (n * _weighted_mean_square(x_nK, gates_n) + SHRINKAGE_TOKENS * layer_sq_K) / (n + SHRINKAGE_TOKENS)


def _weighted_mean_square(x_nK: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    return (weight_n @ x_nK.square()) / weight_n.sum().clamp_min(1e-20)
