"""An allocation to bytes: the tensors of the file in order, each encoded when its turn comes.

What was quantised with error feedback, calibrated or tuned comes out of the spool; all else is ggml's encoder's, one
source tensor in memory at a time.

Shapes: E experts, N rows, K columns, B bytes of one encoded row.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from types import MappingProxyType

import numpy as np

from moe2gguf import ggml
from moe2gguf.allocate import Allocation, expert_order
from moe2gguf.costs import CostTable, Unit
from moe2gguf.ggml import QuantType
from moe2gguf.source import Source, SourceTensor, expert_axis, layer_of
from moe2gguf.spool import Spool
from moe2gguf.stats import CalibrationStats

ROWS_PER_JOB = 4096
# of a file of one type, for a matrix that fits no block of 32: every llama.cpp multiplies with it
FLOAT_FALLBACK = QuantType.F16


# which matrices of an expert lie in a tensor, one below the other
EXPERT_MATRICES = {"gate_up": ("gate", "up"), "gate": ("gate",), "up": ("up",), "down": ("down",)}


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file: which part of which source tensor, in what type."""

    name: str
    source: SourceTensor
    quant_type: QuantType
    experts: np.ndarray | None  # i64: the checkpoint's experts in file order; None for all as they stand
    importance_EK: np.ndarray | None = None  # f32, (1, K) beside the experts
    shares_source: bool = False  # the next plan reads the same source tensor

    @property
    def shape(self) -> tuple[int, ...]:
        if self.experts is None:
            return self.source.shape
        return (len(self.experts), *self.source.shape[1:])

    @property
    def expert_matrices(self) -> tuple[str, ...]:
        """Empty beside the routed experts' weights."""
        match = re.search(r"\.ffn_(gate_up|gate|up|down)_exps\.(?:g\d+\.)?weight$", self.name)
        return EXPERT_MATRICES[match[1]] if match and self.quant_type != QuantType.F32 else ()

    @property
    def expert_ids(self) -> range | np.ndarray:
        return range(self.source.shape[0]) if self.experts is None else self.experts

    @property
    def n_bytes(self) -> int:
        return prod(self.shape[:-1]) * ggml.row_bytes(self.quant_type, self.shape[-1])


@dataclasses.dataclass(frozen=True)
class FilePlan:
    tensors: tuple[TensorPlan, ...]
    expert_orders: dict[int, np.ndarray]  # layer -> position -> checkpoint's expert, where it is not the identity

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    def expert_types(self, layers: Collection[int]) -> dict[tuple[int, str, int], QuantType]:
        """By layer (of those given), matrix and the checkpoint's expert."""
        return {
            (layer, matrix, int(expert)): tensor.quant_type
            for tensor in self.tensors
            if (layer := layer_of(tensor.name)) in layers and layer is not None
            for matrix in tensor.expert_matrices
            for expert in tensor.expert_ids
        }

    @property
    def is_grouped(self) -> bool:
        return any(".g0." in tensor.name for tensor in self.tensors)


def plan_file(source: Source, table: CostTable, allocation: Allocation, stats: CalibrationStats) -> FilePlan:
    """Which tensors the file will hold: experts in runs of one type, everything else as it is."""
    units_of: dict[str, list[Unit]] = {}
    for unit in table.units:
        for name in unit.tensors:
            units_of.setdefault(name, []).append(unit)
    types: dict[tuple[int | None, str], list[QuantType]] = {}
    for unit in table.units:
        if unit.projection is not None:
            types.setdefault((unit.layer, unit.projection), []).append(allocation.types[unit.name])
    orders: dict[int | None, np.ndarray] = {}
    for index in sorted(stats.layers):
        # the stock layout has no gate_up, or one type of it
        gate_up, down = types.get((index, "gate_up"), []), types[index, "down"]
        if len({*gate_up}) > 1 or len({*down}) > 1:
            orders[index] = expert_order(gate_up, down)
    plans: list[TensorPlan] = []
    for tensor in source.tensors:
        layer = layer_of(tensor.name)
        units = units_of.get(tensor.name)
        order = orders.get(layer) if expert_axis(tensor.name) is not None else None
        if units is None:
            plans.append(TensorPlan(tensor.name, tensor, allocation.fixed[tensor.name], order))
        elif units[0].expert is None:
            importance = stats.importance[units[0].importance][None] if units[0].importance else None
            if importance is not None and tensor.columns_K is not None:
                importance = importance[:, tensor.columns_K]
            plans.append(TensorPlan(tensor.name, tensor, allocation.types[units[0].name], None, importance))
        else:
            plans += _expert_plans(tensor, [allocation.types[u.name] for u in units], order, units[0], stats)
    return FilePlan(tuple(plans), {layer: order for layer, order in orders.items() if layer is not None})


def _expert_plans(
    tensor: SourceTensor, types: list[QuantType], order: np.ndarray | None, unit: Unit, stats: CalibrationStats
) -> list[TensorPlan]:
    assert unit.layer is not None
    layer = stats.layers[unit.layer]
    importance_EK = layer.importance_down_EI if unit.projection == "down" else layer.importance_gate_up_ED
    if order is None:
        return [TensorPlan(tensor.name, tensor, types[0], None, importance_EK)]
    borders = [i for i in range(1, len(order)) if types[order[i]] != types[order[i - 1]]]
    runs = np.split(order, borders)
    if len(runs) == 1:
        return [TensorPlan(tensor.name, tensor, types[0], order, importance_EK[order])]
    stem = tensor.name.removesuffix(".weight")
    return [
        TensorPlan(
            f"{stem}.g{g}.weight", tensor, types[run[0]], run, importance_EK[run], shares_source=g < len(runs) - 1
        )
        for g, run in enumerate(runs)
    ]


def plan_uniform(source: Source, quant_type: QuantType, of_experts: QuantType | None = None) -> FilePlan:
    """Every quantisable tensor at one type, experts perhaps at another, or the nearest that fits its columns, in the
    checkpoint's order."""

    def fitting(tensor: SourceTensor) -> QuantType:
        if not tensor.quantisable:
            return QuantType.F32
        wanted = quant_type if of_experts is None or expert_axis(tensor.name) is None else of_experts
        return wanted if ggml.fits(wanted, tensor.shape[-1]) else FLOAT_FALLBACK

    return FilePlan(tuple(TensorPlan(t.name, t, fitting(t), None) for t in source.tensors), {})


def encode_tensors(
    plan: FilePlan,
    n_threads: int,
    progress: Callable[[str, int, int], None],
    spool: Spool | None = None,
    modules: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[TensorPlan, np.ndarray]]:
    """Yields every tensor of the plan with its blocks, uint8 (..., B), or f32 values for F32. `modules` are what the
    spool knows tensors beside the experts by."""
    with ggml.encoding_threads(n_threads) as pool:
        calibrated = None if spool is None else spool.routers()
        fitted = (
            {} if calibrated is None else {f"blk.{i}.ffn_gate_inp.weight": r for i, r in calibrated.router_ED.items()}
        )
        tuned = None if spool is None else spool.tuned()
        fitted |= {} if tuned is None else tuned.weights
        weight: np.ndarray | None = None
        for done, tensor in enumerate(plan.tensors):
            progress(tensor.name, done, len(plan.tensors))
            layer = layer_of(tensor.name)
            if spool is not None and layer is not None and tensor.expert_matrices and spool.has(layer):
                yield tensor, _spooled(tensor, spool, layer)
                continue
            weight = fitted.get(tensor.name, weight)
            if weight is None:
                weight = tensor.source.load()
            known = None if spool is None else modules.get(tensor.name)
            blocks_NB = None if spool is None or known is None else spool.matrix(known, weight)
            yield tensor, _encode(tensor, weight, pool) if blocks_NB is None else blocks_NB
            if not tensor.shares_source:
                weight = None


def _spooled(tensor: TensorPlan, spool: Spool, layer: int) -> np.ndarray:
    experts = [
        np.concatenate([spool.get(layer, matrix, int(expert)) for matrix in tensor.expert_matrices])
        for expert in tensor.expert_ids
    ]
    return np.stack(experts)


def _encode(tensor: TensorPlan, weight: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    if tensor.quant_type == QuantType.F32:
        return weight if tensor.experts is None else weight[tensor.experts]
    n_columns = weight.shape[-1]
    is_expert = (tensor.importance_EK is not None and len(tensor.importance_EK) > 1) or tensor.experts is not None
    matrices = weight.reshape(-1, *weight.shape[-2:]) if is_expert else weight.reshape(1, -1, n_columns)
    jobs = []
    for i, e in enumerate(tensor.expert_ids if is_expert else range(1)):
        importance_K = None if tensor.importance_EK is None else tensor.importance_EK[i]
        # a single matrix is cut into slices of rows, so that it too uses every core
        for rows in range(0, matrices.shape[1], ROWS_PER_JOB):
            jobs.append(
                pool.submit(ggml.encode, matrices[e, rows : rows + ROWS_PER_JOB], tensor.quant_type, importance_K)
            )
    blocks_RB = np.concatenate([job.result() for job in jobs])
    return blocks_RB.reshape(*tensor.shape[:-1], -1)
