"""The walk of error feedback over one sub-block, compiled for the CPU. Reference: moe2gguf.walk's function.

As in moe2gguf_kernels.walk, but a tile's rows are the lanes of vector instructions: every inner loop runs over them,
over memory that is contiguous in them. One thread; callers share the rows out.

Shapes: see moe2gguf_kernels.walk; X and Y parts of codes, Z = X + Y.
"""

import functools

import numpy as np
import torch

from moe2gguf_kernels.compiled import compiled
from moe2gguf_kernels.layout import SIGN_WEIGHTS, Layout

# enough to outweigh what a loop takes to start; a sub-block of them still fits the second cache
ROWS = 128


def walk(
    target_TEN: torch.Tensor,
    scale_JEN: torch.Tensor,
    offset_JEN: torch.Tensor | None,
    factor_ETT: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As moe2gguf_kernels.walk.walk."""
    n_sub, n_experts, n_rows = target_TEN.shape
    width = layout.codebook_GW.shape[1]
    inputs = (
        target_TEN.contiguous().numpy(),
        scale_JEN.contiguous().numpy(),
        np.empty((0, n_experts, n_rows), np.float32) if offset_JEN is None else offset_JEN.contiguous().numpy(),
        factor_ETT.contiguous().numpy(),
    )
    outputs = (
        np.empty((n_sub // width, n_experts, n_rows), np.int32),
        np.empty((0 if layout.signs is None else n_sub, n_experts, n_rows), np.bool_),
        np.empty((n_sub, n_experts, n_rows), np.float32),
        np.empty((n_experts, n_rows), np.float32),
        np.empty((n_experts, n_rows), np.int64),
    )
    if layout.levels is not None:
        tables = (layout.levels.level_G, layout.levels.code_G, layout.levels.boundary_G)
        _walk_levels(*inputs, *(table.numpy() for table in tables), layout.levels.are_consecutive, *outputs)
    else:
        step = SIGN_WEIGHTS if layout.has_even_signs else width
        _walk_codebook(*inputs, layout.codebook_GW.numpy(), *_parts(layout), step, layout.has_even_signs, *outputs)
    code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN = map(torch.from_numpy, outputs)
    return code_CEN, None if layout.signs is None else negative_TEN, error_TEN, loss_EN, tried_EN


@functools.cache
def _parts(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The distinct parts of the codes, so that what many have in common is computed once.

    First single levels: their weights i64 (X,) and values f32 (X,). Then sums of two parts before them, i64 (Y, 2):
    pairs, and so on up to halves. At last the codes, as sums of two halves, i64 (G, 2).
    """
    codebook_GW = layout.codebook_GW.numpy()
    width = codebook_GW.shape[1]
    numbers: dict[tuple[int, tuple[float, ...]], int] = {}

    def distinct(start: int, length: int) -> list[tuple[float, ...]]:
        return [tuple(part) for part in np.unique(codebook_GW[:, start : start + length], axis=0).tolist()]

    def two(start: int, part: tuple[float, ...]) -> tuple[int, int]:
        middle = len(part) // 2
        return numbers[start, part[:middle]], numbers[start + middle, part[middle:]]

    singles = [(w, level) for w in range(width) for (level,) in distinct(w, 1)]
    numbers |= {(w, (level,)): i for i, (w, level) in enumerate(singles)}
    sums = []
    length = 2
    while length < width:
        for start in range(0, width, length):
            for part in distinct(start, length):
                sums.append(two(start, part))
                numbers[start, part] = len(numbers)
        length *= 2
    codes = [two(0, tuple(code)) for code in codebook_GW.tolist()]
    weights, levels = zip(*singles, strict=True)
    return np.array(weights), np.array(levels, np.float32), np.array(sums), np.array(codes)


@compiled
def _walk_levels(
    target_TEN, scale_JEN, offset_JEN, factor_ETT, level_G, code_G, boundary_G, consecutive,
    code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN,
):  # fmt: skip
    n_sub, n_experts, n_rows = target_TEN.shape
    low, high = level_G[0], level_G[-1]
    left = np.empty((n_sub, ROWS), np.float32)
    n_tries = len(scale_JEN)
    errors = np.empty((n_tries, n_sub, ROWS), np.float32)
    codes = np.empty((n_tries, n_sub, ROWS), np.int32)
    losses = np.empty((n_tries, ROWS), np.float32)
    scale, inverse = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    level, quotient = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    for e in range(n_experts):
        for first in range(0, n_rows, ROWS):
            n = min(ROWS, n_rows - first)
            for j in range(n_tries):
                code, error, loss = codes[j], errors[j], losses[j]
                _load(j, e, first, n, target_TEN, scale_JEN, offset_JEN, left, scale, loss)
                for r in range(n):
                    # a zero scale decodes to zero whatever the code
                    inverse[r] = np.float32(1) / scale[r] if scale[r] != 0 else np.float32(0)
                for t in range(n_sub):
                    if consecutive:
                        for r in range(n):
                            nearest = np.rint(left[t, r] * inverse[r])
                            nearest = nearest if nearest > low else low  # as is what compares with nothing
                            level[r] = nearest if nearest < high else high
                            code[t, r] = np.int32(level[r] - low)
                    else:
                        for r in range(n):
                            quotient[r] = left[t, r] * inverse[r]
                            level[r] = low
                            code[t, r] = code_G[0]
                        for g in range(len(boundary_G)):
                            boundary, above, code_above = boundary_G[g], level_G[g + 1], code_G[g + 1]
                            for r in range(n):
                                is_above = quotient[r] > boundary
                                level[r] = above if is_above else level[r]
                                code[t, r] = code_above if is_above else code[t, r]
                    inverse_factor = np.float32(1) / factor_ETT[e, t, t]
                    for r in range(n):
                        error[t, r] = (left[t, r] - scale[r] * level[r]) * inverse_factor
                        loss[r] += error[t, r] * error[t, r]
                    _feed_back(t, t + 1, n_sub, factor_ETT[e], n, error, left)
            _keep_best(e, first, n, codes, errors, errors, losses, code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN)


@compiled
def _walk_codebook(
    target_TEN, scale_JEN, offset_JEN, factor_ETT, codebook_GW, part_weight_X, part_level_X, sum_Y2, code_G2, step,
    even_signs, code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN,
):  # fmt: skip
    n_sub, n_experts, n_rows = target_TEN.shape
    width = codebook_GW.shape[1]
    n_tries = len(scale_JEN)
    left = np.empty((n_sub, ROWS), np.float32)
    errors = np.empty((n_tries, n_sub, ROWS), np.float32)
    signs = np.ones((n_tries, n_sub, ROWS), np.float32)  # 1 or -1
    codes = np.empty((n_tries, n_sub // width, ROWS), np.int32)
    losses = np.empty((n_tries, ROWS), np.float32)
    scale, least = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    distance = np.empty((len(part_weight_X) + len(sum_Y2), ROWS), np.float32)
    cost_T = np.empty(n_sub, np.float32)
    for e in range(n_experts):
        for t in range(n_sub):
            cost_T[t] = np.float32(1) / (factor_ETT[e, t, t] * factor_ETT[e, t, t])
        for first in range(0, n_rows, ROWS):
            n = min(ROWS, n_rows - first)
            for j in range(n_tries):
                code, sign, error, loss = codes[j], signs[j], errors[j], losses[j]
                _load(j, e, first, n, target_TEN, scale_JEN, offset_JEN, left, scale, loss)
                for start in range(0, n_sub, step):
                    stop = start + step
                    if len(negative_TEN):
                        for t in range(start, stop):
                            for r in range(n):
                                sign[t, r] = np.float32(-1) if left[t, r] < 0 else np.float32(1)
                    if even_signs:
                        _make_signs_even(left[start:stop], sign[start:stop], cost_T[start:stop], n)
                    for own in range(start, stop, width):
                        _distances(part_weight_X, part_level_X, sum_Y2, own, left, sign, cost_T, scale, n, distance)
                        _nearest(code_G2, distance, n, least, code[own // width])
                    for t in range(start, stop):
                        for r in range(n):
                            level = sign[t, r] * codebook_GW[code[t // width, r], t % width]
                            error[t, r] = left[t, r] - scale[r] * level
                    for t in range(start, stop):
                        inverse_factor = np.float32(1) / factor_ETT[e, t, t]
                        for r in range(n):
                            error[t, r] *= inverse_factor
                            loss[r] += error[t, r] * error[t, r]
                        _feed_back(t, t + 1, stop, factor_ETT[e], n, error, error)
                        _feed_back(t, stop, n_sub, factor_ETT[e], n, error, left)
            _keep_best(e, first, n, codes, signs, errors, losses, code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN)


@compiled
def _load(j, e, first, n, target_TEN, scale_JEN, offset_JEN, left_TR, scale_R, loss_R):
    for r in range(n):
        scale_R[r] = scale_JEN[j, e, first + r]
        loss_R[r] = 0
    for t in range(len(target_TEN)):
        for r in range(n):
            left_TR[t, r] = target_TEN[t, e, first + r]
        if len(offset_JEN):
            for r in range(n):
                left_TR[t, r] -= offset_JEN[j, e, first + r]


@compiled
def _feed_back(t, start, stop, factor_TT, n, error_TR, left_TR):
    """The error of column t goes to columns START to STOP."""
    for u in range(start, stop):
        factor = factor_TT[t, u]
        for r in range(n):
            left_TR[u, r] -= error_TR[t, r] * factor


@compiled
def _make_signs_even(left_WR, sign_WR, cost_W, n):
    """Where the number of minus signs is odd, the weight for which it matters least changes its sign."""
    least, which, product = np.empty(ROWS, np.float32), np.empty(ROWS, np.int32), np.empty(ROWS, np.float32)
    for r in range(n):
        least[r], which[r], product[r] = np.inf, 0, 1
    for w in range(len(cost_W)):
        for r in range(n):
            matters = cost_W[w] * left_WR[w, r] * left_WR[w, r]
            is_less = matters < least[r]
            least[r] = matters if is_less else least[r]
            which[r] = np.int32(w) if is_less else which[r]
            product[r] *= sign_WR[w, r]
    for w in range(len(cost_W)):
        for r in range(n):
            sign_WR[w, r] *= product[r] if which[r] == w else np.float32(1)


@compiled
def _distances(part_weight_X, part_level_X, sum_Y2, first, left_TR, sign_TR, cost_T, scale_R, n, distance_ZR):
    """Of the parts of codes from the weights after FIRST, without what all codes have in common, over the scale."""
    n_single = len(part_weight_X)
    for x in range(n_single):
        t, level = first + part_weight_X[x], part_level_X[x]
        square, product = cost_T[t] * level * level, np.float32(-2) * cost_T[t] * level
        for r in range(n):
            distance_ZR[x, r] = square * scale_R[r] + product * left_TR[t, r] * sign_TR[t, r]
    for y in range(len(sum_Y2)):
        a, b = sum_Y2[y, 0], sum_Y2[y, 1]
        for r in range(n):
            distance_ZR[n_single + y, r] = distance_ZR[a, r] + distance_ZR[b, r]


@compiled
def _nearest(code_G2, distance_ZR, n, least_R, code_R):
    for r in range(n):
        least_R[r], code_R[r] = np.inf, 0
    for g in range(len(code_G2)):
        a, b = code_G2[g, 0], code_G2[g, 1]
        for r in range(n):
            distance = distance_ZR[a, r] + distance_ZR[b, r]
            is_less = distance < least_R[r]
            least_R[r] = distance if is_less else least_R[r]
            code_R[r] = np.int32(g) if is_less else code_R[r]


@compiled
def _keep_best(
    e, first, n, code_JCR, sign_JTR, error_JTR, loss_JR, code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN
):  # fmt: skip
    """What the try of least loss found, row by row; of equals, and where none compares, the first."""
    tried_R = np.zeros(ROWS, np.int64)
    for j in range(1, len(loss_JR)):
        for r in range(n):
            tried_R[r] = j if loss_JR[j, r] < loss_JR[tried_R[r], r] else tried_R[r]
    for r in range(n):
        loss_EN[e, first + r], tried_EN[e, first + r] = loss_JR[tried_R[r], r], tried_R[r]
    for c in range(len(code_CEN)):
        for r in range(n):
            code_CEN[c, e, first + r] = code_JCR[tried_R[r], c, r]
    for t in range(len(negative_TEN)):
        for r in range(n):
            negative_TEN[t, e, first + r] = sign_JTR[tried_R[r], t, r] < 0
    for t in range(len(error_TEN)):
        for r in range(n):
            error_TEN[t, e, first + r] = error_JTR[tried_R[r], t, r]
