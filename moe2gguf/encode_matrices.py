"""The bytes of the matrices beside the experts: error feedback under what the calibration text puts through them, or
ggml's where those win.

Second moments are summed while the model's own stream passes; some tokens are kept apart, to choose a damping and to
decide between the two encoders. Embeddings are looked up, not multiplied: an error of one goes as it is into the first
layer, and what it costs there, to second order, are the second moments of the loss's gradient, in their place.

Shapes: S sequences, L tokens of each, T = S·L tokens, N rows, K columns, R sampled rows, B bytes of an encoded row,
V vocabulary, D hidden.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from moe2gguf import feedback, ggml
from moe2gguf.codec import CODECS
from moe2gguf.experts import CPU
from moe2gguf.moments import Sums
from moe2gguf.spool import Outcome
from moe2gguf.streams import Matrices, Matrix

# for experts too; in parts of the mean of the second moments' diagonal, of equals the first is taken
DAMPINGS = (0.03, 0.01, 0.1)
SAMPLE_ROWS = 32
# rows of embeddings differ more
EMBEDDING_SAMPLE_ROWS = 256
# second moments of more columns take gigabytes: such a matrix stays ggml's
MAX_COLUMNS = 8192


class InputMoments:
    """Hooks on linear modules that are to be quantised with error feedback. Those that are handed the same tensor one
    after the other, as queries, keys and values are, share its sums."""

    def __init__(self, modules: Mapping[str, nn.Module], matrices: Matrices):
        self.modules = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
            and name in matrices
            and matrices[name].has_feedback
            and matrices[name].quant_type in CODECS
            and module.weight.shape[1] <= MAX_COLUMNS
        }
        self._sums: dict[str, Sums] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(lambda _module, args, name=name: self._see(name, args[0]))
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _see(self, name: str, x_SLK: torch.Tensor) -> None:
        if self._last is not None and self._last[1] is x_SLK:
            self._sums[name] = self._sums[self._last[0]]
            return
        self._last = name, x_SLK
        x_TK = x_SLK.reshape(-1, x_SLK.shape[-1]).float()
        if name not in self._sums:
            self._sums[name] = Sums.zeros(x_TK.shape[1], x_TK.device)
        self._sums[name].add(x_TK)

    def encode(
        self, matrices: Matrices, device: torch.device, pool: ThreadPoolExecutor
    ) -> tuple[dict[str, np.ndarray], list[Outcome]]:
        """By module, blocks uint8 (N, B). Without what was not given any tokens."""
        blocks: dict[str, np.ndarray] = {}
        outcomes: list[Outcome] = []
        for name, module in self.modules.items():
            if name in self._sums:
                weight_NK, sums = module.weight.to(CPU), self._sums[name].on(CPU)
                blocks[name], outcome = encode(name, weight_NK, matrices[name], sums, device, pool)
                outcomes.append(outcome)
        return blocks, outcomes


def encode(
    name: str,
    weight_NK: torch.Tensor,
    matrix: Matrix,
    sums: Sums,
    device: torch.device,
    pool: ThreadPoolExecutor,
    *,
    n_sample: int = SAMPLE_ROWS,
) -> tuple[np.ndarray, Outcome]:
    """Blocks uint8 (N, B), by ggml or with error feedback, whichever has less error of the rows sampled."""
    quant_type, n_columns = matrix.quant_type, weight_NK.shape[1]
    rows = torch.linspace(0, len(weight_NK) - 1, min(n_sample, len(weight_NK))).round().long()
    sample_RK = weight_NK[rows]

    def error(blocks_RB: np.ndarray) -> float:
        delta_RK = torch.from_numpy(ggml.decode(blocks_RB, quant_type, n_columns)) - sample_RK
        return float(((delta_RK @ sums.held_out_KK) * delta_RK).sum(dtype=torch.float64))

    def fed_back(part_NK: torch.Tensor, moments_KK: torch.Tensor, damping: float) -> np.ndarray:
        curvature = feedback.curvature(moments_KK[None].to(device), damping)
        return feedback.quantize(part_NK[None].to(device), quant_type, curvature, pool)[0].cpu().numpy()

    # neither encoder knows the tokens that it is judged by
    fit_KK = sums.fit_KK / max(sums.n_fit, 1)
    importance_K = None if matrix.importance_K is None else fit_KK.diagonal().clamp_min(1e-12).numpy()
    by_ggml = least = error(ggml.encode(sample_RK.numpy(), quant_type, importance_K))
    best: float | None = None
    for damping in DAMPINGS:
        found = error(fed_back(sample_RK, fit_KK, damping))
        if found < least:
            best, least = damping, found
    if best is None:
        parts = [
            pool.submit(ggml.encode, part.numpy(), quant_type, matrix.importance_K)
            for part in weight_NK.split(feedback.ROWS_PER_JOB)
        ]
        blocks_NB = np.concatenate([part.result() for part in parts])
    else:
        n_tokens = max(sums.n_fit + sums.n_held_out, 1)
        blocks_NB = fed_back(weight_NK, (sums.fit_KK + sums.held_out_KK) / n_tokens, best)
    return blocks_NB, Outcome(name, None, quant_type.name, best, least / max(by_ggml, 1e-30))
