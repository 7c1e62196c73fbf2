"""What error feedback does to a block of all rows, or several neighbours: the first pass, and a sweep; the plain ones.

What computes in their place on CPU is in moe2gguf_kernels; moe2gguf.backend chooses.

Shapes: E experts, N rows, D blocks, S weights of them, P sub-blocks, T weights of a sub-block, C codes, J scales tried.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe2gguf import walk as plain
from moe2gguf.codec import Codec, Fields
from moe2gguf.factors import inverse_factor
from moe2gguf.scales import block_multiples, block_scales, first_tries, fits, near_tries
from moe2gguf.walk import Tries, Walked, chosen, feed_back, product

Walk = Callable[[Codec, torch.Tensor, Tries, torch.Tensor], Walked]


@dataclass(frozen=True)
class Blocks:
    """Neighbours of every row, columns leading; None where the type has no such field. A block with several sub-blocks
    is by itself."""

    code_CEN: torch.Tensor  # i32
    negative_SEN: torch.Tensor | None  # bool
    d_DEN: torch.Tensor  # f16; ones where the type has none
    sub_PEN: torch.Tensor | None  # i32
    dmin_DEN: torch.Tensor | None  # f16
    minimum_PEN: torch.Tensor | None  # i32

    def fields(self, codec: Codec) -> list[Fields]:
        """Of each block."""
        n_blocks = len(self.d_DEN)

        def rows(x_XEN: torch.Tensor | None) -> list[torch.Tensor] | list[None]:
            if x_XEN is None:
                return [None] * n_blocks
            return [part.flatten(1).T.contiguous() for part in x_XEN.chunk(n_blocks)]

        columns = [
            rows(self.code_CEN),
            rows(self.negative_SEN),
            [None] * n_blocks if codec.places.d is None else list(self.d_DEN.flatten(1)),
            rows(self.sub_PEN),
            [None] * n_blocks if self.dmin_DEN is None else list(self.dmin_DEN.flatten(1)),
            rows(self.minimum_PEN),
        ]
        return [Fields(*of_block) for of_block in zip(*columns, strict=True)]


def first_pass(
    codec: Codec, weight_SEN: torch.Tensor, factor_ESS: torch.Tensor, walk: Walk = plain.walk
) -> tuple[Blocks, torch.Tensor, torch.Tensor]:
    """Scales and codes, one sub-block after the other; -> also ŵ and the error, (w - ŵ) U⁻¹, f32 (S, E, N)."""
    # what an error costs that the columns after it undo as far as they can
    cost_SE = factor_ESS.diagonal(dim1=-2, dim2=-1).T ** -2
    size = codec.sub_weights
    owns = [slice(start, start + size) for start in range(0, len(weight_SEN), size)]
    found = [fits(codec, weight_SEN[own], cost_SE[own], block_multiples(codec)) for own in owns]
    d_DEN, dmin_DEN = block_scales(
        codec,
        torch.cat([scale_JEN for scale_JEN, _ in found]),
        torch.cat([minimum_JEN for _, minimum_JEN in found if minimum_JEN is not None]) if codec.has_minimum else None,
    )
    left_SEN, found_SEN, error_SEN = weight_SEN.clone(), torch.empty_like(weight_SEN), torch.empty_like(weight_SEN)
    tried: list[Tries] = []
    walked: list[Walked] = []
    for own in owns:
        tries = first_tries(codec, left_SEN[own], cost_SE[own], d_DEN[:1], dmin_DEN)
        walked.append(walk(codec, left_SEN[own], tries, factor_ESS[:, own, own]))
        error_SEN[own] = walked[-1].error_TEN
        found_SEN[own] = left_SEN[own] - product(factor_ESS[:, own, own].mT, error_SEN[own])
        feed_back(left_SEN[own.stop :], error_SEN[own], factor_ESS[:, own, own.stop :])
        tried.append(tries)
    # (J, P, E, N) each
    tries = Tries(
        torch.stack([t.scale_JEN for t in tried], 1),
        None,
        _joined([t.sub_JEN for t in tried]),
        _joined([t.minimum_JEN for t in tried]),
    )
    code_CEN = torch.cat([w.code_CEN for w in walked])
    negatives = [w.negative_TEN for w in walked if w.negative_TEN is not None]
    blocks = Blocks(code_CEN, torch.cat(negatives) if negatives else None, d_DEN, None, dmin_DEN, None)
    return with_scales(codec, blocks, tries, torch.stack([w.tried_EN for w in walked])), found_SEN, error_SEN


def _joined(of_subs: list[torch.Tensor | None]) -> torch.Tensor | None:
    found = [x_JEN for x_JEN in of_subs if x_JEN is not None]
    return torch.stack(found, 1) if found else None


def sweep(
    codec: Codec,
    blocks: Blocks,
    found_SEN: torch.Tensor,
    slope_SEN: torch.Tensor,
    hessian_ESS: torch.Tensor,
    factor_EPTT: torch.Tensor,
    walk: Walk = plain.walk,
) -> tuple[Blocks, torch.Tensor, torch.Tensor]:
    """The sub-blocks anew where that lowers the output error, all else as it is; -> also found_SEN, the weights, and
    slope_SEN, half the output error's gradient there, H (ŵ - w), as they are then. factor_EPTT: `sub_factors`."""
    size, n_codes = codec.sub_weights, codec.sub_weights // codec.width
    found_SEN, slope_SEN = found_SEN.clone(), slope_SEN.clone()
    code_CEN, negative_SEN = (
        blocks.code_CEN.clone(),
        None if blocks.negative_SEN is None else blocks.negative_SEN.clone(),
    )
    tries = sweep_tries(codec, blocks)
    tried_PEN = torch.empty(tries.scale_JEN.shape[1:], dtype=torch.int64, device=found_SEN.device)
    for p in range(len(tried_PEN)):
        own, own_codes = slice(p * size, (p + 1) * size), slice(p * n_codes, (p + 1) * n_codes)
        offset_JEN = None if tries.offset_JEN is None else tries.offset_JEN[:, p]
        target_TEN, gain_EN = _lowest(found_SEN[own], slope_SEN[own], factor_EPTT[:, p])
        walked = walk(codec, target_TEN, Tries(tries.scale_JEN[:, p], offset_JEN), factor_EPTT[:, p])
        better_EN = walked.loss_EN < gain_EN
        tried_PEN[p] = torch.where(better_EN, walked.tried_EN, 0)
        code_CEN[own_codes] = torch.where(better_EN, walked.code_CEN, code_CEN[own_codes])
        if negative_SEN is not None and walked.negative_TEN is not None:
            negative_SEN[own] = torch.where(better_EN, walked.negative_TEN, negative_SEN[own])
        new_TEN = target_TEN - product(factor_EPTT[:, p].mT, walked.error_TEN)
        moved_TEN = torch.where(better_EN, new_TEN - found_SEN[own], 0.0)
        found_SEN[own] += moved_TEN
        feed_back(slope_SEN, moved_TEN, -hessian_ESS[:, own])
    blocks = dataclasses.replace(blocks, code_CEN=code_CEN, negative_SEN=negative_SEN)
    return with_scales(codec, blocks, tries, tried_PEN), found_SEN, slope_SEN


def sub_factors(codec: Codec, hessian_EKK: torch.Tensor) -> torch.Tensor:
    """U of each sub-block's own Hessian, f32 (E, P, T, T); of one block, or of more."""
    own_EPTT = diagonal_blocks(hessian_EKK, codec.sub_weights)
    return inverse_factor(own_EPTT.flatten(0, 1)).view_as(own_EPTT)


def diagonal_blocks(matrix_EKK: torch.Tensor, size: int) -> torch.Tensor:
    """(E, P, T, T), T = size"""
    split = -1, size
    own_ETTP = matrix_EKK.unflatten(1, split).unflatten(3, split).diagonal(dim1=1, dim2=3)
    return own_ETTP.permute(0, 3, 1, 2).contiguous()


def sweep_tries(codec: Codec, blocks: Blocks) -> Tries:
    """The scales that all sub-blocks have, first, and those next to them: (J, P, E, N) each."""
    return near_tries(codec, blocks.d_DEN, blocks.sub_PEN, blocks.dmin_DEN, blocks.minimum_PEN)


def with_scales(codec: Codec, blocks: Blocks, tries: Tries, tried_PEN: torch.Tensor) -> Blocks:
    return dataclasses.replace(
        blocks,
        d_DEN=chosen(tries.scale_JEN, tried_PEN).half() if codec.sub_scale_Q is None else blocks.d_DEN,
        sub_PEN=None if tries.sub_JEN is None else chosen(tries.sub_JEN, tried_PEN),
        minimum_PEN=None if tries.minimum_JEN is None else chosen(tries.minimum_JEN, tried_PEN),
    )


def _lowest(
    found_TEN: torch.Tensor, slope_TEN: torch.Tensor, factor_ETT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the output error would be least, all else as it is, and by how much it would fall, f32 (E, N)."""
    step_TEN = product(factor_ETT, slope_TEN)
    return found_TEN - product(factor_ETT.mT, step_TEN), step_TEN.square().sum(0)
