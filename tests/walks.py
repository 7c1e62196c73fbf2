"""What the walks of moe2gguf_kernels are held against."""

from collections.abc import Callable

import torch

from moe2gguf import factors, scales
from moe2gguf import walk as plain
from moe2gguf.codec import Codec
from moe2gguf.feedback import damped
from moe2gguf.walk import Tries, Walked
from tests.test_codec import hard_rows
from tests.test_feedback import correlated

DAMPING = 0.01
Walk = Callable[[Codec, torch.Tensor, Tries, torch.Tensor], Walked]


def factor(n_columns: int, n_experts: int) -> torch.Tensor:
    """As feedback passes it: a part of a larger matrix, f32 (E, T, T)."""
    hessian_EKK = torch.stack([torch.from_numpy(correlated(2 * n_columns, 1.0, seed)) for seed in range(n_experts)])
    return factors.inverse_factor(damped(hessian_EKK.float(), DAMPING))[:, :n_columns, :n_columns]


def first_tries(
    codec: Codec, weight_SEN: torch.Tensor, factor_ETT: torch.Tensor, which: slice
) -> tuple[torch.Tensor, Tries]:
    """A block's first sub-block, and some of the scales feedback would try for it."""
    size = codec.sub_weights
    cost_TE = factor_ETT.diagonal(dim1=-2, dim2=-1).T ** -2
    found = [scales.fits(codec, w_TEN, cost_TE, scales.block_multiples(codec)) for w_TEN in weight_SEN.split(size)]
    minimum_PEN = torch.cat([m for _, m in found if m is not None]) if codec.has_minimum else None
    of_block = scales.block_scales(codec, torch.cat([s for s, _ in found]), minimum_PEN)
    tries = scales.first_tries(codec, weight_SEN[:size], cost_TE, *of_block)
    return weight_SEN[:size], Tries(*(None if x is None else x[which] for x in vars(tries).values()))


def compare(walk: Walk, codec: Codec, target_TEN: torch.Tensor, tries: Tries, factor_ETT: torch.Tensor) -> None:
    expected = plain.walk(codec, target_TEN, tries, factor_ETT)
    found = walk(codec, target_TEN, tries, factor_ETT)
    torch.testing.assert_close(found.loss_EN, expected.loss_EN, rtol=1e-3, atol=1e-30)
    # two tries of the same scale, or of equal loss
    same_EN = found.tried_EN == expected.tried_EN
    assert same_EN.float().mean() > 0.9
    # levels on both sides of zero are as near to it
    same_EN &= (target_TEN != 0).any(0)
    assert (found.code_CEN == expected.code_CEN)[:, same_EN].float().mean() > 0.99
    assert (found.negative_TEN is None) == (expected.negative_TEN is None)
    if found.negative_TEN is not None and expected.negative_TEN is not None:
        assert (found.negative_TEN == expected.negative_TEN)[:, same_EN].float().mean() > 0.99
    # what is reported is what was chosen: the errors' squares are the loss, and they lead back to the levels
    torch.testing.assert_close(found.error_TEN.square().sum(0), found.loss_EN, rtol=1e-4, atol=1e-30)
    level_TEN = codec.codebook_GW[found.code_CEN.long()].permute(0, 3, 1, 2).flatten(0, 1)
    if found.negative_TEN is not None:
        level_TEN = torch.where(found.negative_TEN, -level_TEN, level_TEN)
    decoded_TEN = level_TEN * plain.chosen(tries.scale_JEN, found.tried_EN)
    if tries.offset_JEN is not None:
        decoded_TEN = decoded_TEN + plain.chosen(tries.offset_JEN, found.tried_EN)
    missed_TEN = torch.einsum("ten,etu->uen", found.error_TEN, factor_ETT.triu())
    largest_EN = target_TEN.abs().amax(0) + decoded_TEN.abs().amax(0)
    assert ((decoded_TEN + missed_TEN - target_TEN).abs() <= 1e-4 * largest_EN).all()


def hard_and_random(codec: Codec) -> torch.Tensor:
    """A block of the rows that go wrong and as many of noise, an expert each: f32 (S, 2, N)."""
    hard_NS = torch.stack([torch.from_numpy(row) for row in hard_rows(codec.block_weights).values()])
    noise_ENS = torch.randn(2, len(hard_NS), codec.block_weights, generator=torch.Generator().manual_seed(0))
    noise_ENS[0] = hard_NS
    return noise_ENS.permute(2, 0, 1).contiguous()
