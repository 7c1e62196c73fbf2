"""Quantisation with error feedback onto any GGUF type (block-LDLQ): every code makes up for the errors before it.

The columns are walked in groups as wide as a code. What a group's error does to the output, the columns after it can
partly undo; by how much is in the Cholesky factor of the inverse Hessian (GPTQ, arXiv:2210.17323, with groups for
columns as in QuIP#'s LDLQ, arXiv:2402.04396). Where the walk reaches a sub-block it tries several scales, as the file
would hold them, on the weights as they are by then, and goes on with the one whose codes leave the least error.

Then sweeps: each sub-block is walked again, towards what makes up best for the errors of all others as they have
become, with the scale that it has and those next to it; what does not lower the output error is not taken. (Coordinate
descent; with single codes for sub-blocks: CDQuant, arXiv:2406.17542.)

Rows can make up for each other too (`quantize_by_rows`): an error of one output is undone in part by others, as far as
the model minds them together.

Columns lead in memory, so that a step over one column of all rows is contiguous.

Shapes: E experts, N rows, K columns, S weights of a block of the file, P sub-blocks of it, T weights of a sub-block,
C codes of a block, B bytes.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe2gguf import backend, ggml
from moe2gguf.codec import CODECS, Codec, Fields
from moe2gguf.ggml import QuantType
from moe2gguf.scales import HALF_MAX, block_scales, first_tries, near_tries
from moe2gguf.walk import chosen, feed_back

# a job's steps should be long against what it takes to call them, and its arrays short against the cache
ROWS_PER_JOB = 2048
# the first takes most of what there is to gain
SWEEPS = 2
# columns that are factored, and substituted, at a time
PANEL = 256
# where rows make up for each other: of all rows so many at a time, and so many in a job, whatever their experts
ROW_BLOCKS = 16
ROW_BLOCK_LANES = 256
# in parts of the mean of the diagonal of the gradient's second moments; 0.03 and 0.3 are no better
ROW_DAMPING = 0.1


@dataclass(frozen=True)
class Curvature:
    """What errors cost: the second moments H of the inputs, damped, and U upper triangular with UᵀU = H⁻¹."""

    hessian_EKK: torch.Tensor
    factor_EKK: torch.Tensor

    def of(self, experts: slice | list[int]) -> "Curvature":
        return Curvature(self.hessian_EKK[experts], self.factor_EKK[experts])


def curvature(hessian_EKK: torch.Tensor, damping: float) -> Curvature:
    """Of H + damping * mean(diag H) * I; f32 (E, K, K), factored in f64."""
    damped_EKK = hessian_EKK.to(torch.float64, copy=True)
    diagonal_EK = damped_EKK.diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal_EK.mean(-1)
    # an expert that nothing was seen of has no Hessian: all columns count alike
    diagonal_EK += torch.where(mean_E > 0, damping * mean_E, 1.0)[:, None]
    return Curvature(damped_EKK.float(), _into_inverse_factor(damped_EKK))


def inverse_factor(hessian_EKK: torch.Tensor) -> torch.Tensor:
    """U upper triangular with UᵀU = H⁻¹, f32 (E, K, K); a factor of H is found in its own precision."""
    return _into_inverse_factor(hessian_EKK.clone())


def _into_inverse_factor(hessian_EKK: torch.Tensor) -> torch.Tensor:
    # H = R Rᵀ with R upper triangular, and U = R⁻¹
    _into_root(hessian_EKK)
    factor_EKK = hessian_EKK.triu_().float()
    _into_inverse(factor_EKK)
    return factor_EKK


def _into_root(hessian_EKK: torch.Tensor) -> None:
    """By panels from the last, in products, which take a fraction of LAPACK's time; below the diagonal H stays."""
    n_columns = hessian_EKK.shape[-1]
    for stop in range(n_columns, 0, -PANEL):
        start = max(0, stop - PANEL)
        left_EKP = hessian_EKK[:, :stop, start:stop]
        if stop < n_columns:
            left_EKP -= hessian_EKK[:, :stop, stop:] @ hessian_EKK[:, start:stop, stop:].mT
        corner_EPP = torch.linalg.cholesky(left_EKP[:, start:].flip(1, 2)).flip(1, 2)
        left_EKP[:, start:] = corner_EPP
        if start:
            above_EKP = left_EKP[:, :start]
            above_EKP.copy_(torch.linalg.solve_triangular(corner_EPP.mT, above_EKP, upper=False, left=False))


def _into_inverse(upper_EKK: torch.Tensor) -> None:
    """By halves, whose products take less time than substitution."""
    n_columns = upper_EKK.shape[-1]
    if n_columns <= PANEL:
        one_KK = torch.eye(n_columns, device=upper_EKK.device)
        upper_EKK.copy_(torch.linalg.solve_triangular(upper_EKK, one_KK, upper=True))
        return
    first, second = slice(n_columns // 2), slice(n_columns // 2, n_columns)
    for own in (first, second):
        _into_inverse(upper_EKK[:, own, own])
    beside_EKK = upper_EKK[:, first, first] @ upper_EKK[:, first, second]
    upper_EKK[:, first, second] = -(beside_EKK @ upper_EKK[:, second, second])


def row_factor(moments_ENN: torch.Tensor) -> torch.Tensor:
    """U upper triangular with UᵀU = G⁻¹, f32 (E, N, N), for second moments G of the loss's gradient by the outputs,
    damped."""
    return curvature(moments_ENN, ROW_DAMPING).factor_EKK


def quantize_by_rows(
    weight_ENK: torch.Tensor,
    quant_type: QuantType,
    curvature: Curvature,
    factor_ENN: torch.Tensor,
    pool: ThreadPoolExecutor,
) -> torch.Tensor:
    """As `quantize`, and the errors of a block of rows go to the rows after it, by `row_factor`: towards the least
    tr(G Δ H Δᵀ), what an error Δ costs the model where outputs' gradients and inputs are independent. (Feedback to
    both sides: YAQA, arXiv:2505.22988.)"""
    left_ENK, n_rows = weight_ENK.clone(), weight_ENK.shape[1]
    parts = []
    for start in range(0, n_rows, step := -(-n_rows // ROW_BLOCKS)):
        own, after = slice(start, start + step), slice(start + step, n_rows)
        blocks_ERB = quantize(left_ENK[:, own], quant_type, curvature, pool, rows_per_job=ROW_BLOCK_LANES)
        error_ERK = left_ENK[:, own] - _decoded(blocks_ERB, quant_type)
        whitened_ERK = torch.linalg.solve_triangular(factor_ENN[:, own, own].mT, error_ERK, upper=False)
        left_ENK[:, after] -= factor_ENN[:, own, after].mT @ whitened_ERK
        parts.append(blocks_ERB)
    return torch.cat(parts, 1)


def _decoded(blocks_ENB: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """f32 (E, N, K)"""
    codec, shape = CODECS[quant_type], blocks_ENB.shape[:2]
    n_columns = blocks_ENB.shape[2] // codec.block_bytes * codec.block_weights
    if blocks_ENB.is_cpu:
        found = torch.from_numpy(ggml.decode(blocks_ENB.flatten(0, 1).numpy(), quant_type, n_columns))
    else:
        found = backend.decode(codec, blocks_ENB.reshape(-1, codec.block_bytes))
    return found.view(*shape, n_columns)


def quantize(
    weight_ENK: torch.Tensor,
    quant_type: QuantType,
    curvature: Curvature,
    pool: ThreadPoolExecutor,
    *,
    rows_per_job: int = ROWS_PER_JOB,
) -> torch.Tensor:
    """The experts' rows in QUANT_TYPE with error feedback: uint8 (E, N, B), on the weights' device."""
    codec = CODECS[quant_type]
    if not weight_ENK.is_cpu:
        return _quantize(codec, weight_ENK, curvature)
    n_experts, n_rows, _ = weight_ENK.shape
    n_step, e_step = min(n_rows, rows_per_job), max(1, rows_per_job // n_rows)
    with single_threaded():
        jobs = [
            [
                pool.submit(
                    _quantize, codec, weight_ENK[e : e + e_step, n : n + n_step], curvature.of(slice(e, e + e_step))
                )
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


@dataclass(frozen=True)
class Block:
    """One block of every row, columns leading; None where the type has no such field."""

    code_CEN: torch.Tensor  # i32
    negative_SEN: torch.Tensor | None  # bool
    d_EN: torch.Tensor  # f16; ones where the type has none
    sub_PEN: torch.Tensor | None  # i32
    dmin_EN: torch.Tensor | None  # f16
    minimum_PEN: torch.Tensor | None  # i32

    def clone(self) -> "Block":
        fields = {name: x.clone() for name, x in vars(self).items() if x is not None}
        return dataclasses.replace(self, **fields)

    def fields(self, codec: Codec) -> Fields:
        def rows(x_XEN: torch.Tensor | None) -> torch.Tensor | None:
            return None if x_XEN is None else x_XEN.flatten(1).T.contiguous()

        codes_RC = rows(self.code_CEN)
        assert codes_RC is not None
        return Fields(
            codes_RC,
            rows(self.negative_SEN),
            None if codec.places.d is None else self.d_EN.flatten(),
            rows(self.sub_PEN),
            None if self.dmin_EN is None else self.dmin_EN.flatten(),
            rows(self.minimum_PEN),
        )


def _quantize(codec: Codec, weight_ENK: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    hessian_EKK, factor_EKK = curvature.hessian_EKK, curvature.factor_EKK
    weight_KEN = weight_ENK.float().permute(2, 0, 1).contiguous()
    found_KEN = weight_KEN.clone()
    size = codec.block_weights
    owns = [slice(start, start + size) for start in range(0, len(weight_KEN), size)]
    blocks = []
    for own in owns:
        block, error_SEN = _first_codes(codec, found_KEN[own], factor_EKK[:, own, own])
        # the columns after it make up for its error, and it stays what it is without it
        feed_back(found_KEN[own.start :], error_SEN, factor_EKK[:, own, own.start :])
        blocks.append(block)
    miss_KEN = found_KEN.sub_(weight_KEN)
    for _ in range(SWEEPS):
        for i, own in enumerate(owns):
            slope_SEN, found_SEN = _product(hessian_EKK[:, own], miss_KEN), weight_KEN[own] + miss_KEN[own]
            blocks[i], found_SEN = _sweep(codec, blocks[i], found_SEN, slope_SEN, hessian_EKK[:, own, own])
            miss_KEN[own] = found_SEN - weight_KEN[own]
    shape = (*weight_ENK.shape[:2], -1)
    return torch.cat([backend.pack(codec, block.fields(codec)).view(shape) for block in blocks], -1)


def _first_codes(codec: Codec, weight_SEN: torch.Tensor, factor_ESS: torch.Tensor) -> tuple[Block, torch.Tensor]:
    """-> also the error, (w - ŵ) U⁻¹, f32 (S, E, N)."""
    # what an error costs that the columns after it undo as far as they can
    cost_SE = factor_ESS.diagonal(dim1=-2, dim2=-1).T ** -2
    size = codec.sub_weights
    left_SEN, error_SEN = weight_SEN.clone(), torch.empty_like(weight_SEN)
    d_EN, dmin_EN = block_scales(codec, weight_SEN, cost_SE)
    codes: list[torch.Tensor] = []
    negatives: list[torch.Tensor] = []
    subs: list[torch.Tensor] = []
    minimums: list[torch.Tensor] = []
    for first in range(0, codec.block_weights, size):
        own = slice(first, first + size)
        tries = first_tries(codec, left_SEN[own], cost_SE[own], d_EN, dmin_EN)
        walked = backend.walk(codec, left_SEN[own], tries, factor_ESS[:, own, own])
        error_SEN[own] = walked.error_TEN
        feed_back(left_SEN[own.stop :], walked.error_TEN, factor_ESS[:, own, own.stop :])
        codes.append(walked.code_CEN)
        if walked.negative_TEN is not None:
            negatives.append(walked.negative_TEN)
        if tries.sub_JEN is not None:
            subs.append(chosen(tries.sub_JEN, walked.tried_EN))
        if tries.minimum_JEN is not None:
            minimums.append(chosen(tries.minimum_JEN, walked.tried_EN))
        if codec.places.sub is None:
            d_EN = chosen(tries.scale_JEN, walked.tried_EN).half()
    block = Block(
        torch.cat(codes),
        torch.cat(negatives) if negatives else None,
        d_EN,
        torch.stack(subs) if subs else None,
        dmin_EN,
        torch.stack(minimums) if minimums else None,
    )
    return block, error_SEN


def _sweep(
    codec: Codec, block: Block, found_SEN: torch.Tensor, slope_SEN: torch.Tensor, hessian_ESS: torch.Tensor
) -> tuple[Block, torch.Tensor]:
    """The sub-blocks anew where that lowers the output error, all else as it is; -> also the weights, f32 (S, E, N).

    slope_SEN: half the output error's gradient at found_SEN, H (ŵ - w).
    """
    size, n_codes = codec.sub_weights, codec.sub_weights // codec.width
    found_SEN, slope_SEN = found_SEN.clone(), slope_SEN.clone()
    block = block.clone()
    for p in range(codec.n_subs):
        own, own_codes = slice(p * size, (p + 1) * size), slice(p * n_codes, (p + 1) * n_codes)
        factor_ETT = inverse_factor(hessian_ESS[:, own, own])
        target_TEN, gain_EN = _lowest(found_SEN[own], slope_SEN[own], factor_ETT)
        sub_EN, minimum_EN = (None if x is None else x[p] for x in (block.sub_PEN, block.minimum_PEN))
        tries = near_tries(codec, block.d_EN, sub_EN, block.dmin_EN, minimum_EN)
        walked = backend.walk(codec, target_TEN, tries, factor_ETT)
        better_EN = walked.loss_EN < gain_EN

        def put(into: torch.Tensor | None, new: torch.Tensor | None, better_EN: torch.Tensor = better_EN) -> None:
            if into is not None and new is not None:
                into.copy_(torch.where(better_EN, new, into))

        put(block.code_CEN[own_codes], walked.code_CEN)
        put(None if block.negative_SEN is None else block.negative_SEN[own], walked.negative_TEN)
        put(sub_EN, None if tries.sub_JEN is None else chosen(tries.sub_JEN, walked.tried_EN))
        put(minimum_EN, None if tries.minimum_JEN is None else chosen(tries.minimum_JEN, walked.tried_EN))
        if sub_EN is None:
            put(block.d_EN, chosen(tries.scale_JEN, walked.tried_EN).half())
        new_TEN = target_TEN - _product(factor_ETT.mT, walked.error_TEN)
        moved_TEN = torch.where(better_EN, new_TEN - found_SEN[own], 0.0)
        found_SEN[own] += moved_TEN
        feed_back(slope_SEN, moved_TEN, -hessian_ESS[:, own])
    return _refit(codec, block, found_SEN, slope_SEN, hessian_ESS)


def _lowest(
    found_TEN: torch.Tensor, slope_TEN: torch.Tensor, factor_ETT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the output error would be least, all else as it is, and by how much it would fall, f32 (E, N)."""
    step_TEN = _product(factor_ETT, slope_TEN)
    return found_TEN - _product(factor_ETT.mT, step_TEN), step_TEN.square().sum(0)


def _refit(
    codec: Codec, block: Block, found_SEN: torch.Tensor, slope_SEN: torch.Tensor, hessian_ESS: torch.Tensor
) -> tuple[Block, torch.Tensor]:
    """d and dmin where the output error is least, all else as it is; -> also the weights, f32 (S, E, N)."""
    if codec.places.d is None:
        return block, found_SEN
    old_d = block.d_EN.float()
    if block.dmin_EN is None:
        unit_SEN = _over(found_SEN, old_d)
        bent_SEN = _product(hessian_ESS, unit_SEN)
        new_d = old_d - (slope_SEN * unit_SEN).sum(0) / (bent_SEN * unit_SEN).sum(0)
        d_EN = torch.where(_near(new_d, old_d), new_d, old_d).half()
        return dataclasses.replace(block, d_EN=d_EN), d_EN * unit_SEN
    assert block.minimum_PEN is not None
    old_min = block.dmin_EN.float()
    low_SEN = block.minimum_PEN.float().repeat_interleave(codec.sub_weights, dim=0)
    unit_SEN = _over(found_SEN + old_min * low_SEN, old_d)
    bent_SEN, bent_low_SEN = _product(hessian_ESS, unit_SEN), _product(hessian_ESS, low_SEN)
    uu, ul, ll = (bent_SEN * unit_SEN).sum(0), (bent_SEN * low_SEN).sum(0), (bent_low_SEN * low_SEN).sum(0)
    us, ls = (slope_SEN * unit_SEN).sum(0), (slope_SEN * low_SEN).sum(0)
    determinant = uu * ll - ul * ul
    new_d, new_min = old_d + (ul * ls - ll * us) / determinant, old_min + (uu * ls - ul * us) / determinant
    fits = _near(new_d, old_d) & _near(new_min, old_min)
    d_EN, dmin_EN = torch.where(fits, new_d, old_d).half(), torch.where(fits, new_min, old_min).half()
    return dataclasses.replace(block, d_EN=d_EN, dmin_EN=dmin_EN), d_EN * unit_SEN - dmin_EN * low_SEN


def _over(x_SEN: torch.Tensor, d_EN: torch.Tensor) -> torch.Tensor:
    return torch.where(d_EN != 0, x_SEN / d_EN, 0.0)


def _product(matrix_EST: torch.Tensor, x_TEN: torch.Tensor) -> torch.Tensor:
    """Expert by expert, f32 (S, E, N)."""
    return torch.bmm(matrix_EST, x_TEN.transpose(0, 1)).transpose(0, 1)


def _near(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """False for the noise of a block that is all but zero, and for what f16 does not hold."""
    return ((new / old - 1).abs() < 0.5) & (new.abs() < HALF_MAX)
