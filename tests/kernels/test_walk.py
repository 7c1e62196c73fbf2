"""The walk over a sub-block against feedback's own."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe2gguf import backend, feedback
from moe2gguf.codec import CODECS, Codec
from moe2gguf.feedback import inverse_factor
from moe2gguf.ggml import QuantType
from moe2gguf_kernels.walk import walk
from tests.test_codec import hard_rows
from tests.test_feedback import correlated

DAMPING = 0.01
# the interpreter's time goes by the number of operations, not by their size
CODEBOOK_TILE = 512


def factor(n_columns: int, n_experts: int) -> torch.Tensor:
    """As feedback passes it: a part of a larger matrix, f32 (E, T, T)."""
    hessian_EKK = torch.stack([torch.from_numpy(correlated(2 * n_columns, 1.0, seed)) for seed in range(n_experts)])
    return inverse_factor(hessian_EKK.float(), DAMPING)[:, :n_columns, :n_columns]


def first_tries(
    codec: Codec, weight_SEN: torch.Tensor, factor_ETT: torch.Tensor, which: slice
) -> tuple[torch.Tensor, feedback._Tries]:
    """A block's first sub-block, and some of the scales feedback would try for it."""
    size = codec.sub_weights
    cost_TE = factor_ETT.diagonal(dim1=-2, dim2=-1).T ** -2
    scales = feedback._block_scales(codec, weight_SEN, cost_TE.repeat(codec.n_subs, 1))
    tries = feedback._tries(codec, weight_SEN[:size], cost_TE, *scales)
    some = {name: None if x is None else x[which] for name, x in vars(tries).items()}
    return weight_SEN[:size], feedback._Tries(**some)


def compare(codec: Codec, target_TEN: torch.Tensor, tries: feedback._Tries, factor_ETT: torch.Tensor,
            device: torch.device, tile: int) -> None:  # fmt: skip
    expected, tried_EN = feedback._walk(codec, target_TEN, tries, factor_ETT)
    tensors = (target_TEN, tries.scale_JEN, tries.offset_JEN, factor_ETT)
    code_CEN, negative_TEN, error_TEN, loss_EN, found_tried_EN = (
        None if x is None else x.cpu()
        for x in walk(
            *(None if x is None else x.to(device) for x in tensors), backend.layout(codec.quant_type, device), tile
        )
    )
    assert code_CEN is not None and error_TEN is not None and loss_EN is not None and found_tried_EN is not None
    torch.testing.assert_close(loss_EN, expected.loss_EL, rtol=1e-3, atol=1e-30)
    # two tries of the same scale, or of equal loss
    same_EN = found_tried_EN == tried_EN
    assert same_EN.float().mean() > 0.9
    assert (code_CEN == expected.code_CEL)[:, same_EN].float().mean() > 0.99
    assert (negative_TEN is None) == (expected.negative_TEL is None)
    if negative_TEN is not None and expected.negative_TEL is not None:
        assert (negative_TEN == expected.negative_TEL)[:, same_EN].float().mean() > 0.99
    # what is reported is what was chosen: the errors' squares are the loss, and they lead back to the levels
    torch.testing.assert_close(error_TEN.square().sum(0), loss_EN, rtol=1e-4, atol=1e-30)
    level_TEN = codec.codebook_GW[code_CEN.long()].permute(0, 3, 1, 2).flatten(0, 1)
    if negative_TEN is not None:
        level_TEN = torch.where(negative_TEN, -level_TEN, level_TEN)
    decoded_TEN = level_TEN * feedback._chosen(tries.scale_JEN, found_tried_EN)
    if tries.offset_JEN is not None:
        decoded_TEN = decoded_TEN + feedback._chosen(tries.offset_JEN, found_tried_EN)
    missed_TEN = torch.einsum("ten,etu->uen", error_TEN, factor_ETT.triu())
    largest_EN = target_TEN.abs().amax(0) + decoded_TEN.abs().amax(0)
    assert ((decoded_TEN + missed_TEN - target_TEN).abs() <= 1e-4 * largest_EN).all()


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_every_type_walks_as_feedback_does(quant_type: QuantType, device: torch.device) -> None:
    codec = CODECS[quant_type]
    generator = torch.Generator().manual_seed(0)
    hard_NS = torch.stack([torch.from_numpy(row) for row in hard_rows(codec.block_weights).values()])
    noise_ENS = torch.randn(2, len(hard_NS), codec.block_weights, generator=generator)
    noise_ENS[0] = hard_NS
    factor_ETT = factor(codec.sub_weights, 2)
    n_tries = 10 if codec.sub_offset_Q is not None else 8 if codec.width == 1 else 5
    # two of them, the second after what the first wrote
    which = slice(1, None, n_tries // 2)
    target_TEN, tries = first_tries(codec, noise_ENS.permute(2, 0, 1).contiguous(), factor_ETT, which)
    compare(codec, target_TEN, tries, factor_ETT, device, CODEBOOK_TILE)


@pytest.mark.parametrize("name", ["Q3_K", "IQ2_XS"])
def test_rows_of_several_tiles(name: str, device: torch.device) -> None:
    """130 rows and a codebook of 512: no multiple of the first, several of the second."""
    codec = CODECS[QuantType[name]]
    weight_SEN = torch.randn(codec.block_weights, 1, 130, generator=torch.Generator().manual_seed(1))
    factor_ETT = factor(codec.sub_weights, 1)
    target_TEN, tries = first_tries(codec, weight_SEN, factor_ETT, slice(2, 4))
    compare(codec, target_TEN, tries, factor_ETT, device, 64)


def test_a_row_of_nan_is_written(device: torch.device) -> None:
    """No try is better than another; unwritten codes would point anywhere."""
    codec = CODECS[QuantType.Q2_K]
    target_TEN = torch.full((codec.sub_weights, 1, 2), torch.nan)
    scale_JEN = torch.ones(2, 1, 2)
    factor_ETT = factor(codec.sub_weights, 1)
    layout = backend.layout(codec.quant_type, device)
    code_TEN, _, _, loss_EN, tried_EN = walk(
        target_TEN.to(device), scale_JEN.to(device), scale_JEN.to(device), factor_ETT.to(device), layout
    )
    assert loss_EN.isnan().all() and not tried_EN.any()
    assert ((code_TEN >= 0) & (code_TEN < len(codec.codebook_GW))).all()


@pytest.mark.parametrize(("name", "n_columns", "n_experts"), [("MXFP4", 64, 2), ("IQ2_XXS", 256, 1)])
def test_quantising_with_the_kernels(
    name: str, n_columns: int, n_experts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows, with feedback between sub-blocks and blocks."""
    monkeypatch.setattr("moe2gguf.feedback.CODEBOOK_TRIES", (1.0,))
    codec = CODECS[QuantType[name]]
    weight_ENK = torch.randn(n_experts, 3, n_columns, generator=torch.Generator().manual_seed(2))
    factor_EKK = factor(n_columns, n_experts)
    with ThreadPoolExecutor(1) as pool:
        expected_ENB = feedback.quantize(weight_ENK, codec.quant_type, factor_EKK, pool)
        monkeypatch.setattr("moe2gguf.backend.has_kernels", lambda _: True)
        found_ENB = feedback.quantize(weight_ENK.to(device), codec.quant_type, factor_EKK.to(device), pool).cpu()
    found, expected = (codec.unpack(blocks.flatten(0, 1).unflatten(1, (-1, codec.block_bytes)).flatten(0, 1))
                       for blocks in (found_ENB, expected_ENB))  # fmt: skip
    for field in dataclasses.fields(found):
        if (values := getattr(found, field.name)) is not None:
            assert (values == getattr(expected, field.name)).float().mean() > 0.97
