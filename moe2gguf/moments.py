"""Second moments of each expert's tokens: what an error in its weights costs at its outputs.

Shapes: T tokens, S slots (a token at one of its experts), n the slots sorted by expert, E experts, K columns of x,
M columns of the other side (x itself, or what is given for it).
"""

from itertools import pairwise

import torch

CHUNK_SLOTS = 4096


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
