"""Scales for a block and its sub-blocks, as the file can hold them: from the weights, and near those there are.

Shapes: see moe2gguf.walk; S weights of a block, Q values of a sub-block's scale, P sub-blocks, D blocks of them.
"""

import torch

from moe2gguf.codec import Codec
from moe2gguf.walk import Tries, chosen, nearest_level

# the scale that mostly is best, over rms of the weights / rms of the codebook, by width; and its multiples tried
CODEBOOK_START = {8: 1.1, 4: 1.2}
CODEBOOK_TRIES = (0.8, 0.9, 1.0, 1.1, 1.2)
# IQ1's codebooks are large, and their sub-blocks' scales few
LARGE_CODEBOOK, LARGE_CODEBOOK_TRIES = 2048, (0.92, 1.08)
# with levels, the scale that just avoids clipping, and so many steps less or more over the whole range
LEVEL_TRIES = (-1.6, -0.9, -0.4, 0.0, 0.6)
# of a scale that stands by itself its neighbours are so many steps away
NEAR_TRIES = (0.0, -0.5, 0.5)
# with levels and minimums, what a block's own scales are chosen by
BLOCK_LEVEL_TRY = -0.8
# room for what feedback adds to later sub-blocks
HEADROOM = 1.08
HALF_MAX = 65504.0


def block_multiples(codec: Codec) -> list[float]:
    """Of the scale that a sub-block's weights suggest, what its block's own scales are chosen by."""
    return [1 + BLOCK_LEVEL_TRY / len(codec.codebook_GW)] if codec.has_minimum else [1.0]


def first_multiples(codec: Codec) -> list[float]:
    """What is tried of it."""
    if codec.width == 1:
        return [1 + steps / len(codec.codebook_GW) for steps in LEVEL_TRIES]
    return [*(CODEBOOK_TRIES if len(codec.codebook_GW) < LARGE_CODEBOOK else LARGE_CODEBOOK_TRIES)]


def fits(
    codec: Codec, target_TEN: torch.Tensor, cost_TE: torch.Tensor, multiples: list[float]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and minimums, that fit a sub-block's weights by themselves, f32 (J, E, N)."""
    if codec.has_minimum:
        return _lines(codec, target_TEN, cost_TE, multiples)
    fit = _codebook_scale if codec.width > 1 else _full_scale
    return fit(codec, target_TEN, cost_TE) * torch.tensor(multiples, device=target_TEN.device)[:, None, None], None


def has_block_scale(codec: Codec) -> bool:
    """Sub-blocks' scales are in units of it."""
    return codec.places.d is not None and codec.sub_scale_Q is not None


def block_scales(
    codec: Codec, scale_PEN: torch.Tensor, minimum_PEN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and dmin, f16 (D, E, N), that let each sub-block have these; ones where the type has none, or no other."""
    if not has_block_scale(codec):
        return torch.ones_like(scale_PEN, dtype=torch.float16), None
    assert codec.sub_scale_Q is not None
    # of signed sub-scales the lowest reaches further
    low, high = codec.sub_scale_Q.min(), codec.sub_scale_Q.max()
    if minimum_PEN is not None:
        return _half(HEADROOM * scale_PEN.amax(0) / high)[None], _half(HEADROOM * minimum_PEN.amax(0) / high)[None]
    largest_EN = chosen(scale_PEN, scale_PEN.abs().argmax(0))
    return _half(HEADROOM * largest_EN / (low if low < 0 else high))[None], None


def first_tries(
    codec: Codec, target_TEN: torch.Tensor, cost_TE: torch.Tensor, d_1EN: torch.Tensor, dmin_1EN: torch.Tensor | None
) -> Tries:
    """Around what fits the weights best."""
    d_1EN = d_1EN.float()
    scale_JEN, minimum_JEN = fits(codec, target_TEN, cost_TE, first_multiples(codec))
    if minimum_JEN is not None:
        assert codec.sub_scale_Q is not None and dmin_1EN is not None
        values_Q = codec.sub_scale_Q.to(target_TEN.device)
        sub_JEN, _ = nearest_level(values_Q, scale_JEN, d_1EN)
        minimum_JEN, _ = nearest_level(values_Q, minimum_JEN, dmin_1EN.float())
        return held(codec, d_1EN, dmin_1EN, sub_JEN, minimum_JEN)
    if codec.sub_scale_Q is None:
        return Tries(_half(scale_JEN).float())
    if codec.places.d is None:  # powers of two
        exponent_JEN = (scale_JEN.clamp_min(1e-30).log2().round() + 128).clamp(1, 254)
        sub_JEN = torch.cat([exponent_JEN.amin(0, keepdim=True) + i for i in range(3)]).clamp_max(254).int()
        return held(codec, d_1EN, None, sub_JEN)
    n = _n_scales(codec)
    sub_JEN, _ = nearest_level(codec.sub_scale_Q[:n].to(target_TEN.device), scale_JEN, d_1EN)
    # where there are two shifts, both for every scale
    return held(codec, d_1EN, None, sub_JEN if codec.sub_offset_Q is None else torch.cat([sub_JEN, sub_JEN + n]))


def codebook_unit(codec: Codec) -> float:
    """The scale that mostly is best, over the rms of the weights."""
    return CODEBOOK_START[codec.width] / codec.codebook_GW.square().mean().sqrt().item()


def _codebook_scale(codec: Codec, target_TEN: torch.Tensor, cost_TE: torch.Tensor) -> torch.Tensor:
    cost_TEN = cost_TE[..., None]
    rms_EN = ((target_TEN.square() * cost_TEN).sum(0) / cost_TEN.sum(0)).sqrt()
    return codebook_unit(codec) * rms_EN


def turns_around(codec: Codec) -> bool:
    """Whether a scale may be below zero."""
    return codec.sub_scale_Q is None or bool((codec.sub_scale_Q < 0).any())


def _full_scale(codec: Codec, target_TEN: torch.Tensor, _cost_TE: torch.Tensor) -> torch.Tensor:
    """The scale that just avoids clipping, f32 (E, N)."""
    low, high = codec.codebook_GW.min().item(), codec.codebook_GW.max().item()
    lowest_EN, highest_EN = target_TEN.amin(0), target_TEN.amax(0)
    if not turns_around(codec):
        return torch.maximum(-lowest_EN, highest_EN) / high
    # a scale below zero turns the range around, so that the largest weight meets the end that reaches further
    return torch.where(-lowest_EN > highest_EN, lowest_EN, highest_EN) / low


def _lines(
    codec: Codec, target_TEN: torch.Tensor, cost_TE: torch.Tensor, multiples: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums that fit the levels of narrower and wider ranges, f32 (J, E, N)."""
    cost_TEN = cost_TE[..., None]
    levels_G = codec.codebook_GW[:, 0].to(target_TEN.device)
    bottom_EN, top_EN = target_TEN.amin(0).clamp_max(0), target_TEN.amax(0)
    lines = []
    for multiple in multiples:
        middle_EN, half_EN = (top_EN + bottom_EN) / 2, multiple * (top_EN - bottom_EN) / 2
        minimum_EN = (half_EN - middle_EN).clamp_min(0)
        scale_EN = 2 * half_EN / levels_G[-1].item()
        _, level_TEN = nearest_level(levels_G, target_TEN + minimum_EN, scale_EN)
        lines.append(_line(level_TEN, target_TEN, cost_TEN, scale_EN, minimum_EN))
    scales, minimums = zip(*lines, strict=True)
    return torch.stack(scales), torch.stack(minimums)


def _line(
    level_TEN: torch.Tensor, target_TEN: torch.Tensor, cost_TEN: torch.Tensor, scale_EN: torch.Tensor,
    minimum_EN: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Least squares of target = scale * level - minimum, minimum >= 0."""
    weighted_TEN = cost_TEN * level_TEN
    c, cl = cost_TEN.sum(0), weighted_TEN.sum(0)
    cll, clt = (weighted_TEN * level_TEN).sum(0), (weighted_TEN * target_TEN).sum(0)
    ct = (cost_TEN * target_TEN).sum(0)
    determinant = c * cll - cl * cl
    fits = determinant > 1e-6 * c * cll
    scale = torch.where(fits, (c * clt - cl * ct) / determinant, scale_EN)
    minimum = torch.where(fits, (cl * clt - cll * ct) / determinant, minimum_EN)
    through_zero = torch.where(cll > 0, clt / cll, scale_EN)
    return torch.where(minimum < 0, through_zero, scale), minimum.clamp_min(0)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half()


def _n_scales(codec: Codec) -> int:
    """Of a sub-block, whatever its shift."""
    assert codec.sub_scale_Q is not None
    return len(codec.sub_scale_Q) if codec.sub_offset_Q is None else len(codec.sub_scale_Q) // 2


def near_tries(
    codec: Codec, d_DEN: torch.Tensor, sub_PEN: torch.Tensor | None, dmin_DEN: torch.Tensor | None,
    minimum_PEN: torch.Tensor | None,
) -> Tries:  # fmt: skip
    """The scales that all sub-blocks have, first, and those next to them: (J, P, E, N) each."""
    if codec.sub_scale_Q is None:
        multiples = 1 + torch.tensor(NEAR_TRIES, device=d_DEN.device) / len(codec.codebook_GW)
        return Tries(_half(d_DEN * multiples[:, None, None, None]).float())
    assert sub_PEN is not None
    n = _n_scales(codec)
    order_Q = codec.sub_scale_Q[:n].argsort().to(d_DEN.device)
    shift_PEN = sub_PEN // n * n
    place_PEN = order_Q.argsort()[(sub_PEN - shift_PEN).long()]
    lower, higher = (order_Q[(place_PEN + i).clamp(0, n - 1)].int() + shift_PEN for i in (-1, 1))
    if codec.sub_offset_Q is not None:  # and the other shift
        return held(codec, d_DEN, None, torch.stack([sub_PEN, lower, higher, sub_PEN + n - 2 * shift_PEN]))
    if minimum_PEN is None:
        return held(codec, d_DEN, None, torch.stack([sub_PEN, lower, higher]))
    less, more = (minimum_PEN - 1).clamp_min(0), (minimum_PEN + 1).clamp_max(n - 1)
    return held(
        codec, d_DEN, dmin_DEN,
        torch.stack([sub_PEN, lower, higher, sub_PEN, sub_PEN]),
        torch.stack([minimum_PEN, minimum_PEN, minimum_PEN, less, more]),
    )  # fmt: skip


def held(
    codec: Codec, d_EN: torch.Tensor, dmin_EN: torch.Tensor | None, sub_JEN: torch.Tensor,
    minimum_JEN: torch.Tensor | None = None,
) -> Tries:  # fmt: skip
    """What the file's scales stand for."""
    assert codec.sub_scale_Q is not None
    d_EN = d_EN.float()  # ones where the type has none
    scale_JEN = d_EN * codec.sub_scale_Q.to(d_EN.device)[sub_JEN.long()]
    offset_JEN = None
    if codec.sub_offset_Q is not None:
        offset_JEN = d_EN * codec.sub_offset_Q.to(d_EN.device)[sub_JEN.long()]
    if minimum_JEN is not None:
        assert dmin_EN is not None
        offset_JEN = -dmin_EN.float() * minimum_JEN
    return Tries(scale_JEN, offset_JEN, sub_JEN, minimum_JEN)
