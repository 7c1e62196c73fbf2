"""The first pass of error feedback over blocks, and sweeps, compiled for the CPU. Reference: moe2gguf.passes.

A tile's rows go through all of a block at once, in arrays that stay in the cache; see moe2gguf_kernels.walk_cpu.

Shapes: E experts, N rows, R rows of a tile, S weights of the blocks, P sub-blocks of them, T weights of a sub-block, C
codes, J scales tried, U units of scales and minimums, Q values of a sub-block's scale, G levels.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from moe2gguf_kernels.compiled import as_float, as_int, compiled, unaliased
from moe2gguf_kernels.layout import Layout
from moe2gguf_kernels.walk_cpu import (
    ROWS,
    invert,
    load,
    search_of,
    store,
    store_signs,
    take,
    tile_for,
    walk_tile,
)

BY_CODEBOOK, BY_RANGE, BY_TURNED_RANGE, BY_LINE = range(4)


class Scales(NamedTuple):
    """The values of a sub-block's scale, which are evenly spaced, and those of its shift."""

    sub_scale_Q: np.ndarray  # f32
    sub_offset_Q: np.ndarray  # f32; none without shifts
    order_Q: np.ndarray  # i32, ascending; where there are shifts, the values come once for each of two
    place_Q: np.ndarray  # i32, in that order
    lowest: np.float32
    step: np.float32


NO_SCALES = Scales(
    np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int32), np.float32(0),
    np.float32(1),
)  # fmt: skip


class Line(NamedTuple):
    """Sums over a sub-block's weights, weighed by their costs: levels l, targets t."""

    sum_l_R: np.ndarray
    sum_ll_R: np.ndarray
    sum_lt_R: np.ndarray
    sum_t_R: np.ndarray
    minimum_R: np.ndarray  # where levels are cut from
    inverse_R: np.ndarray


def fits(
    weight_SEN: torch.Tensor, cost_SE: torch.Tensor, how: int, unit: float, multiple: float, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums that fit the sub-blocks by themselves, f32 (P, E, N)."""
    scale_PEN, minimum_PEN = np.zeros((2, _n_subs(weight_SEN, layout), *weight_SEN.shape[1:]), np.float32)
    low, high = _range(layout)
    _fits(
        weight_SEN.contiguous().numpy(), cost_SE.contiguous().numpy(), how, np.float32(unit), low, high,
        np.array([multiple], np.float32), scale_PEN, minimum_PEN,
    )  # fmt: skip
    return torch.from_numpy(scale_PEN), torch.from_numpy(minimum_PEN)


def first_pass(
    weight_SEN: torch.Tensor,
    factor_ESS: torch.Tensor,
    factor_EPTT: torch.Tensor,
    unit_UEN: torch.Tensor | None,
    how: int,
    unit: float,
    multiples: list[float],
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor,
           torch.Tensor]:  # fmt: skip
    """Codes, signs, the sub-blocks' scales, f32 (P, E, N), what the file says for them and for their minimums, ŵ, and
    the error (w - ŵ) U⁻¹.

    unit_UEN: what scales, and minimums, are in units of, f32; None where each sub-block has an f16 of its own.
    factor_EPTT: the sub-blocks' own parts of factor_ESS. unit: for BY_CODEBOOK, the scale over the weights' rms.
    """
    n_weights, n_experts, n_rows = weight_SEN.shape
    rows, n_subs = (n_experts, n_rows), _n_subs(weight_SEN, layout)
    n_units = 0 if unit_UEN is None else len(unit_UEN)
    code_CEN = np.empty((n_weights // layout.codebook_GW.shape[1], *rows), np.int32)
    negative_SEN = np.empty((0 if layout.signs is None else n_weights, *rows), np.bool_)
    scale_PEN, (found_SEN, error_SEN) = (
        np.empty((n_subs, *rows), np.float32),
        np.empty((2, n_weights, *rows), np.float32),
    )
    sub_PEN = np.empty((n_subs if n_units else 0, *rows), np.int32)
    minimum_PEN = np.empty((n_subs if n_units == 2 else 0, *rows), np.int32)
    low, high = _range(layout)
    _first_pass(
        search_of(layout), _scales(layout) if n_units else NO_SCALES, weight_SEN.contiguous().numpy(),
        factor_ESS.contiguous().numpy(), factor_EPTT.contiguous().numpy(),
        np.empty((0, *rows), np.float32) if unit_UEN is None else unit_UEN.contiguous().numpy(), how, np.float32(unit),
        low, high, np.array(multiples, np.float32), code_CEN, negative_SEN, scale_PEN, sub_PEN, minimum_PEN, found_SEN,
        error_SEN,
    )  # fmt: skip
    return (
        torch.from_numpy(code_CEN),
        _if_any(negative_SEN),
        torch.from_numpy(scale_PEN),
        _if_any(sub_PEN),
        _if_any(minimum_PEN),
        torch.from_numpy(found_SEN),
        torch.from_numpy(error_SEN),
    )


def sweep(
    code_CEN: torch.Tensor,
    negative_SEN: torch.Tensor | None,
    sub_PEN: torch.Tensor | None,
    minimum_PEN: torch.Tensor | None,
    unit_UEN: torch.Tensor | None,
    scale_JPEN: torch.Tensor | None,
    factor_EPTT: torch.Tensor,
    hessian_ESS: torch.Tensor,
    found_SEN: torch.Tensor,
    slope_SEN: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor,
           torch.Tensor]:  # fmt: skip
    """Codes, signs, scales and minimums of the sub-blocks, weights and slope as moe2gguf.passes.sweep leaves them, and
    which try each sub-block took, the first where it stays, i64 (P, E, N).

    scale_JPEN: the scales tried; without, those next to sub_PEN and minimum_PEN in units of unit_UEN, f32.
    """
    rows = found_SEN.shape[1:]
    optional = (code_CEN, np.int32), (negative_SEN, np.bool_), (sub_PEN, np.int32), (minimum_PEN, np.int32)
    codes, signs, subs, minimums = (
        np.empty((0, *rows), dtype) if x is None else x.contiguous().numpy().copy() for x, dtype in optional
    )
    found, slope = (x_SEN.contiguous().numpy().copy() for x_SEN in (found_SEN, slope_SEN))
    tried_PEN = np.zeros((_n_subs(found_SEN, layout), *rows), np.int32)
    no_floats = np.empty((0, *rows), np.float32)
    _sweep(
        search_of(layout), _scales(layout) if scale_JPEN is None else NO_SCALES,
        no_floats if unit_UEN is None else unit_UEN.contiguous().numpy(),
        no_floats[None] if scale_JPEN is None else scale_JPEN.contiguous().numpy(), factor_EPTT.contiguous().numpy(),
        hessian_ESS.contiguous().numpy(), codes, signs, subs, minimums, found, slope, tried_PEN,
    )  # fmt: skip
    return (
        torch.from_numpy(codes),
        _if_any(signs),
        _if_any(subs),
        _if_any(minimums),
        torch.from_numpy(found),
        torch.from_numpy(slope),
        torch.from_numpy(tried_PEN).long(),
    )


def _n_subs(weight_SEN: torch.Tensor, layout: Layout) -> int:
    return len(weight_SEN) * layout.n_subs // layout.block_weights


def _if_any(x_XEN: np.ndarray) -> torch.Tensor | None:
    return torch.from_numpy(x_XEN) if len(x_XEN) else None


def _range(layout: Layout) -> tuple[np.float32, np.float32]:
    return np.float32(layout.codebook_GW.min().item()), np.float32(layout.codebook_GW.max().item())


@functools.cache
def _scales(layout: Layout) -> Scales:
    assert layout.sub_scale_Q is not None
    values_Q = layout.sub_scale_Q.numpy()
    none = np.empty(0, np.float32)
    once_Q = values_Q if layout.sub_offset_Q is None else values_Q[: len(values_Q) // 2]
    order_Q = once_Q.argsort(kind="stable").astype(np.int32)
    steps = np.diff(once_Q[order_Q])
    assert (steps == steps[0]).all()
    return Scales(
        values_Q,
        none if layout.sub_offset_Q is None else layout.sub_offset_Q.numpy(),
        order_Q,
        order_Q.argsort().astype(np.int32),
        once_Q.min(),
        steps[0],
    )


@compiled
def _line():
    return Line(
        np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), np.empty(ROWS, np.float32),
        np.empty(ROWS, np.float32), np.empty(ROWS, np.float32),
    )  # fmt: skip


@compiled
def _fits(weight_SEN, cost_SE, how, unit, low, high, multiple_J, scale_PEN, minimum_PEN):
    n_subs, n_experts, n_rows = scale_PEN.shape
    size = len(weight_SEN) // n_subs
    weight, scale, minimum = (
        np.zeros((size, ROWS), np.float32),
        np.empty((1, ROWS), np.float32),
        np.empty((1, ROWS), np.float32),
    )
    line, cost = _line(), np.empty(size, np.float32)
    for e in range(n_experts):
        for first in range(0, n_rows, ROWS):
            for p in range(n_subs):
                load(weight_SEN, e, first, p * size, weight)
                for t in range(size):
                    cost[t] = cost_SE[p * size + t, e]
                _fit(weight, cost, how, unit, low, high, multiple_J, line, scale, minimum)
                store(scale, e, first, p, scale_PEN)
                store(minimum, e, first, p, minimum_PEN)


@compiled
def _fit(target_TR, cost_T, how, unit, low, high, multiple_J, line, scale_JR, minimum_JR):
    """moe2gguf.scales.fits of a tile."""
    if how == BY_LINE:
        _ranges(target_TR, True, line.sum_l_R, line.sum_ll_R)  # bottom and top
        for j in range(len(multiple_J)):
            _cut(line.sum_l_R, line.sum_ll_R, multiple_J[j], high, scale_JR[j], minimum_JR[j])
        _weighed(target_TR, cost_T, line.sum_t_R)
        cost = np.float32(0)
        for t in range(len(cost_T)):
            cost += cost_T[t]
        for j in range(len(multiple_J)):
            invert(scale_JR[j], line.inverse_R)
            _multiply(minimum_JR[j], np.float32(1), line.minimum_R)
            _line_sums(
                target_TR, cost_T, high, line.minimum_R, line.inverse_R, line.sum_l_R, line.sum_ll_R, line.sum_lt_R
            )
            _solve_line(cost, line.sum_l_R, line.sum_ll_R, line.sum_lt_R, line.sum_t_R, scale_JR[j], minimum_JR[j])
        return
    if how == BY_CODEBOOK:
        _root_mean_square(target_TR, cost_T, unit, scale_JR[0])
    else:
        _ranges(target_TR, False, line.sum_l_R, line.sum_ll_R)
        _full_scale(line.sum_l_R, line.sum_ll_R, how == BY_TURNED_RANGE, low, high, scale_JR[0])
    for j in range(len(multiple_J) - 1, -1, -1):
        _multiply(scale_JR[0], multiple_J[j], scale_JR[j])


@unaliased
def _ranges(target_TR, with_zero, lowest_R, highest_R):
    for r in range(ROWS):
        lowest_R[r], highest_R[r] = target_TR[0, r], target_TR[0, r]
    for t in range(1, len(target_TR)):
        for r in range(ROWS):
            lowest_R[r] = min(lowest_R[r], target_TR[t, r])
            highest_R[r] = max(highest_R[r], target_TR[t, r])
    if with_zero:
        for r in range(ROWS):
            lowest_R[r] = min(lowest_R[r], np.float32(0))


@unaliased
def _cut(bottom_R, top_R, multiple, high, scale_R, minimum_R):
    for r in range(ROWS):
        middle = (top_R[r] + bottom_R[r]) / np.float32(2)
        half = multiple * (top_R[r] - bottom_R[r]) / np.float32(2)
        minimum_R[r] = max(half - middle, np.float32(0))
        scale_R[r] = np.float32(2) * half / high


@unaliased
def _weighed(target_TR, cost_T, sum_R):
    for r in range(ROWS):
        sum_R[r] = 0
    for t in range(len(target_TR)):
        cost = cost_T[t]
        for r in range(ROWS):
            sum_R[r] += cost * target_TR[t, r]


@unaliased
def _line_sums(target_TR, cost_T, high, minimum_R, inverse_R, sum_l_R, sum_ll_R, sum_lt_R):
    for r in range(ROWS):
        sum_l_R[r], sum_ll_R[r], sum_lt_R[r] = 0, 0, 0
    for t in range(len(target_TR)):
        cost = cost_T[t]
        for r in range(ROWS):
            level = np.rint((target_TR[t, r] + minimum_R[r]) * inverse_R[r])
            level = level if level > 0 else np.float32(0)
            level = level if level < high else high
            weighed = cost * level
            sum_l_R[r] += weighed
            sum_ll_R[r] += weighed * level
            sum_lt_R[r] += weighed * target_TR[t, r]


@unaliased
def _solve_line(cost, sum_l_R, sum_ll_R, sum_lt_R, sum_t_R, scale_R, minimum_R):
    """Least squares of target = scale * level - minimum, minimum >= 0."""
    for r in range(ROWS):
        l, ll, lt, t = sum_l_R[r], sum_ll_R[r], sum_lt_R[r], sum_t_R[r]
        determinant = cost * ll - l * l
        fits = determinant > np.float32(1e-6) * cost * ll
        inverse = np.float32(1) / determinant
        scale = (cost * lt - l * t) * inverse if fits else scale_R[r]
        minimum = (l * lt - ll * t) * inverse if fits else minimum_R[r]
        through_zero = lt / ll if ll > 0 else scale_R[r]
        scale_R[r] = through_zero if minimum < 0 else scale
        minimum_R[r] = max(minimum, np.float32(0))


@unaliased
def _root_mean_square(target_TR, cost_T, unit, scale_R):
    total = np.float32(0)
    for r in range(ROWS):
        scale_R[r] = 0
    for t in range(len(target_TR)):
        cost = cost_T[t]
        total += cost
        for r in range(ROWS):
            scale_R[r] += cost * target_TR[t, r] * target_TR[t, r]
    for r in range(ROWS):
        scale_R[r] = unit * np.sqrt(scale_R[r] / total)


@unaliased
def _full_scale(lowest_R, highest_R, may_turn, low, high, scale_R):
    for r in range(ROWS):
        below, above = -lowest_R[r], highest_R[r]
        turned = (-below if below > above else above) / low
        scale_R[r] = turned if may_turn else max(below, above) / high


@unaliased
def _multiply(from_R, factor, into_R):
    for r in range(ROWS):
        into_R[r] = from_R[r] * factor


@compiled
def _first_pass(
    search, scales, weight_SEN, factor_ESS, factor_EPTT, unit_UEN, how, unit, low, high, multiple_J,
    code_CEN, negative_SEN, scale_PEN, sub_PEN, minimum_PEN, found_SEN, error_SEN,
):  # fmt: skip
    n_weights, n_experts, n_rows = weight_SEN.shape
    n_subs, size = len(scale_PEN), n_weights // len(scale_PEN)
    n_codes, n_fits, n_once = len(code_CEN) // n_subs, len(multiple_J), len(scales.order_Q)
    n_tries = n_fits * (2 if len(scales.sub_offset_Q) else 1)
    has_offset = len(scales.sub_offset_Q) > 0 or len(minimum_PEN) > 0
    tile, line = tile_for(search, size, n_tries), _line()
    cost = np.empty(size, np.float32)
    units, inverses = np.zeros((len(unit_UEN), ROWS), np.float32), np.empty((len(unit_UEN), ROWS), np.float32)
    left, error = np.zeros((n_weights, ROWS), np.float32), np.empty((size, ROWS), np.float32)
    fit, minimum = np.zeros((n_fits, ROWS), np.float32), np.zeros((n_fits, ROWS), np.float32)
    scale = np.zeros((n_tries, ROWS), np.float32)
    offset = np.zeros((n_tries if has_offset else 0, ROWS), np.float32)
    sub_J1R, low_sub_J1R = np.zeros((n_tries, 1, ROWS), np.int32), np.zeros((n_fits, 1, ROWS), np.int32)
    number, code = np.empty((1, ROWS), np.int32), np.empty((n_codes, ROWS), np.int32)
    chosen = np.empty((1, ROWS), np.float32)
    for e in range(n_experts):
        for first in range(0, n_rows, ROWS):
            load(weight_SEN, e, first, 0, left)
            load(unit_UEN, e, first, 0, units)
            for u in range(len(units)):
                invert(units[u], inverses[u])
            for p in range(n_subs):
                start, stop = p * size, (p + 1) * size
                factor_TT, target = factor_EPTT[e, p], left[start:stop]
                for t in range(size):
                    cost[t] = np.float32(1) / (factor_TT[t, t] * factor_TT[t, t])
                _fit(target, cost, how, unit, low, high, multiple_J, line, fit, minimum)
                if n_once == 0:
                    for j in range(n_fits):
                        _half(fit[j], scale[j])
                else:
                    for j in range(n_fits):
                        _hold(fit[j], inverses[0], scales, 0, sub_J1R[j, 0])
                        if n_tries > n_fits:  # for the other shift
                            _hold(fit[j], inverses[0], scales, n_once, sub_J1R[n_fits + j, 0])
                        if len(minimum_PEN):
                            _hold(minimum[j], inverses[1], scales, 0, low_sub_J1R[j, 0])
                    for j in range(n_tries):
                        _stand_for(units, scales, sub_J1R[j, 0], low_sub_J1R[min(j, n_fits - 1), 0], j, scale, offset)
                walk_tile(search, target, scale, offset, factor_TT, tile)
                take(tile.error_JTR, tile.tried_R, error)
                _feed_on(error, factor_ESS[e], start, left)
                _minus_transposed(factor_TT, error, target)
                store(target, e, first, start, found_SEN)
                store(error, e, first, start, error_SEN)
                take(tile.code_JCR, tile.tried_R, code)
                store(code, e, first, p * n_codes, code_CEN)
                if len(negative_SEN):
                    take(tile.sign_JTR, tile.tried_R, error)
                    store_signs(error, e, first, start, negative_SEN)
                take(scale.reshape(n_tries, 1, ROWS), tile.tried_R, chosen)
                store(chosen, e, first, p, scale_PEN)
                if n_once:
                    take(sub_J1R, tile.tried_R, number)
                    store(number, e, first, p, sub_PEN)
                if len(minimum_PEN):
                    take(low_sub_J1R, tile.tried_R, number)
                    store(number, e, first, p, minimum_PEN)


@compiled
def _half(x_R, into_R):
    """To the nearest f16."""
    for r in range(ROWS):
        x = min(max(x_R[r], np.float32(-65504)), np.float32(65504))
        if abs(x) < np.float32(2**-14):  # the steps are even there
            into_R[r] = np.rint(x * np.float32(2**24)) * np.float32(2**-24)
        else:
            bits = as_int(x)
            into_R[r] = as_float((bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000))


@compiled
def _stand_for(units, scales, sub_R, low_sub_R, j, scale_JR, offset_JR):
    """What the file's numbers for a sub-block stand for."""
    _times(units[0], scales.sub_scale_Q, sub_R, np.float32(1), scale_JR[j])
    if len(scales.sub_offset_Q):
        _times(units[0], scales.sub_offset_Q, sub_R, np.float32(1), offset_JR[j])
    if len(units) == 2:
        _times(units[1], scales.sub_scale_Q, low_sub_R, np.float32(-1), offset_JR[j])


@compiled
def _hold(scale_R, inverse_R, scales, shift, sub_R):
    """The nearest of the values that a sub-block's scale has, in units of the block's."""
    last = np.float32(len(scales.order_Q) - 1)
    for r in range(ROWS):
        place = np.rint((scale_R[r] * inverse_R[r] - scales.lowest) / scales.step)
        place = place if place > 0 else np.float32(0)
        place = place if place < last else last
        sub_R[r] = scales.order_Q[np.int64(place)] + np.int32(shift)


@unaliased
def _times(unit_R, value_Q, number_R, sign, into_R):
    for r in range(ROWS):
        into_R[r] = sign * unit_R[r] * value_Q[number_R[r]]


@unaliased
def _feed_on(error_TR, factor_SS, start, left_SR):
    """The errors of the columns after START go to those after them."""
    size = len(error_TR)
    for u in range(start + size, len(left_SR)):
        for t in range(0, size, 4):
            a, b = factor_SS[start + t, u], factor_SS[start + t + 1, u]
            c, d = factor_SS[start + t + 2, u], factor_SS[start + t + 3, u]
            for r in range(ROWS):
                left = left_SR[u, r] - a * error_TR[t, r] - b * error_TR[t + 1, r]
                left_SR[u, r] = left - c * error_TR[t + 2, r] - d * error_TR[t + 3, r]


@compiled
def _sweep(
    search, scales, unit_UEN, scale_JPEN, factor_EPTT, hessian_ESS, code_CEN, negative_SEN, sub_PEN, minimum_PEN,
    found_SEN, slope_SEN, tried_PEN,
):  # fmt: skip
    n_subs, n_experts, n_rows = tried_PEN.shape
    size, n_codes, n_once = len(found_SEN) // n_subs, len(code_CEN) // n_subs, len(scales.order_Q)
    has_shift, has_minimum = len(scales.sub_offset_Q) > 0, len(minimum_PEN) > 0
    n_tries = 5 if has_minimum else 4 if has_shift else 3 if n_once else len(scale_JPEN)
    tile = tile_for(search, size, n_tries)
    scale = np.zeros((n_tries, ROWS), np.float32)
    offset = np.zeros((n_tries if has_shift or has_minimum else 0, ROWS), np.float32)
    units = np.zeros((len(unit_UEN), ROWS), np.float32)
    sub_J1R, low_sub_J1R = np.zeros((n_tries, 1, ROWS), np.int32), np.zeros((n_tries, 1, ROWS), np.int32)
    found, slope = np.zeros((len(found_SEN), ROWS), np.float32), np.zeros((len(found_SEN), ROWS), np.float32)
    code = np.zeros((len(code_CEN), ROWS), np.int32)
    new_code, new = np.empty((n_codes, ROWS), np.int32), np.empty((size, ROWS), np.float32)
    target, moved = np.empty((size, ROWS), np.float32), np.empty((size, ROWS), np.float32)
    gain = np.empty(ROWS, np.float32)
    better, tried, number = np.empty(ROWS, np.int32), np.empty((1, ROWS), np.int32), np.empty((1, ROWS), np.int32)
    for e in range(n_experts):
        for first in range(0, n_rows, ROWS):
            load(found_SEN, e, first, 0, found)
            load(slope_SEN, e, first, 0, slope)
            load(code_CEN, e, first, 0, code)
            load(unit_UEN, e, first, 0, units)
            for p in range(n_subs):
                start, stop, factor_TT = p * size, (p + 1) * size, factor_EPTT[e, p]
                if n_once:
                    load(sub_PEN, e, first, p, sub_J1R[0])
                    if has_minimum:
                        load(minimum_PEN, e, first, p, low_sub_J1R[0])
                    _near(scales, has_minimum, sub_J1R, low_sub_J1R)
                    for j in range(n_tries):
                        _stand_for(units, scales, sub_J1R[j, 0], low_sub_J1R[j, 0], j, scale, offset)
                else:
                    for j in range(n_tries):
                        load(scale_JPEN[j], e, first, p, scale[j : j + 1])
                # where the output error would be least, all else as it is, and by how much it would fall
                _times_factor(factor_TT, slope[start:stop], new)
                _squares(new, gain)
                _copy(found[start:stop], target)
                _minus_transposed(factor_TT, new, target)
                walk_tile(search, target, scale, offset, factor_TT, tile)
                take(tile.error_JTR, tile.tried_R, new)
                _minus_transposed(factor_TT, new, target)
                _decide(tile.loss_JR, tile.tried_R, gain, better, tried[0])
                _move(target, better, found[start:stop], moved)
                _bend(hessian_ESS[e], start, moved, slope)
                take(tile.code_JCR, tile.tried_R, new_code)
                _put(new_code, better, code[p * n_codes : (p + 1) * n_codes])
                if search.has_signs:
                    take(tile.sign_JTR, tile.tried_R, new)
                    _put_signs(new, better, e, first, start, negative_SEN)
                if n_once:
                    take(sub_J1R, tried[0], number)
                    store(number, e, first, p, sub_PEN)
                if has_minimum:
                    take(low_sub_J1R, tried[0], number)
                    store(number, e, first, p, minimum_PEN)
                store(tried, e, first, p, tried_PEN)
            store(found, e, first, 0, found_SEN)
            store(slope, e, first, 0, slope_SEN)
            store(code, e, first, 0, code_CEN)


@compiled
def _near(scales, has_minimum, sub_J1R, low_sub_J1R):
    """moe2gguf.scales.near_tries of a tile, from its first: the values next to it, and the other shift or minimums."""
    n = np.int32(len(scales.order_Q))
    for r in range(ROWS):
        own = sub_J1R[0, 0, r]
        shift = n if own >= n else np.int32(0)
        place = scales.place_Q[own - shift]
        sub_J1R[1, 0, r] = scales.order_Q[max(place - 1, 0)] + shift
        sub_J1R[2, 0, r] = scales.order_Q[min(place + 1, n - 1)] + shift
        if has_minimum:
            low = low_sub_J1R[0, 0, r]
            low_sub_J1R[1, 0, r], low_sub_J1R[2, 0, r] = low, low
            sub_J1R[3, 0, r], low_sub_J1R[3, 0, r] = own, max(low - 1, 0)
            sub_J1R[4, 0, r], low_sub_J1R[4, 0, r] = own, min(low + 1, n - 1)
        elif len(scales.sub_offset_Q):
            sub_J1R[3, 0, r] = own + n - 2 * shift


@unaliased
def _times_factor(factor_TT, x_TR, into_TR):
    for t in range(len(into_TR)):
        for r in range(ROWS):
            into_TR[t, r] = 0
        for u in range(t, len(into_TR)):
            factor = factor_TT[t, u]
            for r in range(ROWS):
                into_TR[t, r] += factor * x_TR[u, r]


@unaliased
def _minus_transposed(factor_TT, x_TR, into_TR):
    for u in range(len(into_TR)):
        for t in range(u + 1):
            factor = factor_TT[t, u]
            for r in range(ROWS):
                into_TR[u, r] -= factor * x_TR[t, r]


@unaliased
def _copy(from_TR, into_TR):
    for t in range(len(into_TR)):
        for r in range(ROWS):
            into_TR[t, r] = from_TR[t, r]


@unaliased
def _decide(loss_JR, tried_R, gain_R, better_R, taken_R):
    """What compares with nothing stays."""
    for r in range(ROWS):
        better_R[r] = 0
    for j in range(len(loss_JR)):
        for r in range(ROWS):
            better_R[r] |= (tried_R[r] == j) & (loss_JR[j, r] < gain_R[r])
    for r in range(ROWS):
        taken_R[r] = tried_R[r] * better_R[r]


@unaliased
def _move(target_TR, better_R, found_TR, moved_TR):
    for t in range(len(target_TR)):
        for r in range(ROWS):
            new = target_TR[t, r] if better_R[r] else found_TR[t, r]
            moved_TR[t, r] = new - found_TR[t, r]
            found_TR[t, r] = new


@unaliased
def _put(new_XR, better_R, into_XR):
    for x in range(len(new_XR)):
        for r in range(ROWS):
            into_XR[x, r] = new_XR[x, r] if better_R[r] else into_XR[x, r]


@unaliased
def _put_signs(sign_TR, better_R, e, first, start, negative_SEN):
    n = min(ROWS, negative_SEN.shape[2] - first)
    for t in range(len(sign_TR)):
        for r in range(n):
            old = negative_SEN[start + t, e, first + r]
            negative_SEN[start + t, e, first + r] = sign_TR[t, r] < 0 if better_R[r] else old


@unaliased
def _squares(x_TR, sum_R):
    for r in range(ROWS):
        sum_R[r] = 0
    for t in range(len(x_TR)):
        for r in range(ROWS):
            sum_R[r] += x_TR[t, r] * x_TR[t, r]


@unaliased
def _bend(hessian_SS, start, moved_TR, slope_SR):
    """The slope where these weights have moved."""
    for s in range(len(slope_SR)):
        for t in range(0, len(moved_TR), 4):
            a, b = hessian_SS[s, start + t], hessian_SS[s, start + t + 1]
            c, d = hessian_SS[s, start + t + 2], hessian_SS[s, start + t + 3]
            for r in range(ROWS):
                slope = slope_SR[s, r] + a * moved_TR[t, r] + b * moved_TR[t + 1, r]
                slope_SR[s, r] = slope + c * moved_TR[t + 2, r] + d * moved_TR[t + 3, r]
