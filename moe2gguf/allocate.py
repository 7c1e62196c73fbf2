"""A cost table and a byte budget to a type for every unit: one program over the whole model.

    min Σ_u Σ_j Δ_uj x_uj    s.t.  Σ_j x_uj = 1,  Σ bytes_uj x_uj ≤ budget,
    and the experts of one (layer, projection) form at most max_groups runs of one type

The last rule couples the experts of a layer. At a price λ per byte the problem falls apart into layers, so a search
over λ finds each layer's best few types and a lower bound; what is left, one type out of those few for every unit, is a
multiple-choice knapsack for HiGHS.

Shapes: U units, J types, E experts.
"""

import dataclasses
import json
import os
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.sparse

from moe2gguf.costs import CostTable
from moe2gguf.errors import BudgetError, Moe2ggufError
from moe2gguf.ggml import QuantType

MAX_GROUPS = 7  # GGML_MAX_MMID_GROUPS of the patched runtime
# a fifth type in one layer's projection gained nothing measurable, and the subsets to try grow with the power
MAX_TYPES_PER_PROJECTION = 4
LAGRANGE_STEPS = 50
SOLVER_GAP = 1e-4
SOLVER_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One type for every unit and fixed tensor."""

    layout: str  # "grouped" | "stock"
    types: dict[str, QuantType]  # unit name -> type
    fixed: dict[str, QuantType]  # tensor name -> type
    budget_bytes: int
    tensor_bytes: int
    n_params: int
    predicted_kl: float  # nats per token
    lower_bound_kl: float  # no allocation under the same rules does better

    @property
    def bits_per_weight(self) -> float:
        return self.tensor_bytes * 8 / self.n_params


def allocate(table: CostTable, budget_bytes: int, *, layout: str, max_groups: int = MAX_GROUPS) -> Allocation:
    """The cheapest allocation whose tensors take at most budget_bytes. Raises BudgetError outside what is reachable."""
    rows = _rows(table, shared=layout == "stock" or max_groups == 1)
    cost_UJ = np.array([table.cost_UJ[row].sum(0) for row in rows])
    bytes_UJ = np.array([table.bytes_UJ[row].sum(0) for row in rows])
    available = budget_bytes - table.fixed_bytes
    _check_reachable(table, cost_UJ, bytes_UJ, budget_bytes)
    if layout == "stock" or max_groups == 1:
        blocks: list[tuple[np.ndarray, np.ndarray]] = []
    else:
        blocks = _expert_blocks(table)
    lower_bound, allowed_UJ = _best_subsets(cost_UJ, bytes_UJ, available, blocks, max_groups)
    choice_U = _knapsack(np.where(allowed_UJ, cost_UJ, np.inf), bytes_UJ, available)
    chosen = {table.units[member].name: table.types[j] for row, j in zip(rows, choice_U, strict=True) for member in row}
    picked = np.arange(len(rows)), choice_U
    return Allocation(
        layout=layout,
        types={unit.name: chosen[unit.name] for unit in table.units},
        fixed=table.fixed,
        budget_bytes=budget_bytes,
        tensor_bytes=table.fixed_bytes + int(bytes_UJ[picked].sum()),
        n_params=table.n_params,
        predicted_kl=float(cost_UJ[picked].sum()),
        lower_bound_kl=min(lower_bound, float(cost_UJ[picked].sum())),
    )


def reachable_bytes(table: CostTable, *, layout: str) -> tuple[int, int]:
    """Fewest and most bytes of tensors that any allocation can take."""
    rows = _rows(table, shared=layout == "stock")
    return _extremes(
        np.array([table.cost_UJ[row].sum(0) for row in rows]),
        np.array([table.bytes_UJ[row].sum(0) for row in rows]),
        table.fixed_bytes,
    )


def expert_order(gate_up: list[QuantType], down: list[QuantType]) -> np.ndarray:
    """Positions -> expert ids, so that both projections fall into few runs of one type.

    Experts of like types stand together, ordered by one projection, and within it by the other, there and back in
    turns, so that the inner runs join at the borders. Of the two ways round the one with fewer runs is taken.
    """

    def snake(outer: list[QuantType], inner: list[QuantType]) -> np.ndarray:
        rank = {t: i for i, t in enumerate(sorted(set(outer)))}
        keys = [
            (rank[o], int(i) if rank[o] % 2 == 0 else -int(i), e)
            for e, (o, i) in enumerate(zip(outer, inner, strict=True))
        ]
        return np.array([key[2] for key in sorted(keys)])

    orders = [snake(gate_up, down), snake(down, gate_up)]
    return min(orders, key=lambda order: max(n_runs(gate_up, order), n_runs(down, order)))


def n_runs(types: list[QuantType], order: np.ndarray) -> int:
    in_order = [types[e] for e in order]
    return 1 + sum(a != b for a, b in pairwise(in_order))


def _rows(table: CostTable, *, shared: bool) -> list[list[int]]:
    """Units that share a type: each by itself, or all experts of one (layer, projection)."""
    rows: dict[object, list[int]] = {}
    for u, unit in enumerate(table.units):
        key = (unit.layer, unit.projection) if shared and unit.expert is not None else unit.name
        rows.setdefault(key, []).append(u)
    return list(rows.values())


def _expert_blocks(table: CostTable) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each MoE layer the indices of its gate_up units and of its down units."""
    found: dict[int, dict[str, list[int]]] = {}
    for u, unit in enumerate(table.units):
        if unit.layer is not None and unit.projection is not None:
            found.setdefault(unit.layer, {"gate_up": [], "down": []})[unit.projection].append(u)
    return [(np.array(b["gate_up"]), np.array(b["down"])) for _, b in sorted(found.items())]


def _extremes(cost_UJ: np.ndarray, bytes_UJ: np.ndarray, fixed_bytes: int) -> tuple[int, int]:
    allowed = np.isfinite(cost_UJ)
    smallest = np.where(allowed, bytes_UJ, np.iinfo(np.int64).max).min(1).sum()
    largest = np.where(allowed, bytes_UJ, 0).max(1).sum()
    return fixed_bytes + int(smallest), fixed_bytes + int(largest)


def _check_reachable(table: CostTable, cost_UJ: np.ndarray, bytes_UJ: np.ndarray, budget_bytes: int) -> None:
    smallest, largest = _extremes(cost_UJ, bytes_UJ, table.fixed_bytes)

    def figures(n_bytes: int) -> str:
        return f"{n_bytes * 8 / table.n_params:.2f} bits per weight ({n_bytes:,} bytes of tensors)"

    if budget_bytes < smallest:
        raise BudgetError(
            f"{figures(budget_bytes)} is below the smallest allocation, {figures(smallest)}; the largest is "
            f"{figures(largest)}. Raise --bits or --size, or allow smaller types with --types"
        )
    if budget_bytes > largest * 1.005:
        raise BudgetError(
            f"{figures(budget_bytes)} is above the largest allocation, {figures(largest)}; the smallest is "
            f"{figures(smallest)}. Lower --bits or --size"
        )


def _type_limits(max_groups: int) -> list[tuple[int, int]]:
    """Pairs (types of gate_up, types of down) that fall into max_groups runs at worst, in a snake order."""
    limits = []
    for a in range(1, MAX_TYPES_PER_PROJECTION + 1):
        for b in range(1, MAX_TYPES_PER_PROJECTION + 1):
            # the outer projection has one run per type; the inner ones join at each of the outer's borders
            if min(max(a, a * b - a + 1), max(b, a * b - b + 1)) <= max_groups:
                limits.append((a, b))
    return [l for l in limits if not any(o != l and o[0] >= l[0] and o[1] >= l[1] for o in limits)]


def _best_subsets(
    cost_UJ: np.ndarray,
    bytes_UJ: np.ndarray,
    available: int,
    blocks: list[tuple[np.ndarray, np.ndarray]],
    max_groups: int,
) -> tuple[float, np.ndarray]:
    """Lower bound on the cost, and which types each unit may take: all, or its layer's best few for experts."""
    n_types = cost_UJ.shape[1]
    limits = _type_limits(max_groups)
    most = max(max(limit) for limit in limits)
    subsets = [np.array(s) for size in range(1, most + 1) for s in combinations(range(n_types), size)]
    free = np.ones(len(cost_UJ), bool)
    for gate_up, down in blocks:
        free[gate_up] = free[down] = False

    def best_of(value_EJ: np.ndarray, usable: list[np.ndarray]) -> list[tuple[float, np.ndarray]]:
        """For each size 1..most, the cheapest subset of at most so many types, and its total."""
        best: list[tuple[float, np.ndarray]] = []
        for size in range(1, most + 1):
            totals = [(float(value_EJ[:, s].min(1).sum()), i) for i, s in enumerate(usable) if len(s) == size]
            candidates = [(t, usable[i]) for t, i in ([min(totals)] if totals else [])] + best[-1:]
            best.append(min(candidates, key=lambda c: c[0]))
        return best

    def solve(price: float) -> tuple[float, int, np.ndarray]:
        """Value of the relaxed problem at this price, the bytes it would take, and the types allowed."""
        value_UJ = cost_UJ + price * bytes_UJ
        allowed_UJ = np.isfinite(cost_UJ)
        value = float(value_UJ[free].min(1).sum())
        for gate_up, down in blocks:
            # a type that the price makes useless to every expert of the layer need not be tried
            best_gate_up = best_of(value_UJ[gate_up], _useful(value_UJ[gate_up], subsets))
            best_down = best_of(value_UJ[down], _useful(value_UJ[down], subsets))
            a, b = min(limits, key=lambda l: best_gate_up[l[0] - 1][0] + best_down[l[1] - 1][0])
            for members, (total, subset) in ((gate_up, best_gate_up[a - 1]), (down, best_down[b - 1])):
                value += total
                only = np.zeros(n_types, bool)
                only[subset] = True
                allowed_UJ[members] &= only
        choice_U = np.where(allowed_UJ, value_UJ, np.inf).argmin(1)
        taken = int(bytes_UJ[np.arange(len(choice_U)), choice_U].sum())
        return value - price * available, taken, allowed_UJ

    # the price per byte that just exhausts the budget lies between nothing and the steepest exchange in the table
    low, high = 0.0, float(np.where(np.isfinite(cost_UJ), cost_UJ, 0).max()) or 1e-12
    bound, taken, allowed_UJ = solve(low)
    if taken <= available:
        return bound, allowed_UJ
    cheapest_UJ = allowed_UJ
    for _ in range(LAGRANGE_STEPS):
        # prices span many orders of magnitude
        price = (low + high) / 2 if low == 0 and high < 1e-20 else np.sqrt(max(low, high * 1e-6) * high)
        value, taken, allowed_UJ = solve(price)
        bound = max(bound, value)
        if taken <= available:
            high, cheapest_UJ = price, allowed_UJ
        else:
            low = price
        if low and high / low < 1 + 1e-6:
            break
    return bound, cheapest_UJ


def _useful(value_EJ: np.ndarray, subsets: list[np.ndarray]) -> list[np.ndarray]:
    """Subsets of the types that are some member's first choice, or its nearest ones, at this price."""
    possible = np.isfinite(value_EJ).all(0)
    # seven types around the best ones are plenty: prices change the winners a little, not by leaps
    ranked = np.argsort(np.where(possible, value_EJ.sum(0), np.inf))[:7]
    keep = set(ranked.tolist()) | set(value_EJ.argmin(1).tolist())
    keep = {j for j in keep if possible[j]}
    return [s for s in subsets if keep.issuperset(s.tolist())]


def _knapsack(cost_UJ: np.ndarray, bytes_UJ: np.ndarray, available: int) -> np.ndarray:
    """One type per unit under the byte limit, by HiGHS. -> i64 (U,)"""
    units, types = np.nonzero(np.isfinite(cost_UJ))
    cost, n_bytes = cost_UJ[units, types], bytes_UJ[units, types].astype(np.float64)
    n = len(cost)
    one_each = scipy.sparse.csr_array((np.ones(n), (units, np.arange(n))), shape=(len(cost_UJ), n))
    result = scipy.optimize.milp(
        # HiGHS works with absolute tolerances near 1e-7: bring costs and bytes to a scale where those mean nothing
        cost / cost.max(),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(n_bytes[None] / n_bytes.max(), -np.inf, available / n_bytes.max()),
        ],
        integrality=np.ones(n),
        bounds=scipy.optimize.Bounds(0, 1),
        options={"mip_rel_gap": SOLVER_GAP, "time_limit": SOLVER_SECONDS},
    )
    if result.x is None:
        raise BudgetError(f"no allocation fits {available:,} bytes ({result.message}); raise --bits or --size")
    choice_U = np.zeros(len(cost_UJ), np.int64)
    picked = result.x > 0.5
    choice_U[units[picked]] = types[picked]
    assert picked.sum() == len(cost_UJ)
    return choice_U


def save_allocation(allocation: Allocation, path: Path) -> None:
    """JSON, written aside and renamed."""
    content = dataclasses.asdict(allocation)
    for field in ("types", "fixed"):
        content[field] = {name: t.name for name, t in getattr(allocation, field).items()}
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def load_allocation(path: Path) -> Allocation:
    try:
        content = json.loads(path.read_text())
        for field in ("types", "fixed"):
            content[field] = {name: QuantType[t] for name, t in content[field].items()}
        return Allocation(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Moe2ggufError(f"{path} is not an allocation of `moe2gguf allocate` ({error})") from error
