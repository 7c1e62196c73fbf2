"""Codes, signs and scales to blocks of any GGUF type, compiled for the CPU. Reference: moe2gguf.codec.Codec.pack.

Shapes: R rows (blocks), B bytes of a block, F fields of a kind, X pieces of a byte.
"""

import numpy as np
import torch

from moe2gguf_kernels.compiled import compiled
from moe2gguf_kernels.layout import Layout


def pack(
    codes_RC: torch.Tensor,
    negative_RS: torch.Tensor | None,
    d_R: torch.Tensor | None,
    sub_RP: torch.Tensor | None,
    dmin_R: torch.Tensor | None,
    minimum_RP: torch.Tensor | None,
    layout: Layout,
) -> torch.Tensor:
    """As moe2gguf_kernels.pack.pack."""
    blocks_RB = np.zeros((len(codes_RC), layout.block_bytes), np.uint8)
    values = (
        (codes_RC, layout.codes),
        (negative_RS, layout.signs),
        (None if d_R is None else d_R[:, None].contiguous().view(torch.int16), layout.d),
        (sub_RP, layout.sub),
        (None if dmin_R is None else dmin_R[:, None].contiguous().view(torch.int16), layout.dmin),
        (minimum_RP, layout.minimum),
    )
    for value_RF, pieces in values:
        if value_RF is not None and pieces is not None:
            _put(value_RF.int().contiguous().numpy(), pieces.by_byte_X4B.numpy(), blocks_RB)
    return torch.from_numpy(blocks_RB)


@compiled
def _put(value_RF, pieces_X4B, blocks_RB):
    for r in range(len(blocks_RB)):
        for x in range(len(pieces_X4B)):
            field_B, shift_B, mask_B, place_B = pieces_X4B[x]
            for b in range(blocks_RB.shape[1]):
                blocks_RB[r, b] |= np.uint8(((value_RF[r, field_B[b]] >> place_B[b]) & mask_B[b]) << shift_B[b])
