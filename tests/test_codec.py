"""Every type's codes and scales against gguf's decoder, on blocks that are hard for one or the other."""

import gguf
import numpy as np
import pytest

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
def test_codes_and_scales_are_what_gguf_decodes(quant_type: QuantType) -> None:
    codec = CODECS[quant_type]
    weight_RS = np.stack([*hard_rows(codec.block_weights).values()])
    blocks_RB = ggml.encode(weight_RS, quant_type)
    codes_RC, negative_RS = codec.codes(blocks_RB)
    np.testing.assert_array_equal(codec.put(blocks_RB, codes_RC, negative_RS), blocks_RB)

    level_RS = codec.codebook_GW[codes_RC].reshape(weight_RS.shape)
    if negative_RS is not None:
        level_RS = np.where(negative_RS, -level_RS, level_RS)
    scale_RS, offset_RS = codec.scales(blocks_RB)
    decoded_RS = gguf.dequantize(blocks_RB, quant_type)
    np.testing.assert_allclose(scale_RS * level_RS + offset_RS, decoded_RS, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("quant_type", CODECS, ids=lambda t: t.name)
def test_any_codes_can_be_put(quant_type: QuantType) -> None:
    """Every code and sign in every place, beside the scales of other weights."""
    codec, rng = CODECS[quant_type], np.random.default_rng(1)
    n_rows = -(-2 * len(codec.codebook_GW) // len(codec.code_bits)) + 3
    blocks_RB = ggml.encode(rng.standard_normal((n_rows, codec.block_weights)).astype(np.float32), quant_type)
    codes_RC = rng.permutation(n_rows * len(codec.code_bits)).reshape(n_rows, -1) % len(codec.codebook_GW)
    negative_RS = rng.random((n_rows, codec.block_weights)) < 0.5
    if codec.has_even_signs:
        negative_RS[:, ::8] ^= negative_RS.reshape(n_rows, -1, 8).sum(-1) % 2 == 1
    put_RB = codec.put(blocks_RB, codes_RC, negative_RS)
    found_RC, found_RS = codec.codes(put_RB)
    np.testing.assert_array_equal(found_RC, codes_RC)
    assert found_RS is None or (found_RS == negative_RS).all()
    for before, after in zip(codec.scales(blocks_RB), codec.scales(put_RB), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("quant_type", [t for t in CODECS if CODECS[t].scale_bits is not None], ids=lambda t: t.name)
def test_doubling_the_block_scale_doubles_the_scales(quant_type: QuantType) -> None:
    codec = CODECS[quant_type]
    weight_RS = np.random.default_rng(2).standard_normal((5, codec.block_weights)).astype(np.float32)
    blocks_RB = ggml.encode(weight_RS, quant_type)
    doubled_RB = codec.put_block_scale(blocks_RB, 2 * codec.block_scale(blocks_RB))
    np.testing.assert_allclose(codec.scales(doubled_RB)[0], 2 * codec.scales(blocks_RB)[0], rtol=1e-6)
    np.testing.assert_array_equal(codec.codes(doubled_RB)[0], codec.codes(blocks_RB)[0])
