"""The walk of error feedback over one sub-block, compiled for the CPU. Reference: moe2gguf.walk's function.

As in moe2gguf_kernels.walk, but a tile's rows are the lanes of vector instructions: every inner loop runs over them,
over memory that is contiguous in them. One thread; callers share the rows out.

Shapes: see moe2gguf_kernels.walk; X single levels, Y pairs of them, Z = X + Y; A first and B second halves of codes,
M least of second halves, O = B + M; I of those that go with the first halves.
"""

import functools
from collections import Counter
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from moe2gguf_kernels.compiled import as_float, as_int, compiled, unaliased
from moe2gguf_kernels.layout import SIGN_WEIGHTS, Layout

# enough to outweigh what a loop takes to start; a sub-block of them still fits the second cache
ROWS = 64
# partners compared in one pass over the rows
UNROLLED = 4


def walk(
    target_TEN: torch.Tensor,
    scale_JEN: torch.Tensor,
    offset_JEN: torch.Tensor | None,
    factor_ETT: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As moe2gguf_kernels.walk.walk."""
    n_sub, n_experts, n_rows = target_TEN.shape
    outputs = (
        np.empty((n_sub // layout.codebook_GW.shape[1], n_experts, n_rows), np.int32),
        np.empty((0 if layout.signs is None else n_sub, n_experts, n_rows), np.bool_),
        np.empty((n_sub, n_experts, n_rows), np.float32),
        np.empty((n_experts, n_rows), np.float32),
        np.empty((n_experts, n_rows), np.int64),
    )
    _walk(
        search_of(layout),
        target_TEN.contiguous().numpy(),
        scale_JEN.contiguous().numpy(),
        np.empty((0, n_experts, n_rows), np.float32) if offset_JEN is None else offset_JEN.contiguous().numpy(),
        factor_ETT.contiguous().numpy(),
        *outputs,
    )
    code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN = map(torch.from_numpy, outputs)
    return code_CEN, None if layout.signs is None else negative_TEN, error_TEN, loss_EN, tried_EN


class Parts(NamedTuple):
    """The distinct parts of the codes, so that what many have in common is computed once.

    Numbers are u64: of indices that may be negative the compiler makes more.
    """

    weight_X: np.ndarray  # of the single levels
    level_X: np.ndarray  # f32
    pair_Y2: np.ndarray  # the numbers of two levels each; none where pairs are halves
    first_A2: np.ndarray  # of two pairs, counted after the levels, or of two levels: first halves
    second_B2: np.ndarray  # second halves
    less_M2: np.ndarray  # the less of two second halves, or of what is in turn the least of some, counted after them
    start_A1: np.ndarray  # where each first half's partners start among all
    partner_I: np.ndarray  # numbers of those, the last repeated up to a multiple of UNROLLED
    code_AB: np.ndarray  # i32, 0 where no code has these halves


class Search(NamedTuple):
    """How the codes of a type are found."""

    step: int  # weights whose signs, or code, are found together
    has_signs: bool
    has_even_signs: bool
    are_consecutive: bool  # levels; these and what follows of them for codes of one weight
    level_G: np.ndarray  # f32
    code_G: np.ndarray  # i32
    boundary_G: np.ndarray  # f32
    codebook_GW: np.ndarray  # f32
    parts: Parts  # for codes of several


class Tile(NamedTuple):
    """What one tile's rows are worked on in, for each try, and what the best of them, tried_R, leaves."""

    left_TR: np.ndarray  # f32
    code_JCR: np.ndarray  # i32
    sign_JTR: np.ndarray  # f32, 1 or -1
    error_JTR: np.ndarray  # f32
    loss_JR: np.ndarray  # f32
    tried_R: np.ndarray  # i32
    cost_T: np.ndarray  # f32
    inverse_R: np.ndarray  # f32
    level_R: np.ndarray  # f32
    quotient_R: np.ndarray  # f32
    scratch: "Scratch"


class Scratch(NamedTuple):
    part_ZR: np.ndarray  # f32, distances
    second_OR: np.ndarray  # f32
    partner_AR: np.ndarray  # f32
    least_R: np.ndarray  # f32
    product_R: np.ndarray  # f32
    which_R: np.ndarray  # i32


@functools.cache
def search_of(layout: Layout) -> Search:
    codebook_GW, levels = layout.codebook_GW.numpy(), layout.levels
    floats, ints = np.empty(0, np.float32), np.empty(0, np.int32)
    if levels is None:
        step = SIGN_WEIGHTS if layout.has_even_signs else codebook_GW.shape[1]
        has_signs, parts = layout.signs is not None, _parts(codebook_GW)
        return Search(step, has_signs, layout.has_even_signs, False, floats, ints, floats, codebook_GW, parts)
    numbers, pairs = np.empty(0, np.uint64), np.empty((0, 2), np.uint64)
    parts = Parts(numbers, floats, pairs, pairs, pairs, pairs, numbers, numbers, ints.reshape(0, 0))
    tables = levels.level_G.numpy(), levels.code_G.numpy(), levels.boundary_G.numpy()
    return Search(1, False, False, levels.are_consecutive, *tables, codebook_GW, parts)


def _parts(codebook_GW: np.ndarray) -> Parts:
    width = codebook_GW.shape[1]
    half = width // 2
    numbers: dict[tuple[int, tuple[float, ...]], int] = {}

    def distinct(start: int, length: int) -> list[tuple[float, ...]]:
        return [tuple(part) for part in np.unique(codebook_GW[:, start : start + length], axis=0).tolist()]

    def sums(start: int, length: int) -> list[tuple[int, int]]:
        middle = start + length // 2
        return [
            (numbers[start, part[: length // 2]], numbers[middle, part[length // 2 :]])
            for part in distinct(start, length)
        ]

    def number(length: int) -> list[tuple[int, tuple[float, ...]]]:
        parts = [(start, part) for start in range(0, width, length) for part in distinct(start, length)]
        numbers.update({part: len(numbers) + i for i, part in enumerate(parts)})
        return parts

    singles = number(1)
    pairs = [pair for start in range(0, width, 2) for pair in sums(start, 2)] if half > 2 else []
    if pairs:
        number(2)
    firsts, seconds = ({part: i for i, part in enumerate(distinct(start, half))} for start in (0, half))
    code_AB = np.zeros((len(firsts), len(seconds)), np.int32)
    partners: list[list[int]] = [[] for _ in firsts]
    for code, levels in enumerate(codebook_GW.tolist()):
        a, b = firsts[tuple(levels[:half])], seconds[tuple(levels[half:])]
        code_AB[a, b] = code
        partners[a].append(b)
    less, members = _in_common(partners, len(seconds))
    padded = [own + own[-1:] * (-len(own) % UNROLLED) for own in members]
    return Parts(
        np.array([w for w, _ in singles], np.uint64),
        np.array([level for _, (level,) in singles], np.float32),
        np.array(pairs, np.uint64).reshape(-1, 2),
        np.array(sums(0, half), np.uint64),
        np.array(sums(half, half), np.uint64),
        np.array(less, np.uint64).reshape(-1, 2),
        np.cumsum([0, *map(len, padded)], dtype=np.uint64),
        np.concatenate(padded).astype(np.uint64),
        code_AB,
    )


def _in_common(sets: list[list[int]], n_members: int) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Pairs of numbers, each of which makes one more, and what is left of the sets when these stand for both.

    Only the least of a set is wanted, and the sets overlap much, as those of a lattice's points do.
    """
    left = [set(members) for members in sets]
    common = Counter(pair for members in left for pair in combinations(sorted(members), 2))
    pairs: list[tuple[int, int]] = []
    while common:
        pair = min(common, key=lambda pair: (-common[pair], pair))
        if common[pair] == 1:
            break
        both = n_members + len(pairs)
        pairs.append(pair)
        for members in left:
            if members.issuperset(pair):
                common.subtract(combinations(sorted(members), 2))
                members.difference_update(pair)
                members.add(both)
                common.update(combinations(sorted(members), 2))
    return pairs, [sorted(members) for members in left]


@compiled
def _walk(
    search, target_TEN, scale_JEN, offset_JEN, factor_ETT, code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN
):  # fmt: skip
    n_sub, n_experts, n_rows = target_TEN.shape
    tile = tile_for(search, n_sub, len(scale_JEN))
    target, error = np.zeros((n_sub, ROWS), np.float32), np.empty((n_sub, ROWS), np.float32)
    code = np.empty((len(code_CEN), ROWS), np.int32)
    scale, offset = np.zeros((len(scale_JEN), ROWS), np.float32), np.zeros((len(offset_JEN), ROWS), np.float32)
    for e in range(n_experts):
        for first in range(0, n_rows, ROWS):
            n = min(ROWS, n_rows - first)
            load(target_TEN, e, first, 0, target)
            load(scale_JEN, e, first, 0, scale)
            load(offset_JEN, e, first, 0, offset)
            walk_tile(search, target, scale, offset, factor_ETT[e], tile)
            for r in range(n):
                j = tile.tried_R[r]
                loss_EN[e, first + r], tried_EN[e, first + r] = tile.loss_JR[j, r], j
            take(tile.code_JCR, tile.tried_R, code)
            store(code, e, first, 0, code_CEN)
            if search.has_signs:
                take(tile.sign_JTR, tile.tried_R, error)
                store_signs(error, e, first, 0, negative_TEN)
            take(tile.error_JTR, tile.tried_R, error)
            store(error, e, first, 0, error_TEN)


@compiled
def tile_for(search, n_sub, n_tries):
    parts, width = search.parts, search.codebook_GW.shape[1]
    scratch = Scratch(
        np.empty((len(parts.weight_X) + len(parts.pair_Y2), ROWS), np.float32),
        np.empty((len(parts.second_B2) + len(parts.less_M2), ROWS), np.float32),
        np.empty((len(parts.first_A2), ROWS), np.float32),
        np.empty(ROWS, np.float32),
        np.empty(ROWS, np.float32),
        np.empty(ROWS, np.int32),
    )
    return Tile(
        np.zeros((n_sub, ROWS), np.float32),
        np.empty((n_tries, n_sub // width, ROWS), np.int32),
        np.ones((n_tries, n_sub, ROWS), np.float32),
        np.empty((n_tries, n_sub, ROWS), np.float32),
        np.empty((n_tries, ROWS), np.float32),
        np.empty(ROWS, np.int32),
        np.empty(n_sub, np.float32),
        np.empty(ROWS, np.float32),
        np.empty(ROWS, np.float32),
        np.empty(ROWS, np.float32),
        scratch,
    )


@unaliased
def load(from_XEN, e, first, start, into_XR):
    """A tile's rows, from START on; those that it lacks stay what they were."""
    n = min(ROWS, from_XEN.shape[2] - first)
    for x in range(len(into_XR)):
        for r in range(n):
            into_XR[x, r] = from_XEN[start + x, e, first + r]


@unaliased
def store(from_XR, e, first, start, into_XEN):
    n = min(ROWS, into_XEN.shape[2] - first)
    for x in range(len(from_XR)):
        for r in range(n):
            into_XEN[start + x, e, first + r] = from_XR[x, r]


@unaliased
def store_signs(from_XR, e, first, start, into_XEN):
    n = min(ROWS, into_XEN.shape[2] - first)
    for x in range(len(from_XR)):
        for r in range(n):
            into_XEN[start + x, e, first + r] = from_XR[x, r] < 0


@unaliased
def take(from_JXR, tried_R, into_XR):
    """Of each row its own try."""
    for x in range(len(into_XR)):
        for r in range(ROWS):
            into_XR[x, r] = from_JXR[0, x, r]
        for j in range(1, len(from_JXR)):
            for r in range(ROWS):
                into_XR[x, r] = from_JXR[j, x, r] if tried_R[r] == j else into_XR[x, r]


@compiled
def walk_tile(search, target_TR, scale_JR, offset_JR, factor_TT, tile):
    """Of equals, and where none compares, the first try."""
    for t in range(len(target_TR)):
        tile.cost_T[t] = np.float32(1) / (factor_TT[t, t] * factor_TT[t, t])
    for j in range(len(scale_JR)):
        _start(target_TR, offset_JR, j, tile.left_TR, tile.loss_JR)
        if search.codebook_GW.shape[1] == 1:
            _walk_levels(search, scale_JR[j], factor_TT, tile, tile.code_JCR[j], tile.error_JTR[j], tile.loss_JR[j])
        else:
            _walk_codebook(
                search, scale_JR[j], factor_TT, tile, tile.code_JCR[j], tile.sign_JTR[j], tile.error_JTR[j],
                tile.loss_JR[j],
            )  # fmt: skip
    _choose(tile.loss_JR, tile.level_R, tile.tried_R)


@compiled
def _walk_levels(search, scale_R, factor_TT, tile, code_TR, error_TR, loss_R):
    n_sub = len(error_TR)
    level_G, level = search.level_G, tile.level_R
    invert(scale_R, tile.inverse_R)
    for t in range(n_sub):
        if search.are_consecutive:
            _round(tile.left_TR[t], tile.inverse_R, level_G[0], level_G[-1], level, code_TR[t])
        else:
            _nearest_level(
                tile.left_TR[t], tile.inverse_R, level_G, search.code_G, search.boundary_G, tile.quotient_R, level,
                code_TR[t],
            )  # fmt: skip
        _miss(tile.left_TR[t], scale_R, level, error_TR[t])
        _whiten(np.float32(1) / factor_TT[t, t], error_TR[t], loss_R)
        _feed_back(t, t + 1, n_sub, factor_TT, error_TR, tile.left_TR)


@compiled
def _walk_codebook(search, scale_R, factor_TT, tile, code_CR, sign_TR, error_TR, loss_R):
    n_sub, width, left = len(error_TR), search.codebook_GW.shape[1], tile.left_TR
    for start in range(0, n_sub, search.step):
        stop = start + search.step
        if search.has_signs:
            for t in range(start, stop):
                _take_sign(left[t], sign_TR[t])
        if search.has_even_signs:
            _make_signs_even(left[start:stop], sign_TR[start:stop], tile.cost_T[start:stop], tile.scratch)
        for own in range(start, stop, width):
            _search(search.parts, own, left, sign_TR, tile.cost_T, scale_R, tile.scratch, code_CR[own // width])
        for t in range(start, stop):
            _level(search.codebook_GW, code_CR[t // width], t % width, sign_TR[t], tile.level_R)
            _miss(left[t], scale_R, tile.level_R, error_TR[t])
        for t in range(start, stop):
            _whiten(np.float32(1) / factor_TT[t, t], error_TR[t], loss_R)
            _feed_back(t, t + 1, stop, factor_TT, error_TR, error_TR)
            _feed_back(t, stop, n_sub, factor_TT, error_TR, left)


@unaliased
def _start(target_TR, offset_JR, j, left_TR, loss_JR):
    for r in range(ROWS):
        loss_JR[j, r] = 0
    for t in range(len(target_TR)):
        for r in range(ROWS):
            left_TR[t, r] = target_TR[t, r]
        if len(offset_JR):
            for r in range(ROWS):
                left_TR[t, r] -= offset_JR[j, r]


@unaliased
def _choose(loss_JR, least_R, tried_R):
    for r in range(ROWS):
        least_R[r], tried_R[r] = loss_JR[0, r], 0
    for j in range(1, len(loss_JR)):
        for r in range(ROWS):
            is_less = loss_JR[j, r] < least_R[r]
            least_R[r] = loss_JR[j, r] if is_less else least_R[r]
            tried_R[r] = np.int32(j) if is_less else tried_R[r]


@unaliased
def invert(scale_R, inverse_R):
    for r in range(ROWS):
        # a zero scale decodes to zero whatever the code
        inverse_R[r] = np.float32(1) / scale_R[r] if scale_R[r] != 0 else np.float32(0)


@unaliased
def _round(left_R, inverse_R, low, high, level_R, code_R):
    for r in range(ROWS):
        nearest = np.rint(left_R[r] * inverse_R[r])
        nearest = nearest if nearest > low else low  # as is what compares with nothing
        nearest = nearest if nearest < high else high
        level_R[r] = nearest
        code_R[r] = np.int32(nearest - low)


@unaliased
def _nearest_level(left_R, inverse_R, level_G, code_G, boundary_G, quotient_R, level_R, code_R):
    for r in range(ROWS):
        quotient_R[r] = left_R[r] * inverse_R[r]
        level_R[r] = level_G[0]
        code_R[r] = code_G[0]
    for g in range(len(boundary_G)):
        boundary, above, code_above = boundary_G[g], level_G[g + 1], code_G[g + 1]
        for r in range(ROWS):
            is_above = quotient_R[r] > boundary
            level_R[r] = above if is_above else level_R[r]
            code_R[r] = code_above if is_above else code_R[r]


@unaliased
def _take_sign(left_R, sign_R):
    for r in range(ROWS):
        sign_R[r] = np.float32(-1) if left_R[r] < 0 else np.float32(1)


@unaliased
def _level(codebook_GW, code_R, w, sign_R, level_R):
    for r in range(ROWS):
        level_R[r] = sign_R[r] * codebook_GW[code_R[r], w]


@unaliased
def _miss(left_R, scale_R, level_R, error_R):
    for r in range(ROWS):
        error_R[r] = left_R[r] - scale_R[r] * level_R[r]


@unaliased
def _whiten(inverse_factor, error_R, loss_R):
    for r in range(ROWS):
        error_R[r] *= inverse_factor
        loss_R[r] += error_R[r] * error_R[r]


@unaliased
def _feed_back(t, start, stop, factor_TT, error_TR, left_TR):
    """The error of column t goes to columns START to STOP."""
    for u in range(start, stop):
        factor = factor_TT[t, u]
        for r in range(ROWS):
            left_TR[u, r] -= error_TR[t, r] * factor


@unaliased
def _make_signs_even(left_WR, sign_WR, cost_W, scratch):
    """Where the number of minus signs is odd, the weight for which it matters least changes its sign."""
    least_R, product_R, which_R = scratch.least_R, scratch.product_R, scratch.which_R
    for r in range(ROWS):
        least_R[r], which_R[r], product_R[r] = np.inf, 0, 1
    for w in range(len(cost_W)):
        for r in range(ROWS):
            matters = cost_W[w] * left_WR[w, r] * left_WR[w, r]
            is_less = matters < least_R[r]
            least_R[r] = matters if is_less else least_R[r]
            which_R[r] = np.int32(w) if is_less else which_R[r]
            product_R[r] *= sign_WR[w, r]
    for w in range(len(cost_W)):
        for r in range(ROWS):
            sign_WR[w, r] *= product_R[r] if which_R[r] == w else np.float32(1)


@compiled
def _search(parts, start, left_TR, sign_TR, cost_T, scale_R, scratch, code_R):
    """The codes nearest to the weights after START, whatever they are where none compares.

    In the lowest bits of a half's distance stands which half it is, so that the least is all there is to keep.
    Distances count to one part in 2^15, without what all codes have in common.
    """
    part_ZR, second_OR, partner_AR = scratch.part_ZR, scratch.second_OR, scratch.partner_AR
    n_first, n_second = len(parts.first_A2), len(parts.second_B2)
    first_bits, second_bits = _bits(n_first), _bits(n_second)
    _distances(parts.weight_X, parts.level_X, start, left_TR, sign_TR, cost_T, scale_R, part_ZR)
    _sums(parts.pair_Y2, len(parts.weight_X), part_ZR, part_ZR)
    _numbered_sums(parts.second_B2, second_bits, part_ZR, second_OR)
    _less(parts.less_M2, n_second, second_OR)
    _least_partners(parts.start_A1, parts.partner_I, second_OR, partner_AR)
    _least_sum(parts.first_A2, part_ZR, partner_AR, first_bits, scratch.least_R)
    least_R = scratch.least_R.view(np.int32)
    _codes(least_R, partner_AR.view(np.int32), first_bits, second_bits, parts.code_AB, code_R)


@compiled
def _bits(n):
    """Enough to number N things."""
    mask = np.int32(0)
    while mask < n - 1:
        mask = 2 * mask + 1
    return mask


@unaliased
def _distances(weight_X, level_X, start, left_TR, sign_TR, cost_T, scale_R, distance_ZR):
    """Of single levels, over the scale."""
    for x in range(len(weight_X)):
        t, level = np.uint64(start) + weight_X[x], level_X[x]
        square, product = cost_T[t] * level * level, np.float32(-2) * cost_T[t] * level
        for r in range(ROWS):
            distance_ZR[x, r] = square * scale_R[r] + product * left_TR[t, r] * sign_TR[t, r]


@unaliased
def _sums(sum_Y2, start, of_ZR, into_YR):
    for y in range(len(sum_Y2)):
        a, b = sum_Y2[y, 0], sum_Y2[y, 1]
        for r in range(ROWS):
            into_YR[start + y, r] = of_ZR[a, r] + of_ZR[b, r]


@unaliased
def _numbered_sums(sum_Y2, mask, of_ZR, into_YR):
    for y in range(len(sum_Y2)):
        a, b = sum_Y2[y, 0], sum_Y2[y, 1]
        for r in range(ROWS):
            into_YR[y, r] = as_float((as_int(of_ZR[a, r] + of_ZR[b, r]) & ~mask) | np.int32(y))


@unaliased
def _less(less_M2, n_second, second_OR):
    for m in range(len(less_M2)):
        a, b = less_M2[m, 0], less_M2[m, 1]
        for r in range(ROWS):
            second_OR[n_second + m, r] = min(second_OR[a, r], second_OR[b, r])


@unaliased
def _least_partners(start_A1, partner_I, second_OR, partner_AR):
    """The least second half for each first one."""
    for a in range(len(partner_AR)):
        i = start_A1[a]
        b0, b1, b2, b3 = partner_I[i], partner_I[i + 1], partner_I[i + 2], partner_I[i + 3]
        for r in range(ROWS):
            one, other = min(second_OR[b0, r], second_OR[b1, r]), min(second_OR[b2, r], second_OR[b3, r])
            partner_AR[a, r] = min(one, other)
        for i in range(start_A1[a] + UNROLLED, start_A1[a + 1], UNROLLED):
            b0, b1, b2, b3 = partner_I[i], partner_I[i + 1], partner_I[i + 2], partner_I[i + 3]
            for r in range(ROWS):
                one, other = min(second_OR[b0, r], second_OR[b1, r]), min(second_OR[b2, r], second_OR[b3, r])
                partner_AR[a, r] = min(partner_AR[a, r], min(one, other))


@unaliased
def _least_sum(first_A2, part_ZR, partner_AR, mask, least_R):
    """Of a first half and its partner, numbered by the first."""
    for r in range(ROWS):
        least_R[r] = np.inf
    for a in range(len(first_A2)):
        b, c = first_A2[a, 0], first_A2[a, 1]
        for r in range(ROWS):
            sum_ = part_ZR[b, r] + part_ZR[c, r] + partner_AR[a, r]
            least_R[r] = min(least_R[r], as_float((as_int(sum_) & ~mask) | np.int32(a)))


@unaliased
def _codes(least_R, partner_AR, first_bits, second_bits, code_AB, code_R):
    n_first, n_second = code_AB.shape
    for r in range(ROWS):
        first = np.uint32(least_R[r] & first_bits)
        first = first if first < n_first else np.uint32(0)
        second = np.uint32(partner_AR[first, r] & second_bits)
        second = second if second < n_second else np.uint32(0)
        code_R[r] = code_AB[first, second]
