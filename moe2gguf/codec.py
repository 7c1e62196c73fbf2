"""GGUF's quantised types as codes and scales: which bits of a block are codes, and which values they stand for.

A block's other bits are its scales. What they come to is asked of ggml's own decoder, so that it is not told twice.

Shapes: R rows, S weights of a block, B bytes of a block, C codes of a block, W weights of a code, G codes there are.
"""

from dataclasses import dataclass

import gguf
import numpy as np

from moe2gguf import ggml
from moe2gguf.ggml import QuantType

SIGN_WEIGHTS = 8  # the weights whose signs lie together


@dataclass(frozen=True)
class Codec:
    """weight = scale * sign * codebook[code] + offset; signs only where they are apart from the code."""

    quant_type: QuantType
    codebook_GW: np.ndarray  # f32; magnitudes where signs are apart
    code_bits: np.ndarray  # i64 (C, bits of a code): their places in the block, the lowest bit first
    sign_bits: np.ndarray | None = None  # i64 (S / 8, 7 or 8): with 7 the last sign makes their number even
    scale_bits: np.ndarray | None = None  # i64 (16,): the f16 scale of the block; MXFP4's is a power of two

    @property
    def width(self) -> int:
        return self.codebook_GW.shape[1]

    @property
    def block_weights(self) -> int:
        return self.width * len(self.code_bits)

    @property
    def has_even_signs(self) -> bool:
        return self.sign_bits is not None and self.sign_bits.shape[1] < SIGN_WEIGHTS

    def put(self, blocks_RB: np.ndarray, codes_RC: np.ndarray, negative_RS: np.ndarray | None = None) -> np.ndarray:
        """The blocks with other codes and, where signs are apart, other signs; their scales stay."""
        bits = np.unpackbits(blocks_RB, axis=1, bitorder="little")
        shifts = np.arange(self.code_bits.shape[1])
        bits[:, self.code_bits] = (codes_RC[..., None] >> shifts) & 1
        if self.sign_bits is not None:
            assert negative_RS is not None
            signs = negative_RS.reshape(len(bits), -1, SIGN_WEIGHTS)
            assert not (self.has_even_signs and (signs.sum(-1) % 2).any())
            bits[:, self.sign_bits] = signs[..., : self.sign_bits.shape[1]]
        return np.packbits(bits, axis=1, bitorder="little")

    def codes(self, blocks_RB: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """-> codes i64 (R, C), and which weights are negative, bool (R, S), where signs are apart."""
        bits = np.unpackbits(blocks_RB, axis=1, bitorder="little")
        codes_RC = (bits[:, self.code_bits].astype(np.int64) << np.arange(self.code_bits.shape[1])).sum(-1)
        if self.sign_bits is None:
            return codes_RC, None
        signs = bits[:, self.sign_bits]
        if self.has_even_signs:
            signs = np.concatenate([signs, signs.sum(-1, keepdims=True) % 2], axis=-1)
        return codes_RC, signs.reshape(len(bits), -1).astype(bool)

    def scales(self, blocks_RB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """scale and offset of every weight, f32 (R, S) each."""
        # two codes of which every weight differs
        sums_G = self.codebook_GW.sum(1)
        low, high = int(sums_G.argmin()), int(sums_G.argmax())
        shape = (len(blocks_RB), len(self.code_bits))
        positive = np.zeros((len(blocks_RB), self.block_weights), bool)

        def decoded(code: int) -> np.ndarray:
            put = self.put(blocks_RB, np.full(shape, code), positive)
            return ggml.decode(put, self.quant_type, self.block_weights)

        high_W = np.tile(self.codebook_GW[high], len(self.code_bits))
        if self.sign_bits is not None:
            scale_RS = decoded(high) / high_W
            return scale_RS, np.zeros_like(scale_RS)
        assert (self.codebook_GW[low] != self.codebook_GW[high]).all()
        low_RS, low_W = decoded(low), np.tile(self.codebook_GW[low], len(self.code_bits))
        scale_RS = (decoded(high) - low_RS) / (high_W - low_W)
        return scale_RS, low_RS - scale_RS * low_W

    def block_scale(self, blocks_RB: np.ndarray) -> np.ndarray:
        """f16 (R,)"""
        assert self.scale_bits is not None
        bits = np.unpackbits(blocks_RB, axis=1, bitorder="little")[:, self.scale_bits]
        return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view(np.float16)[:, 0]

    def put_block_scale(self, blocks_RB: np.ndarray, scale_R: np.ndarray) -> np.ndarray:
        assert self.scale_bits is not None and scale_R.dtype == np.float16
        bits = np.unpackbits(blocks_RB, axis=1, bitorder="little")
        bits[:, self.scale_bits] = np.unpackbits(
            np.ascontiguousarray(scale_R)[:, None].view(np.uint8), axis=1, bitorder="little"
        )
        return np.packbits(bits, axis=1, bitorder="little")


def _field(byte: int, bit: int, n: int) -> list[int]:
    return [8 * byte + bit + i for i in range(n)]


def _levels(first: int, n: int) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.float32)[:, None]


def _grid(quant_class: type) -> np.ndarray:
    """The codebook of an IQ type as gguf holds it, f32 (G, W)."""
    quant_class.init_grid()  # type: ignore[attr-defined]
    grid = np.asarray(quant_class.grid, np.float32)  # type: ignore[attr-defined]
    return grid.reshape(grid.shape[-2:])


def _nibbles(first_byte: int, n_weights: int, half: int) -> list[list[int]]:
    """4 bits a weight: of every 2 * half weights the first half in the low nibbles, the second in the high ones."""
    return [_field(first_byte + k // (2 * half) * half + k % half, 4 * (k // half % 2), 4) for k in range(n_weights)]


def _pairs(first_byte: int) -> list[list[int]]:
    """2 bits a weight: of every 128 weights four runs of 32 share 32 bytes."""
    return [_field(first_byte + k // 128 * 32 + k % 32, 2 * (k // 32 % 4), 2) for k in range(256)]


def _joined(*parts: list[list[int]]) -> np.ndarray:
    return np.array([[place for bits in parts_of_code for place in bits] for parts_of_code in zip(*parts, strict=True)])


def _sign_bytes(first_byte: int) -> np.ndarray:
    return np.array([_field(first_byte + i, 0, 8) for i in range(32)])


def _packed_signs(first_byte: int, stride_bytes: int) -> np.ndarray:
    """Every 32 weights have a 32-bit word with four times 7 signs."""
    return np.array([_field(first_byte + i // 4 * stride_bytes, 7 * (i % 4), 7) for i in range(32)])


def _codecs() -> dict[QuantType, Codec]:
    q = gguf.quants
    fifth = [_field(16 + k % 32, k // 32, 1) for k in range(256)]
    third = [_field(k % 32, k // 32, 1) for k in range(256)]
    iq4 = np.array(q.IQ4_NL.kvalues, np.float32)[:, None]
    iq1 = _grid(q.IQ1_S)
    ternary = np.concatenate([iq1 + q.IQ1_S.delta, iq1 - q.IQ1_S.delta])  # IQ1_M's highest bit of a code: which
    d = np.array(_field(0, 0, 16))
    found = (
        Codec(
            QuantType.Q8_0,
            np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32)[:, None],
            np.array([_field(2 + k, 0, 8) for k in range(32)]),
            scale_bits=d,
        ),
        Codec(QuantType.IQ4_NL, iq4, np.array(_nibbles(2, 32, 16)), scale_bits=d),
        Codec(QuantType.MXFP4, np.array(q.MXFP4.kvalues, np.float32)[:, None], np.array(_nibbles(1, 32, 16))),
        Codec(QuantType.IQ4_XS, iq4, np.array(_nibbles(8, 256, 16)), scale_bits=d),
        Codec(QuantType.Q2_K, _levels(0, 4), np.array(_pairs(16)), scale_bits=np.array(_field(80, 0, 16))),
        Codec(QuantType.Q3_K, _levels(-4, 8), _joined(_pairs(32), third), scale_bits=np.array(_field(108, 0, 16))),
        Codec(QuantType.Q4_K, _levels(0, 16), np.array(_nibbles(16, 256, 32)), scale_bits=d),
        Codec(QuantType.Q5_K, _levels(0, 32), _joined(_nibbles(48, 256, 32), fifth), scale_bits=d),
        Codec(
            QuantType.Q6_K,
            _levels(-32, 64),
            _joined(_nibbles(0, 256, 64), _pairs(128)),
            scale_bits=np.array(_field(208, 0, 16)),
        ),
        Codec(
            QuantType.IQ1_S,
            iq1,
            np.array(
                [_field(2 + j, 0, 8) + _field(34 + j // 4 * 2, 0, 16)[3 * (j % 4) : 3 * (j % 4) + 3] for j in range(32)]
            ),
            scale_bits=d,
        ),
        Codec(
            QuantType.IQ1_M,
            ternary,
            np.array([_field(j, 0, 8) + _field(32 + j // 2, 4 * (j % 2), 4) for j in range(32)]),
            scale_bits=np.array([place for i in range(4) for place in _field(48 + 2 * i, 12, 4)]),
        ),
        Codec(
            QuantType.IQ2_XXS,
            _grid(q.IQ2_XXS),
            np.array([_field(2 + j // 4 * 8 + j % 4, 0, 8) for j in range(32)]),
            _packed_signs(6, 8),
            d,
        ),
        Codec(
            QuantType.IQ2_XS,
            _grid(q.IQ2_XS),
            np.array([_field(2 + 2 * j, 0, 9) for j in range(32)]),
            np.array([_field(2 + 2 * j, 9, 7) for j in range(32)]),
            d,
        ),
        Codec(
            QuantType.IQ2_S,
            _grid(q.IQ2_S),
            np.array([_field(2 + j, 0, 8) + _field(66 + j // 4, 2 * (j % 4), 2) for j in range(32)]),
            _sign_bytes(34),
            d,
        ),
        Codec(
            QuantType.IQ3_XXS,
            _grid(q.IQ3_XXS),
            np.array([_field(2 + j, 0, 8) for j in range(64)]),
            _packed_signs(66, 4),
            d,
        ),
        Codec(
            QuantType.IQ3_S,
            _grid(q.IQ3_S),
            np.array([_field(2 + j, 0, 8) + _field(66 + j // 8, j % 8, 1) for j in range(64)]),
            _sign_bytes(74),
            d,
        ),
    )
    return {codec.quant_type: codec for codec in found}


CODECS: dict[QuantType, Codec] = _codecs()
