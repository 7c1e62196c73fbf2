"""The experts' bytes: error feedback under what the calibration text puts through them, ggml's bytes where they win.

One pass over the checkpoint, one layer in memory, a few experts at a time: the second moments of their inputs, a choice
of damping on tokens that the moments have not seen, the codes. Two streams run along, the model's own and one whose
experts are quantised: a matrix is fitted to what it will be given, so that it undoes what it can of the errors before
it (asymmetric calibration, GPTAQ, arXiv:2504.02692), the down projection those of its own gate and up. Where the
loss's gradients are known, rows make up for each other too.

Shapes: T tokens, K selected experts per token or columns of a matrix, D hidden, I intermediate, N rows, R sampled rows,
E experts, n tokens of one expert, B bytes of an encoded row.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import torch

from moe2gguf import backend, feedback, ggml
from moe2gguf.capture import ExpertCapture, spread_tokens, tokens_of
from moe2gguf.codec import CODECS
from moe2gguf.encode_matrices import (
    DAMPINGS,
    EMBEDDING_SAMPLE_ROWS,
    MAX_COLUMNS,
    SAMPLE_ROWS,
    InputMoments,
    encode,
)
from moe2gguf.experts import CPU, ExpertBlock
from moe2gguf.factors import PANEL
from moe2gguf.feedback import Curvature
from moe2gguf.ggml import QuantType
from moe2gguf.llama import memory_bytes
from moe2gguf.moments import HELD_OUT, Sums
from moe2gguf.run import Progress
from moe2gguf.settings import AFFINITIES
from moe2gguf.spool import Outcome, Spool
from moe2gguf.stats import SHRINKAGE_TOKENS
from moe2gguf.stream import LayerStream
from moe2gguf.streams import NO_MATRICES, Matrices, Streams, Types, put_back

MAX_HELD_OUT_TOKENS = 1024
FIT_SAMPLE_TOKENS = 512
# what an expert's second moments are taken of at most, and its activation's slopes
MAX_EXPERT_TOKENS = 16384
MAX_SLOPE_TOKENS = 2048
# of a chunk of experts: second moments, of which several live at a time, and what down projections are given
CHUNK_BYTES = 1 << 26
CHUNK_INPUT_BYTES = 1 << 28
# for each of so many threads, and so much memory of the computer, both once more
SCALE_THREADS, SCALE_MEMORY_BYTES = 4, 8 << 30
# of sampled rows, in a job
SAMPLE_LANES = 128


def chunk_scale(n_threads: int, device: torch.device) -> int:
    """By how much chunks are larger than CHUNK_BYTES and CHUNK_INPUT_BYTES: one expert has work for few threads."""
    if device.type != "cpu":
        return 1
    return max(1, min(n_threads // SCALE_THREADS, memory_bytes() // SCALE_MEMORY_BYTES))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Those of one expert: which of what is given, what they count, which are held out."""

    token_n: torch.Tensor
    weight_n: torch.Tensor
    held_out_n: torch.Tensor  # bool


@dataclasses.dataclass(frozen=True)
class Moments:
    """Weighted means of one matrix's inputs, experts together."""

    hessian_EKK: torch.Tensor  # of found foundᵀ
    cross_EKK: torch.Tensor  # of exact foundᵀ


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a matrix of each expert is given: by the model as it is, and by what is quantised before it."""

    exact_TK: torch.Tensor
    found_TK: torch.Tensor
    of: Mapping[int, Tokens]

    def error(self, expert: int, exact_RK: torch.Tensor, found_RK: torch.Tensor) -> float:
        """Mean squared output error of sampled rows on held-out tokens."""
        tokens = self.of[expert]
        held_out = tokens.held_out_n.nonzero()[:, 0]
        held_out = held_out[:: -(-len(held_out) // MAX_HELD_OUT_TOKENS) or 1]  # from all of the text
        token_n = tokens.token_n[held_out]
        miss_nR = self.exact_TK[token_n] @ exact_RK.T - self.found_TK[token_n] @ found_RK.T
        return float(tokens.weight_n[held_out] @ miss_nR.square().sum(1))

    def moments(self, device: torch.device) -> tuple[Moments, Moments]:
        """Of the tokens that are not held out, and of all."""
        exact_TK, found_TK = self.exact_TK.to(device), self.found_TK.to(device)
        own = self.of.values()
        token_n = torch.cat([t.token_n for t in own]).to(device)
        weight_n = torch.cat([t.weight_n / t.weight_n.sum().clamp_min(1e-20) for t in own]).to(device)
        held_out_n = torch.cat([t.held_out_n for t in own]).to(device)
        n_tokens_E = torch.tensor([len(t.token_n) for t in own], device=device)
        expert_n = torch.arange(len(own), device=device).repeat_interleave(n_tokens_E)

        def sums(part_n: torch.Tensor, hessian_EKK: torch.Tensor | None, cross_EKK: torch.Tensor | None) -> Moments:
            offset_E1 = torch.bincount(expert_n[part_n] + 1, minlength=len(own) + 1).cumsum(0)
            part, own_n = token_n[part_n], weight_n[part_n]
            return Moments(
                backend.moments(found_TK, part, offset_E1, own_n, total_EMK=hessian_EKK),
                backend.moments(found_TK, part, offset_E1, own_n, exact_TK, part, total_EMK=cross_EKK),
            )

        fit = sums(~held_out_n, None, None)
        whole = sums(held_out_n, fit.hessian_EKK.clone(), fit.cross_EKK.clone())
        # one at a time, whose order does not change from run to run
        share_E = torch.stack([part.sum() for part in (weight_n * ~held_out_n).split([len(t.token_n) for t in own])])
        for total_EKK in (fit.hessian_EKK, fit.cross_EKK):
            total_EKK /= share_E.clamp_min(1e-20)[:, None, None]
        return fit, whole


@torch.inference_mode()
def encode_experts(
    stream: LayerStream,
    tokens_SL: np.ndarray,
    types: Types,
    spool: Spool,
    *,
    affinity: str,
    device: torch.device,
    n_threads: int,
    progress: Progress,
    matrices: Matrices = NO_MATRICES,
    embedding_moments_2DD: np.ndarray | None = None,
    output_moments: Mapping[int, np.ndarray] = MappingProxyType({}),
) -> None:
    """Fills the spool with every expert in `types` and the matrices beside them, layer by layer; what is there only
    passes the tokens on. Moments are those of the loss's gradient (CalibrationStats): without, embeddings stay ggml's
    and an expert's rows do not make up for each other."""
    layers = {layer for layer, _, _ in types}
    missing = {layer for layer in layers if not spool.has(layer)}
    without = {layer for layer in range(stream.n_layers) if not spool.has_matrices(layer)}
    head = InputMoments({} if spool.has_matrices("lm_head") else {"lm_head": stream.head}, matrices)
    last = stream.n_layers - 1 if head.modules else max(missing | without, default=-1)
    with ggml.encoding_threads(n_threads) as pool:
        if embedding_moments_2DD is not None and not spool.has_matrices("embed_tokens"):
            progress("quantise embeddings", 0, 1)
            _put_embeddings(spool, stream.embedding_VD.to(CPU), embedding_moments_2DD, matrices, device, pool)
        if last >= 0:
            streams = Streams(stream, tokens_SL, matrices, spool, pool, progress)
        for index in range(last + 1):
            with streams.layer(index) as (layer, block):
                exact, found = ExpertCapture(block), ExpertCapture(block)
                modules = {f"layers.{index}.{path}": module for path, module in layer.named_modules()}
                given = InputMoments(modules if index in without else {}, matrices)
                with exact.listening(), given.listening():
                    streams.advance(streams.exact_SLD)
                if index in without:
                    streams.say("quantise matrices", 0, 1)
                    _put_matrices(spool, index, given, matrices, device, pool)
                del given
                streams.quantise_matrices()
                if block is not None and index in layers:
                    own = {(matrix, expert): t for (l, matrix, expert), t in types.items() if l == index}
                    if index in missing:
                        with found.listening():
                            streams.look(block)
                        gradient = output_moments.get(index)
                        with streams.put_away():
                            # no name for it: it must be gone before the next layer's activations come
                            spool.put(
                                index,
                                *_LayerWork(
                                    block,
                                    exact,
                                    found,
                                    tokens_SL.shape[1],
                                    affinity,
                                    device,
                                    pool,
                                    gradient,
                                    chunk_scale(n_threads, device),
                                ).encode(own, lambda done, total: streams.say("quantise", done, total)),
                            )
                    del exact, found
                    put_back(block, own, spool, index, pool)
                if index < last:
                    streams.advance(streams.found_SLD)
        if head.modules:
            with head.listening():
                streams.look_at_head()
        if not spool.has_matrices("lm_head"):
            _put_matrices(spool, "lm_head", head, matrices, device, pool)


def _put_embeddings(
    spool: Spool,
    weight_VD: torch.Tensor,
    moments_2DD: np.ndarray,
    matrices: Matrices,
    device: torch.device,
    pool: ThreadPoolExecutor,
) -> None:
    matrix = matrices.get("embed_tokens")
    if matrix is None or matrix.quant_type not in CODECS or weight_VD.shape[1] > MAX_COLUMNS:
        return
    fit_DD, held_out_DD = torch.from_numpy(moments_2DD)
    sums = Sums(fit_DD, held_out_DD)
    blocks_VB, outcome = encode("embed_tokens", weight_VD, matrix, sums, device, pool, n_sample=EMBEDDING_SAMPLE_ROWS)
    spool.put_matrices("embed_tokens", {"embed_tokens": (weight_VD.numpy(), blocks_VB)}, [outcome])


def _put_matrices(
    spool: Spool,
    part: int | str,
    given: InputMoments,
    matrices: Matrices,
    device: torch.device,
    pool: ThreadPoolExecutor,
) -> None:
    blocks, outcomes = given.encode(matrices, device, pool)
    weights = {name: (given.modules[name].weight.to(CPU).numpy(), blocks_NB) for name, blocks_NB in blocks.items()}
    spool.put_matrices(part, weights, outcomes)


class _LayerWork:
    def __init__(
        self,
        block: ExpertBlock,
        exact: ExpertCapture,
        found: ExpertCapture,
        length: int,
        affinity: str,
        device: torch.device,
        pool: ThreadPoolExecutor,
        output_moments_DD: np.ndarray | None = None,
        scale: int = 1,
    ):
        self._scale = scale
        self._block, self._affinity, self._device, self._pool = block, affinity, device, pool
        self._output_DD: torch.Tensor | None = None
        if output_moments_DD is not None:
            self._output_DD = torch.from_numpy(output_moments_DD).float().to(device)
            self._down_feedback_DD = feedback.row_feedback(self._output_DD[None])[0]
        self._exact_TD, _, _ = exact.routed()
        self._found_TD, self._ids_TK, self._gates_TK = found.routed()
        n_tokens = len(self._found_TD)
        run = max(1, min(length, n_tokens // (2 * HELD_OUT)))
        self._held_out_T = torch.arange(n_tokens) // run % HELD_OUT == HELD_OUT - 1
        # stands in for what a cold expert has not seen
        self._sample_n = spread_tokens(n_tokens, FIT_SAMPLE_TOKENS)
        self._sample_probability_nE = torch.softmax(block.scores(found.scored()[self._sample_n]), dim=-1)

    def encode(
        self, types: Mapping[tuple[str, int], QuantType], progress: Callable[[int, int], None]
    ) -> tuple[dict[tuple[str, int], np.ndarray], list[Outcome]]:
        blocks: dict[tuple[str, int], np.ndarray] = {}
        outcomes: list[Outcome] = []
        n_experts = self._block.n_experts
        for experts in self._chunks():
            progress(experts.start, n_experts)
            inputs = Inputs(self._exact_TD, self._found_TD, {e: self._tokens(e) for e in experts})
            first = self._block.first
            gate_up = {e: self._block.gate_up(e).chunk(len(first)) for e in experts}
            found = self._matrices(
                {(matrix, e): gate_up[e][i] for e in experts for i, matrix in enumerate(first)},
                types, inputs, self._gate_up_feedbacks(inputs), outcomes,
            )  # fmt: skip
            inputs = self._down_inputs(inputs, {key: decoded for key, (_, decoded) in found.items()})
            found |= self._matrices(
                {("down", e): self._block.down(e) for e in experts}, types, inputs,
                {} if self._output_DD is None else {("down", e): self._down_feedback_DD for e in experts}, outcomes,
            )  # fmt: skip
            blocks |= {key: block for key, (block, _) in found.items()}
        return blocks, outcomes

    def _chunks(self) -> Iterator[range]:
        """Experts in turn, as many at a time as CHUNK_BYTES and CHUNK_INPUT_BYTES allow, scaled, and one at least."""
        chunk_bytes, chunk_input_bytes = self._scale * CHUNK_BYTES, self._scale * CHUNK_INPUT_BYTES
        widest = max(self._found_TD.shape[1], self._block.n_intermediate)
        n_tokens_E = torch.bincount(self._ids_TK.flatten(), minlength=self._block.n_experts).clamp(
            max=MAX_EXPERT_TOKENS
        )
        start, n_tokens = 0, 0
        for expert, n_own in enumerate(n_tokens_E.tolist()):
            n_tokens += n_own + len(self._sample_n)
            input_bytes = 2 * 4 * n_tokens * self._block.n_intermediate
            is_full = (expert - start) * 4 * widest**2 >= chunk_bytes or input_bytes > chunk_input_bytes
            if expert > start and is_full:
                yield range(start, expert)
                start, n_tokens = expert, n_own + len(self._sample_n)
        yield range(start, self._block.n_experts)

    def _weights(self, gates_n: torch.Tensor) -> torch.Tensor:
        return gates_n ** AFFINITIES.index(self._affinity)

    def _tokens(self, expert: int) -> Tokens:
        """The expert's own, and so much of the layer's as shrinkage asks."""
        tokens_n, gates_n = tokens_of(expert, self._ids_TK, self._gates_TK)
        if len(tokens_n) > MAX_EXPERT_TOKENS:  # from all of the text
            kept_n = torch.linspace(0, len(tokens_n) - 1, MAX_EXPERT_TOKENS).round().long()
            tokens_n, gates_n = tokens_n[kept_n], gates_n[kept_n]
        own_n = self._weights(gates_n)
        probability_n = self._weights(self._sample_probability_nE[:, expert])
        # means, the layer's with the belief of SHRINKAGE_TOKENS tokens
        own_n = own_n / own_n.sum().clamp_min(1e-20) * len(tokens_n)
        layer_n = probability_n / probability_n.sum().clamp_min(1e-20) * SHRINKAGE_TOKENS
        token_n = torch.cat([tokens_n, self._sample_n])
        return Tokens(token_n, torch.cat([own_n, layer_n]), self._held_out_T[token_n])

    def _down_inputs(self, given: Inputs, decoded: Mapping[tuple[str, int], torch.Tensor]) -> Inputs:
        n_tokens = sum(len(tokens.token_n) for tokens in given.of.values())
        exact_nI, found_nI = torch.empty(2, n_tokens, self._block.n_intermediate)
        of: dict[int, Tokens] = {}
        stop = 0
        for expert, tokens in given.of.items():
            start, stop = stop, stop + len(tokens.token_n)
            exact_nI[start:stop] = self._block.activation(expert, given.exact_TK[tokens.token_n])
            x_nD = given.found_TK[tokens.token_n]
            biases = zip(self._block.first, self._block.first_biases(expert), strict=True)
            found_nI[start:stop] = self._block.activated(
                *(x_nD @ decoded[matrix, expert].T + bias for matrix, bias in biases)
            )
            of[expert] = dataclasses.replace(tokens, token_n=torch.arange(start, stop))
        return Inputs(exact_nI, found_nI, of)

    def _gate_up_feedbacks(self, inputs: Inputs) -> dict[tuple[str, int], torch.Tensor]:
        if self._output_DD is None:
            return {}
        output_DD = self._output_DD

        @torch.inference_mode()  # by thread
        def of_expert(expert: int) -> dict[tuple[str, int], torch.Tensor]:
            tokens = inputs.of[expert]
            n = len(tokens.token_n)
            kept_n = torch.linspace(0, n - 1, min(n, MAX_SLOPE_TOKENS)).round().long()
            x_nD, weight_n = inputs.exact_TK[tokens.token_n[kept_n]], tokens.weight_n[kept_n]
            moments = gate_up_moments(self._block, expert, x_nD, weight_n, output_DD)
            return {
                (matrix, expert): feedback.row_feedback(moments_II[None])[0]
                for matrix, moments_II in zip(self._block.first, moments, strict=True)
            }

        with feedback.single_threaded():
            return {key: found for own in self._pool.map(of_expert, inputs.of) for key, found in own.items()}

    def _matrices(
        self,
        weights: Mapping[tuple[str, int], torch.Tensor],
        types: Mapping[tuple[str, int], QuantType],
        inputs: Inputs,
        row_feedbacks: Mapping[tuple[str, int], torch.Tensor],
        outcomes: list[Outcome],
    ) -> dict[tuple[str, int], tuple[np.ndarray, torch.Tensor]]:
        """-> by matrix and expert, blocks uint8 (N, B) and what they decode to. Feedback is chosen, and damped, by a
        sample of rows, which does without that between them."""
        experts = list(inputs.of)
        most, whole = inputs.moments(self._device)
        rows = {
            key: torch.linspace(0, len(weight) - 1, min(SAMPLE_ROWS, len(weight))).round().long()
            for key, weight in weights.items()
        }
        sample = {key: weight[rows[key]] for key, weight in weights.items()}
        importance = _importance(experts, whole)
        # neither encoder knows the tokens that it is judged by
        plain = self._ggml(sample, types, _importance(experts, most))
        ggml_error = {key: inputs.error(key[1], sample[key], plain[key][1]) for key in weights}
        best_error, best_damping = dict(ggml_error), dict.fromkeys(weights, None)
        with_codec = {key for key in weights if types[key] in CODECS}
        for damping in DAMPINGS:
            tried = self._feedback(
                {key: sample[key] for key in weights if key in with_codec}, types, experts, most,
                dict.fromkeys(weights, damping), {},
            )  # fmt: skip
            for key, (_, decoded) in tried.items():
                error = inputs.error(key[1], sample[key], decoded)
                if error < best_error[key]:
                    best_error[key], best_damping[key] = error, damping
        del most
        chosen = {key: damping for key, damping in best_damping.items() if damping is not None}
        found = self._feedback({key: weights[key] for key in chosen}, types, experts, whole, chosen, row_feedbacks)
        found |= self._ggml({key: weight for key, weight in weights.items() if key not in chosen}, types, importance)
        outcomes += [
            Outcome(key[0], key[1], types[key].name, best_damping[key], best_error[key] / max(ggml_error[key], 1e-30))
            for key in weights
        ]
        return found

    def _ggml(
        self,
        weights: Mapping[tuple[str, int], torch.Tensor],
        types: Mapping[tuple[str, int], QuantType],
        importance: Mapping[int, np.ndarray],
    ) -> dict[tuple[str, int], tuple[np.ndarray, torch.Tensor]]:
        jobs = {
            key: self._pool.submit(ggml.encode, weight.numpy(), types[key], importance[key[1]])
            for key, weight in weights.items()
        }
        blocks = {key: job.result() for key, job in jobs.items()}
        return {
            key: (block, torch.from_numpy(ggml.decode(block, types[key], weights[key].shape[1])))
            for key, block in blocks.items()
        }

    def _feedback(
        self,
        weights: Mapping[tuple[str, int], torch.Tensor],
        types: Mapping[tuple[str, int], QuantType],
        experts: list[int],
        moments: Moments,
        dampings: Mapping[tuple[str, int], float],
        row_feedbacks: Mapping[tuple[str, int], torch.Tensor],
    ) -> dict[tuple[str, int], tuple[np.ndarray, torch.Tensor]]:
        """An expert's matrices of one type and damping go together, those of all experts in one batch, and all batches
        side by side."""
        together: dict[tuple[QuantType, float, int], list[tuple[str, int]]] = {}
        for key in weights:
            together.setdefault((types[key], dampings[key], key[1]), []).append(key)
        batches: dict[tuple[QuantType, float, int], list[list[tuple[str, int]]]] = {}
        for (quant_type, damping, _), keys in together.items():
            batches.setdefault((quant_type, damping, len(keys)), []).append(keys)
        curvatures: dict[float, tuple[list[int], Curvature]] = {}
        for damping in sorted({dampings[key] for key in weights}):
            wanted = sorted({key[1] for key in weights if dampings[key] == damping})
            places = feedback.neighbours([experts.index(e) for e in wanted])
            curvatures[damping] = wanted, feedback.curvature(moments.hessian_EKK[places], damping, self._pool)

        def encode(batch: tuple[QuantType, float, int]) -> torch.Tensor:
            quant_type, damping, _ = batch
            wanted, curvature = curvatures[damping]
            curvature = curvature.of(wanted.index(keys[0][1]) for keys in batches[batch])
            weight_EMNK = torch.stack([torch.stack([weights[key] for key in keys]) for keys in batches[batch]])
            weight_EMNK = weight_EMNK.to(self._device)

            def fit_in_place(i: int) -> None:
                place = experts.index(batches[batch][i][0][1])
                root_KK = curvature.root_EKK[curvature.places[i]]
                fit(weight_EMNK[i].flatten(0, 1), moments.hessian_EKK[place], moments.cross_EKK[place], root_KK)

            list(self._pool.map(fit_in_place, range(len(weight_EMNK))))
            if not row_feedbacks:
                weight_ENK = weight_EMNK.flatten(1, 2)
                blocks_ENB = feedback.quantize(weight_ENK, quant_type, curvature, self._pool, rows_per_job=SAMPLE_LANES)
                return blocks_ENB.view(*weight_EMNK.shape[:3], -1)
            feedbacks = [torch.stack([row_feedbacks[key] for key in keys]) for keys in batches[batch]]
            return feedback.quantize_by_rows(weight_EMNK, quant_type, curvature, torch.stack(feedbacks), self._pool)

        found: dict[tuple[str, int], tuple[np.ndarray, torch.Tensor]] = {}
        # a GPU has enough to do with one batch, and Triton's first launch of a kernel is not safe among threads
        n_at_once = len(batches) if self._device.type == "cpu" else 1
        with feedback.side_by_side(n_at_once, self._pool) as threads:
            for batch, blocks_EMNB in zip(batches, threads.map(encode, batches), strict=True):
                for keys, blocks_MNB in zip(batches[batch], blocks_EMNB.cpu().numpy(), strict=True):
                    for key, blocks_NB in zip(keys, blocks_MNB, strict=True):
                        decoded = ggml.decode(blocks_NB, batch[0], weights[key].shape[1])
                        found[key] = blocks_NB, torch.from_numpy(decoded)
        return found


def _importance(experts: Sequence[int], moments: Moments) -> dict[int, np.ndarray]:
    """By expert, f32 (K,)"""
    diagonals = moments.hessian_EKK.diagonal(dim1=1, dim2=2).clamp_min(1e-12).cpu().numpy()
    return dict(zip(experts, diagonals, strict=True))


def gate_up_moments(
    block: ExpertBlock, expert: int, x_nD: torch.Tensor, weight_n: torch.Tensor, output_DD: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Second moments of the loss's gradient by what gate and up give, f32 (I, I) each, on output_DD's device: through
    down, and times the activation's slope, as if the gradient and the tokens were independent."""
    share_n1 = (weight_n / weight_n.sum().clamp_min(1e-20))[:, None].to(output_DD.device)
    down_DI = block.down(expert).to(output_DD.device)
    through_II = down_DI.T @ output_DD @ down_DI
    slopes = [slope_nI.to(output_DD.device) for slope_nI in block.slopes(*block.pre_activation(expert, x_nD))]
    return tuple(through_II * (slope_nI.T @ (share_n1 * slope_nI)) for slope_nI in slopes)


@torch.inference_mode()
def fit(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, cross_KK: torch.Tensor, root_KK: torch.Tensor) -> None:
    """In place, to rows V that minimise E‖W x - V x̂‖² + ridge ‖W - V‖²: V = W + W (E[x x̂ᵀ] - E[x̂ x̂ᵀ]) (E[x̂ x̂ᵀ] +
    ridge)⁻¹, of which the root is given."""
    # rows first: they are seldom more than columns, and few where dampings are compared
    miss_NK = weight_NK @ (cross_KK - hessian_KK)
    owns = [slice(start, start + PANEL) for start in range(0, len(root_KK), PANEL)]
    for own in reversed(owns):
        miss_NK[:, own] -= miss_NK[:, own.stop :] @ root_KK[own, own.stop :].T
        miss_NK[:, own] = torch.linalg.solve_triangular(root_KK[own, own].T, miss_NK[:, own], upper=False, left=False)
    for own in owns:
        miss_NK[:, own] -= miss_NK[:, : own.start] @ root_KK[: own.start, own]
        miss_NK[:, own] = torch.linalg.solve_triangular(root_KK[own, own], miss_NK[:, own], upper=True, left=False)
    weight_NK += miss_NK


def describe(outcomes: Iterable[Outcome]) -> str:
    """How often feedback won, per type."""
    won, total = Counter[str](), Counter[str]()
    for outcome in outcomes:
        total[outcome.quant_type] += 1
        won[outcome.quant_type] += outcome.damping is not None
    order = sorted(total, key=lambda name: ggml.bits_per_weight(QuantType[name]))
    return (
        f"error feedback kept for {sum(won.values())} of {sum(total.values())} matrices, ggml's bytes for the rest "
        f"({', '.join(f'{name} {won[name]}/{total[name]}' for name in order)})"
    )
