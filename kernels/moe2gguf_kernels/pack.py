"""Codes, signs and scales to blocks of any GGUF type. Reference: moe2gguf.codec.Codec.pack, equal byte for byte.

Shapes: R rows (blocks), B bytes of a block, S weights of it, C codes, P sub-blocks.
"""

import torch
import triton
import triton.language as tl

from moe2gguf_kernels.layout import Layout

# 8 blocks of up to 256 bytes are 16 a thread: for sm_90 only Q5_K then spills registers, with 16 blocks IQ3_S too
TILE_ROWS = 8


def pack(
    codes_RC: torch.Tensor,
    negative_RS: torch.Tensor | None,
    d_R: torch.Tensor | None,
    sub_RP: torch.Tensor | None,
    dmin_R: torch.Tensor | None,
    minimum_RP: torch.Tensor | None,
    layout: Layout,
) -> torch.Tensor:
    """i32 codes, bool signs, f16 d and dmin, i32 sub and minimum -> uint8 (R, B). None: the type has no such field."""
    n_rows = len(codes_RC)
    blocks_RB = torch.empty((n_rows, layout.block_bytes), dtype=torch.uint8, device=codes_RC.device)
    if n_rows == 0:
        return blocks_RB
    values = (
        codes_RC.int(),
        None if negative_RS is None else negative_RS.contiguous().view(torch.uint8),
        None if d_R is None else d_R.contiguous().view(torch.int16),
        None if sub_RP is None else sub_RP.int(),
        None if dmin_R is None else dmin_R.contiguous().view(torch.int16),
        None if minimum_RP is None else minimum_RP.int(),
    )
    kinds = (layout.codes, layout.signs, layout.d, layout.sub, layout.dmin, layout.minimum)
    _pack[(triton.cdiv(n_rows, TILE_ROWS),)](
        *(None if value is None else value.contiguous() for value in values),
        *(None if pieces is None else pieces.by_byte_X4B for pieces in kinds),
        blocks_RB,
        n_rows,
        *(0 if pieces is None else len(pieces.by_byte_X4B) for pieces in kinds),
        B=layout.block_bytes,
        B_PADDED=triton.next_power_of_2(layout.block_bytes),
        S=layout.block_weights,
        C=layout.codes.n_fields,
        P=layout.n_subs,
        ROWS=TILE_ROWS,
        enable_fp_fusion=True,
    )
    return blocks_RB


@triton.jit
def _bytes(
    value_ptr,  # (R, F) u8, i16 or i32
    pieces_ptr,  # (PIECES, 4, B) i32: field, shift, mask, place
    row_R,  # i64
    inside_RB,
    F: tl.constexpr,
    B: tl.constexpr,
    B_PADDED: tl.constexpr,
    PIECES: tl.constexpr,
):
    """What a kind of field puts into each byte, i32 (ROWS, B_PADDED)."""
    byte_B = tl.arange(0, B_PADDED)
    in_block_B = byte_B < B
    bytes_RB = tl.zeros((row_R.shape[0], B_PADDED), tl.int32)
    for x in tl.static_range(PIECES):
        piece_ptr = pieces_ptr + 4 * B * x + byte_B
        field_B = tl.load(piece_ptr, mask=in_block_B, other=0)
        shift_B = tl.load(piece_ptr + B, mask=in_block_B, other=0)
        mask_B = tl.load(piece_ptr + 2 * B, mask=in_block_B, other=0)
        place_B = tl.load(piece_ptr + 3 * B, mask=in_block_B, other=0)
        at_RB = row_R[:, None] * F + field_B[None, :]
        held_RB = inside_RB & (mask_B != 0)[None, :]
        value_RB = tl.load(value_ptr + at_RB, mask=held_RB, other=0).to(tl.int32)
        bytes_RB |= ((value_RB >> place_B[None, :]) & mask_B[None, :]) << shift_B[None, :]
    return bytes_RB


@triton.jit
def _pack(
    code_ptr,  # (R, C) i32
    negative_ptr,  # (R, S) u8, or None
    d_ptr,  # (R,) the bits of f16 as i16, or None
    sub_ptr,  # (R, P) i32, or None
    dmin_ptr,  # (R,) the bits of f16 as i16, or None
    minimum_ptr,  # (R, P) i32, or None
    code_pieces_ptr,  # the pieces of each kind of field, (pieces, 4, B) i32, or None
    sign_pieces_ptr,
    d_pieces_ptr,
    sub_pieces_ptr,
    dmin_pieces_ptr,
    minimum_pieces_ptr,
    blocks_ptr,  # (R, B) u8, out
    n_rows: tl.int64,
    CODE_PIECES: tl.constexpr,
    SIGN_PIECES: tl.constexpr,
    D_PIECES: tl.constexpr,
    SUB_PIECES: tl.constexpr,
    DMIN_PIECES: tl.constexpr,
    MINIMUM_PIECES: tl.constexpr,
    B: tl.constexpr,
    B_PADDED: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte_B = tl.arange(0, B_PADDED)
    inside_RB = (row_R < n_rows)[:, None] & (byte_B < B)[None, :]
    bytes_RB = _bytes(code_ptr, code_pieces_ptr, row_R, inside_RB, C, B, B_PADDED, CODE_PIECES)
    if SIGN_PIECES > 0:
        bytes_RB |= _bytes(negative_ptr, sign_pieces_ptr, row_R, inside_RB, S, B, B_PADDED, SIGN_PIECES)
    if D_PIECES > 0:
        bytes_RB |= _bytes(d_ptr, d_pieces_ptr, row_R, inside_RB, 1, B, B_PADDED, D_PIECES)
    if SUB_PIECES > 0:
        bytes_RB |= _bytes(sub_ptr, sub_pieces_ptr, row_R, inside_RB, P, B, B_PADDED, SUB_PIECES)
    if DMIN_PIECES > 0:
        bytes_RB |= _bytes(dmin_ptr, dmin_pieces_ptr, row_R, inside_RB, 1, B, B_PADDED, DMIN_PIECES)
    if MINIMUM_PIECES > 0:
        bytes_RB |= _bytes(minimum_ptr, minimum_pieces_ptr, row_R, inside_RB, P, B, B_PADDED, MINIMUM_PIECES)
    tl.store(blocks_ptr + row_R[:, None] * B + byte_B[None, :], bytes_RB.to(tl.uint8), mask=inside_RB)
