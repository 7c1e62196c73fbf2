"""The walk over a sub-block by Triton kernels against the plain one."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe2gguf import backend, feedback
from moe2gguf.codec import CODECS, Codec
from moe2gguf.feedback import Curvature, curvature
from moe2gguf.ggml import QuantType
from moe2gguf.walk import Tries, Walked
from moe2gguf_kernels.walk import walk
from tests.test_feedback import correlated
from tests.walks import DAMPING, Walk, compare, factor, first_tries, hard_and_random

# the interpreter's time goes by the number of operations, not by their size
CODEBOOK_TILE = 512


def walk_on(device: torch.device, tile: int) -> Walk:
    def on_device(codec: Codec, target_TEN: torch.Tensor, tries: Tries, factor_ETT: torch.Tensor) -> Walked:
        tensors = (target_TEN, tries.scale_JEN, tries.offset_JEN, factor_ETT)
        tables = backend.layout(codec.quant_type, device)
        found = walk(*(None if x is None else x.to(device) for x in tensors), tables, tile)
        return Walked(*(None if x is None else x.cpu() for x in found))

    return on_device


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_every_type_walks_as_feedback_does(quant_type: QuantType, device: torch.device) -> None:
    codec = CODECS[quant_type]
    factor_ETT = factor(codec.sub_weights, 2)
    n_tries = 4 if codec.sub_offset_Q is not None else 3 if codec.quant_type == QuantType.MXFP4 else 5
    # two of them, the second after what the first wrote
    target_TEN, tries = first_tries(codec, hard_and_random(codec), factor_ETT, slice(0, None, n_tries // 2 + 1))
    compare(walk_on(device, CODEBOOK_TILE), codec, target_TEN, tries, factor_ETT)


@pytest.mark.parametrize("name", ["Q3_K", "IQ2_XS"])
def test_rows_of_several_tiles(name: str, device: torch.device) -> None:
    """130 rows and a codebook of 512: no multiple of the first, several of the second."""
    codec = CODECS[QuantType[name]]
    weight_SEN = torch.randn(codec.block_weights, 1, 130, generator=torch.Generator().manual_seed(1))
    factor_ETT = factor(codec.sub_weights, 1)
    target_TEN, tries = first_tries(codec, weight_SEN, factor_ETT, slice(2, 4))
    compare(walk_on(device, 64), codec, target_TEN, tries, factor_ETT)


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
    monkeypatch.setattr("moe2gguf.scales.CODEBOOK_TRIES", (1.0,))
    codec = CODECS[QuantType[name]]
    weight_ENK = torch.randn(n_experts, 3, n_columns, generator=torch.Generator().manual_seed(2))
    hessian_EKK = torch.stack([torch.from_numpy(correlated(n_columns, 1.0, seed)) for seed in range(n_experts)])
    costs = curvature(hessian_EKK, DAMPING)
    on_device = Curvature(costs.hessian_EKK.to(device), costs.root_EKK.to(device), costs.places)
    with ThreadPoolExecutor(1) as pool:
        expected_ENB = feedback.quantize(weight_ENK, codec.quant_type, costs, pool)
        monkeypatch.setattr("moe2gguf.backend.has_kernels", lambda _: True)
        found_ENB = feedback.quantize(weight_ENK.to(device), codec.quant_type, on_device, pool).cpu()
    found, expected = (codec.unpack(blocks.flatten(0, 1).unflatten(1, (-1, codec.block_bytes)).flatten(0, 1))
                       for blocks in (found_ENB, expected_ENB))  # fmt: skip
    for field in dataclasses.fields(found):
        if (values := getattr(found, field.name)) is not None:
            assert (values == getattr(expected, field.name)).float().mean() > 0.97
