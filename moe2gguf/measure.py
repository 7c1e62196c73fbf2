"""Output errors of candidate types, measured with ggml's encoder on sampled tokens and rows.

Rows of one matrix are quantised independently, so their errors add up as squares: a sample of rows, scaled, will do.
Of an expert's rows those that matter more are more likely in it.

Shapes: T tokens, D hidden, I intermediate, E experts, K columns, J candidate types, n sampled tokens, R sampled rows.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from moe2gguf import ggml
from moe2gguf.capture import ExpertCapture, MatrixCapture, layer_sample_tokens, tokens_of
from moe2gguf.experts import CPU, ExpertBlock
from moe2gguf.feedback import single_threaded
from moe2gguf.ggml import QuantType
from moe2gguf.stats import SHRINKAGE_TOKENS, ExpertStats

MAX_ERROR_TOKENS = 256
# gradients differ more from token to token than errors do
MAX_GRADED_TOKENS = 1024
# of an expert's gate, up and down each
MAX_ERROR_ROWS = 64
MAX_MATRIX_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class ExpertErrors:
    """Of one layer's experts, f64 (E, J) each."""

    gate_up_EJ: np.ndarray  # the expert's share of the block's mean squared output error per token
    down_EJ: np.ndarray
    gate_share_EJ: np.ndarray  # of the errors of gate and of up, each alone, the part that is gate's
    graded_gate_up_EJ: np.ndarray | None = None  # what the errors cost by the gradient, nats per token
    graded_down_EJ: np.ndarray | None = None


# in their order in `_Expert.errors`
N_ERRORS = len(dataclasses.fields(ExpertErrors))


class Measure:
    """ggml releases the GIL, so a pool of threads uses all cores."""

    def __init__(self, types: tuple[QuantType, ...], pool: ThreadPoolExecutor):
        self.types = types
        self.pool = pool

    def embedding(self, weight_VD: np.ndarray, share_V: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A looked-up row errs by itself, as often as its token occurs. -> (1, J)"""
        rows = rng.choice(len(weight_VD), MAX_MATRIX_ROWS, p=share_V)
        identity_KK = np.eye(weight_VD.shape[1], dtype=np.float32)
        jobs = [
            self.pool.submit(_matrix_error, weight_VD[rows], t, None, identity_KK, 1 / len(rows)) for t in self.types
        ]
        return np.array([[job.result() for job in jobs]])

    def matrix(self, matrix: MatrixCapture, rng: np.random.Generator) -> np.ndarray:
        """-> (1, J): mean ‖Δx‖² over the sampled inputs."""
        weight_NK, x_nK = matrix.module.weight.to(CPU).numpy(), matrix.sample_nK().numpy()
        rows = _sample(rng, len(weight_NK), MAX_MATRIX_ROWS)
        scale = len(weight_NK) / len(rows) / len(x_nK)
        importance_K = matrix.importance_K()
        jobs = [self.pool.submit(_matrix_error, weight_NK[rows], t, importance_K, x_nK, scale) for t in self.types]
        return np.array([[job.result() for job in jobs]])

    def experts(
        self,
        block: ExpertBlock,
        capture: ExpertCapture,
        stats: ExpertStats,
        rng: np.random.Generator,
        progress: Callable[[int, int], None],
        gradient_TD: torch.Tensor | None = None,
    ) -> ExpertErrors:
        """gradient_TD: of the loss, for labels drawn from the model's own distribution, by the block's output."""
        x_TD, ids_TK, gates_TK = capture.routed()
        sample = layer_sample_tokens(len(x_TD))
        probability_nE = torch.softmax(block.scores(capture.scored()[sample]), dim=-1)
        # as large as gate weights are, however those are made of scores
        # (by numpy: in torch's sum of so many the last digits are the number of threads')
        mean_gate = float(gates_TK.sum(1).numpy().mean())
        probability_nE *= mean_gate / probability_nE.topk(ids_TK.shape[1]).values.sum(1).mean()
        jobs: list[Future[np.ndarray]] = []
        found = np.empty((N_ERRORS, block.n_experts, len(self.types)))
        with single_threaded():
            for expert in range(block.n_experts):
                tokens_n, gates_n = tokens_of(expert, ids_TK, gates_TK)
                n = len(tokens_n)
                keep = torch.from_numpy(_sample(rng, n, MAX_ERROR_TOKENS if gradient_TD is None else MAX_GRADED_TOKENS))
                # its own tokens weigh g², then tokens of the layer p², blended as the importance is; one token is
                # added to the count, lest an expert that calibration never met looks free
                own_n = gates_n[keep].square() * n / max(len(keep), 1)
                layer_n = probability_nE[:, expert].square() * SHRINKAGE_TOKENS / len(probability_nE)
                weight_n = torch.cat([own_n, layer_n]) / (n + SHRINKAGE_TOKENS) * (n + 1) / len(x_TD)
                token_n = torch.cat([tokens_n[keep], sample])
                of_expert = _Expert(
                    block, expert, x_TD, gradient_TD, token_n, weight_n, rng.random(),
                    stats.importance_gate_up_ED[expert], stats.importance_down_EI[expert],
                )  # fmt: skip
                jobs.append(self.pool.submit(of_expert.errors, self.types))
            for expert, job in enumerate(jobs):
                progress(expert, len(jobs))
                found[:, expert] = job.result()
        gate_up_EJ, down_EJ, gate_share_EJ, *graded = found
        return ExpertErrors(gate_up_EJ, down_EJ, gate_share_EJ, *([None, None] if gradient_TD is None else graded))


def _sample(rng: np.random.Generator, n: int, n_max: int) -> np.ndarray:
    """Sorted indices: all n, or n_max of them."""
    return np.arange(n) if n <= n_max else np.sort(rng.choice(n, n_max, replace=False))


def _matrix_error(
    weight_RK: np.ndarray, quant_type: QuantType, importance_K: np.ndarray | None, x_nK: np.ndarray, scale: float
) -> float:
    """inf where the columns do not divide into the type's blocks."""
    if not ggml.fits(quant_type, weight_RK.shape[1]):
        return np.inf
    delta_RK = ggml.round_trip(weight_RK, quant_type, importance_K) - weight_RK
    return float(np.square(x_nK @ delta_RK.T).sum() * scale)


def likely_sample(matters_R: torch.Tensor, n_max: int, start: float) -> tuple[np.ndarray, torch.Tensor]:
    """Sorted indices, all or n_max of them, and for how many rows each stands: systematic sampling from a start in
    [0, 1), with probabilities as what the rows are thought to contribute, but a tenth alike."""
    n = len(matters_R)
    if n <= n_max:
        return np.arange(n), torch.ones(n)
    share_R = matters_R.double().numpy()
    share_R = 0.9 * share_R / max(share_R.sum(), 1e-300) + 0.1 / n
    likely_R = np.zeros(n)
    while (free_R := likely_R < 1).any():
        likely_R[free_R] = share_R[free_R] / share_R[free_R].sum() * (n_max - (~free_R).sum())
        if likely_R.max() <= 1:
            break
        likely_R = likely_R.clip(max=1)
    rows = np.searchsorted(likely_R.cumsum(), start + np.arange(n_max), side="right").clip(max=n - 1)
    return rows, torch.from_numpy(1 / likely_R[rows]).float()


def _moved(block: ExpertBlock, parts: tuple[torch.Tensor, ...], hidden_nI: torch.Tensor) -> torch.Tensor:
    """(n, I): squared change of the hidden units where all that gate, or up, gives is off by as much of its size."""
    moved_nI = torch.zeros_like(hidden_nI)
    for i, part_nI in enumerate(parts):
        off_I = 0.1 * part_nI.square().mean(0).sqrt()
        moved_nI += (block.activated(*parts[:i], part_nI + off_I, *parts[i + 1 :]) - hidden_nI).square_()
    return moved_nI


@dataclasses.dataclass(frozen=True)
class _Expert:
    """What one expert's errors are measured on. Its tokens are gathered only where they are needed: those of all
    experts together are many."""

    block: ExpertBlock
    expert: int
    x_TD: torch.Tensor
    gradient_TD: torch.Tensor | None
    token_n: torch.Tensor
    weight_n: torch.Tensor
    start: float  # of the samples of rows
    importance_D: np.ndarray
    importance_I: np.ndarray

    @torch.inference_mode()
    def errors(self, types: tuple[QuantType, ...]) -> np.ndarray:
        """f64 (N_ERRORS, J): error of the gate_up rows, through the activation and the down projection, of the down
        rows, gate's share, and what the former two cost by the gradient.

        That is ½ E[(gᵀδ)²] for an error δ of the output (the Gauss-Newton form of the KL divergence). Rows are
        quantised independently, so their errors hardly correlate, and it is ½ E[Σ g² δ²], row by row.
        """
        block, weight_n = self.block, self.weight_n
        down_DI, x_nD = block.down(self.expert), self.x_TD[self.token_n]
        parts = block.pre_activation(self.expert, x_nD)
        hidden_nI = block.activated(*parts)
        gradient_nD = torch.ones_like(x_nD) if self.gradient_TD is None else self.gradient_TD[self.token_n]
        # of an error of a hidden unit, by the norm of what it does to the output where there is no gradient
        through_nI = down_DI.norm(dim=0) if self.gradient_TD is None else gradient_nD @ down_DI
        moved_nI = _moved(block, parts, hidden_nI).mul_(through_nI.square())
        rows_I, gate_up_scale_R = likely_sample(weight_n @ moved_nI, MAX_ERROR_ROWS, self.start)
        del moved_nI
        matters_D = (weight_n @ gradient_nD.square()) * (down_DI.square() @ (weight_n @ hidden_nI.square()))
        rows_D, down_scale_R = likely_sample(matters_D, MAX_ERROR_ROWS, self.start)
        parts, clean_nR = tuple(part_nI[:, rows_I] for part_nI in parts), hidden_nI[:, rows_I]
        column_sq_R = down_DI[:, rows_I].square().sum(0) * gate_up_scale_R
        rows = np.concatenate([rows_I + i * block.n_intermediate for i in range(len(parts))])
        exact_RD = block.gate_up(self.expert)[rows].numpy()
        exact_RI = down_DI[rows_D].numpy()
        if self.gradient_TD is not None:
            through_nR, gradient_nR = through_nI[:, rows_I], gradient_nD[:, rows_D]

        def change(changed: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return block.activated(*changed) - clean_nR

        def error(delta_nR: torch.Tensor) -> float:
            return float(weight_n @ delta_nR.square() @ column_sq_R)

        found = np.full((N_ERRORS, len(types)), np.inf)
        gate_up_J, down_J, gate_share_J, graded_gate_up_J, graded_down_J = found  # views
        # where a type does not fit, and of experts without a gate
        gate_share_J[:] = 0.5 if len(parts) > 1 else 0.0
        for j, quant_type in enumerate(types):
            if ggml.fits(quant_type, exact_RD.shape[1]):
                delta_RD = torch.from_numpy(ggml.round_trip(exact_RD, quant_type, self.importance_D) - exact_RD)
                deltas = (x_nD @ delta_RD.T).chunk(len(parts), dim=-1)
                changed = tuple(part_nR + delta_nR for part_nR, delta_nR in zip(parts, deltas, strict=True))
                change_nR = change(changed)
                gate_up_J[j] = error(change_nR)
                if self.gradient_TD is not None:
                    graded_gate_up_J[j] = float(weight_n @ (through_nR * change_nR).square() @ gate_up_scale_R) / 2
                if len(parts) > 1:
                    of_gate, of_up = error(change((changed[0], parts[1]))), error(change((parts[0], changed[1])))
                    gate_share_J[j] = of_gate / (of_gate + of_up) if of_gate + of_up > 0 else 0.5
            if ggml.fits(quant_type, exact_RI.shape[1]):
                delta_RI = torch.from_numpy(ggml.round_trip(exact_RI, quant_type, self.importance_I) - exact_RI)
                delta_nR = hidden_nI @ delta_RI.T
                down_J[j] = float(weight_n @ delta_nR.square() @ down_scale_R)
                if self.gradient_TD is not None:
                    graded_down_J[j] = float(weight_n @ (gradient_nR * delta_nR).square() @ down_scale_R) / 2
        return found
