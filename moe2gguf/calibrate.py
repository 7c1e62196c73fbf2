"""One pass over the checkpoint: what the experts see, what each type would break, and how much the model minds.

Layer by layer, on the full-precision stream, three things are gathered while the layer is in memory: statistics and
importance (here), output errors of the candidate types (measure.py), probes of the KL divergence (probes.py). If asked
for, a second pass goes back through the layers (backward.py), and experts' errors are weighed by the loss's gradient.

Shapes: S sequences, L tokens of each, T = S·L tokens, D hidden, I intermediate, E experts, K selected per token,
J candidate types, n tokens of one expert or of a sample.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moe2gguf.backward import backward
from moe2gguf.capture import GradedCapture, LayerCapture, MatrixCapture, layer_sample_tokens, tokens_of
from moe2gguf.dtypes import DTYPES
from moe2gguf.experts import CPU, ExpertBlock, find_experts
from moe2gguf.ggml import QuantType, encoding_threads
from moe2gguf.interim import Interim, Passed
from moe2gguf.measure import Measure
from moe2gguf.moments import Sums
from moe2gguf.probes import Probes
from moe2gguf.run import Note, Progress, no_note
from moe2gguf.skip import drop_harm
from moe2gguf.stats import SHRINKAGE_TOKENS, CalibrationStats, ExpertStats, MatrixErrors
from moe2gguf.stream import LayerStream
from moe2gguf.text import CalibrationText

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
    note: Note = no_note,
) -> CalibrationStats:
    """Runs all of the text through the model once, and n_probe_tokens of it through the probes, whose hidden states
    lie in the scratch folder where they are many. Goes on from what an earlier run has left there."""
    n_sequences, length = text.tokens_SL.shape
    n_probe_sequences = min(n_sequences, max(1, n_probe_tokens // length))
    nothing = CalibrationStats(
        types=types,
        source_sha256=source_sha256,
        n_tokens=text.tokens_SL.size,
        n_probe_tokens=n_probe_sequences * length,
        seed=seed,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == stream.dtype),
        tokens_SL=text.tokens_SL.astype(np.int32),
        text=text.origin,
        digest=text.digest,
        request=request,
        layers={},
        importance={},
        errors={},
    )
    with encoding_threads(n_threads) as pool:
        forward = _Forward(stream, nothing, pool, n_probe_sequences, sensitivity, scratch_folder, n_threads, progress)
        interim = Interim(scratch_folder)
        if (passed := interim.load(nothing)) is not None:
            forward.go_on(passed)
            note(f"an earlier run passed {min(passed.n_passed, stream.n_layers)} of {stream.n_layers} layers: going on")
        while forward.n_passed <= stream.n_layers:
            if forward.n_passed < stream.n_layers:
                forward.pass_layer()
            else:
                forward.pass_head()
            interim.save(forward.n_passed, forward.stats, forward.rng.bit_generator.state, forward.streams())
        stats = forward.stats()
        if sensitivity == "gradient":
            stats = graded(stream, stats, forward.measure, forward.rng, scratch_folder, progress)
    return stats


class _Forward:
    """The way through all layers, and the head: what is found on it, and the streams."""

    def __init__(
        self,
        stream: LayerStream,
        nothing: CalibrationStats,
        pool: ThreadPoolExecutor,
        n_probe_sequences: int,
        sensitivity: str,
        scratch_folder: Path,
        n_threads: int,
        progress: Progress,
    ):
        self._stream, self._nothing, self._sensitivity, self._progress = stream, nothing, sensitivity, progress
        tokens_SL = torch.from_numpy(nothing.tokens_SL).long()
        n_sequences, length = tokens_SL.shape
        self._batch_sequences = batch_sequences(length)
        self.measure, self.rng = Measure(nothing.types, pool), np.random.default_rng(nothing.seed)
        # spread over the text, which may be several files of different kinds
        probed = torch.linspace(0, n_sequences - 1, n_probe_sequences).round().long()
        self._probes = Probes(stream, pool, self._batch_sequences, tokens_SL[probed], scratch_folder, n_threads)
        share_V = np.bincount(nothing.tokens_SL.ravel(), minlength=len(stream.embedding_VD)) / nothing.tokens_SL.size
        self._layers: dict[int, ExpertStats] = {}
        self._importance: dict[str, np.ndarray] = {}
        self._errors = {
            "embed_tokens": _unprobed(self.measure.embedding(stream.embedding_VD.to(CPU).numpy(), share_V, self.rng))
        }
        self._hidden_SLD = torch.cat([stream.embed(batch) for batch in tokens_SL.split(self._batch_sequences)])
        self.n_passed = 0

    def go_on(self, passed: Passed) -> None:
        self.n_passed, self.rng.bit_generator.state = passed.n_passed, passed.random_state
        self._layers, self._importance, self._errors = (
            dict(passed.stats.layers), dict(passed.stats.importance), dict(passed.stats.errors)
        )  # fmt: skip
        if passed.streams:
            self._hidden_SLD = passed.stream("text", self._hidden_SLD.shape)
            self._probes.go_on(passed)
        else:
            self._hidden_SLD = torch.empty(0)

    def stats(self) -> CalibrationStats:
        return dataclasses.replace(self._nothing, layers=self._layers, importance=self._importance, errors=self._errors)

    def streams(self) -> Iterator[tuple[str, torch.Tensor]]:
        """None after the head."""
        if self.n_passed <= self._stream.n_layers:
            yield "text", self._hidden_SLD
            yield from self._probes.streams()

    def pass_layer(self) -> None:
        stream, probes, index, n_sequences = self._stream, self._probes, self.n_passed, len(self._hidden_SLD)

        def step(what: str, done: int, total: int) -> None:
            self._progress(f"layer {index + 1}/{stream.n_layers}: {what}", done, total)

        with stream.layer(index) as layer:
            block = find_experts(layer)
            capture = LayerCapture(layer, block)
            with capture.listening():
                for start in range(0, n_sequences, self._batch_sequences):
                    step("statistics", start, n_sequences)
                    batch = self._hidden_SLD[start : start + self._batch_sequences]
                    batch.copy_(stream.run(index, layer, batch))
            probes.advance(index, layer, lambda done, total: step("probes", done, total))
            for path, matrix in capture.matrices.items():
                # Jamba multiplies with one without calling its module. And what chooses the tokens to attend to has no
                # effect where there are so few that all are chosen: it would seem to be worth nothing
                if matrix.n_tokens == 0 or "indexer." in path:
                    continue
                name = f"layers.{index}.{path}"
                self._importance[name] = matrix.importance_K()
                self._errors[name] = _unprobed(self.measure.matrix(matrix, self.rng))
                probes.branch_matrix(index, layer, name, matrix)
            if block is not None:
                self._layers[index] = stats = expert_statistics(block, capture, n_sequences)
                if self._sensitivity == "probe":
                    found = self.measure.experts(
                        block, capture, stats, self.rng, lambda done, total: step("errors", done, total)
                    )
                    self._errors[f"layers.{index}.gate_up"] = _unprobed(found.gate_up_EJ, found.gate_share_EJ)
                    self._errors[f"layers.{index}.down"] = _unprobed(found.down_EJ)
                probes.branch_experts(index, layer, block, stats)
            del capture
            probes.pass_layer(index, layer)
        self.n_passed += 1

    def pass_head(self) -> None:
        stream, length = self._stream, self._hidden_SLD.shape[1]
        head = MatrixCapture(stream.head)
        with head.listening():
            for batch in self._hidden_SLD.split(self._batch_sequences):
                # the head's inputs are what the final norm makes of the stream; a part of it is sample enough
                stream.logits(batch[:, -length // 8 :])
        self._importance["lm_head"] = head.importance_K()
        self._errors["lm_head"] = _unprobed(self.measure.matrix(head, self.rng))
        found = self._probes.finish(head, lambda done, total: self._progress("probes: KL divergence", done, total))
        # of experts whose errors are weighed by the gradient only these are known
        unknown = _unprobed(np.empty((0, len(self._nothing.types))))
        self._errors = {
            name: dataclasses.replace(
                self._errors.get(name, unknown),
                probe_types=tuple(probe.quant_type for probe in probes),
                probe_kl=np.array([probe.kl for probe in probes], np.float64),
            )
            for name, probes in found.items()
        }
        self._hidden_SLD = torch.empty(0)
        self.n_passed += 1


def batch_sequences(length: int) -> int:
    return max(1, BATCH_TOKENS // length)


def _unprobed(error_EJ: np.ndarray, gate_share_EJ: np.ndarray | None = None) -> MatrixErrors:
    return MatrixErrors(error_EJ, (), np.empty(0), gate_share_EJ)


@torch.inference_mode(False)
@torch.enable_grad()
def graded(
    stream: LayerStream,
    stats: CalibrationStats,
    measure: Measure,
    rng: np.random.Generator,
    scratch_folder: Path,
    progress: Progress,
) -> CalibrationStats:
    """With experts' errors, what they cost by the gradient of the loss on labels drawn from the model, and its second
    moments: the mean of its square is the curvature of the KL divergence."""
    n_sequences, length = stats.tokens_SL.shape
    chosen = torch.linspace(0, n_sequences - 1, min(n_sequences, max(1, GRADED_TOKENS // length))).round().long()
    tokens_SL = torch.from_numpy(stats.tokens_SL).long()[chosen]
    labels = torch.Generator().manual_seed(stats.seed)
    captures: dict[int, GradedCapture] = {}
    errors = dict(stats.errors)
    output_moments: dict[int, np.ndarray] = {}

    def loss(logits_lV: torch.Tensor, _sequence: int, _tokens: slice) -> torch.Tensor:
        # the same labels on any device
        label_l1 = torch.multinomial(logits_lV.detach().softmax(-1).to(CPU), 1, generator=labels).to(logits_lV.device)
        return torch.nn.functional.cross_entropy(logits_lV, label_l1[:, 0], reduction="sum")

    def prepare(index: int, _layer: nn.Module) -> None:
        progress(f"layer {index + 1}/{stream.n_layers}: gradients", 0, 1)

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
            found = measure.experts(
                block, capture, stats.layers[index], rng,
                lambda done, total: progress(f"layer {index + 1}/{stream.n_layers}: errors by gradient", done, total),
                gradient_TD,
            )  # fmt: skip
            for name, error_EJ, gate_share_EJ, graded_EJ in (
                (f"layers.{index}.gate_up", found.gate_up_EJ, found.gate_share_EJ, found.graded_gate_up_EJ),
                (f"layers.{index}.down", found.down_EJ, None, found.graded_down_EJ),
            ):
                errors[name] = dataclasses.replace(
                    errors[name], error_EJ=error_EJ, gate_share_EJ=gate_share_EJ, graded_EJ=graded_EJ
                )

    at_once = batch_sequences(length)
    hidden_SLD = torch.cat([stream.embed(batch) for batch in tokens_SL.split(at_once)])
    _, gradient_SLD = backward(
        stream, hidden_SLD, loss, prepare=prepare, finish=finish, batch_sequences=at_once,
        scratch_folder=scratch_folder, listen=listen,
    )  # fmt: skip
    if gradient_SLD.dim() > 3:  # hyper-connections: every stream begins as the embedding
        gradient_SLD = gradient_SLD.sum(2)
    if (tokens_SL[:, 0] == tokens_SL[0, 0]).all():  # what begins all text is one row, unlike all others
        gradient_SLD = gradient_SLD[:, 1:]
    sums = Sums.zeros(gradient_SLD.shape[-1])
    for gradient_LD in gradient_SLD:
        sums.add(gradient_LD)
    return dataclasses.replace(
        stats,
        errors=errors,
        embedding_moments_2DD=torch.stack([sums.fit_KK, sums.held_out_KK]).numpy(),
        output_moments=output_moments,
    )


def expert_statistics(block: ExpertBlock, capture: LayerCapture, n_sequences: int) -> ExpertStats:
    """Counts, gate weights and importance of one layer's experts over all tokens (MC-MoE, arXiv 2410.06270)."""
    x_TD, ids_TK, gates_TK = capture.routed()
    n_experts = block.n_experts
    sample = layer_sample_tokens(len(x_TD))
    sample_nD, probability_nE = x_TD[sample], torch.softmax(block.scores(capture.scored()[sample]), dim=-1)
    layer_sq_D = x_TD.square().mean(0)

    counts_SE = torch.zeros(n_sequences, n_experts, dtype=torch.int32)
    sequence_TK = torch.arange(len(ids_TK))[:, None].expand_as(ids_TK) // (len(ids_TK) // n_sequences)
    counts_SE.index_put_((sequence_TK, ids_TK), torch.ones_like(ids_TK, dtype=torch.int32), accumulate=True)

    gate_sum_E = np.zeros(n_experts)
    importance_gate_up_ED = np.zeros((n_experts, x_TD.shape[1]), np.float32)
    importance_down_EI = np.zeros((n_experts, block.n_intermediate), np.float32)
    for expert in range(n_experts):
        tokens_n, gates_n = tokens_of(expert, ids_TK, gates_TK)
        x_nD = x_TD[tokens_n]
        hidden_nI = block.activation(expert, x_nD)
        gate_sum_E[expert] = gates_n.sum()
        importance_gate_up_ED[expert] = shrunk_importance(x_nD, gates_n, layer_sq_D)
        sample_sq_I = _weighted_mean_square(block.activation(expert, sample_nD), probability_nE[:, expert])
        importance_down_EI[expert] = shrunk_importance(hidden_nI, gates_n, sample_sq_I)
    return ExpertStats(
        n_tokens_E=torch.bincount(ids_TK.flatten(), minlength=n_experts).numpy(),
        gate_sum_E=gate_sum_E,
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
