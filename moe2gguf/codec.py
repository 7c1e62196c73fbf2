"""GGUF's quantised types as fields of bits: codes, signs, the scales of sub-blocks, and the scales of those.

Declared once, for encoding, decoding and the search over both, on any device.

Shapes: R rows, S weights of a block, B bytes of a block, C codes of a block, W weights of a code, G codes there are,
P sub-blocks (runs of weights with a scale of their own), Q values of a sub-block's scale.
"""

from dataclasses import dataclass

import gguf
import numpy as np
import torch

from moe2gguf.ggml import QuantType, block_shape

SIGN_WEIGHTS = 8  # the weights whose signs lie together
F16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Places:
    """Where the fields lie: bit numbers in the block, i64 (fields, bits of a field), the lowest bit first."""

    codes: np.ndarray  # (C, bits)
    signs: np.ndarray | None = None  # (S / 8, 7 or 8): with 7 the last sign makes their number even
    d: np.ndarray | None = None  # (1, 16): f16, the unit of the sub-blocks' scales
    sub: np.ndarray | None = None  # (P, bits): the sub-blocks' scales
    dmin: np.ndarray | None = None  # (1, 16): f16, the unit of the sub-blocks' minimums
    minimum: np.ndarray | None = None  # (P, bits)


@dataclass(frozen=True)
class Fields:
    """What a block holds; None where the type has no such field."""

    codes_RC: torch.Tensor  # i32
    negative_RS: torch.Tensor | None = None  # bool
    d_R: torch.Tensor | None = None  # f16
    sub_RP: torch.Tensor | None = None  # i32
    dmin_R: torch.Tensor | None = None  # f16
    minimum_RP: torch.Tensor | None = None  # i32


@dataclass(frozen=True)
class Codec:
    """weight = d * (sub_scale[sub] * sign * codebook[code] + sub_offset[sub]) - dmin * minimum."""

    quant_type: QuantType
    codebook_GW: torch.Tensor  # f32; magnitudes where signs are apart
    places: Places
    sub_scale_Q: torch.Tensor | None = None  # f32; None: the block has one scale, d
    sub_offset_Q: torch.Tensor | None = None  # f32; None: no offset

    @property
    def width(self) -> int:
        return self.codebook_GW.shape[1]

    @property
    def block_weights(self) -> int:
        return block_shape(self.quant_type)[0]

    @property
    def block_bytes(self) -> int:
        return block_shape(self.quant_type)[1]

    @property
    def n_subs(self) -> int:
        return 1 if self.places.sub is None else len(self.places.sub)

    @property
    def sub_weights(self) -> int:
        return self.block_weights // self.n_subs

    @property
    def has_signs(self) -> bool:
        return self.places.signs is not None

    @property
    def has_even_signs(self) -> bool:
        return self.places.signs is not None and self.places.signs.shape[1] < SIGN_WEIGHTS

    @property
    def has_minimum(self) -> bool:
        return self.places.minimum is not None

    def pack(self, fields: Fields) -> torch.Tensor:
        """-> uint8 (R, B)"""
        device = fields.codes_RC.device
        bits = torch.zeros((len(fields.codes_RC), 8 * self.block_bytes), dtype=torch.uint8, device=device)

        def put(places: np.ndarray | None, values: torch.Tensor | None) -> None:
            if places is not None:
                assert values is not None
                shifts = torch.arange(places.shape[1], dtype=torch.int32, device=device)
                spread = (values.int()[..., None] >> shifts) & 1
                bits[:, torch.from_numpy(places.ravel()).to(device)] = spread.flatten(1).to(torch.uint8)

        put(self.places.codes, fields.codes_RC)
        if fields.negative_RS is not None:
            negative = fields.negative_RS.unflatten(1, (-1, SIGN_WEIGHTS)).int()
            put(self.places.signs, (negative << torch.arange(SIGN_WEIGHTS, device=device)).sum(-1))
        put(self.places.d, None if fields.d_R is None else fields.d_R.view(torch.int16)[:, None])
        put(self.places.sub, fields.sub_RP)
        put(self.places.dmin, None if fields.dmin_R is None else fields.dmin_R.view(torch.int16)[:, None])
        put(self.places.minimum, fields.minimum_RP)
        eight = bits.unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=device)
        return eight.sum(-1, dtype=torch.uint8)

    def unpack(self, blocks_RB: torch.Tensor) -> Fields:
        device = blocks_RB.device
        bits = ((blocks_RB[..., None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1).flatten(1)

        def get(places: np.ndarray | None) -> torch.Tensor | None:
            if places is None:
                return None
            found = bits[:, torch.from_numpy(places.ravel()).to(device)].unflatten(1, places.shape).int()
            return (found << torch.arange(places.shape[1], dtype=torch.int32, device=device)).sum(-1, dtype=torch.int32)

        def half(places: np.ndarray | None) -> torch.Tensor | None:
            return None if (found := get(places)) is None else found[:, 0].to(torch.int16).view(torch.float16)

        codes_RC, words = get(self.places.codes), get(self.places.signs)
        assert codes_RC is not None
        negative_RS = None
        if words is not None:
            shifts = torch.arange(SIGN_WEIGHTS, dtype=torch.int32, device=device)
            signs = (words[..., None] >> shifts) & 1
            if self.has_even_signs:
                signs[..., -1] = signs[..., :-1].sum(-1) % 2
            negative_RS = signs.flatten(1).bool()
        return Fields(
            codes_RC, negative_RS, half(self.places.d), get(self.places.sub), half(self.places.dmin),
            get(self.places.minimum),
        )  # fmt: skip

    def parts(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights as multiples of d and of dmin, f32 (R, S) and (R, S or 1): weight = d * one - dmin * other."""
        device = fields.codes_RC.device
        level_RS = self.codebook_GW.to(device)[fields.codes_RC.long()].flatten(1)
        if fields.negative_RS is not None:
            level_RS = torch.where(fields.negative_RS, -level_RS, level_RS)

        def spread(values_RP: torch.Tensor) -> torch.Tensor:
            return values_RP.repeat_interleave(self.sub_weights, dim=1)

        if fields.sub_RP is not None:
            assert self.sub_scale_Q is not None
            level_RS = level_RS * spread(self.sub_scale_Q.to(device)[fields.sub_RP.long()])
            if self.sub_offset_Q is not None:
                level_RS = level_RS + spread(self.sub_offset_Q.to(device)[fields.sub_RP.long()])
        minimum = torch.zeros_like(level_RS[:, :1]) if fields.minimum_RP is None else spread(fields.minimum_RP.float())
        return level_RS, minimum

    def decode(self, blocks_RB: torch.Tensor) -> torch.Tensor:
        """uint8 (R, B) -> f32 (R, S)"""
        fields = self.unpack(blocks_RB)
        level_RS, minimum = self.parts(fields)
        if fields.d_R is not None:
            level_RS = fields.d_R.float()[:, None] * level_RS
        return level_RS if fields.dmin_R is None else level_RS - fields.dmin_R.float()[:, None] * minimum

    def rescaled(self, blocks_RB: torch.Tensor, factor_R: torch.Tensor) -> torch.Tensor:
        """uint8 (R, B): all of a block's weights times factor_R, f32 (R,), as nearly as f16 allows."""
        found_RB = blocks_RB.clone()
        for places in (self.places.d, self.places.dmin):
            if places is not None:
                bytes_16, bits_16 = places[0] // 8, torch.from_numpy(places[0] % 8)
                shifts = torch.arange(16, dtype=torch.int32)
                bits_R16 = (blocks_RB[:, bytes_16].int() >> bits_16) & 1
                unit_R = (bits_R16 << shifts).sum(-1, dtype=torch.int32).to(torch.int16).view(torch.float16)
                new_R = (unit_R.float() * factor_R).clamp(-F16_MAX, F16_MAX).half().view(torch.int16).int()
                changed_R16 = (((new_R[:, None] >> shifts) & 1) ^ bits_R16) << bits_16
                for i, byte in enumerate(bytes_16.tolist()):
                    found_RB[:, byte] ^= changed_R16[:, i].to(torch.uint8)
        return found_RB


def _field(byte: int, bit: int, n: int) -> list[int]:
    return [8 * byte + bit + i for i in range(n)]


def _levels(first: int, n: int) -> torch.Tensor:
    return torch.arange(first, first + n, dtype=torch.float32)[:, None]


def _grid(quant_class: type) -> torch.Tensor:
    """The codebook of an IQ type as gguf holds it, f32 (G, W)."""
    quant_class.init_grid()  # type: ignore[attr-defined]
    grid = np.asarray(quant_class.grid, np.float32)  # type: ignore[attr-defined]
    return torch.from_numpy(grid.reshape(grid.shape[-2:]).copy())


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
    """Every 32 weights have a 32-bit word with four times 7 signs, and a scale above them."""
    return np.array([_field(first_byte + i // 4 * stride_bytes, 7 * (i % 4), 7) for i in range(32)])


def _scales_above_signs(first_byte: int, stride_bytes: int) -> np.ndarray:
    return np.array([_field(first_byte + i * stride_bytes, 28, 4) for i in range(8)])


def _nibble_per_sub(first_byte: int, n_subs: int) -> np.ndarray:
    return np.array([_field(first_byte + i // 2, 4 * (i % 2), 4) for i in range(n_subs)])


def _k4_scales() -> tuple[np.ndarray, np.ndarray]:
    """Scales and minimums of Q4_K and Q5_K: 6 bits each, the last four's upper two bits above the first four."""
    low = [_field(4 + j, 0, 6) for j in range(4)] + [_field(8 + j, 0, 4) + _field(j, 6, 2) for j in range(4, 8)]
    high = [_field(8 + j, 0, 6) for j in range(4)] + [_field(8 + j, 4, 4) + _field(4 + j, 6, 2) for j in range(4, 8)]
    return np.array(low), np.array(high)


def _codecs() -> dict[QuantType, Codec]:
    q = gguf.quants
    d = np.array([_field(0, 0, 16)])
    fifth = [_field(16 + k % 32, k // 32, 1) for k in range(256)]
    third = [_field(k % 32, k // 32, 1) for k in range(256)]
    iq4 = torch.tensor(q.IQ4_NL.kvalues, dtype=torch.float32)[:, None]
    iq1, delta = _grid(q.IQ1_S), float(q.IQ1_S.delta)
    sixteenth = torch.arange(16)
    half_steps = torch.arange(16) + 0.5
    odd = 2.0 * torch.arange(8) + 1
    k4_scales, k4_minimums = _k4_scales()
    found = (
        Codec(
            QuantType.Q8_0,
            torch.arange(256).to(torch.uint8).view(torch.int8).float()[:, None],
            Places(np.array([_field(2 + k, 0, 8) for k in range(32)]), d=d),
        ),
        Codec(QuantType.IQ4_NL, iq4, Places(np.array(_nibbles(2, 32, 16)), d=d)),
        Codec(
            QuantType.MXFP4,
            torch.tensor(q.MXFP4.kvalues, dtype=torch.float32)[:, None],
            Places(np.array(_nibbles(1, 32, 16)), sub=np.array([_field(0, 0, 8)])),
            # a power of two, halved for the codebook's doubled values
            torch.ldexp(torch.ones(256), torch.arange(256) - 128),
        ),
        Codec(
            QuantType.IQ4_XS,
            iq4,
            Places(
                np.array(_nibbles(8, 256, 16)),
                d=d,
                sub=np.array([_field(4 + i // 2, 4 * (i % 2), 4) + _field(2, 2 * i, 2) for i in range(8)]),
            ),
            _levels(-32, 64)[:, 0],
        ),
        Codec(
            QuantType.Q2_K,
            _levels(0, 4),
            Places(
                np.array(_pairs(16)),
                d=np.array([_field(80, 0, 16)]),
                sub=np.array([_field(i, 0, 4) for i in range(16)]),
                dmin=np.array([_field(82, 0, 16)]),
                minimum=np.array([_field(i, 4, 4) for i in range(16)]),
            ),
            _levels(0, 16)[:, 0],
        ),
        Codec(
            QuantType.Q3_K,
            _levels(-4, 8),
            Places(
                _joined(_pairs(32), third),
                d=np.array([_field(108, 0, 16)]),
                sub=np.array(
                    [_field(96 + i % 8, 4 * (i // 8), 4) + _field(104 + i % 4, 2 * (i // 4), 2) for i in range(16)]
                ),
            ),
            _levels(-32, 64)[:, 0],
        ),
        Codec(
            QuantType.Q4_K,
            _levels(0, 16),
            Places(
                np.array(_nibbles(16, 256, 32)),
                d=d,
                sub=k4_scales,
                dmin=np.array([_field(2, 0, 16)]),
                minimum=k4_minimums,
            ),
            _levels(0, 64)[:, 0],
        ),
        Codec(
            QuantType.Q5_K,
            _levels(0, 32),
            Places(
                _joined(_nibbles(48, 256, 32), fifth),
                d=d,
                sub=k4_scales,
                dmin=np.array([_field(2, 0, 16)]),
                minimum=k4_minimums,
            ),
            _levels(0, 64)[:, 0],
        ),
        Codec(
            QuantType.Q6_K,
            _levels(-32, 64),
            Places(
                _joined(_nibbles(0, 256, 64), _pairs(128)),
                d=np.array([_field(208, 0, 16)]),
                sub=np.array([_field(192 + i, 0, 8) for i in range(16)]),
            ),
            torch.arange(256).to(torch.uint8).view(torch.int8).float(),
        ),
        Codec(
            QuantType.IQ1_S,
            iq1,
            Places(
                np.array(
                    [
                        _field(2 + j, 0, 8) + _field(34 + j // 4 * 2, 0, 16)[3 * (j % 4) : 3 * (j % 4) + 3]
                        for j in range(32)
                    ]
                ),
                d=d,
                sub=np.array([_field(34 + 2 * i, 12, 4) for i in range(8)]),
            ),
            # the highest bit says which way all levels are shifted
            odd.repeat(2),
            (odd * delta).repeat(2) * torch.where(sixteenth < 8, 1, -1),
        ),
        Codec(
            QuantType.IQ1_M,
            # the highest bit of a code says which way its levels are shifted
            torch.cat([iq1 + delta, iq1 - delta]),
            Places(
                np.array([_field(j, 0, 8) + _field(32 + j // 2, 4 * (j % 2), 4) for j in range(32)]),
                d=np.array([[place for i in range(4) for place in _field(48 + 2 * i, 12, 4)]]),
                sub=np.array([_field(48 + i // 4 * 2, 3 * (i % 4), 3) for i in range(16)]),
            ),
            odd,
        ),
        Codec(
            QuantType.IQ2_XXS,
            _grid(q.IQ2_XXS),
            Places(
                np.array([_field(2 + j // 4 * 8 + j % 4, 0, 8) for j in range(32)]),
                _packed_signs(6, 8),
                d,
                _scales_above_signs(6, 8),
            ),
            half_steps / 4,
        ),
        Codec(
            QuantType.IQ2_XS,
            _grid(q.IQ2_XS),
            Places(
                np.array([_field(2 + 2 * j, 0, 9) for j in range(32)]),
                np.array([_field(2 + 2 * j, 9, 7) for j in range(32)]),
                d,
                _nibble_per_sub(66, 16),
            ),
            half_steps / 4,
        ),
        Codec(
            QuantType.IQ2_S,
            _grid(q.IQ2_S),
            Places(
                np.array([_field(2 + j, 0, 8) + _field(66 + j // 4, 2 * (j % 4), 2) for j in range(32)]),
                _sign_bytes(34),
                d,
                _nibble_per_sub(74, 16),
            ),
            half_steps / 4,
        ),
        Codec(
            QuantType.IQ3_XXS,
            _grid(q.IQ3_XXS),
            Places(
                np.array([_field(2 + j, 0, 8) for j in range(64)]),
                _packed_signs(66, 4),
                d,
                _scales_above_signs(66, 4),
            ),
            half_steps / 2,
        ),
        Codec(
            QuantType.IQ3_S,
            _grid(q.IQ3_S),
            Places(
                np.array([_field(2 + j, 0, 8) + _field(66 + j // 8, j % 8, 1) for j in range(64)]),
                _sign_bytes(74),
                d,
                _nibble_per_sub(106, 8),
            ),
            2.0 * torch.arange(16) + 1,
        ),
    )
    return {codec.quant_type: codec for codec in found}


CODECS: dict[QuantType, Codec] = _codecs()
