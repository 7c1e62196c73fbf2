"""Every type's fields against gguf's decoder, on blocks that are hard for one or the other."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch

from moe2gguf import ggml
from moe2gguf.codec import CODECS
from moe2gguf.ggml import QuantType


def hard_rows(n: int) -> dict[str, np.ndarray]:
    """f32 (n,) each."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(n)
    outlier = noise * 1e-3
    outlier[n // 3] = 50
    rows = {
        "random": noise,
        "all zero": np.zeros(n),
        "one outlier": outlier,
        "ties": rng.integers(-2, 3, n) * 0.5,
        "constant": np.full(n, 0.37),
        "negative constant": np.full(n, -0.37),
        # below the smallest f16, and just above
        "denormals": noise * 1e-40,
        "f16 denormals": noise * 1e-7,
        # scales near the largest f16
        "large": noise * 1e4,
        # an odd number of minus signs in every eight
        "odd signs": np.abs(noise) * np.where(np.arange(n) % 8 == 3, -1, 1),
    }
    return {name: row.astype(np.float32) for name, row in rows.items()}


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_ggmls_bytes_decode_as_gguf_decodes_them(quant_type: QuantType) -> None:
    codec = CODECS[quant_type]
    blocks_RB = ggml.encode(np.stack([*hard_rows(codec.block_weights).values()]), quant_type)
    found_RS = codec.decode(torch.from_numpy(blocks_RB))
    np.testing.assert_allclose(found_RS, gguf.dequantize(blocks_RB, quant_type), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_any_bytes_decode_as_gguf_decodes_them(quant_type: QuantType) -> None:
    """Every bit in every place, f16 infinities and NaN aside."""
    codec = CODECS[quant_type]
    blocks_RB = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (600, codec.block_bytes), np.uint8))
    fields = codec.unpack(blocks_RB)
    halves = {
        name: torch.linspace(-60, 60, 600).half() for name in ("d_R", "dmin_R") if getattr(fields, name) is not None
    }
    blocks_RB = codec.pack(dataclasses.replace(fields, **halves))
    expected_RS = gguf.dequantize(blocks_RB.numpy(), quant_type)
    np.testing.assert_allclose(codec.decode(blocks_RB), expected_RS, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_packing_undoes_unpacking(quant_type: QuantType) -> None:
    """Every bit of a block belongs to one field."""
    codec = CODECS[quant_type]
    blocks_RB = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (50, codec.block_bytes), np.uint8))
    assert torch.equal(codec.pack(codec.unpack(blocks_RB)), blocks_RB)
    places = np.concatenate([p.ravel() for p in vars(codec.places).values() if p is not None])
    assert sorted(places) == list(range(8 * codec.block_bytes))


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_rescaled_blocks_are_multiples(quant_type: QuantType) -> None:
    """By factors that f16 has exactly, in any block; overflow stays finite, powers of two of MXFP4 as they are."""
    codec = CODECS[quant_type]
    weights = np.random.default_rng(0).standard_normal((12, codec.block_weights)).astype(np.float32)
    blocks_RB = torch.from_numpy(ggml.encode(weights, quant_type, np.ones(codec.block_weights, np.float32)))
    factor_R = torch.tensor([0.5, 1.0, 2.0, -1.0] * 3)
    before_RS, after_RS = codec.decode(blocks_RB), codec.decode(codec.rescaled(blocks_RB, factor_R))
    wanted_RS = before_RS if codec.places.d is None else before_RS * factor_R[:, None]
    torch.testing.assert_close(after_RS, wanted_RS, rtol=1e-6, atol=0)
    assert codec.decode(codec.rescaled(blocks_RB, torch.full((12,), 1e9))).isfinite().all()
