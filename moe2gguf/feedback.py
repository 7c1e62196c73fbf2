"""Quantisation with error feedback onto any GGUF type (block-LDLQ): every code makes up for the errors before it.

The columns are walked in groups as wide as a code. What a group's error does to the output, the columns after it can
partly undo; by how much is in the Cholesky factor of the inverse Hessian (GPTQ, arXiv:2210.17323, with groups for
columns as in QuIP#'s LDLQ, arXiv:2402.04396). Where the walk reaches a sub-block it tries several scales, as the file
would hold them, on the weights as they are by then, and goes on with the one whose codes leave the least error.

Columns lead in memory, so that a step over one column of all rows is contiguous.

Shapes: E experts, N rows, K columns, S weights of a block of the file, P sub-blocks of it, T weights of a sub-block,
W weights of a group, J scales tried, L = J * N lanes, G codes there are, B bytes.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe2gguf import backend
from moe2gguf.codec import CODECS, SIGN_WEIGHTS, Codec, Fields
from moe2gguf.ggml import QuantType

# distances to all codes are computed for so many at a time: they should stay in the cache
CHUNK_DISTANCES = 1 << 18
# scales tried: multiples of the one that fits best before feedback
CODEBOOK_TRIES = (0.8, 0.9, 1.0, 1.1, 1.2)
# IQ1's codebooks are large, and their sub-blocks' scales few
LARGE_CODEBOOK, LARGE_CODEBOOK_TRIES = 2048, (0.92, 1.08)
# and with levels, multiples of the one that just avoids clipping: by so many steps less or more over the whole range
LEVEL_STEPS = (-1.6, -0.9, -0.4, 0.0, 0.6)
# fewer will do to choose the scale of a block's scales
BLOCK_LEVEL_STEPS = (-1.2, -0.4)
# where the search for a codebook's scale begins: rms of the weights over rms of the codebook, by width
CODEBOOK_START = {8: 1.1, 4: 1.3}
# room for what feedback adds to later sub-blocks
HEADROOM = 1.08
HALF_MAX = 65504.0
# a job's steps should be long against what it takes to call them, and its arrays short against the cache
ROWS_PER_JOB = 2048


def inverse_factor(hessian_EKK: torch.Tensor, damping: float) -> torch.Tensor:
    """U upper triangular with UᵀU = (H + damping * mean(diag H) * I)⁻¹, f32 (E, K, K), computed in f64."""
    hessian_EKK = hessian_EKK.double()
    mean_E = hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(-1)
    # an expert that nothing was seen of has no Hessian: all columns count alike
    ridge_E = torch.where(mean_E > 0, damping * mean_E, 1.0)
    identity_KK = torch.eye(hessian_EKK.shape[-1], dtype=torch.float64, device=hessian_EKK.device)
    lower = torch.linalg.cholesky(hessian_EKK + ridge_E[:, None, None] * identity_KK)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def quantize(
    weight_ENK: torch.Tensor, quant_type: QuantType, factor_EKK: torch.Tensor, pool: ThreadPoolExecutor
) -> torch.Tensor:
    """The experts' rows in QUANT_TYPE with error feedback: uint8 (E, N, B), on the weights' device.

    factor_EKK: f32, inverse_factor of the inputs' second moments.
    """
    codec = CODECS[quant_type]
    if not weight_ENK.is_cpu:
        return _quantize(codec, weight_ENK, factor_EKK)
    n_experts, n_rows, _ = weight_ENK.shape
    n_step, e_step = min(n_rows, ROWS_PER_JOB), max(1, ROWS_PER_JOB // n_rows)
    with single_threaded():
        jobs = [
            [
                pool.submit(_quantize, codec, weight_ENK[e : e + e_step, n : n + n_step], factor_EKK[e : e + e_step])
                for n in range(0, n_rows, n_step)
            ]
            for e in range(0, n_experts, e_step)
        ]
        return torch.cat([torch.cat([job.result() for job in row], 1) for row in jobs])


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch's own threads stay out of the way of a pool's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quantize(codec: Codec, weight_ENK: torch.Tensor, factor_EKK: torch.Tensor) -> torch.Tensor:
    n_experts, n_rows, n_columns = weight_ENK.shape
    size = codec.block_weights
    left_KEN = weight_ENK.float().permute(2, 0, 1).contiguous()
    parts = []
    for start in range(0, n_columns, size):
        own = slice(start, start + size)
        blocks_RB, error_SEN = _quantize_block(codec, left_KEN[own], factor_EKK[:, own, own])
        parts.append(blocks_RB.view(n_experts, n_rows, -1))
        _feed_back(left_KEN[start + size :], error_SEN, factor_EKK[:, own, start + size :])
    return torch.cat(parts, -1)


def _feed_back(left_KEL: torch.Tensor, error_WEL: torch.Tensor, factor_EWK: torch.Tensor) -> None:
    """left -= errorᵀ @ factor, in place."""
    if len(left_KEL):
        left_KEL.permute(1, 0, 2).baddbmm_(factor_EWK.mT, error_WEL.permute(1, 0, 2), alpha=-1)


@dataclass(frozen=True)
class _Tries:
    """Scales for one sub-block, as the file can hold them."""

    scale_JEN: torch.Tensor
    offset_JEN: torch.Tensor | None
    sub_JEN: torch.Tensor | None
    minimum_JEN: torch.Tensor | None


@dataclass(frozen=True)
class _Walked:
    """What a walk over a sub-block chose and left behind."""

    code_CEL: torch.Tensor  # i32
    negative_TEL: torch.Tensor | None  # bool
    error_TEL: torch.Tensor  # in units of U: (w - ŵ) U⁻¹
    loss_EL: torch.Tensor

    def best(self, n_tries: int) -> tuple["_Walked", torch.Tensor]:
        """Of the lanes of each row the one of least loss; -> also which try it was, i64 (E, N)."""
        tried_EN = self.loss_EL.unflatten(1, (n_tries, -1)).argmin(1)
        n_rows = tried_EN.shape[1]
        lane_EN = tried_EN * n_rows + torch.arange(n_rows, device=tried_EN.device)

        def pick(x_XEL: torch.Tensor) -> torch.Tensor:
            return x_XEL.gather(2, lane_EN.expand(len(x_XEL), -1, -1))

        chosen = _Walked(
            pick(self.code_CEL),
            None if self.negative_TEL is None else pick(self.negative_TEL),
            pick(self.error_TEL),
            self.loss_EL.gather(1, lane_EN),
        )
        return chosen, tried_EN


def _quantize_block(
    codec: Codec, weight_SEN: torch.Tensor, factor_ESS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> blocks uint8 (E * N, B), and the error in units of U, (w - ŵ) U⁻¹, f32 (S, E, N)."""
    # what an error costs that the columns after it undo as far as they can
    cost_SE = factor_ESS.diagonal(dim1=-2, dim2=-1).T ** -2
    size = codec.sub_weights
    left_SEN = weight_SEN.clone()
    d_EN, dmin_EN = _block_scales(codec, weight_SEN, cost_SE)
    codes: list[torch.Tensor] = []
    negatives: list[torch.Tensor] = []
    subs: list[torch.Tensor] = []
    minimums: list[torch.Tensor] = []
    for first in range(0, codec.block_weights, size):
        own = slice(first, first + size)
        tries = _tries(codec, left_SEN[own], cost_SE[own], d_EN, dmin_EN)
        walked, tried_EN = _walk(codec, left_SEN[own], tries, factor_ESS[:, own, own])
        _feed_back(left_SEN[first + size :], walked.error_TEL, factor_ESS[:, own, first + size :])
        codes.append(walked.code_CEL)
        if walked.negative_TEL is not None:
            negatives.append(walked.negative_TEL)
        if tries.sub_JEN is not None:
            subs.append(_chosen(tries.sub_JEN, tried_EN)[None])
        if tries.minimum_JEN is not None:
            minimums.append(_chosen(tries.minimum_JEN, tried_EN)[None])
        if codec.places.sub is None:
            d_EN = _chosen(tries.scale_JEN, tried_EN).half()

    def rows(parts: list[torch.Tensor]) -> torch.Tensor | None:
        return torch.cat(parts).flatten(1).T.contiguous() if parts else None

    codes_RC = rows(codes)
    assert codes_RC is not None
    fields = Fields(
        codes_RC,
        rows(negatives),
        None if codec.places.d is None else d_EN.flatten(),
        rows(subs),
        None if dmin_EN is None else dmin_EN.flatten(),
        rows(minimums),
    )
    return _refit(codec, fields, weight_SEN, factor_ESS)


def _chosen(x_JEN: torch.Tensor, tried_EN: torch.Tensor) -> torch.Tensor:
    return x_JEN.gather(0, tried_EN[None])[0]


def _walk(
    codec: Codec, target_TEN: torch.Tensor, tries: _Tries, factor_ETT: torch.Tensor
) -> tuple[_Walked, torch.Tensor]:
    """What the try of least loss chose and left behind, and which it was, i64 (E, N)."""
    if backend.has_kernels(target_TEN):
        code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN = backend.walk(
            codec, target_TEN, tries.scale_JEN, tries.offset_JEN, factor_ETT
        )
        return _Walked(code_CEN, negative_TEN, error_TEN, loss_EN), tried_EN
    n_tries = len(tries.scale_JEN)
    scale_EL = tries.scale_JEN.transpose(0, 1).flatten(1)
    left_TEL = target_TEN.repeat(1, 1, n_tries)
    if tries.offset_JEN is not None:
        left_TEL -= tries.offset_JEN.transpose(0, 1).flatten(1)
    step = SIGN_WEIGHTS if codec.has_even_signs else codec.width
    error_TEL = torch.empty_like(left_TEL)
    codes: list[torch.Tensor] = []
    negatives: list[torch.Tensor] = []
    loss_EL = torch.zeros_like(scale_EL)
    size = len(target_TEN)
    for first in range(0, size, SIGN_WEIGHTS):
        group = slice(first, first + SIGN_WEIGHTS)
        for start in range(first, first + SIGN_WEIGHTS, step):
            own = slice(start, start + step)
            factor_EWW = factor_ETT[:, own, own]
            if start > first:
                _feed_back(left_TEL[own], error_TEL[first:start], factor_ETT[:, first:start, own])
            code, negative, level_WEL = _nearest(codec, left_TEL[own], scale_EL, factor_EWW)
            codes.append(code)
            if negative is not None:
                negatives.append(negative)
            miss_WEL = left_TEL[own] - scale_EL * level_WEL
            if step == 1:
                torch.mul(miss_WEL, 1 / factor_EWW[:, 0], out=error_TEL[own])
            else:
                error_TEL[own] = _whitened(factor_EWW, miss_WEL)
            loss_EL += error_TEL[own].square().sum(0)
        _feed_back(left_TEL[group.stop :], error_TEL[group], factor_ETT[:, group, group.stop :])
    negative_TEL = torch.cat(negatives) if negatives else None
    return _Walked(torch.cat(codes), negative_TEL, error_TEL, loss_EL).best(n_tries)


def _nearest(
    codec: Codec, target_WEL: torch.Tensor, scale_EL: torch.Tensor, factor_EWW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The codes and signs whose levels, scaled, are nearest: i32 (W / width, E, L), bool (W, E, L), levels f32."""
    codebook_GW = codec.codebook_GW.to(target_WEL.device)
    if codec.width == 1:
        code_EL, level_EL = _nearest_level(codebook_GW[:, 0], target_WEL[0], scale_EL)
        return code_EL[None], None, level_EL[None]
    cost_WE = factor_EWW.diagonal(dim1=-2, dim2=-1).T ** -2
    if not codec.has_signs:
        code_EL = _nearest_code(codebook_GW, target_WEL, scale_EL, cost_WE)
        return code_EL[None], None, codebook_GW[code_EL.long()].permute(2, 0, 1)
    negative_WEL = target_WEL < 0
    if codec.has_even_signs:
        # min, not argmin, which is slow across rows
        cheapest = (target_WEL.square() * cost_WE[..., None]).min(0, keepdim=True).indices
        odd = negative_WEL.sum(0, keepdim=True) % 2 == 1
        negative_WEL = negative_WEL.scatter(0, cheapest, negative_WEL.gather(0, cheapest) ^ odd)
    upright_WEL = torch.where(negative_WEL, -target_WEL, target_WEL)
    parts = [
        _nearest_code(codebook_GW, upright_WEL[i : i + codec.width], scale_EL, cost_WE[i : i + codec.width])
        for i in range(0, len(target_WEL), codec.width)
    ]
    level_WEL = torch.cat([codebook_GW[code.long()].permute(2, 0, 1) for code in parts])
    return torch.stack(parts), negative_WEL, torch.where(negative_WEL, -level_WEL, level_WEL)


def _nearest_level(
    levels_G: torch.Tensor, target: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes i32 and their levels, of the target's shape."""
    # a zero scale decodes to zero whatever the code
    quotient = torch.where(scale != 0, target / scale, 0.0)
    low, high = float(levels_G[0]), float(levels_G[-1])
    if high - low == len(levels_G) - 1:  # consecutive integers
        level = quotient.round_().clamp_(low, high)
        return (level - low).int(), level
    ordered_G, order_G = levels_G.sort()
    place = torch.bucketize(quotient, (ordered_G[1:] + ordered_G[:-1]) / 2)
    return order_G[place].int(), ordered_G[place]


def _nearest_code(
    codebook_GW: torch.Tensor, target_WEL: torch.Tensor, scale_EL: torch.Tensor, cost_WE: torch.Tensor
) -> torch.Tensor:
    """argmin over g of sum_w cost * (target - scale * codebook[g])², i32 (E, L). Scales are positive."""
    # divided by the scale and without what no code changes: scale * sum_w cost * code² - 2 sum_w cost * target * code
    square_EG = cost_WE.T @ codebook_GW.square().T
    book_EXG = torch.cat([codebook_GW.T.expand(len(square_EG), -1, -1), square_EG[:, None]], 1)
    lanes_EXL = torch.cat([-2 * target_WEL * cost_WE[..., None], scale_EL[None]]).transpose(0, 1)
    n_experts, n_lanes = scale_EL.shape
    code_EL = torch.empty((n_experts, n_lanes), dtype=torch.int32, device=target_WEL.device)
    chunk = max(1, CHUNK_DISTANCES // len(codebook_GW))
    for e in range(n_experts):
        for lanes in range(0, n_lanes, chunk):
            code_EL[e, lanes : lanes + chunk] = _argmin(lanes_EXL[e, :, lanes : lanes + chunk].T @ book_EXG[e])
    return code_EL


def _argmin(distance_LG: torch.Tensor) -> torch.Tensor:
    # on CPU numpy's is several times as fast as torch's
    return torch.from_numpy(distance_LG.numpy().argmin(-1)) if distance_LG.is_cpu else distance_LG.argmin(-1)


def _block_scales(
    codec: Codec, weight_SEN: torch.Tensor, cost_SE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and dmin, f16 (E, N), that let each sub-block have the scale that fits it best without feedback."""
    shape = weight_SEN.shape[1:]
    if codec.places.d is None or codec.places.sub is None:
        return torch.ones(shape, dtype=torch.float16, device=weight_SEN.device), None
    assert codec.sub_scale_Q is not None
    size = codec.sub_weights
    scales: list[torch.Tensor] = []
    minimums: list[torch.Tensor] = []
    for first in range(0, len(weight_SEN), size):
        own = slice(first, first + size)
        scale_JEN, minimum_JEN, loss_JEN = _guesses(codec, weight_SEN[own], cost_SE[own], BLOCK_LEVEL_STEPS)
        best_EN = loss_JEN.argmin(0)
        scales.append(_chosen(scale_JEN, best_EN))
        if minimum_JEN is not None:
            minimums.append(_chosen(minimum_JEN, best_EN))
    scale_PEN = torch.stack(scales)
    largest_EN = _chosen(scale_PEN, scale_PEN.abs().argmax(0))
    # of signed sub-scales the lowest reaches further
    low, high = codec.sub_scale_Q.min(), codec.sub_scale_Q.max()
    d_EN = HEADROOM * largest_EN / (low if low < 0 else high)
    if not codec.has_minimum:
        return _half(d_EN), None
    return _half(d_EN), _half(HEADROOM * torch.stack(minimums).amax(0) / high)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half()


def _guesses(
    codec: Codec, target_TEN: torch.Tensor, cost_TE: torch.Tensor, level_steps: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Scales (and minimums, and losses without feedback) worth trying for a sub-block, f32 (J, E, N) each."""
    cost_TEN = cost_TE[..., None]
    codebook_GW = codec.codebook_GW.to(target_TEN.device)
    if codec.width > 1:
        rms_EN = ((target_TEN.square() * cost_TEN).sum(0) / cost_TEN.sum(0)).sqrt()
        scale_EN = CODEBOOK_START[codec.width] * rms_EN / codebook_GW.square().mean().sqrt()
        found_TEN = _without_feedback(codec, target_TEN, scale_EN, cost_TE)
        scale_EN = _ratio((cost_TEN * target_TEN * found_TEN).sum(0), (cost_TEN * found_TEN.square()).sum(0), scale_EN)
        return scale_EN[None], None, torch.zeros_like(scale_EN)[None]
    levels_G = codebook_GW[:, 0]
    low, high = levels_G.min(), levels_G.max()
    tries = [1 + steps / len(levels_G) for steps in level_steps]
    scales, minimums, losses = [], [], []
    if codec.has_minimum:
        bottom_EN, top_EN = target_TEN.amin(0).clamp_max(0), target_TEN.amax(0)
        for f in tries:
            middle_EN, half_EN = (top_EN + bottom_EN) / 2, f * (top_EN - bottom_EN) / 2
            minimum_EN = (half_EN - middle_EN).clamp_min(0)
            scale_EN = 2 * half_EN / high
            _, level_TEN = _nearest_level(levels_G, target_TEN + minimum_EN, scale_EN)
            scale_EN, minimum_EN = _line(level_TEN, target_TEN, cost_TEN, scale_EN, minimum_EN)
            loss_EN = (cost_TEN * (target_TEN - scale_EN * level_TEN + minimum_EN).square()).sum(0)
            scales.append(scale_EN)
            minimums.append(minimum_EN)
            losses.append(loss_EN)
        return torch.stack(scales), torch.stack(minimums), torch.stack(losses)
    extreme_EN = target_TEN.gather(0, target_TEN.abs().argmax(0, keepdim=True))[0]
    # a scale below zero turns the range around, so that the largest weight meets the end that reaches further
    signed = codec.sub_scale_Q is None or bool((codec.sub_scale_Q < 0).any())
    full_EN = extreme_EN / low if signed else extreme_EN.abs() / high
    for f in tries:
        scale_EN = f * full_EN
        _, level_TEN = _nearest_level(levels_G, target_TEN, scale_EN)
        scale_EN = _ratio((cost_TEN * target_TEN * level_TEN).sum(0), (cost_TEN * level_TEN.square()).sum(0), scale_EN)
        scales.append(scale_EN)
        losses.append((cost_TEN * (target_TEN - scale_EN * level_TEN).square()).sum(0))
    return torch.stack(scales), None, torch.stack(losses)


def _ratio(above: torch.Tensor, below: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    return torch.where(below > 0, above / below, otherwise)


def _line(
    level_TEN: torch.Tensor, target_TEN: torch.Tensor, cost_TEN: torch.Tensor, scale_EN: torch.Tensor,
    minimum_EN: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Least squares of target = scale * level - minimum, minimum >= 0."""
    c, cl = cost_TEN.sum(0), (cost_TEN * level_TEN).sum(0)
    cll, clt = (cost_TEN * level_TEN.square()).sum(0), (cost_TEN * level_TEN * target_TEN).sum(0)
    ct = (cost_TEN * target_TEN).sum(0)
    determinant = c * cll - cl * cl
    fits = determinant > 1e-6 * c * cll
    scale = torch.where(fits, (c * clt - cl * ct) / determinant, scale_EN)
    minimum = torch.where(fits, (cl * clt - cll * ct) / determinant, minimum_EN)
    through_zero = minimum < 0
    return torch.where(through_zero, _ratio(clt, cll, scale_EN), scale), minimum.clamp_min(0)


def _without_feedback(
    codec: Codec, target_TEN: torch.Tensor, scale_EN: torch.Tensor, cost_TE: torch.Tensor
) -> torch.Tensor:
    """The nearest levels of a sub-block, f32 (T, E, N)."""
    if backend.has_kernels(target_TEN):  # a walk of columns that do not act on each other
        tries = _Tries(scale_EN[None], None, None, None)
        walked, _ = _walk(codec, target_TEN, tries, torch.diag_embed(cost_TE.T**-0.5))
        level_TEN = codec.codebook_GW.to(target_TEN.device)[walked.code_CEL.long()].permute(0, 3, 1, 2).flatten(0, 1)
        return level_TEN if walked.negative_TEL is None else torch.where(walked.negative_TEL, -level_TEN, level_TEN)
    parts = []
    for first in range(0, len(target_TEN), SIGN_WEIGHTS):
        own = slice(first, first + SIGN_WEIGHTS)
        for i in range(first, first + SIGN_WEIGHTS, SIGN_WEIGHTS if codec.has_even_signs else codec.width):
            own = slice(i, i + (SIGN_WEIGHTS if codec.has_even_signs else codec.width))
            factor_EWW = torch.diag_embed(cost_TE[own].T ** -0.5)
            parts.append(_nearest(codec, target_TEN[own], scale_EN, factor_EWW)[2])
    return torch.cat(parts)


def _tries(
    codec: Codec, target_TEN: torch.Tensor, cost_TE: torch.Tensor, d_EN: torch.Tensor, dmin_EN: torch.Tensor | None
) -> _Tries:
    scale_JEN, minimum_JEN, _ = _guesses(codec, target_TEN, cost_TE, LEVEL_STEPS)
    if codec.width > 1:
        tries = CODEBOOK_TRIES if len(codec.codebook_GW) < LARGE_CODEBOOK else LARGE_CODEBOOK_TRIES
        scale_JEN = scale_JEN * torch.tensor(tries, device=scale_JEN.device)[:, None, None]
    if codec.sub_scale_Q is None:
        return _Tries(_half(scale_JEN).float(), None, None, None)
    values_Q = codec.sub_scale_Q.to(target_TEN.device)
    d_EN = d_EN.float()
    if codec.sub_offset_Q is not None:  # both shifts of every scale
        half = len(values_Q) // 2
        sub_JEN = _nearest_level(values_Q[:half], scale_JEN, d_EN)[0]
        sub_JEN = torch.cat([sub_JEN, sub_JEN + half])
        offset_JEN = d_EN * codec.sub_offset_Q.to(target_TEN.device)[sub_JEN.long()]
        return _Tries(d_EN * values_Q[sub_JEN.long()], offset_JEN, sub_JEN, None)
    if codec.places.d is None:
        exponent_JEN = (scale_JEN.clamp_min(1e-30).log2().round() + 128).clamp(1, 254)
        sub_JEN = torch.cat([exponent_JEN.amin(0, keepdim=True) + i for i in range(3)]).clamp_max(254).int()
        return _Tries(values_Q[sub_JEN.long()], None, sub_JEN, None)
    sub_JEN = _nearest_level(values_Q, scale_JEN, d_EN)[0]
    scale_JEN = d_EN * values_Q[sub_JEN.long()]
    if minimum_JEN is None:
        return _Tries(scale_JEN, None, sub_JEN, None)
    assert dmin_EN is not None
    minimum_code_JEN = _nearest_level(values_Q, minimum_JEN, dmin_EN.float())[0]
    return _Tries(scale_JEN, -dmin_EN.float() * minimum_code_JEN, sub_JEN, minimum_code_JEN)


def _refit(
    codec: Codec, fields: Fields, weight_SEN: torch.Tensor, factor_ESS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin by least squares, in what an error costs after the columns behind the block undo it."""
    shape, device = weight_SEN.shape, weight_SEN.device
    unit_SEN, minimum = (x.T.reshape(-1, *shape[1:]) for x in codec.parts(fields))
    whitened = _whitened(factor_ESS, weight_SEN)
    d_EN = torch.ones(shape[1:], device=device) if fields.d_R is None else fields.d_R.float().view(shape[1:])
    dmin_EN = None if fields.dmin_R is None else fields.dmin_R.float().view(shape[1:])
    if fields.d_R is not None:
        unit = _whitened(factor_ESS, unit_SEN)
        uu, uw = unit.square().sum(0), (unit * whitened).sum(0)
        if dmin_EN is None:
            new_d = uw / uu
            fits = _near(new_d, d_EN)
        else:
            low = _whitened(factor_ESS, minimum)
            ll, ul, lw = low.square().sum(0), (unit * low).sum(0), (low * whitened).sum(0)
            determinant = uu * ll - ul * ul
            new_d, new_min = (uw * ll - lw * ul) / determinant, (uw * ul - lw * uu) / determinant
            fits = _near(new_d, d_EN) & _near(new_min, dmin_EN)
            dmin_EN = torch.where(fits, new_min, dmin_EN).half().float()
        d_EN = torch.where(fits, new_d, d_EN).half().float()
    decoded_SEN = d_EN * unit_SEN if dmin_EN is None else d_EN * unit_SEN - dmin_EN * minimum
    fields = dataclasses.replace(
        fields,
        d_R=None if fields.d_R is None else d_EN.flatten().half(),
        dmin_R=None if dmin_EN is None else dmin_EN.flatten().half(),
    )
    return backend.pack(codec, fields), _whitened(factor_ESS, weight_SEN - decoded_SEN)


def _near(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """False for the noise of a block that is all but zero, and for what f16 does not hold."""
    return ((new / old - 1).abs() < 0.5) & (new.abs() < HALF_MAX)


def _whitened(factor_ESS: torch.Tensor, x_SEN: torch.Tensor) -> torch.Tensor:
    """x U⁻¹, whose squares are what an error costs."""
    return torch.linalg.solve_triangular(factor_ESS.mT, x_SEN.transpose(0, 1), upper=False).transpose(0, 1)
