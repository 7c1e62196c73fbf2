"""Second moments of what weights are multiplied with: what an error in them costs at their outputs.

Shapes: T tokens, S slots (a token at one of its experts), n the slots sorted by expert, E experts, K columns of x,
M columns of the other side (x itself, or what is given for it).
"""

import dataclasses
from itertools import pairwise

import torch

CHUNK_SLOTS = 4096
# of what is symmetric so many rows at a time
PANEL = 256
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
    def zeros(n_columns: int, device: torch.device | None = None) -> "Sums":
        fit_KK, held_out_KK = torch.zeros(2, n_columns, n_columns, device=device)
        return Sums(fit_KK, held_out_KK)

    def on(self, device: torch.device) -> "Sums":
        return dataclasses.replace(self, fit_KK=self.fit_KK.to(device), held_out_KK=self.held_out_KK.to(device))

    def add(self, x_TK: torch.Tensor) -> None:
        run = max(1, len(x_TK) // (2 * HELD_OUT))
        is_held_out_T = torch.arange(len(x_TK), device=x_TK.device) // run % HELD_OUT == HELD_OUT - 1
        fit_nK, held_out_nK = x_TK[~is_held_out_T], x_TK[is_held_out_T]
        _add_squares(self.fit_KK, fit_nK, fit_nK)
        _add_squares(self.held_out_KK, held_out_nK, held_out_nK)
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
    assert (other_SM is None) == (slot_n is None)
    offsets = offset_E1.tolist()
    if total_EMK is None:
        n_rows = (x_TK if other_SM is None else other_SM).shape[1]
        total_EMK = torch.zeros((len(offsets) - 1, n_rows, x_TK.shape[1]), device=x_TK.device)
    for e, (begin, end) in enumerate(pairwise(offsets)):
        for first in range(begin, end, CHUNK_SLOTS):
            own = slice(first, min(first + CHUNK_SLOTS, end))
            x_nK = x_TK[token_n[own].long()].float()
            if other_SM is None or slot_n is None:
                _add_squares(total_EMK[e], x_nK, x_nK * weight_n[own, None])
            else:
                total_EMK[e].addmm_((other_SM[slot_n[own].long()].float() * weight_n[own, None]).T, x_nK)
    return total_EMK


def _add_squares(total_KK: torch.Tensor, x_nK: torch.Tensor, weighed_nK: torch.Tensor) -> None:
    """total += weighedᵀ x, which is symmetric."""
    for start in range(0, len(total_KK), PANEL):
        own, after = slice(start, start + PANEL), slice(start + PANEL, None)
        total_KK[own, start:].addmm_(weighed_nK[:, own].T, x_nK[:, start:])
        total_KK[after, own] = total_KK[own, after].T
