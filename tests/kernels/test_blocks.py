"""decode and pack against the codec, equal to the bit."""

import dataclasses

import numpy as np
import pytest
import torch

from moe2gguf import backend, ggml
from moe2gguf.codec import CODECS, Codec, Fields
from moe2gguf.ggml import QuantType
from moe2gguf_kernels.decode import decode
from moe2gguf_kernels.pack import pack
from tests.test_codec import hard_rows

# no multiple of a tile, and more than one
N_ROWS = 37


def some_blocks(codec: Codec) -> torch.Tensor:
    """Blocks ggml makes of what is hard, and every bit in every place."""
    hard_RB = ggml.encode(np.stack([*hard_rows(codec.block_weights).values()]), codec.quant_type)
    any_RB = np.random.default_rng(1).integers(0, 256, (N_ROWS - len(hard_RB), codec.block_bytes), np.uint8)
    fields = codec.unpack(torch.from_numpy(any_RB))
    # the payload of a NaN is the processor's own
    halves = {
        name: torch.linspace(-60, 60, len(any_RB)).half()
        for name in ("d_R", "dmin_R")
        if getattr(fields, name) is not None
    }
    return torch.cat([torch.from_numpy(hard_RB), codec.pack(dataclasses.replace(fields, **halves))])


def on(device: torch.device, fields: Fields) -> list[torch.Tensor | None]:
    return [None if x is None else x.to(device) for x in vars(fields).values()]


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_decode_equals_the_codecs(quant_type: QuantType, device: torch.device) -> None:
    codec = CODECS[quant_type]
    blocks_RB = some_blocks(codec)
    found_RS = decode(blocks_RB.to(device), backend.layout(quant_type, device)).cpu()
    # as bits: zeros have signs
    assert torch.equal(found_RS.view(torch.int32), codec.decode(blocks_RB).view(torch.int32))


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_pack_undoes_unpack(quant_type: QuantType, device: torch.device) -> None:
    codec = CODECS[quant_type]
    blocks_RB = some_blocks(codec)
    found_RB = pack(*on(device, codec.unpack(blocks_RB)), backend.layout(quant_type, device))
    assert torch.equal(found_RB.cpu(), blocks_RB)


def test_pack_takes_fields_as_feedback_has_them(device: torch.device) -> None:
    """Transposed: sub-blocks lead in memory while they are walked."""
    codec = CODECS[QuantType.Q4_K]
    blocks_RB = some_blocks(codec)
    fields = codec.unpack(blocks_RB)
    assert fields.sub_RP is not None and fields.minimum_RP is not None
    fields = dataclasses.replace(
        fields, sub_RP=fields.sub_RP.T.contiguous().T, minimum_RP=fields.minimum_RP.T.contiguous().T
    )
    assert torch.equal(pack(*on(device, fields), backend.layout(codec.quant_type, device)).cpu(), blocks_RB)


def test_no_blocks(device: torch.device) -> None:
    """A launch of no programs is an error of CUDA's."""
    codec, layout = CODECS[QuantType.Q4_K], backend.layout(QuantType.Q4_K, device)
    blocks_RB = torch.zeros((0, codec.block_bytes), dtype=torch.uint8)
    assert decode(blocks_RB.to(device), layout).shape == (0, codec.block_weights)
    assert pack(*on(device, codec.unpack(blocks_RB)), layout).shape == blocks_RB.shape
