"""What is compiled for the CPU against its plain references."""

import numpy as np
import pytest
import torch

from moe2gguf import backend, passes
from moe2gguf.codec import CODECS, Codec
from moe2gguf.factors import PANEL, inverse_factor
from moe2gguf.feedback import damped
from moe2gguf.ggml import QuantType
from moe2gguf.walk import Tries, product
from moe2gguf_kernels import passes_cpu
from moe2gguf_kernels.walk_cpu import ROWS
from tests.test_feedback import correlated, weights_of
from tests.walks import DAMPING, compare, factor, first_tries, hard_and_random


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_every_type_walks_as_the_plain_one(quant_type: QuantType) -> None:
    codec = CODECS[quant_type]
    factor_ETT = factor(codec.sub_weights, 2)
    target_TEN, tries = first_tries(codec, hard_and_random(codec), factor_ETT, slice(None))
    compare(backend.walk, codec, target_TEN, tries, factor_ETT)


@pytest.mark.parametrize("name", ["Q3_K", "IQ4_XS", "IQ2_XS", "IQ3_S", "IQ1_S"])
def test_rows_of_several_tiles(name: str) -> None:
    """The last tile is not full: what the one before left in it must not be read."""
    codec = CODECS[QuantType[name]]
    weight_SEN = torch.randn(codec.block_weights, 2, 2 * ROWS + 3, generator=torch.Generator().manual_seed(1))
    factor_ETT = factor(codec.sub_weights, 2)
    target_TEN, tries = first_tries(codec, weight_SEN, factor_ETT, slice(None))
    compare(backend.walk, codec, target_TEN, tries, factor_ETT)


@pytest.mark.parametrize("name", ["Q2_K", "IQ4_XS", "IQ2_XXS"])
def test_a_row_of_nan_has_codes(name: str) -> None:
    """No try is better than another; a code that is none would point anywhere."""
    codec = CODECS[QuantType[name]]
    target_TEN = torch.full((codec.sub_weights, 1, 2), torch.nan)
    walked = backend.walk(codec, target_TEN, Tries(torch.ones(2, 1, 2)), factor(codec.sub_weights, 1))
    assert walked.loss_EN.isnan().all() and not walked.tried_EN.any()
    assert ((walked.code_CEN >= 0) & (walked.code_CEN < len(codec.codebook_GW))).all()


def test_nothing_changes_by_how_rows_are_shared_out() -> None:
    codec = CODECS[QuantType.IQ2_S]
    weight_SEN = torch.randn(codec.block_weights, 1, 150, generator=torch.Generator().manual_seed(2))
    factor_ETT = factor(codec.sub_weights, 1)
    target_TEN, tries = first_tries(codec, weight_SEN, factor_ETT, slice(None))
    whole = backend.walk(codec, target_TEN, tries, factor_ETT)
    assert tries.sub_JEN is not None
    for rows in (slice(0, 70), slice(70, 150)):
        part_of = Tries(tries.scale_JEN[..., rows], None, tries.sub_JEN[..., rows])
        part = backend.walk(codec, target_TEN[..., rows], part_of, factor_ETT)
        assert torch.equal(part.code_CEN, whole.code_CEN[..., rows])
        assert torch.equal(part.error_TEN, whole.error_TEN[..., rows])


def columns_of_two_experts(codec: Codec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hard rows and noise, more than a tile of them, a block of 256 columns or two of 32; a Hessian
    each, and the factor of its inverse."""
    few_SEN = hard_and_random(codec)
    weight_SEN = few_SEN.repeat(PANEL // (4 * len(few_SEN)) or 1, 1, -(-(ROWS + 3) // few_SEN.shape[2]))
    hessian_ESS = torch.stack([torch.from_numpy(correlated(len(weight_SEN), 1.0, seed)) for seed in (0, 1)]).float()
    hessian_ESS = damped(hessian_ESS, DAMPING)
    return weight_SEN, hessian_ESS, inverse_factor(hessian_ESS)


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_first_passes_are_as_the_plain_one(quant_type: QuantType) -> None:
    """Sums in another order can turn near ties, and then what follows differs: rows' errors are alike on average."""
    codec = CODECS[quant_type]
    weight_SEN, _, factor_ESS = columns_of_two_experts(codec)
    expected, _, expected_error_SEN = passes.first_pass(codec, weight_SEN, factor_ESS)
    block, found_SEN, error_SEN = backend.first_pass(codec, weight_SEN, factor_ESS)
    for one_EN, other_EN in ((block.d_DEN, expected.d_DEN), (block.dmin_DEN, expected.dmin_DEN)):
        assert (one_EN is None) == (other_EN is None)
        # rows of ties have others
        assert one_EN is None or one_EN.isclose(other_EN, rtol=2e-3).float().mean() > 0.9
    same_EN = (block.code_CEN == expected.code_CEN).all(0)
    assert same_EN.float().mean() > 0.7
    for name in ("negative_SEN", "sub_PEN", "minimum_PEN"):
        one, other = getattr(block, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or (one == other)[:, same_EN].float().mean() > 0.98
    loss_EN, expected_EN = error_SEN.square().sum(0), expected_error_SEN.square().sum(0)
    torch.testing.assert_close(loss_EN.mean(1), expected_EN.mean(1), rtol=0.02, atol=1e-30)
    # what is reported is what the file will hold
    missed_SEN = torch.einsum("sen,est->ten", error_SEN, factor_ESS.triu())
    largest_EN = weight_SEN.abs().amax(0) + weights_of(codec, block).abs().amax(0)
    assert ((weights_of(codec, block) + missed_SEN - weight_SEN).abs() <= 1e-3 * largest_EN).all()
    assert ((weights_of(codec, block) - found_SEN).abs() <= 1e-3 * largest_EN).all()


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_sweeps_are_as_the_plain_one(quant_type: QuantType) -> None:
    """From a start that leaves much to be better; the slope is that of the weights which the file will hold."""
    codec = CODECS[quant_type]
    weight_SEN, hessian_ESS, factor_ESS = columns_of_two_experts(codec)
    # as if the columns had nothing to do with each other
    block, _, _ = passes.first_pass(codec, weight_SEN, torch.diag_embed(factor_ESS.diagonal(dim1=1, dim2=2)))
    found_SEN = weights_of(codec, block)
    slope_SEN = product(hessian_ESS, found_SEN - weight_SEN)
    results = [
        sweep(codec, block, found_SEN.clone(), slope_SEN.clone(), hessian_ESS, passes.sub_factors(codec, hessian_ESS))
        for sweep in (passes.sweep, backend.sweep)
    ]
    errors = []
    for after, after_SEN, after_slope_SEN in results:
        largest_EN = weight_SEN.abs().amax(0) + found_SEN.abs().amax(0)
        assert ((weights_of(codec, after) - after_SEN).abs() <= 1e-3 * largest_EN).all()
        miss_SEN = after_SEN - weight_SEN
        bent_SEN = product(hessian_ESS, miss_SEN)
        scale_EN = product(hessian_ESS.abs(), miss_SEN.abs() + largest_EN).amax(0)
        assert ((bent_SEN - after_slope_SEN).abs() <= 1e-4 * scale_EN).all()
        errors.append((miss_SEN * bent_SEN).sum(0))
    before_EN = ((found_SEN - weight_SEN) * slope_SEN).sum(0)
    assert all((error_EN <= 1.001 * before_EN + 1e-4 * before_EN.mean()).all() for error_EN in errors)
    assert errors[1].mean() < 0.9 * before_EN.mean()
    torch.testing.assert_close(errors[1].mean(1), errors[0].mean(1), rtol=0.02, atol=1e-30)
    same_EN = (results[1][0].code_CEN == results[0][0].code_CEN).all(0)
    assert same_EN.float().mean() > 0.7


def test_scales_are_rounded_as_f16() -> None:
    """Zero, what f16 has no or few bits for, ties to even on both sides of a step, the largest and beyond."""
    few = [
        0,
        -0.0,
        1e-9,
        2**-25,
        1.5 * 2**-24,
        6.1e-5,
        2**-14,
        1 + 2**-11,
        1 + 3 * 2**-11,
        -0.1,
        65504,
        65519,
        7e4,
        -1e9,
    ]
    x_R = torch.tensor([*few, *torch.randn(ROWS - len(few), generator=torch.Generator().manual_seed(0)).tolist()])
    found_R = np.empty(ROWS, np.float32)
    passes_cpu._half(x_R.numpy(), found_R)
    assert torch.equal(torch.from_numpy(found_R), x_R.clamp(-65504, 65504).half().float())


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_pack_undoes_unpack(quant_type: QuantType) -> None:
    """Any bits make a block."""
    codec = CODECS[quant_type]
    blocks_RB = torch.randint(0, 256, (37, codec.block_bytes), generator=torch.Generator().manual_seed(0)).byte()
    fields = codec.unpack(blocks_RB)
    assert torch.equal(backend.pack(codec, fields), codec.pack(fields))
    assert torch.equal(backend.pack(codec, codec.unpack(blocks_RB[:0])), blocks_RB[:0])
