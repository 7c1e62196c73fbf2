"""A GGUF type as the kernels see it: its tables on the device, and its bit fields cut into pieces of bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

SIGN_WEIGHTS = 8  # the weights whose signs lie together


@dataclass(frozen=True)
class Pieces:
    """A kind of field, cut where bytes end: each piece is `(byte >> shift & mask) << place` of its field's value.

    Both tables are i32; pieces that a field or byte does not have hold a mask of zero.
    """

    by_field_X4F: torch.Tensor  # byte, shift, mask, place: F fields, at most X pieces each
    by_byte_X4B: torch.Tensor  # field, shift, mask, place: B bytes of the block, at most X pieces each

    @property
    def n_fields(self) -> int:
        return self.by_field_X4F.shape[-1]


@dataclass(frozen=True)
class Levels:
    """A codebook of single weights, in ascending order."""

    level_G: torch.Tensor  # f32
    code_G: torch.Tensor  # i32
    boundary_G: torch.Tensor  # f32, halfway to the next; one less than there are levels
    low: float
    high: float
    are_consecutive: bool  # integers, and their codes in the same order


@dataclass(frozen=True, eq=False)  # one object per type and device: an argument of caches
class Layout:
    """weight = d * (sub_scale[sub] * sign * codebook[code] + sub_offset[sub]) - dmin * minimum; None: no such field."""

    block_weights: int
    block_bytes: int
    has_even_signs: bool  # every eighth sign makes the number of minus signs even, and is not stored
    codebook_GW: torch.Tensor  # f32; magnitudes where signs are apart
    levels: Levels | None  # None: a code has several weights
    sub_scale_Q: torch.Tensor | None  # f32
    sub_offset_Q: torch.Tensor | None  # f32
    codes: Pieces
    signs: Pieces | None  # a field per weight
    d: Pieces | None
    sub: Pieces | None
    dmin: Pieces | None
    minimum: Pieces | None

    @property
    def n_subs(self) -> int:
        return 1 if self.sub is None else self.sub.n_fields


def layout(
    block_weights: int,
    block_bytes: int,
    codebook_GW: torch.Tensor,
    sub_scale_Q: torch.Tensor | None,
    sub_offset_Q: torch.Tensor | None,
    places: Mapping[str, np.ndarray | None],
    device: torch.device,
) -> Layout:
    """The type's tables on DEVICE.

    places: for codes, signs, d, sub, dmin, minimum the bit numbers (fields, bits of a field), the lowest bit first;
    of signs (block_weights / 8, 7 or 8).
    """
    bits = {name: numbers.tolist() for name, numbers in places.items() if numbers is not None}
    has_even_signs = False
    if "signs" in bits:
        # a bit for each weight; none where the last of eight follows from the others
        has_even_signs = len(bits["signs"][0]) < SIGN_WEIGHTS
        bits["signs"] = [eight[w : w + 1] for eight in bits["signs"] for w in range(SIGN_WEIGHTS)]

    def on_device(table: torch.Tensor | None) -> torch.Tensor | None:
        return None if table is None else table.to(device).contiguous()

    def pieces(name: str) -> Pieces | None:
        return _pieces(bits[name], block_bytes, device) if name in bits else None

    return Layout(
        block_weights,
        block_bytes,
        has_even_signs,
        codebook_GW.to(device).contiguous(),
        _levels(codebook_GW[:, 0], device) if codebook_GW.shape[1] == 1 else None,
        on_device(sub_scale_Q),
        on_device(sub_offset_Q),
        _pieces(bits["codes"], block_bytes, device),
        *map(pieces, ("signs", "d", "sub", "dmin", "minimum")),
    )


def _levels(codebook_G: torch.Tensor, device: torch.device) -> Levels:
    level_G, code_G = codebook_G.sort()
    low, high = level_G[0].item(), level_G[-1].item()
    return Levels(
        level_G.to(device),
        code_G.int().to(device),
        ((level_G[1:] + level_G[:-1]) / 2).to(device),
        low,
        high,
        torch.equal(codebook_G, torch.arange(low, low + len(codebook_G))),
    )


def _pieces(fields: list[list[int]], n_bytes: int, device: torch.device) -> Pieces:
    by_field: list[list[tuple[int, ...]]] = [[] for _ in fields]
    by_byte: list[list[tuple[int, ...]]] = [[] for _ in range(n_bytes)]
    for field, bits in enumerate(fields):
        first = 0
        for i in range(1, len(bits) + 1):
            if i == len(bits) or bits[i] != bits[i - 1] + 1 or bits[i] % 8 == 0:
                byte, shift = divmod(bits[first], 8)
                mask = (1 << (i - first)) - 1
                by_field[field].append((byte, shift, mask, first))
                by_byte[byte].append((field, shift, mask, first))
                first = i
    return Pieces(_table(by_field, device), _table(by_byte, device))


def _table(rows: list[list[tuple[int, ...]]], device: torch.device) -> torch.Tensor:
    """-> i32 (most pieces of a row, 4, rows)"""
    table = np.zeros((max(map(len, rows)), 4, len(rows)), np.int32)
    for i, row in enumerate(rows):
        for x, piece in enumerate(row):
            table[x, :, i] = piece
    return torch.from_numpy(table).to(device)
