"""Quantisation with error feedback onto any GGUF type (block-LDLQ): every code makes up for the errors before it.

The columns are walked in groups as wide as a code. What a group's error does to the output, the columns after it can
partly undo; by how much is in the Cholesky factor of the inverse Hessian (GPTQ, arXiv:2210.17323, with groups for
columns as in QuIP#'s LDLQ, arXiv:2402.04396). Where the walk reaches a sub-block it tries several scales, as the file
would hold them, on the weights as they are by then, and goes on with the one whose codes leave the least error.

Then sweeps: each sub-block is walked again, towards what makes up best for the errors of all others as they have
become, with the scale that it has and those next to it; what does not lower the output error is not taken. (Coordinate
descent; with single codes for sub-blocks: CDQuant, arXiv:2406.17542.) One sweep goes through a block before the walk
leaves it, while the columns after it can still make up for anything: it costs a fraction of one through all columns.

Rows can make up for each other too (`quantize_by_rows`): an error of one output is undone in part by others, as far as
the model minds them together.

Columns lead in memory, so that a step over one column of all rows is contiguous.

Shapes: E experts, N rows, K columns, B blocks of a row and, where they are packed, its bytes, S weights of a block,
P sub-blocks of it, T weights of a sub-block, C codes of a block.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe2gguf import backend, ggml, passes
from moe2gguf.codec import CODECS, Codec
from moe2gguf.factors import inverse_factor, root
from moe2gguf.ggml import QuantType
from moe2gguf.passes import Block
from moe2gguf.scales import HALF_MAX
from moe2gguf.walk import feed_back, product

# of the compiled passes
TILE_ROWS = 64
# a job's steps should be long against what it takes to call them, and its arrays short against the cache
ROWS_PER_JOB = 512
# from so many bits on sweeps gain less than what kernels lose by rounding activations to 8 bits
UNSWEPT_BITS = 6
# where rows make up for each other: of all rows about a 16th at a time, in whole tiles of the kernels' where that makes
# a dozen blocks, and so many rows in a job, whatever their experts
ROW_BLOCKS, MIN_ROW_BLOCKS = 16, 12
ROW_BLOCK_LANES = 128
# in parts of the mean of the diagonal of the gradient's second moments; 0.03 and 0.3 are no better
ROW_DAMPING = 0.1


@dataclass(frozen=True)
class Curvature:
    """What errors cost: the second moments H of the inputs, damped, and U upper triangular with UᵀU = H⁻¹."""

    hessian_EKK: torch.Tensor
    factor_EKK: torch.Tensor

    def of(self, experts: slice | list[int]) -> "Curvature":
        own = experts if isinstance(experts, slice) else neighbours(experts)
        return Curvature(self.hessian_EKK[own], self.factor_EKK[own])


def neighbours(places: list[int]) -> slice | list[int]:
    """A slice where they are: what it takes out of a tensor is no copy, which may be gigabytes."""
    stop = places[0] + len(places)
    return slice(places[0], stop) if places == [*range(places[0], stop)] else places


def curvature(hessian_EKK: torch.Tensor, damping: float) -> Curvature:
    damped_EKK = damped(hessian_EKK, damping)
    return Curvature(damped_EKK, inverse_factor(damped_EKK))


def damped(hessian_EKK: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diag H) * I, f32 (E, K, K)."""
    damped_EKK = hessian_EKK.to(torch.float32, copy=True)
    diagonal_EK = damped_EKK.diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal_EK.mean(-1)
    # an expert that nothing was seen of has no Hessian: all columns count alike
    diagonal_EK += torch.where(mean_E > 0, damping * mean_E, 1.0)[:, None]
    return damped_EKK


@dataclass(frozen=True)
class _BlockCosts:
    """Of a curvature, what errors in each block of a type cost: B blocks of so many columns."""

    root_EBSS: torch.Tensor  # U⁻¹ of the block
    ahead_EBSS: torch.Tensor  # where the columns after the block make up for errors, in the place of H: U⁻¹ U⁻ᵀ
    ahead_EBPTT: torch.Tensor  # `passes.sub_factors` of that
    factor_EBPTT: torch.Tensor  # and of H

    @staticmethod
    def of_type(codec: Codec, curvature: Curvature) -> "_BlockCosts":
        own_EBSS = passes.diagonal_blocks(curvature.factor_EKK, codec.block_weights)
        one_SS = torch.eye(codec.block_weights, device=own_EBSS.device)
        root_EBSS = torch.linalg.solve_triangular(own_EBSS, one_SS, upper=True)
        ahead_EBSS = root_EBSS @ root_EBSS.mT
        shape = (*own_EBSS.shape[:2], codec.n_subs, codec.sub_weights, codec.sub_weights)
        return _BlockCosts(
            root_EBSS,
            ahead_EBSS,
            passes.sub_factors(codec, ahead_EBSS.flatten(0, 1)).view(shape),
            passes.sub_factors(codec, curvature.hessian_EKK).view(shape),
        )

    def of(self, experts: slice) -> "_BlockCosts":
        return _BlockCosts(
            self.root_EBSS[experts], self.ahead_EBSS[experts], self.ahead_EBPTT[experts], self.factor_EBPTT[experts]
        )


def row_feedback(moments_ENN: torch.Tensor) -> torch.Tensor:
    """What a block of rows makes up for, of each row's error before it: f32 (E, N, N), for second moments G of the
    loss's gradient by the outputs, damped. With G = R Rᵀ it is R over its blocks on the diagonal."""
    root_ENN = root(damped(moments_ENN, ROW_DAMPING))
    n_rows = root_ENN.shape[-1]
    for start in range(0, n_rows, step := _row_block(n_rows)):
        own = slice(start, start + step)
        own_ERR = root_ENN[:, own, own]
        root_ENN[:, :start, own] = torch.linalg.solve_triangular(
            own_ERR, root_ENN[:, :start, own], upper=True, left=False
        )
    return root_ENN


def quantize_by_rows(
    weight_ENK: torch.Tensor,
    quant_type: QuantType,
    curvature: Curvature,
    row_feedback_ENN: torch.Tensor,
    pool: ThreadPoolExecutor,
) -> torch.Tensor:
    """As `quantize`, and a block of rows makes up for the errors of the rows before it, by `row_feedback`: towards the
    least tr(G Δ H Δᵀ), what an error Δ costs the model where outputs' gradients and inputs are independent. (Feedback
    to both sides: YAQA, arXiv:2505.22988.)"""
    codec, (_, n_rows, _) = CODECS[quant_type], weight_ENK.shape
    costs = _BlockCosts.of_type(codec, curvature)
    error_ENK = torch.empty_like(weight_ENK)
    parts = []
    for start in range(0, n_rows, step := _row_block(n_rows)):
        own = slice(start, start + step)
        made_up_ERK = row_feedback_ENN[:, :start, own].mT @ error_ENK[:, :start]
        blocks_ERB = _in_jobs(codec, weight_ENK[:, own] + made_up_ERK, curvature, costs, pool, ROW_BLOCK_LANES)
        error_ENK[:, own] = weight_ENK[:, own] - _decoded(blocks_ERB, quant_type)
        parts.append(blocks_ERB)
    return torch.cat(parts, 1)


def _row_block(n_rows: int) -> int:
    if n_rows < MIN_ROW_BLOCKS * TILE_ROWS:
        return -(-n_rows // ROW_BLOCKS)
    return TILE_ROWS * max(1, n_rows // (ROW_BLOCKS * TILE_ROWS))


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
    costs = _BlockCosts.of_type(codec, curvature)
    return _in_jobs(codec, weight_ENK, curvature, costs, pool, rows_per_job)


def _in_jobs(
    codec: Codec,
    weight_ENK: torch.Tensor,
    curvature: Curvature,
    costs: _BlockCosts,
    pool: ThreadPoolExecutor,
    rows_per_job: int,
) -> torch.Tensor:
    if not weight_ENK.is_cpu:
        return _quantize(codec, weight_ENK, curvature, costs)
    n_experts, n_rows, _ = weight_ENK.shape
    n_step, e_step = min(n_rows, rows_per_job), max(1, rows_per_job // n_rows)

    def job(e: int, n: int) -> Future[torch.Tensor]:
        own = slice(e, e + e_step)
        return pool.submit(_quantize, codec, weight_ENK[own, n : n + n_step], curvature.of(own), costs.of(own))

    with single_threaded():
        jobs = [[job(e, n) for n in range(0, n_rows, n_step)] for e in range(0, n_experts, e_step)]
        return torch.cat([torch.cat([job.result() for job in row], 1) for row in jobs])


@contextmanager
def side_by_side(n_batches: int, pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """A thread for each batch, to wait for its jobs in the pool. When something fails, they find the pool closed."""
    with single_threaded(), ThreadPoolExecutor(max(1, n_batches)) as threads:
        try:
            yield threads
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch's own threads stay out of the way of a pool's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quantize(codec: Codec, weight_ENK: torch.Tensor, curvature: Curvature, costs: _BlockCosts) -> torch.Tensor:
    hessian_EKK, factor_EKK, (n_early, n_late) = curvature.hessian_EKK, curvature.factor_EKK, _sweeps(codec)
    weight_KEN = weight_ENK.float().permute(2, 0, 1).contiguous()
    found_KEN = weight_KEN.clone()
    size = codec.block_weights
    owns = [slice(start, start + size) for start in range(0, len(weight_KEN), size)]
    blocks = []
    for i, own in enumerate(owns):
        left_SEN, factor_ESS = found_KEN[own].clone(), factor_EKK[:, own, own]
        block, error_SEN = backend.first_pass(codec, left_SEN, factor_ESS)
        found_SEN = left_SEN - product(factor_ESS.mT, error_SEN)
        for _ in range(n_early):
            root_ESS, ahead_ESS, ahead_EPTT = costs.root_EBSS[:, i], costs.ahead_EBSS[:, i], costs.ahead_EBPTT[:, i]
            slope_SEN = -product(root_ESS, error_SEN)
            block, found_SEN, _ = backend.sweep(codec, block, found_SEN, slope_SEN, ahead_ESS, ahead_EPTT)
            error_SEN = product(root_ESS.mT, left_SEN - found_SEN)
        found_KEN[own] = found_SEN
        feed_back(found_KEN[own.stop :], error_SEN, factor_EKK[:, own, own.stop :])
        blocks.append(block)
    miss_KEN = found_KEN.sub_(weight_KEN)
    for _ in range(n_late):
        for i, own in enumerate(owns):
            slope_SEN, found_SEN = product(hessian_EKK[:, own], miss_KEN), weight_KEN[own] + miss_KEN[own]
            own_ESS, own_EPTT = hessian_EKK[:, own, own], costs.factor_EBPTT[:, i]
            block, found_SEN, slope_SEN = backend.sweep(codec, blocks[i], found_SEN, slope_SEN, own_ESS, own_EPTT)
            blocks[i], found_SEN = _refit(codec, block, found_SEN, slope_SEN, own_ESS)
            miss_KEN[own] = found_SEN - weight_KEN[own]
    shape = (*weight_ENK.shape[:2], -1)
    return torch.cat([backend.pack(codec, block.fields(codec)).view(shape) for block in blocks], -1)


def _sweeps(codec: Codec) -> tuple[int, int]:
    """Through a block as the walk leaves it, where it has sub-blocks to make up for each other, and through all blocks
    after the walk; more gain little."""
    if ggml.bits_per_weight(codec.quant_type) >= UNSWEPT_BITS:
        return 0, 0
    return (1, 1) if codec.n_subs > 1 else (0, 2)


def _refit(
    codec: Codec, block: Block, found_SEN: torch.Tensor, slope_SEN: torch.Tensor, hessian_ESS: torch.Tensor
) -> tuple[Block, torch.Tensor]:
    """d and dmin where the output error is least, all else as it is; -> also the weights, f32 (S, E, N)."""
    if codec.places.d is None:
        return block, found_SEN
    old_d = block.d_EN.float()
    if block.dmin_EN is None:
        new_d = old_d * (1 - (slope_SEN * found_SEN).sum(0) / (product(hessian_ESS, found_SEN) * found_SEN).sum(0))
        d_EN = torch.where(_near(new_d, old_d), new_d, old_d).half()
        return dataclasses.replace(block, d_EN=d_EN), _over(d_EN, old_d) * found_SEN
    assert block.minimum_PEN is not None
    old_min = block.dmin_EN.float()
    low_SEN = block.minimum_PEN.float().repeat_interleave(codec.sub_weights, dim=0)
    unit_SEN = _over(found_SEN + old_min * low_SEN, old_d)
    bent_SEN, bent_low_SEN = product(hessian_ESS, unit_SEN), product(hessian_ESS, low_SEN)
    uu, ul, ll = (bent_SEN * unit_SEN).sum(0), (bent_SEN * low_SEN).sum(0), (bent_low_SEN * low_SEN).sum(0)
    us, ls = (slope_SEN * unit_SEN).sum(0), (slope_SEN * low_SEN).sum(0)
    determinant = uu * ll - ul * ul
    new_d, new_min = old_d + (ul * ls - ll * us) / determinant, old_min + (uu * ls - ul * us) / determinant
    fits = _near(new_d, old_d) & _near(new_min, old_min)
    d_EN, dmin_EN = torch.where(fits, new_d, old_d).half(), torch.where(fits, new_min, old_min).half()
    return dataclasses.replace(block, d_EN=d_EN, dmin_EN=dmin_EN), d_EN * unit_SEN - dmin_EN * low_SEN


def _over(x: torch.Tensor, d_EN: torch.Tensor) -> torch.Tensor:
    return torch.where(d_EN != 0, x / d_EN, 0.0)


def _near(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """False for the noise of a block that is all but zero, and for what f16 does not hold."""
    return ((new / old - 1).abs() < 0.5) & (new.abs() < HALF_MAX)
