"""Second moments of what weights are multiplied with: what an error in them costs at their outputs.

Shapes: T tokens, S slots (a token at one of its experts), n the slots sorted by expert, E experts, K columns of x,
M columns of the other side (x itself, or what is given for it).
"""

import dataclasses
from itertools import pairwise

import torch

CHUNK_SLOTS = 4096
# one in so many runs of tokens is held out
HELD_OUT = 4


@dataclasses.dataclass
class Sums:
    """Of x xᵀ, f32 (K, K): of most tokens, and of some runs of them that are kept apart to decide by."""

    fit_KK: torch.Tensor
    held_out_KK: torch.Tensor
    n_fit: int = 0
    n_held_out: int = 0

    @staticmethod
    def zeros(n_columns: int) -> "Sums":
        return Sums(torch.zeros(n_columns, n_columns), torch.zeros(n_columns, n_columns))

    def add(self, x_TK: torch.Tensor) -> None:
        run = max(1, len(x_TK) // (2 * HELD_OUT))
        is_held_out_T = torch.arange(len(x_TK)) // run % HELD_OUT == HELD_OUT - 1
        fit_nK, held_out_nK = x_TK[~is_held_out_T], x_TK[is_held_out_T]
        self.fit_KK.addmm_(fit_nK.T, fit_nK)
        self.held_out_KK.addmm_(held_out_nK.T, held_out_nK)
        self.n_fit, self.n_held_out = self.n_fit + len(fit_nK), self.n_held_out + len(held_out_nK)


def moments(
    x_TK: torch.Tensor,
    token_n: torch.Tensor,
    offset_E1: torch.Tensor,
    weight_n: torch.Tensor,
    other_SM: torch.Tensor | None = None,
    slot_n: torch.Tensor | None = None,
    total_EMK: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum over n in offset_E1[e] to offset_E1[e + 1] of weight * other[slot] x[token]ᵀ, f32 (E, M, K).

    x_TK, other_SM: any floats. token_n, slot_n: i32 or i64. offset_E1: i64 (E + 1,). weight_n: f32.
    Without other_SM and slot_n both sides are x's. total_EMK: where given, added to in place and returned.
    Summed in f32, in any order: an element is within 1e-5 of the sum of its terms' magnitudes.
    """
    if other_SM is None or slot_n is None:
        assert other_SM is None and slot_n is None
        other_SM, slot_n = x_TK, token_n
    offsets = offset_E1.tolist()
    if total_EMK is None:
        total_EMK = torch.zeros((len(offsets) - 1, other_SM.shape[1], x_TK.shape[1]), device=x_TK.device)
    for e, (begin, end) in enumerate(pairwise(offsets)):
        for first in range(begin, end, CHUNK_SLOTS):
            own = slice(first, min(first + CHUNK_SLOTS, end))
            weighed_nM = other_SM[slot_n[own].long()].float() * weight_n[own, None]
            total_EMK[e].addmm_(weighed_nM.T, x_TK[token_n[own].long()].float())
    return total_EMK
