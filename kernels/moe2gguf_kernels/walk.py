"""The walk of error feedback over one sub-block. Reference: moe2gguf.walk's function.

Each column's target is moved by the errors of the columns before it, times their row of the factor U; its code is the
nearest one. The walk is repeated for every scale tried, and what the cheapest left behind is what stays.

A program walks a tile of one expert's rows. The columns go in steps: what the steps before left behind is one product
of errors and U on tensor cores, and within a step the columns are vectors over the rows, unrolled, so that an error
meets U's element in registers. The tries follow one another, and a better one overwrites the output, so that memory
holds and carries one try, not all.

Shapes: E experts, N rows, T weights of a sub-block, J scales tried, G codes there are, W weights of a code, C codes of
a sub-block, R rows of a tile, X codes of a tile of the codebook.
"""

import torch
import triton
import triton.language as tl

from moe2gguf_kernels.layout import SIGN_WEIGHTS, Layout

# a row a thread: for sm_90 its 32 errors and 32 codes just do not fit, 100 bytes spill; of 16 columns all fit
LEVEL_ROWS, LEVEL_WARPS = 128, 4
# columns whose errors meet one by one; more unroll too far to compile in seconds
LEVEL_STEP = 8
# tensor cores multiply 64 rows a warp group; distances, the least so far and its code are 3 * 32 registers a thread
CODEBOOK_ROWS, CODEBOOK_WARPS = 128, 8
CODEBOOK_TILE = 64
# the least a product of f32 sums over; twice the widest code
DOT_DEPTH = 16


def walk(
    target_TEN: torch.Tensor,
    scale_JEN: torch.Tensor,
    offset_JEN: torch.Tensor | None,
    factor_ETT: torch.Tensor,
    layout: Layout,
    codebook_tile: int = CODEBOOK_TILE,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the scales tried the one of least loss: codes i32 (C, E, N), signs bool (T, E, N) or None where the type has
    none, errors in units of U f32 (T, E, N), loss f32 (E, N), which try it was i64 (E, N).

    scale_JEN, offset_JEN: f32, as the file would hold them; of a codebook not negative. factor_ETT: f32, upper
    triangular. Ties fall to the first try. Targets nearly between two codes can fall either way: the loss is within
    1e-3 of the reference's, the codes are equal but for those and what follows from them.
    """
    n_sub, n_experts, n_rows = target_TEN.shape
    n_tries = len(scale_JEN)
    width = layout.codebook_GW.shape[1]
    device = target_TEN.device
    factor_ETT = factor_ETT if factor_ETT.stride(-1) == 1 else factor_ETT.contiguous()
    offset_JEN = None if offset_JEN is None else offset_JEN.contiguous()
    code_CEN = torch.empty((n_sub // width, n_experts, n_rows), dtype=torch.int32, device=device)
    negative_TEN = None
    if layout.signs is not None:
        negative_TEN = torch.empty((n_sub, n_experts, n_rows), dtype=torch.bool, device=device)
    error_TEN = torch.empty((n_sub, n_experts, n_rows), dtype=torch.float32, device=device)
    loss_EN = torch.empty((n_experts, n_rows), dtype=torch.float32, device=device)
    tried_EN = torch.empty((n_experts, n_rows), dtype=torch.int64, device=device)
    inputs = (target_TEN.contiguous(), scale_JEN.contiguous(), offset_JEN, factor_ETT)
    strides = (n_experts * n_rows, n_rows, factor_ETT.stride(0), factor_ETT.stride(1))
    if layout.levels is not None:
        levels = layout.levels
        _walk_levels[(triton.cdiv(n_rows, LEVEL_ROWS), n_experts)](
            *inputs,
            levels.level_G,
            levels.code_G,
            levels.boundary_G,
            code_CEN,
            error_TEN,
            loss_EN,
            tried_EN,
            *strides,
            n_tries,
            T=n_sub,
            G=len(levels.level_G),
            LOW=levels.low,
            HIGH=levels.high,
            CONSECUTIVE=levels.are_consecutive,
            STEP=LEVEL_STEP,
            ROWS=LEVEL_ROWS,
            num_warps=LEVEL_WARPS,
            enable_fp_fusion=True,
        )
        return code_CEN, None, error_TEN, loss_EN, tried_EN
    cost_ET = factor_ETT.diagonal(dim1=-2, dim2=-1) ** -2
    square_ECG = cost_ET.unflatten(1, (-1, width)) @ layout.codebook_GW.square().T
    _walk_codebook[(triton.cdiv(n_rows, CODEBOOK_ROWS), n_experts)](
        *inputs,
        cost_ET.contiguous(),
        layout.codebook_GW,
        square_ECG.contiguous(),
        code_CEN,
        negative_TEN,
        error_TEN,
        loss_EN,
        tried_EN,
        *strides,
        n_tries,
        T=n_sub,
        G=len(layout.codebook_GW),
        W=width,
        STEP=SIGN_WEIGHTS if layout.has_even_signs else width,
        EVEN_SIGNS=layout.has_even_signs,
        ROWS=CODEBOOK_ROWS,
        TILE=min(codebook_tile, len(layout.codebook_GW)),
        DEPTH=DOT_DEPTH,
        num_warps=CODEBOOK_WARPS,
        enable_fp_fusion=True,
    )
    return code_CEN, negative_TEN, error_TEN, loss_EN, tried_EN


@triton.jit
def _scale(scale_ptr, offset_ptr, at_R, inside_R):
    scale_R = tl.load(scale_ptr + at_R, mask=inside_R, other=0.0)
    offset_R = tl.zeros_like(scale_R)
    if offset_ptr is not None:
        offset_R = tl.load(offset_ptr + at_R, mask=inside_R, other=0.0)
    return scale_R, offset_R


@triton.jit
def _left(
    target_ptr,  # f32, of the step's first column
    offset_R,
    error_RT,  # zero from the step on
    factor_ptr,  # f32, U's first row at the step's first column
    factor_row_stride,
    own_R,
    inside_R,
    plane,
    STEP: tl.constexpr,
):
    """The columns of a step as those before it have moved them: STEP vectors."""
    w_W = tl.arange(0, STEP)
    left_RW = tl.load(target_ptr + own_R[:, None] + w_W[None, :] * plane, mask=inside_R[:, None], other=0.0)
    factor_TW = tl.load(factor_ptr + tl.arange(0, error_RT.shape[1])[:, None] * factor_row_stride + w_W[None, :])
    # three products of 11 bits keep nearly all of f32's 24
    left_RW = left_RW - offset_R[:, None] - tl.dot(error_RT, factor_TW, input_precision="tf32x3")
    columns = ()
    for w in tl.static_range(STEP):
        columns += (tl.sum(tl.where(w_W[None, :] == w, left_RW, 0.0), 1),)
    return columns


@triton.jit
def _nearest_level(
    left_R,
    scale_R,
    level_ptr,  # (G,) f32, ascending
    level_code_ptr,  # (G,) i32, their codes
    boundary_ptr,  # (G - 1,) f32, halfway between them
    G: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
):
    """Codes i32 and levels f32."""
    # a zero scale decodes to zero whatever the code
    quotient_R = tl.where(scale_R != 0, tl.div_rn(left_R, tl.where(scale_R != 0, scale_R, 1.0)), 0.0)
    if CONSECUTIVE:
        # not tl.maximum: what it makes of NaN depends on Triton's version
        clamped_R = tl.where(quotient_R > LOW, quotient_R, LOW)
        clamped_R = tl.where(clamped_R < HIGH, clamped_R, HIGH)
        # from 2^23 to 2^24 f32 holds only integers: adding 1.5 * 2^23 rounds, half to even
        level_R = (clamped_R + 12582912.0) - 12582912.0
        return (level_R - LOW).to(tl.int32), level_R
    # how many boundaries lie below, a bit at a time: G is a power of two
    place_R = tl.zeros_like(left_R).to(tl.int32)
    half: tl.constexpr = G // 2
    for i in tl.static_range(8):
        if half >> i > 0:
            boundary_R = tl.load(boundary_ptr + place_R + ((half >> i) - 1))
            place_R += tl.where(boundary_R < quotient_R, half >> i, 0)
    return tl.load(level_code_ptr + place_R), tl.load(level_ptr + place_R)


@triton.jit
def _walk_levels(
    target_ptr,  # (T, E, N) f32
    scale_ptr,  # (J, E, N) f32
    offset_ptr,  # (J, E, N) f32, or None
    factor_ptr,  # (E, T, T) f32, upper triangular; its last stride is 1
    level_ptr,  # (G,) f32, ascending
    level_code_ptr,  # (G,) i32, their codes
    boundary_ptr,  # (G - 1,) f32, halfway between them
    code_ptr,  # (T, E, N) i32, out
    error_ptr,  # (T, E, N) f32, out
    loss_ptr,  # (E, N) f32, out
    tried_ptr,  # (E, N) i64, out
    plane: tl.int64,  # E * N
    n_rows: tl.int64,
    factor_expert_stride: tl.int64,
    factor_row_stride: tl.int64,
    n_tries,
    T: tl.constexpr,
    G: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CONSECUTIVE: tl.constexpr,  # levels are integers without gaps, codes in their order
    STEP: tl.constexpr,  # columns in registers of their own
    ROWS: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    own_R = e * n_rows + row_R
    t_T = tl.arange(0, T)
    own_RT = own_R[:, None] + t_T[None, :] * plane
    factor_ptr += e * factor_expert_stride
    least_R = tl.full((ROWS,), float("inf"), tl.float32)
    for j in range(n_tries):
        scale_R, offset_R = _scale(scale_ptr, offset_ptr, j * plane + own_R, inside_R)
        loss_R = tl.zeros((ROWS,), tl.float32)
        error_RT = tl.zeros((ROWS, T), tl.float32)
        code_RT = tl.zeros((ROWS, T), tl.int32)
        for start in range(0, T, STEP):
            left = _left(
                target_ptr + start * plane, offset_R, error_RT, factor_ptr + start, factor_row_stride, own_R, inside_R,
                plane, STEP,
            )  # fmt: skip
            errors = ()
            for w in tl.static_range(STEP):
                t = start + w
                left_R = left[w]
                for before in tl.static_range(w):
                    left_R -= errors[before] * tl.load(factor_ptr + (start + before) * factor_row_stride + t)
                code_R, level_R = _nearest_level(
                    left_R, scale_R, level_ptr, level_code_ptr, boundary_ptr, G, LOW, HIGH, CONSECUTIVE
                )
                error_R = tl.div_rn(left_R - scale_R * level_R, tl.load(factor_ptr + t * factor_row_stride + t))
                loss_R += error_R * error_R
                errors += (error_R,)
                code_RT = tl.where(t_T[None, :] == t, code_R[:, None], code_RT)
                error_RT = tl.where(t_T[None, :] == t, error_R[:, None], error_RT)
        # the first is kept even if all are NaN: no output stays unwritten
        better_R = inside_R & ((loss_R < least_R) | (j == 0))
        least_R = tl.where(better_R, loss_R, least_R)
        tl.store(code_ptr + own_RT, code_RT, mask=better_R[:, None])
        tl.store(error_ptr + own_RT, error_RT, mask=better_R[:, None])
        tl.store(tried_ptr + own_R, tl.zeros((ROWS,), tl.int64) + j, mask=better_R)
    tl.store(loss_ptr + own_R, least_R, mask=inside_R)


@triton.jit
def _signs(
    targets,  # of STEP columns
    cost_ptr,  # (STEP,) f32
    STEP: tl.constexpr,
    EVEN_SIGNS: tl.constexpr,
):
    """Where a column's sign is minus; with even signs the column where that costs least gives way."""
    negatives, count_R = (), tl.zeros_like(targets[0]).to(tl.int32)
    for w in tl.static_range(STEP):
        negatives += (targets[w] < 0,)
        count_R += negatives[w].to(tl.int32)
    if not EVEN_SIGNS:
        return negatives
    least_R, cheapest_R = targets[0] * targets[0] * tl.load(cost_ptr), tl.zeros_like(count_R)
    for w in tl.static_range(1, STEP):
        price_R = targets[w] * targets[w] * tl.load(cost_ptr + w)
        cheapest_R = tl.where(price_R < least_R, w, cheapest_R)
        least_R = tl.minimum(price_R, least_R)
    even = ()
    for w in tl.static_range(STEP):
        even += (negatives[w] ^ ((cheapest_R == w) & (count_R % 2 == 1)),)
    return even


@triton.jit
def _nearest_code(
    targets,  # W columns, without their signs where those are apart
    scale_R,
    cost_ptr,  # (W,) f32
    codebook_ptr,  # (G, W) f32
    square_ptr,  # (G,) f32: sum of cost * codebook^2
    FIRST: tl.constexpr,  # of the columns
    G: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """argmin over g of sum_w cost * (target - scale * codebook[g])^2, i32 (ROWS,)."""
    # divided by the scale and without what no code changes: scale * square - 2 * sum_w cost * target * codebook.
    # Tensor cores take 11 bits of an f32: codebooks have no more, and of the other factor both halves are multiplied.
    depth_K = tl.arange(0, DEPTH)
    lane_RK = tl.zeros((ROWS, DEPTH), tl.float32)
    for w in tl.static_range(W):
        product_R = -2.0 * targets[FIRST + w] * tl.load(cost_ptr + w)
        upper_R = (product_R.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        lane_RK = tl.where(depth_K[None, :] == w, upper_R[:, None], lane_RK)
        lane_RK = tl.where(depth_K[None, :] == W + w, (product_R - upper_R)[:, None], lane_RK)
    least_RX = tl.full((ROWS, TILE), float("inf"), tl.float32)
    code_RX = tl.zeros((ROWS, TILE), tl.int32)
    for first in range(0, G, TILE):
        code_X = first + tl.arange(0, TILE)
        book_KX = tl.load(
            codebook_ptr + code_X[None, :] * W + depth_K[:, None] % W, mask=depth_K[:, None] < 2 * W, other=0.0
        )
        distance_RX = scale_R[:, None] * tl.load(square_ptr + code_X)[None, :]
        distance_RX = tl.dot(lane_RK, book_KX, distance_RX, input_precision="tf32")
        code_RX = tl.where(distance_RX < least_RX, code_X[None, :], code_RX)
        least_RX = tl.minimum(distance_RX, least_RX)
    # of equal distances the lowest code
    least_R = tl.min(least_RX, 1)
    return tl.min(tl.where(least_RX == least_R[:, None], code_RX, G - 1), 1)


@triton.jit
def _walk_codebook(
    target_ptr,  # (T, E, N) f32
    scale_ptr,  # (J, E, N) f32
    offset_ptr,  # (J, E, N) f32, or None
    factor_ptr,  # (E, T, T) f32, upper triangular; its last stride is 1
    cost_ptr,  # (E, T) f32: 1 / U's diagonal squared
    codebook_ptr,  # (G, W) f32
    square_ptr,  # (E, C, G) f32: sum over a code's weights of cost * codebook^2
    code_ptr,  # (C, E, N) i32, out
    negative_ptr,  # (T, E, N) bool, out, or None
    error_ptr,  # (T, E, N) f32, out
    loss_ptr,  # (E, N) f32, out
    tried_ptr,  # (E, N) i64, out
    plane: tl.int64,  # E * N
    n_rows: tl.int64,
    factor_expert_stride: tl.int64,
    factor_row_stride: tl.int64,
    n_tries,
    T: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    STEP: tl.constexpr,  # columns whose errors act together: a code's, or those whose signs depend on each other
    EVEN_SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    own_R = e * n_rows + row_R
    t_T, c_C = tl.arange(0, T), tl.arange(0, T // W)
    own_RT = own_R[:, None] + t_T[None, :] * plane
    own_RC = own_R[:, None] + c_C[None, :] * plane
    factor_ptr += e * factor_expert_stride
    cost_ptr += e * T
    square_ptr += e * (T // W) * G
    least_R = tl.full((ROWS,), float("inf"), tl.float32)
    for j in range(n_tries):
        scale_R, offset_R = _scale(scale_ptr, offset_ptr, j * plane + own_R, inside_R)
        loss_R = tl.zeros((ROWS,), tl.float32)
        error_RT = tl.zeros((ROWS, T), tl.float32)
        code_RC = tl.zeros((ROWS, T // W), tl.int32)
        signs_R = tl.zeros((ROWS,), tl.int32)  # a bit for each column
        for start in range(0, T, STEP):
            targets = _left(
                target_ptr + start * plane, offset_R, error_RT, factor_ptr + start, factor_row_stride, own_R, inside_R,
                plane, STEP,
            )  # fmt: skip
            upright = targets
            if negative_ptr is not None:
                negatives = _signs(targets, cost_ptr + start, STEP, EVEN_SIGNS)
                upright = ()
                for w in tl.static_range(STEP):
                    upright += (tl.where(negatives[w], -targets[w], targets[w]),)
                    signs_R |= negatives[w].to(tl.int32) << (start + w)
            codes, errors = (), ()
            for first in tl.static_range(0, STEP, W):
                c = (start + first) // W
                code_R = _nearest_code(
                    upright, scale_R, cost_ptr + start + first, codebook_ptr, square_ptr + c * G,
                    first, G, W, ROWS, TILE, DEPTH,
                )  # fmt: skip
                codes += (code_R,)
                code_RC = tl.where(c_C[None, :] == c, code_R[:, None], code_RC)
            for w in tl.static_range(STEP):
                t = start + w
                level_R = tl.load(codebook_ptr + codes[w // W] * W + w % W)
                if negative_ptr is not None:
                    level_R = tl.where(negatives[w], -level_R, level_R)
                miss_R = targets[w] - scale_R * level_R
                for before in tl.static_range(w):
                    miss_R -= errors[before] * tl.load(factor_ptr + (start + before) * factor_row_stride + t)
                error_R = tl.div_rn(miss_R, tl.load(factor_ptr + t * factor_row_stride + t))
                loss_R += error_R * error_R
                errors += (error_R,)
                error_RT = tl.where(t_T[None, :] == t, error_R[:, None], error_RT)
        # the first is kept even if all are NaN: no output stays unwritten
        better_R = inside_R & ((loss_R < least_R) | (j == 0))
        least_R = tl.where(better_R, loss_R, least_R)
        tl.store(code_ptr + own_RC, code_RC, mask=better_R[:, None])
        tl.store(error_ptr + own_RT, error_RT, mask=better_R[:, None])
        if negative_ptr is not None:
            negative_RT = ((signs_R[:, None] >> t_T[None, :]) & 1) != 0
            tl.store(negative_ptr + own_RT, negative_RT, mask=better_R[:, None])
        tl.store(tried_ptr + own_R, tl.zeros((ROWS,), tl.int64) + j, mask=better_R)
    tl.store(loss_ptr + own_R, least_R, mask=inside_R)
