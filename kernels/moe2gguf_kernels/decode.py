"""Blocks of any GGUF type to f32. Reference: moe2gguf.codec.Codec.decode, equal bit for bit.

Shapes: R rows (blocks), B bytes of a block, S weights of it, C codes, W weights of a code, P sub-blocks, F fields.
"""

import torch
import triton
import triton.language as tl

from moe2gguf_kernels.layout import Layout

# 16 blocks of 256 weights are 32 weights a thread: enough loads in flight, and codes stay in registers
TILE_ROWS = 16


def decode(blocks_RB: torch.Tensor, layout: Layout) -> torch.Tensor:
    """uint8 (R, B) -> f32 (R, S)"""
    blocks_RB = blocks_RB.contiguous()
    n_rows, n_bytes = blocks_RB.shape
    weight_RS = torch.empty((n_rows, layout.block_weights), dtype=torch.float32, device=blocks_RB.device)
    if n_rows == 0:
        return weight_RS
    kinds = (layout.codes, layout.signs, layout.d, layout.sub, layout.dmin, layout.minimum)
    _decode[(triton.cdiv(n_rows, TILE_ROWS),)](
        blocks_RB,
        *(None if pieces is None else pieces.by_field_X4F for pieces in kinds),
        layout.codebook_GW,
        layout.sub_scale_Q,
        layout.sub_offset_Q,
        weight_RS,
        n_rows,
        n_bytes,
        *(0 if pieces is None else len(pieces.by_field_X4F) for pieces in kinds),
        S=layout.block_weights,
        C=layout.codes.n_fields,
        W=layout.codebook_GW.shape[1],
        P=layout.n_subs,
        EVEN_SIGNS=layout.has_even_signs,
        ROWS=TILE_ROWS,
        # the reference rounds after every operation
        enable_fp_fusion=False,
    )
    return weight_RS


@triton.jit
def _fields(
    blocks_ptr,  # (R, B) u8
    pieces_ptr,  # (PIECES, 4, F) i32: byte, shift, mask, place
    row_R,  # i64
    inside_R,
    n_bytes: tl.int64,
    F: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The values of a kind of field, i32 (ROWS, F)."""
    field_F = tl.arange(0, F)
    value_RF = tl.zeros((row_R.shape[0], F), tl.int32)
    for x in tl.static_range(PIECES):
        piece_ptr = pieces_ptr + 4 * F * x + field_F
        byte_F, shift_F = tl.load(piece_ptr), tl.load(piece_ptr + F)
        mask_F, place_F = tl.load(piece_ptr + 2 * F), tl.load(piece_ptr + 3 * F)
        at_RF = row_R[:, None] * n_bytes + byte_F[None, :]
        byte_RF = tl.load(blocks_ptr + at_RF, mask=inside_R[:, None], other=0).to(tl.int32)
        value_RF |= ((byte_RF >> shift_F[None, :]) & mask_F[None, :]) << place_F[None, :]
    return value_RF


@triton.jit
def _half(value_RF):
    """The f16 with these bits, as f32."""
    return value_RF.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _spread(value_RP, S: tl.constexpr):
    """Each sub-block's value for all its weights: (ROWS, S)."""
    ROWS: tl.constexpr = value_RP.shape[0]
    P: tl.constexpr = value_RP.shape[1]
    return tl.reshape(tl.broadcast_to(value_RP[:, :, None], (ROWS, P, S // P)), (ROWS, S))


@triton.jit
def _decode(
    blocks_ptr,  # (R, B) u8
    codes_ptr,  # the pieces of each kind of field, (pieces, 4, fields) i32, or None
    signs_ptr,
    d_ptr,
    sub_ptr,
    dmin_ptr,
    minimum_ptr,
    codebook_ptr,  # (G, W) f32
    sub_scale_ptr,  # (Q,) f32, or None
    sub_offset_ptr,  # (Q,) f32, or None
    weight_ptr,  # (R, S) f32, out
    n_rows: tl.int64,
    n_bytes: tl.int64,
    CODE_PIECES: tl.constexpr,
    SIGN_PIECES: tl.constexpr,
    D_PIECES: tl.constexpr,
    SUB_PIECES: tl.constexpr,
    DMIN_PIECES: tl.constexpr,
    MINIMUM_PIECES: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    EVEN_SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    code_RC = _fields(blocks_ptr, codes_ptr, row_R, inside_R, n_bytes, C, CODE_PIECES)
    level_RCW = tl.load(codebook_ptr + code_RC[:, :, None] * W + tl.arange(0, W)[None, None, :])
    level_RS = tl.reshape(level_RCW, (ROWS, S))
    if SIGN_PIECES > 0:
        negative_RS = _fields(blocks_ptr, signs_ptr, row_R, inside_R, n_bytes, S, SIGN_PIECES)
        if EVEN_SIGNS:
            negative_RX8 = tl.reshape(negative_RS, (ROWS, S // 8, 8))
            odd_RX = tl.sum(negative_RX8, 2) & 1
            last_8 = (tl.arange(0, 8) == 7).to(tl.int32)
            negative_RS = tl.reshape(negative_RX8 | (odd_RX[:, :, None] & last_8[None, None, :]), (ROWS, S))
        level_RS = tl.where(negative_RS != 0, -level_RS, level_RS)
    if SUB_PIECES > 0:
        sub_RP = _fields(blocks_ptr, sub_ptr, row_R, inside_R, n_bytes, P, SUB_PIECES)
        level_RS *= _spread(tl.load(sub_scale_ptr + sub_RP), S)
        if sub_offset_ptr is not None:
            level_RS += _spread(tl.load(sub_offset_ptr + sub_RP), S)
    if D_PIECES > 0:
        level_RS *= _half(_fields(blocks_ptr, d_ptr, row_R, inside_R, n_bytes, 1, D_PIECES))
    if MINIMUM_PIECES > 0:
        dmin_R1 = _half(_fields(blocks_ptr, dmin_ptr, row_R, inside_R, n_bytes, 1, DMIN_PIECES))
        minimum_RP = _fields(blocks_ptr, minimum_ptr, row_R, inside_R, n_bytes, P, MINIMUM_PIECES)
        level_RS -= dmin_R1 * _spread(minimum_RP.to(tl.float32), S)
    at_RS = row_R[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(weight_ptr + at_RS, level_RS, mask=inside_R[:, None])
