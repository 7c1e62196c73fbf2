"""Second moments of each expert's tokens, summed over a routed batch. Reference: moe2gguf.moments, same name.

Shapes: T tokens, S slots (a token at one of its experts), n the slots sorted by expert, E experts, K columns of x,
M columns of the other side (x itself, or what is given for it).
"""

import torch
import triton
import triton.language as tl

# 128 x 128 sums are 64 registers a thread with 8 warps; 32 slots of both sides, three times over, are 96 KiB of the
# 227 KiB of shared memory an H100's multiprocessor has
TILE_COLUMNS, TILE_SLOTS, WARPS, STAGES = 128, 32, 8, 3


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

    x_TK, other_SM: f32, f16 or bf16. token_n, slot_n: i32 or i64. offset_E1: i64 (E + 1,). weight_n: f32.
    Without other_SM and slot_n both sides are x's, and the sums symmetric to the bit.
    total_EMK: where given, added to in place and returned; its last stride is 1.
    """
    is_symmetric = other_SM is None
    if other_SM is None or slot_n is None:
        assert other_SM is None and slot_n is None
        other_SM, slot_n = x_TK, token_n
    n_experts, n_other, n_columns = len(offset_E1) - 1, other_SM.shape[1], x_TK.shape[1]
    adds = total_EMK is not None
    if total_EMK is None:
        total_EMK = torch.empty((n_experts, n_other, n_columns), dtype=torch.float32, device=x_TK.device)
    assert total_EMK.stride(2) == 1 and x_TK.stride(1) == 1 and other_SM.stride(1) == 1
    grid = (triton.cdiv(n_columns, TILE_COLUMNS), triton.cdiv(n_other, TILE_COLUMNS), n_experts)
    _moments[grid](
        x_TK,
        token_n.contiguous(),
        other_SM,
        slot_n.contiguous(),
        weight_n.contiguous(),
        offset_E1.contiguous(),
        total_EMK,
        n_columns,
        n_other,
        x_TK.stride(0),
        other_SM.stride(0),
        total_EMK.stride(0),
        total_EMK.stride(1),
        IS_SYMMETRIC=is_symmetric,
        ADDS=adds,
        COLUMNS=TILE_COLUMNS,
        SLOTS=TILE_SLOTS,
        num_warps=WARPS,
        num_stages=STAGES,
        enable_fp_fusion=True,
    )
    return total_EMK


@triton.jit
def _moments(
    x_ptr,  # (T, K) f32, f16 or bf16
    token_ptr,  # (n,) i32 or i64
    other_ptr,  # (S, M) f32, f16 or bf16
    slot_ptr,  # (n,) i32 or i64
    weight_ptr,  # (n,) f32
    offset_ptr,  # (E + 1,) i64
    total_ptr,  # (E, M, K) f32, out
    n_columns: tl.int64,  # K
    n_other: tl.int64,  # M
    x_stride: tl.int64,
    other_stride: tl.int64,
    total_expert_stride: tl.int64,
    total_row_stride: tl.int64,
    IS_SYMMETRIC: tl.constexpr,  # both sides are x
    ADDS: tl.constexpr,  # to what total holds
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    column_tile, other_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if IS_SYMMETRIC and column_tile < other_tile:
        return  # mirrored by the program that has both the other way round
    e = tl.program_id(2).to(tl.int64)
    column_K = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    other_M = other_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside_K, inside_M = column_K < n_columns, other_M < n_other
    sum_MK = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    end = tl.load(offset_ptr + e + 1)
    for first in range(tl.load(offset_ptr + e), end, SLOTS):
        n = first + tl.arange(0, SLOTS)
        mine_n = n < end
        token_n = tl.load(token_ptr + n, mask=mine_n, other=0).to(tl.int64)
        slot_n = tl.load(slot_ptr + n, mask=mine_n, other=0).to(tl.int64)
        weight_n = tl.load(weight_ptr + n, mask=mine_n, other=0.0)
        x_nK = tl.load(
            x_ptr + token_n[:, None] * x_stride + column_K[None, :], mask=mine_n[:, None] & inside_K[None, :], other=0.0
        )
        other_Mn = tl.load(
            other_ptr + slot_n[None, :] * other_stride + other_M[:, None],
            mask=mine_n[None, :] & inside_M[:, None],
            other=0.0,
        )
        weighed_Mn = other_Mn.to(tl.float32) * weight_n[None, :]
        # three products of 11 bits keep nearly all of f32's 24
        sum_MK = tl.dot(weighed_Mn, x_nK.to(tl.float32), sum_MK, input_precision="tf32x3")
    if IS_SYMMETRIC and column_tile == other_tile:
        # the weight is multiplied into one side, which rounds otherwise than into the other
        sum_MK = tl.where(other_M[:, None] <= column_K[None, :], sum_MK, tl.trans(sum_MK))
    total_ptr += e * total_expert_stride
    at_MK = other_M[:, None] * total_row_stride + column_K[None, :]
    inside_MK = inside_M[:, None] & inside_K[None, :]
    if IS_SYMMETRIC and column_tile != other_tile:
        at_KM = column_K[:, None] * total_row_stride + other_M[None, :]
        inside_KM = inside_K[:, None] & inside_M[None, :]
        sum_KM = tl.trans(sum_MK)
        if ADDS:
            sum_KM += tl.load(total_ptr + at_KM, mask=inside_KM, other=0.0)
        tl.store(total_ptr + at_KM, sum_KM, mask=inside_KM)
    if ADDS:
        sum_MK += tl.load(total_ptr + at_MK, mask=inside_MK, other=0.0)
    tl.store(total_ptr + at_MK, sum_MK, mask=inside_MK)
