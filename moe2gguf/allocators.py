"""Other ways to an allocation than the global program, to compare it with: the paper's, and one type for all experts.

PMQ (MC-MoE, arXiv:2410.06270): a program for each layer by itself, over classes of 1, 2 and 3 bits,

    min Σ_e Σ_j φ_e^α w_e^β ε_ej^γ x_ej    s.t.  Σ_j x_ej = 1,  Σ bytes_ej x_ej ≤ the layer's share,
    at least one expert at 3 bits and one at 2;  α = 1, β = 1.5, γ = 2 (its released code leaves γ out)

with φ the expert's share of the tokens, w its share of the gate weights, and ε the change of the layer's output with
the whole expert at one type. All other matrices have 4 bits.

Shapes: U units, E experts, C classes.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.optimize

from moe2gguf.allocate import Allocation, allocate
from moe2gguf.costs import CostTable
from moe2gguf.errors import BudgetError, Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.stats import CalibrationStats

ALPHA, BETA, GAMMA = 1.0, 1.5, 2.0
# GGUF's types nearest to the paper's 1, 2 and 3 bits; then its 4 bits for the rest, or fewer where those do not fit
EXPERT_CLASSES = (QuantType.IQ1_M, QuantType.IQ2_XXS, QuantType.IQ3_XXS)
OTHER_CLASSES = (QuantType.IQ4_XS, QuantType.IQ3_XXS, QuantType.Q2_K)


def allocate_global(table: CostTable, stats: CalibrationStats | None, budget_bytes: int, max_groups: int) -> Allocation:
    return allocate(table, budget_bytes, max_groups=max_groups)


def allocate_uniform(
    table: CostTable, stats: CalibrationStats | None, budget_bytes: int, max_groups: int
) -> Allocation:
    """All experts at one type, that with the lowest predicted KL divergence; the global program chooses the rest."""
    experts_U = np.array([unit.expert is not None for unit in table.units])
    found = []
    for j in np.flatnonzero(np.isfinite(table.cost_UJ[experts_U]).all(0)):
        cost_UJ = table.cost_UJ.copy()
        cost_UJ[np.ix_(experts_U, np.arange(len(table.types)) != j)] = np.inf
        try:
            found.append(allocate(dataclasses.replace(table, cost_UJ=cost_UJ), budget_bytes, max_groups=max_groups))
        except BudgetError:  # too small or too large a type
            continue
    if not found:
        raise BudgetError(
            f"no single type for all experts makes {budget_bytes:,} bytes of tensors; change --bits or --size, or "
            "take --allocator global"
        )
    return min(found, key=lambda allocation: allocation.predicted_kl)


def allocate_pmq(table: CostTable, stats: CalibrationStats | None, budget_bytes: int, max_groups: int) -> Allocation:
    """What a layer leaves of its share goes to the next, so that the budget is used. Without statistics all weights
    count alike."""
    if table.layout != "grouped":
        raise Moe2ggufError(
            "--allocator pmq gives every expert a type of its own: it needs --layout grouped, and a model whose "
            "experts may change places; take --allocator global"
        )
    if max_groups < len(EXPERT_CLASSES):
        raise Moe2ggufError(f"--allocator pmq has {len(EXPERT_CLASSES)} types of experts, --max-groups {max_groups}")
    experts_U = np.array([unit.expert is not None for unit in table.units])
    missing = [t.name for t in EXPERT_CLASSES + OTHER_CLASSES if t not in table.types]
    if missing or not np.isfinite(table.cost_UJ[experts_U][:, [table.types.index(t) for t in EXPERT_CLASSES]]).all():
        raise Moe2ggufError(
            f"--allocator pmq gives experts {', '.join(t.name for t in EXPERT_CLASSES)}, which --types, --tensor-type "
            "or columns that are no multiple of 256 forbid; take --allocator global"
        )
    column = {t: table.types.index(t) for t in EXPERT_CLASSES + OTHER_CLASSES}
    layers: dict[int, dict[int, list[int]]] = {}
    others = []
    for u, unit in enumerate(table.units):
        if unit.expert is None or unit.layer is None:
            others.append(u)
        else:
            layers.setdefault(unit.layer, {}).setdefault(unit.expert, []).append(u)
    classes = [column[t] for t in EXPERT_CLASSES]
    bytes_LEC = {
        layer: np.array([table.bytes_UJ[members][:, classes].sum(0) for _, members in sorted(experts.items())])
        for layer, experts in sorted(layers.items())
    }
    # one expert each at 2 and 3 bits
    least = {layer: int(b_EC[:, 0].sum() + (b_EC[0] - b_EC[0, 0]).sum()) for layer, b_EC in bytes_LEC.items()}
    choice_U = np.empty(len(table.units), np.int64)
    for n, _ in enumerate(OTHER_CLASSES, 1):
        # a matrix that may not have as few bits, or is pinned, has the next more, or what it may
        wanted = [column[t] for t in reversed(OTHER_CLASSES[:n])]
        for u in others:
            allowed_J = np.isfinite(table.cost_UJ[u])
            choice_U[u] = next((j for j in wanted if allowed_J[j]), int(table.cost_UJ[u].argmin()))
        left = budget_bytes - table.fixed_bytes - int(table.bytes_UJ[others, choice_U[others]].sum())
        if left >= sum(least.values()):
            break
    else:
        raise BudgetError(
            f"{budget_bytes * 8 / table.n_params:.2f} bits per weight is below what PMQ's classes reach; raise --bits "
            "or --size, or take --allocator global"
        )
    n_left = len(layers)
    for layer, experts in sorted(layers.items()):
        share = max(left // n_left, least[layer])
        if stats is None:
            cost_EC = np.array([table.cost_UJ[members][:, classes].sum(0) for _, members in sorted(experts.items())])
        else:
            cost_EC = _importance_EC(stats, layer)
        class_E = _layer_program(cost_EC, bytes_LEC[layer], share)
        for c, (_, members) in zip(class_E, sorted(experts.items()), strict=True):
            choice_U[members] = classes[c]
        left -= int(bytes_LEC[layer][np.arange(len(class_E)), class_E].sum())
        n_left -= 1
    picked = np.arange(len(table.units)), choice_U
    cost = float(table.cost_UJ[picked].sum())
    return Allocation(
        layout=table.layout,
        types={unit.name: table.types[j] for unit, j in zip(table.units, choice_U, strict=True)},
        fixed=table.fixed,
        budget_bytes=budget_bytes,
        tensor_bytes=table.fixed_bytes + int(table.bytes_UJ[picked].sum()),
        n_params=table.n_params,
        predicted_kl=cost,
        lower_bound_kl=cost,
    )


def _importance_EC(stats: CalibrationStats, layer: int) -> np.ndarray:
    """φ^α w^β ε^γ"""
    of_layer = stats.layers[layer]
    share_E = of_layer.n_tokens_E / max(of_layer.n_tokens_E.sum(), 1)
    gate_E = of_layer.gate_sum_E / max(of_layer.gate_sum_E.sum(), 1e-20)
    columns = [stats.types.index(t) for t in EXPERT_CLASSES]
    # of squared changes, per token
    gate_up, down = (stats.errors[f"layers.{layer}.{name}"].error_EJ[:, columns] for name in ("gate_up", "down"))
    return (share_E**ALPHA * gate_E**BETA)[:, None] * (gate_up + down) ** (GAMMA / 2)


def _layer_program(cost_EC: np.ndarray, bytes_EC: np.ndarray, available: int) -> np.ndarray:
    """-> the class of each expert, i64 (E,)"""
    n_experts, n_classes = cost_EC.shape
    one_each = np.kron(np.eye(n_experts), np.ones(n_classes))
    counts = np.tile(np.eye(n_classes)[1:], n_experts)
    result = scipy.optimize.milp(
        cost_EC.ravel() / (cost_EC.max() or 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(bytes_EC.ravel() / bytes_EC.max(), -np.inf, available / bytes_EC.max()),
            scipy.optimize.LinearConstraint(counts, 1, np.inf),
        ],
        integrality=np.ones(cost_EC.size),
        bounds=scipy.optimize.Bounds(0, 1),
    )
    assert result.x is not None, result.message
    return result.x.reshape(cost_EC.shape).argmax(1)


# statistics: None before there are any, to find what is in reach
Allocator = Callable[[CostTable, CalibrationStats | None, int, int], Allocation]
ALLOCATORS: dict[str, Allocator] = {
    "global": allocate_global,
    "pmq": allocate_pmq,
    "uniform": allocate_uniform,
}
