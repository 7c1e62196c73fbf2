"""Quantisation with error feedback onto any GGUF type (block-LDLQ): every code makes up for the errors before it.

The columns are walked in groups as wide as a code. What a group's error does to the output, the columns after it can
partly undo; by how much is in the Hessian's root, a Cholesky factor (LDLQ, arXiv:2307.13304, with groups for columns as
in QuIP#, arXiv:2402.04396), and inside a block in the root's inverse, as in GPTQ (arXiv:2210.17323). Where the walk
reaches a sub-block it tries several scales, as the file would hold them, on the weights as they are by then, and goes
on with the one whose codes leave the least error.

Then sweeps: each sub-block is walked again, towards what makes up best for the errors of all others as they have
become, with the scale that it has and those next to it; what does not lower the output error is not taken. (Coordinate
descent; with single codes for sub-blocks: CDQuant, arXiv:2406.17542.) One sweep goes through a block before the walk
leaves it, while the columns after it can still make up for anything: it costs a fraction of one through all columns.

Rows can make up for each other too (`quantize_by_rows`): an error of one output is undone in part by others, as far as
the model minds them together.

Columns lead in memory, so that a step over one column of all rows is contiguous.

Shapes: E experts, M matrices of one that are given the same, N rows, K columns, B blocks of a row and, where they are
packed, its bytes, S weights of a block, P sub-blocks of it, T weights of a sub-block, C codes of a block.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe2gguf import backend, ggml, passes
from moe2gguf.codec import CODECS, Codec
from moe2gguf.factors import PANEL, inverse, root
from moe2gguf.ggml import QuantType
from moe2gguf.passes import Block
from moe2gguf.scales import HALF_MAX
from moe2gguf.walk import product

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
    """What errors cost: the second moments H of the inputs, damped, and R upper triangular with R Rᵀ = H.

    Matrices that are given the same inputs share them: places says which are whose.
    """

    hessian_EKK: torch.Tensor
    root_EKK: torch.Tensor
    places: tuple[int, ...]

    def of(self, matrices: Iterable[int]) -> "Curvature":
        return dataclasses.replace(self, places=tuple(self.places[i] for i in matrices))


def neighbours(places: list[int]) -> slice | list[int]:
    """A slice where they are: what it takes out of a tensor is no copy, which may be gigabytes."""
    stop = places[0] + len(places)
    return slice(places[0], stop) if places == [*range(places[0], stop)] else places


def curvature(hessian_EKK: torch.Tensor, damping: float, pool: ThreadPoolExecutor | None = None) -> Curvature:
    """In a pool, one Hessian a job."""
    damped_EKK, root_EKK = torch.empty(2, *hessian_EKK.shape, device=hessian_EKK.device)

    @torch.inference_mode()  # by thread
    def factor(own: slice) -> None:
        root(damped(hessian_EKK[own], damping, damped_EKK[own]), root_EKK[own])

    if pool is None or not hessian_EKK.is_cpu:
        factor(slice(None))
    else:
        with single_threaded():
            list(pool.map(factor, _at_a_time(len(hessian_EKK), 1)))
    return Curvature(damped_EKK, root_EKK, tuple(range(len(hessian_EKK))))


def damped(hessian_EKK: torch.Tensor, damping: float, into_EKK: torch.Tensor | None = None) -> torch.Tensor:
    """H + damping * mean(diag H) * I, f32 (E, K, K)."""
    damped_EKK = torch.empty(hessian_EKK.shape, device=hessian_EKK.device) if into_EKK is None else into_EKK
    diagonal_EK = damped_EKK.copy_(hessian_EKK).diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal_EK.mean(-1)
    # an expert that nothing was seen of has no Hessian: all columns count alike
    diagonal_EK += torch.where(mean_E > 0, damping * mean_E, 1.0)[:, None]
    return damped_EKK


@dataclass(frozen=True)
class _Costs:
    """Of a curvature, and in each block of a type: B blocks of so many columns."""

    hessian_EKK: torch.Tensor
    root_EKK: torch.Tensor
    own_EBSS: torch.Tensor  # H of the block
    root_EBSS: torch.Tensor  # R
    factor_EBSS: torch.Tensor  # U = R⁻¹
    ahead_EBSS: torch.Tensor  # where the columns after the block make up for errors, in the place of H: R Rᵀ
    own_EBPTT: torch.Tensor  # `passes.sub_factors` of H
    ahead_EBPTT: torch.Tensor  # and of what is in its place

    @staticmethod
    def of_type(codec: Codec, hessian_EKK: torch.Tensor, root_EKK: torch.Tensor) -> "_Costs":
        own_EBSS = passes.diagonal_blocks(hessian_EKK, codec.block_weights)
        root_EBSS = passes.diagonal_blocks(root_EKK, codec.block_weights)
        ahead_EBSS = root_EBSS @ root_EBSS.mT
        own_EBPTT, ahead_EBPTT = (
            passes.sub_factors(codec, x_EBSS.flatten(0, 1)).unflatten(0, x_EBSS.shape[:2])
            for x_EBSS in (own_EBSS, ahead_EBSS)
        )
        factor_EBSS = inverse(root_EBSS)
        return _Costs(hessian_EKK, root_EKK, own_EBSS, root_EBSS, factor_EBSS, ahead_EBSS, own_EBPTT, ahead_EBPTT)

    @staticmethod
    def joined(parts: list["_Costs"]) -> "_Costs":
        """A single one is not copied: it may be large."""
        if len(parts) == 1:
            return parts[0]
        return _Costs(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


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
    weight_EMNK: torch.Tensor,
    quant_type: QuantType,
    curvature: Curvature,
    row_feedback_EMNN: torch.Tensor,
    pool: ThreadPoolExecutor,
) -> torch.Tensor:
    """As `quantize`, and a block of rows makes up for the errors of the rows before it, by `row_feedback`: towards the
    least tr(G Δ H Δᵀ), what an error Δ costs the model where outputs' gradients and inputs are independent. (Feedback
    to both sides: YAQA, arXiv:2505.22988.) uint8 (E, M, N, B), on the weights' device."""
    codec = CODECS[quant_type]
    if not weight_EMNK.is_cpu:
        return _by_rows(codec, weight_EMNK, _on_device(codec, curvature), row_feedback_EMNN)
    n_experts, n_matrices, n_rows, _ = weight_EMNK.shape
    with single_threaded():
        costs = _in_pool(codec, curvature, pool)
        jobs = [
            pool.submit(_by_rows, codec, weight_EMNK[own], _Costs.joined(costs[own]), row_feedback_EMNN[own])
            for own in _at_a_time(n_experts, max(1, ROW_BLOCK_LANES // (n_matrices * _row_block(n_rows))))
        ]
        return torch.cat([job.result() for job in jobs])


def _by_rows(codec: Codec, weight_EMNK: torch.Tensor, costs: _Costs, row_feedback_EMNN: torch.Tensor) -> torch.Tensor:
    _, n_matrices, n_rows, _ = weight_EMNK.shape
    error_EMNK = torch.empty_like(weight_EMNK)
    parts = []
    for own in _at_a_time(n_rows, _row_block(n_rows)):
        own_EMRK, before = weight_EMNK[:, :, own], slice(own.start)
        made_up_EMRK = row_feedback_EMNN[:, :, before, own].mT @ error_EMNK[:, :, before]
        blocks_ERB = _quantize(codec, (own_EMRK + made_up_EMRK).flatten(1, 2), costs)
        error_EMNK[:, :, own] = own_EMRK - _decoded(blocks_ERB, codec.quant_type).view_as(own_EMRK)
        parts.append(blocks_ERB.unflatten(1, (n_matrices, -1)))
    return torch.cat(parts, 2)


def _at_a_time(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


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
    if not weight_ENK.is_cpu:
        return _quantize(codec, weight_ENK, _on_device(codec, curvature))
    n_matrices, n_rows, _ = weight_ENK.shape

    def job(matrices: slice, rows: slice) -> Future[torch.Tensor]:
        return pool.submit(_quantize, codec, weight_ENK[matrices, rows], _Costs.joined(costs[matrices]))

    with single_threaded():
        costs = _in_pool(codec, curvature, pool)
        jobs = [
            [job(matrices, rows) for rows in _at_a_time(n_rows, rows_per_job)]
            for matrices in _at_a_time(n_matrices, max(1, rows_per_job // n_rows))
        ]
        return torch.cat([torch.cat([job.result() for job in row], 1) for row in jobs])


def _in_pool(codec: Codec, curvature: Curvature, pool: ThreadPoolExecutor) -> list[_Costs]:
    """Of each matrix."""
    matrices = curvature.hessian_EKK, curvature.root_EKK
    jobs = {
        place: pool.submit(_Costs.of_type, codec, *(x_EKK[place : place + 1] for x_EKK in matrices))
        for place in sorted(set(curvature.places))
    }
    return [jobs[place].result() for place in curvature.places]


def _on_device(codec: Codec, curvature: Curvature) -> _Costs:
    places = list(curvature.places)
    return _Costs.of_type(codec, curvature.hessian_EKK[places], curvature.root_EKK[places])


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


def _quantize(codec: Codec, weight_ENK: torch.Tensor, costs: _Costs) -> torch.Tensor:
    weight_KEN = weight_ENK.float().permute(2, 0, 1).contiguous()
    n_early, n_late = _sweeps(codec)
    blocks, miss_KEN = _walk(codec, weight_KEN, costs, n_early)
    for _ in range(n_late):
        _sweep(codec, weight_KEN, costs, blocks, miss_KEN)
    shape = (*weight_ENK.shape[:2], -1)
    return torch.cat([backend.pack(codec, block.fields(codec)).view(shape) for block in blocks], -1)


def _walk(codec: Codec, weight_KEN: torch.Tensor, costs: _Costs, n_sweeps: int) -> tuple[list[Block], torch.Tensor]:
    """The blocks, each swept before the next is begun, and what they miss, f32 (K, E, N)."""
    blocks: list[Block] = []
    miss_KEN = torch.empty_like(weight_KEN)
    for panel in _at_a_time(len(weight_KEN), PANEL):
        # what errors before these columns do to them
        pull_PEN = product(costs.root_EKK[:, : panel.start, panel].mT, miss_KEN[: panel.start])
        for i, own in _blocks_of(codec, panel):
            root_ESS, factor_ESS = costs.root_EBSS[:, i], costs.factor_EBSS[:, i]
            before, pull_SEN = slice(panel.start, own.start), pull_PEN[_within(panel, own)]
            if before.start < before.stop:
                pull_SEN = pull_SEN + product(costs.root_EKK[:, before, own].mT, miss_KEN[before])
            left_SEN = weight_KEN[own] - product(factor_ESS.mT, pull_SEN)
            block, found_SEN, error_SEN = backend.first_pass(codec, left_SEN, factor_ESS)
            if n_sweeps:
                slope_SEN = -product(root_ESS, error_SEN)
            for _ in range(n_sweeps):
                ahead_ESS, ahead_EPTT = costs.ahead_EBSS[:, i], costs.ahead_EBPTT[:, i]
                block, found_SEN, slope_SEN = backend.sweep(codec, block, found_SEN, slope_SEN, ahead_ESS, ahead_EPTT)
            miss_KEN[own] = found_SEN - weight_KEN[own]
            blocks.append(block)
    return blocks, miss_KEN


def _sweep(codec: Codec, weight_KEN: torch.Tensor, costs: _Costs, blocks: list[Block], miss_KEN: torch.Tensor) -> None:
    """Each block anew, all others as they are; in place."""
    for panel in _at_a_time(len(weight_KEN), PANEL):
        slope_PEN = product(costs.hessian_EKK[:, panel], miss_KEN)
        for i, own in _blocks_of(codec, panel):
            own_ESS, own_EPTT, after = costs.own_EBSS[:, i], costs.own_EBPTT[:, i], slice(own.stop, panel.stop)
            old_SEN, slope_SEN = weight_KEN[own] + miss_KEN[own], slope_PEN[_within(panel, own)]
            block, found_SEN, slope_SEN = backend.sweep(codec, blocks[i], old_SEN, slope_SEN, own_ESS, own_EPTT)
            blocks[i], found_SEN = _refit(codec, block, found_SEN, slope_SEN, own_ESS)
            miss_KEN[own] = found_SEN - weight_KEN[own]
            if after.start < after.stop:
                slope_PEN[_within(panel, after)] += product(costs.hessian_EKK[:, after, own], found_SEN - old_SEN)


def _blocks_of(codec: Codec, panel: slice) -> Iterator[tuple[int, slice]]:
    """Their numbers and columns."""
    size = codec.block_weights
    for start in range(panel.start, panel.stop, size):
        yield start // size, slice(start, start + size)


def _within(panel: slice, own: slice) -> slice:
    return slice(own.start - panel.start, own.stop - panel.start)


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
