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
from moe2gguf.passes import Blocks
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
class _Panel:
    """What errors in neighbouring columns cost: those of a block, or of several small ones."""

    own_ESS: torch.Tensor  # H of the columns
    root_ESS: torch.Tensor  # R
    factor_ESS: torch.Tensor  # U = R⁻¹
    ahead_ESS: torch.Tensor  # where the columns after these make up for errors, in the place of H: R Rᵀ
    own_EPTT: torch.Tensor  # `passes.sub_factors` of H
    ahead_EPTT: torch.Tensor  # and of what is in its place

    @staticmethod
    def of(codec: Codec, hessian_ESS: torch.Tensor, root_ESS: torch.Tensor) -> "_Panel":
        own_ESS, root_ESS, ahead_ESS = hessian_ESS.contiguous(), root_ESS.contiguous(), root_ESS @ root_ESS.mT
        factors = (passes.sub_factors(codec, x_ESS) for x_ESS in (own_ESS, ahead_ESS))
        return _Panel(own_ESS, root_ESS, inverse(root_ESS), ahead_ESS, *factors)


@dataclass(frozen=True)
class _Costs:
    """Of a curvature, and in each panel of its columns."""

    hessian_EKK: torch.Tensor
    root_EKK: torch.Tensor
    panels: list[_Panel]

    @staticmethod
    def of_type(codec: Codec, hessian_EKK: torch.Tensor, root_EKK: torch.Tensor) -> "_Costs":
        owns = _at_a_time(hessian_EKK.shape[-1], PANEL)
        panels = [_Panel.of(codec, hessian_EKK[:, own, own], root_EKK[:, own, own]) for own in owns]
        return _Costs(hessian_EKK, root_EKK, panels)

    @staticmethod
    def joined(parts: list["_Costs"]) -> "_Costs":
        """A single one is not copied: it may be large."""
        if len(parts) == 1:
            return parts[0]
        panels = [
            _Panel(*map(torch.cat, zip(*(vars(panel).values() for panel in same), strict=True)))
            for same in zip(*(part.panels for part in parts), strict=True)
        ]
        hessian_EKK, root_EKK = (torch.cat([getattr(part, x) for part in parts]) for x in ("hessian_EKK", "root_EKK"))
        return _Costs(hessian_EKK, root_EKK, panels)


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
    panels, miss_KEN = _walk(codec, weight_KEN, costs, n_early)
    for _ in range(n_late):
        _sweep(codec, weight_KEN, costs, panels, miss_KEN)
    shape = (*weight_ENK.shape[:2], -1)
    packed = [backend.pack(codec, fields) for blocks in panels for fields in blocks.fields(codec)]
    return torch.cat([blocks_RB.view(shape) for blocks_RB in packed], -1)


def _walk(codec: Codec, weight_KEN: torch.Tensor, costs: _Costs, n_sweeps: int) -> tuple[list[Blocks], torch.Tensor]:
    """The blocks of each panel, swept before the next is begun, and what they miss, f32 (K, E, N)."""
    panels: list[Blocks] = []
    miss_KEN = torch.empty_like(weight_KEN)
    for own, panel in zip(_at_a_time(len(weight_KEN), PANEL), costs.panels, strict=True):
        # what errors in the columns before do to these
        pull_SEN = product(costs.root_EKK[:, : own.start, own].mT, miss_KEN[: own.start])
        left_SEN = weight_KEN[own] - product(panel.factor_ESS.mT, pull_SEN)
        blocks, found_SEN, error_SEN = backend.first_pass(codec, left_SEN, panel.factor_ESS)
        if n_sweeps:
            slope_SEN = -product(panel.root_ESS, error_SEN)
        for _ in range(n_sweeps):
            blocks, found_SEN, slope_SEN = backend.sweep(
                codec, blocks, found_SEN, slope_SEN, panel.ahead_ESS, panel.ahead_EPTT
            )
        miss_KEN[own] = found_SEN - weight_KEN[own]
        panels.append(blocks)
    return panels, miss_KEN


def _sweep(codec: Codec, weight_KEN: torch.Tensor, costs: _Costs, panels: list[Blocks], miss_KEN: torch.Tensor) -> None:
    """Each panel anew, all others as they are; in place."""
    for i, (own, panel) in enumerate(zip(_at_a_time(len(weight_KEN), PANEL), costs.panels, strict=True)):
        slope_SEN, found_SEN = product(costs.hessian_EKK[:, own], miss_KEN), weight_KEN[own] + miss_KEN[own]
        blocks, found_SEN, slope_SEN = backend.sweep(
            codec, panels[i], found_SEN, slope_SEN, panel.own_ESS, panel.own_EPTT
        )
        panels[i], found_SEN = _refit(codec, blocks, found_SEN, slope_SEN, panel.own_ESS)
        miss_KEN[own] = found_SEN - weight_KEN[own]


def _sweeps(codec: Codec) -> tuple[int, int]:
    """Through a panel as the walk leaves it, and through all of them after the walk; more gain little."""
    return (0, 0) if ggml.bits_per_weight(codec.quant_type) >= UNSWEPT_BITS else (1, 1)


def _refit(
    codec: Codec, blocks: Blocks, found_SEN: torch.Tensor, slope_SEN: torch.Tensor, hessian_ESS: torch.Tensor
) -> tuple[Blocks, torch.Tensor]:
    """d and dmin where the output error is least, all else as it is; -> also the weights, f32 (S, E, N)."""
    if codec.places.d is None:
        return blocks, found_SEN
    old_DEN = blocks.d_DEN.float()
    if blocks.dmin_DEN is None:
        part_DTEN = found_SEN.unflatten(0, (len(old_DEN), -1))
        new_DEN = old_DEN * (1 - _shares(part_DTEN, (slope_SEN * found_SEN).view_as(part_DTEN).sum(1), hessian_ESS))
        d_DEN = torch.where(_near(new_DEN, old_DEN).all(0), new_DEN, old_DEN).half()
        return dataclasses.replace(blocks, d_DEN=d_DEN), (_over(d_DEN, old_DEN)[:, None] * part_DTEN).flatten(0, 1)
    assert blocks.minimum_PEN is not None
    (old_d,), (old_min,) = old_DEN, blocks.dmin_DEN.float()
    low_SEN = blocks.minimum_PEN.float().repeat_interleave(codec.sub_weights, dim=0)
    unit_SEN = _over(found_SEN + old_min * low_SEN, old_d)
    bent_SEN, bent_low_SEN = product(hessian_ESS, unit_SEN), product(hessian_ESS, low_SEN)
    uu, ul, ll = (bent_SEN * unit_SEN).sum(0), (bent_SEN * low_SEN).sum(0), (bent_low_SEN * low_SEN).sum(0)
    us, ls = (slope_SEN * unit_SEN).sum(0), (slope_SEN * low_SEN).sum(0)
    determinant = uu * ll - ul * ul
    new_d, new_min = old_d + (ul * ls - ll * us) / determinant, old_min + (uu * ls - ul * us) / determinant
    fits = _near(new_d, old_d) & _near(new_min, old_min)
    d_EN, dmin_EN = torch.where(fits, new_d, old_d).half(), torch.where(fits, new_min, old_min).half()
    found_SEN = d_EN * unit_SEN - dmin_EN * low_SEN
    return dataclasses.replace(blocks, d_DEN=d_EN[None], dmin_DEN=dmin_EN[None]), found_SEN


def _shares(part_DTEN: torch.Tensor, slope_DEN: torch.Tensor, hessian_ESS: torch.Tensor) -> torch.Tensor:
    """By which parts of themselves the blocks' weights should be less, for slopes along them: f32 (D, E, N)."""
    n_blocks, size = part_DTEN.shape[:2]
    bent = [
        product(hessian_ESS[..., i * size : (i + 1) * size], part_TEN).unflatten(0, (n_blocks, -1))
        for i, part_TEN in enumerate(part_DTEN)
    ]
    cost_DDEN = torch.stack([(bent_DTEN * part_DTEN).sum(1) for bent_DTEN in bent])
    if n_blocks == 1:
        return slope_DEN / cost_DDEN[0]
    # a block of zeros costs nothing whatever its share
    cost_ENDD = cost_DDEN.permute(2, 3, 0, 1).contiguous()
    cost_ENDD.diagonal(dim1=-2, dim2=-1).masked_fill_(cost_ENDD.diagonal(dim1=-2, dim2=-1) == 0, 1)
    return torch.linalg.solve_ex(cost_ENDD, slope_DEN.permute(1, 2, 0))[0].permute(2, 0, 1)


def _over(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return torch.where(d != 0, x / d, 0.0)


def _near(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """False for the noise of a block that is all but zero, and for what f16 does not hold."""
    return ((new / old - 1).abs() < 0.5) & (new.abs() < HALF_MAX)
