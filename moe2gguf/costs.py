"""Statistics to a cost table: for every unit and type, the predicted rise of the model's KL divergence, and the bytes.

A unit is what gets one type: the gate and up matrices of one expert, its down matrix, or one matrix beside the experts.
The stock layout keeps gate and up apart: no order of experts ties them there.
Its cost is its measured output error times the layer's sensitivity, KL per error, which the probes gave; so costs are
nats per token wherever they sit in the model, and add up.

Shapes: U units, J types, E experts.
"""

import dataclasses
import hashlib
import re
from math import prod

import gguf
import numpy as np

from moe2gguf import ggml
from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.source import Source, SourceTensor, layer_of
from moe2gguf.stats import CalibrationStats, MatrixErrors

# what calibration measures, smallest first, by the columns of a block: where they are no multiple of 256, only the last
# four are left
CANDIDATES = tuple(
    QuantType[name]
    for name in (
        [
            "IQ1_M",
            "IQ2_XXS",
            "IQ2_XS",
            "IQ2_S",
            "Q2_K",
            "IQ3_XXS",
            "IQ3_S",
            "Q3_K",
            "IQ4_XS",
            "Q4_K",
            "Q5_K",
            "Q6_K",
            "IQ4_NL",
            "Q5_0",
            "Q5_1",
            "Q8_0",
        ]
    )
)
# of experts that the checkpoint stores so: ggml's encoder finds the same values again, so that nothing is lost
NATIVE = QuantType.MXFP4
# fewest bits per weight by role. The probes predict well near the types they were measured with; below these floors
# they would have to extrapolate, on matrices whose share of the file is small
ROLE_FLOORS_BPW = {"embedding": 2.5, "output": 3.0, "attention": 2.5, "shared": 2.0, "dense": 2.0, "expert": 1.7}
# what no probe reached, such as the halves of a split MLA projection, is kept nearly exact
UNMEASURED_TYPES = (QuantType.Q8_0, QuantType.BF16)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What gets one type."""

    name: str  # "blk.3.expert.7.gate_up", "blk.0.attn_q.weight"
    tensors: tuple[str, ...]  # GGUF names, whole tensors; an expert's slice of them when expert is set
    role: str  # a key of ROLE_FLOORS_BPW
    n_rows: int  # over all its tensors
    n_columns: int
    layer: int | None = None
    projection: str | None = None  # "gate_up" | "down" for experts; "gate" | "up" in the stock layout
    expert: int | None = None
    importance: str | None = None  # name in CalibrationStats.importance, beside the experts


@dataclasses.dataclass(frozen=True)
class CostTable:
    layout: str  # "grouped" | "stock": what the units are good for
    types: tuple[QuantType, ...]
    units: tuple[Unit, ...]
    cost_UJ: np.ndarray  # f64, nats per token; inf where the type is not allowed
    bytes_UJ: np.ndarray  # i64
    fixed: dict[str, QuantType]  # tensors that are not up for choice, by GGUF name
    fixed_bytes: int
    n_params: int
    small_block_units: tuple[str, ...]  # units whose columns only fit blocks of 32
    seconds_UJ: np.ndarray | None = None  # f64, of each decoded token; None where speed was not measured


def reorderable(source: Source) -> bool:
    """Whether experts may change places. Routers that first choose among groups of neighbours, or look expert ids up in
    a table, depend on the order."""
    return source.n_expert_groups <= 1 and not any("tid2eid" in tensor.name for tensor in source.tensors)


def cost_table(
    source: Source,
    stats: CalibrationStats | None,
    *,
    layout: str = "grouped",
    types: tuple[QuantType, ...] | None = None,
    overrides: tuple[tuple[str, QuantType], ...] = (),
) -> CostTable:
    """types narrows the candidates; overrides (regular expression, type) pin every tensor whose name they match.
    Where experts may not change places the layout is stock, whatever was asked for.

    Without statistics the bytes are exact and the costs a rule of thumb: good for what is reachable, not for a file.
    Raises Moe2ggufError if the statistics belong to another model, or a pinned type does not fit.
    """
    if stats is not None and stats.source_sha256 != source_digest(source):
        raise Moe2ggufError(f"the statistics were made on another model than {source.path}; calibrate again")
    measured = CANDIDATES if stats is None else stats.types
    layout = layout if reorderable(source) else "stock"
    module_of = None if stats is None else module_names(source, stats)
    is_tied = not any(tensor.name == "output.weight" for tensor in source.tensors)
    units: list[Unit] = []
    fixed: dict[str, QuantType] = {}
    experts: dict[tuple[int, str], list[SourceTensor]] = {}
    for tensor in source.tensors:
        projection = _expert_projection(tensor.name, layout)
        if not tensor.quantisable:
            fixed[tensor.name] = QuantType.F32
        elif not any(ggml.fits(t, tensor.shape[-1]) for t in measured):
            if projection is not None:
                raise Moe2ggufError(
                    f"{tensor.name} has {tensor.shape[-1]} columns; quantised types need a multiple of 32, so the "
                    "experts of this model cannot be quantised"
                )
            fixed[tensor.name] = UNMEASURED_TYPES[-1]
        elif projection is not None and (layer := layer_of(tensor.name)) is not None:
            experts.setdefault((layer, projection), []).append(tensor)
        elif module_of is None or tensor.name in module_of:
            units.append(_matrix_unit(tensor, module_of, stats, is_tied))
        else:
            fixed[tensor.name] = next(t for t in UNMEASURED_TYPES if ggml.fits(t, tensor.shape[-1]))
    for (layer, projection), tensors in sorted(experts.items()):
        units += [_expert_unit(layer, projection, e, tensors) for e in range(source.n_expert)]

    if stats is None:
        cost_UJ = np.array([_assumed_costs_J(unit, measured) for unit in units])
    else:
        cost_UJ = np.array([_unit_costs_J(unit, module_of, stats) for unit in units])
    stored_so = {tensor.name for tensor in source.tensors if tensor.native_type == NATIVE}
    if stored_so:
        measured = (*measured, NATIVE)
        is_native_U = np.array([stored_so.issuperset(unit.tensors) for unit in units])
        cost_UJ = np.column_stack([cost_UJ, np.where(is_native_U, 0.0, np.inf)])
    bytes_UJ = np.array(
        [
            [u.n_rows * ggml.row_bytes(t, u.n_columns) if ggml.fits(t, u.n_columns) else 0 for t in measured]
            for u in units
        ]
    )
    _restrict(cost_UJ, units, measured, types, overrides)
    shapes = {tensor.name: tensor.shape for tensor in source.tensors}
    return CostTable(
        layout=layout,
        types=measured,
        units=tuple(units),
        cost_UJ=cost_UJ,
        bytes_UJ=bytes_UJ,
        fixed=fixed,
        fixed_bytes=sum(prod(shapes[n][:-1]) * ggml.row_bytes(t, shapes[n][-1]) for n, t in fixed.items()),
        n_params=source.n_params,
        small_block_units=tuple(u.name for u in units if not ggml.fits(QuantType.Q6_K, u.n_columns)),
    )


def _assumed_costs_J(unit: Unit, types: tuple[QuantType, ...]) -> np.ndarray:
    """Rate-distortion's rule, a quarter of the squared error for each further bit, alike for all weights."""
    bpw_J = np.array([ggml.bits_per_weight(t) if ggml.fits(t, unit.n_columns) else -np.inf for t in types])
    return unit.n_rows * unit.n_columns * 4.0**-bpw_J


def _unit_costs_J(unit: Unit, module_of: dict[str, str] | None, stats: CalibrationStats) -> np.ndarray:
    assert module_of is not None
    if unit.expert is None:
        module = module_of[unit.name]
        cost_J = _costs_EJ(stats.errors[module], stats.types)[0]
        if module == "embed_tokens" and "lm_head" not in module_of.values():
            # tied: the same bytes are looked up and multiplied with
            cost_J = cost_J + _costs_EJ(stats.errors["lm_head"], stats.types)[0]
        return cost_J
    name = f"layers.{unit.layer}.{'down' if unit.projection == 'down' else 'gate_up'}"
    if name not in stats.errors:
        raise Moe2ggufError(f"the statistics have no experts in layer {unit.layer}; calibrate again")
    errors = stats.errors[name]
    cost_J = _costs_EJ(errors, stats.types)[unit.expert]
    if unit.projection in ("gate", "up"):
        assert errors.gate_share_EJ is not None
        share_J = errors.gate_share_EJ[unit.expert]
        cost_J = cost_J * (share_J if unit.projection == "gate" else 1 - share_J)
    return cost_J


def source_digest(source: Source) -> str:
    """sha256 over the configuration and the tensor names and shapes: enough to refuse another model's statistics."""
    digest = hashlib.sha256((source.path / "config.json").read_bytes())
    for tensor in source.tensors:
        digest.update(f"{tensor.name}{tensor.shape}".encode())
    return digest.hexdigest()


def _expert_projection(name: str, layout: str) -> str | None:
    match = re.search(r"\.ffn_(gate|up|gate_up|down)_exps\.weight$", name)
    if match is None:
        return None
    return match[1] if layout == "stock" or match[1] == "down" else "gate_up"


def _role(name: str) -> str:
    if name.startswith("token_embd"):
        return "embedding"
    if name.startswith("output"):
        return "output"
    return "shared" if "shexp" in name else "dense" if ".ffn_" in name else "attention"


def gguf_name(tensor_map: gguf.TensorNameMap, module: str) -> str | None:
    """gguf lists the names of published checkpoints; the layers of some are below `backbone`."""
    return tensor_map.get_name(f"model.{module}") or tensor_map.get_name(f"backbone.{module}")


def module_names(source: Source, stats: CalibrationStats) -> dict[str, str]:
    """GGUF tensor name -> transformers module path, for every probed matrix beside the experts."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == source.arch)
    tensor_map = gguf.get_tensor_name_map(arch, source.n_layer)
    names = {"token_embd.weight": "embed_tokens", "output.weight": "lm_head"}
    present = {tensor.name for tensor in source.tensors}
    for module in stats.errors:
        if module.startswith("layers.") and (base := gguf_name(tensor_map, module)) is not None:
            names[f"{base}.weight"] = module
    return {name: module for name, module in names.items() if name in present and module in stats.errors}


def _matrix_unit(
    tensor: SourceTensor, module_of: dict[str, str] | None, stats: CalibrationStats | None, is_tied: bool
) -> Unit:
    module, role = None if module_of is None else module_of[tensor.name], _role(tensor.name)
    if role == "embedding" and is_tied:  # looked up without error it would be; as the head it is multiplied with
        module, role = None if module is None else "lm_head", "output"
    return Unit(
        name=tensor.name,
        tensors=(tensor.name,),
        role=role,
        n_rows=prod(tensor.shape[:-1]),
        n_columns=tensor.shape[-1],
        layer=layer_of(tensor.name),
        importance=module if stats is not None and module in stats.importance else None,
    )


def _expert_unit(layer: int, projection: str, expert: int, tensors: list[SourceTensor]) -> Unit:
    return Unit(
        name=f"blk.{layer}.expert.{expert}.{projection}",
        tensors=tuple(tensor.name for tensor in tensors),
        role="expert",
        n_rows=sum(prod(tensor.shape[1:-1]) for tensor in tensors),
        n_columns=tensors[0].shape[-1],
        layer=layer,
        projection=projection,
        expert=expert,
    )


def _costs_EJ(errors: MatrixErrors, types: tuple[QuantType, ...]) -> np.ndarray:
    """Errors times sensitivity, which between probes is interpolated in the logarithm of the error.

    Below the smallest error probed the trend goes on, within reason: small errors still tip close choices of experts,
    and those are as many as the error's amplitude is large, not its square, so that KL per error grows, at most by its
    root. Above the largest one the sensitivity stays what it is.
    """
    # how experts compare the gradient knows better; what all of them cost, the probes do: another choice by the router
    # of a later layer has no gradient
    error_EJ = errors.error_EJ if errors.graded_EJ is None else errors.graded_EJ
    total_J = error_EJ.sum(0)
    probe_error = np.array([total_J[types.index(t)] for t in errors.probe_types])
    # a probe can come out at zero or below by rounding, where the matrix hardly matters
    sensitivity = np.maximum(errors.probe_kl, 1e-9) / np.maximum(probe_error, 1e-30)
    order = np.argsort(probe_error)
    log_error, log_sensitivity = np.log(np.maximum(probe_error, 1e-30))[order], np.log(sensitivity)[order]
    with np.errstate(divide="ignore"):
        log_total_J = np.maximum(np.log(total_J), np.log(1e-30))
    log_sensitivity_J = np.interp(log_total_J, log_error, log_sensitivity)
    if len(order) > 1 and log_error[1] > log_error[0]:
        slope = np.diff(log_sensitivity)[0] / np.diff(log_error)[0]
        log_sensitivity_J += np.clip(slope, -0.5, 0) * np.minimum(log_total_J - log_error[0], 0)
    return error_EJ * np.where(np.isfinite(total_J), np.exp(log_sensitivity_J), 1.0)


def _restrict(
    cost_UJ: np.ndarray,
    units: list[Unit],
    measured: tuple[QuantType, ...],
    wanted: tuple[QuantType, ...] | None,
    overrides: tuple[tuple[str, QuantType], ...],
) -> None:
    """Sets the cost of what is not allowed to inf, in place."""
    missing = [t.name for t in (*(wanted or ()), *(t for _, t in overrides)) if t not in measured]
    if missing:
        raise Moe2ggufError(
            f"no measurements of {', '.join(missing)}; the candidates are {', '.join(t.name for t in measured)}"
        )
    names = [name for unit in units for name in unit.tensors]
    for pattern, _ in overrides:
        if not any(re.search(pattern, name) for name in names):
            raise Moe2ggufError(f"no matrix whose type can be chosen has a name that {pattern!r} matches")
    bpw_J = np.array([ggml.bits_per_weight(t) for t in measured])
    for u, unit in enumerate(units):
        pinned = [t for pattern, t in overrides if any(re.search(pattern, name) for name in unit.tensors)]
        if pinned:
            allowed_J = np.array([t == pinned[0] for t in measured])
        else:
            allowed_J = bpw_J >= ROLE_FLOORS_BPW[unit.role]
            # where no wanted type fits the columns, all others are allowed
            if fitting := [t for t in wanted or () if ggml.fits(t, unit.n_columns)]:
                allowed_J &= np.array([t in fitting for t in measured])
        allowed_J &= np.isfinite(cost_UJ[u])
        if not allowed_J.any():
            tried = ", ".join(t.name for t in (pinned or wanted or measured))
            raise Moe2ggufError(
                f"none of {tried} is possible for {unit.name}, which has {unit.n_columns} columns; allow another type"
            )
        cost_UJ[u, ~allowed_J] = np.inf
