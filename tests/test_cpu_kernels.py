"""What is compiled for the CPU against its plain references."""

import pytest
import torch

from moe2gguf import backend
from moe2gguf.codec import CODECS
from moe2gguf.ggml import QuantType
from moe2gguf.walk import Tries
from moe2gguf_kernels.walk_cpu import ROWS
from tests.walks import compare, factor, first_tries, hard_and_random


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


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_pack_undoes_unpack(quant_type: QuantType) -> None:
    """Any bits make a block."""
    codec = CODECS[quant_type]
    blocks_RB = torch.randint(0, 256, (37, codec.block_bytes), generator=torch.Generator().manual_seed(0)).byte()
    fields = codec.unpack(blocks_RB)
    assert torch.equal(backend.pack(codec, fields), codec.pack(fields))
    assert torch.equal(backend.pack(codec, codec.unpack(blocks_RB[:0])), blocks_RB[:0])
