"""A cost table and a byte budget to a type for every unit: one program over the whole model.

    min Σ_u Σ_j Δ_uj x_uj    s.t.  Σ_j x_uj = 1,  Σ bytes_uj x_uj ≤ budget,
    and a layer's gate_up and down have so few types each that, whichever expert has which, one order of the experts
    leaves both in at most max_groups runs of one type

and, where speed counts, Σ seconds_uj x_uj ≤ what a decoded token may take.

The rule on runs couples the experts of a layer. At a price λ per byte the problem falls apart into layers, so a search
over λ finds each layer's best few types and a lower bound; what is left, one type out of those few for every unit, is a
multiple-choice knapsack, which the same price all but solves, and HiGHS finishes. Seconds have a price too: it is added
to the costs, and searched for around all of this.

Shapes: U units, J types, E experts.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from moe2gguf.costs import CostTable
from moe2gguf.errors import BudgetError, Moe2ggufError, OutputError
from moe2gguf.ggml import QuantType

MAX_GROUPS = 7  # GGML_MAX_MMID_GROUPS of the patched runtime
# a fifth type in one layer's projection gained nothing measurable, and the subsets to try grow with the power
MAX_TYPES_PER_PROJECTION = 4
SOLVER_GAP = 1e-4
SOLVER_NODES = 2000
# the fastest file may have this part more predicted KL divergence than the best of the same bytes
KL_FOR_SPEED = 0.1
PRICE_STEPS = 8


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
    source_sha256: str = ""  # of the checkpoint it is for
    recipe: str = ""  # JSON: what was asked for
    decode_seconds: float | None = None  # predicted, of a token's matrix products; None where speed was not measured
    best_decode_seconds: float | None = None  # of the allocation with the least KL divergence in these bytes

    @property
    def bits_per_weight(self) -> float:
        return self.tensor_bytes * 8 / self.n_params


def allocate(
    table: CostTable, budget_bytes: int, *, max_groups: int = MAX_GROUPS, seconds_budget: float = np.inf
) -> Allocation:
    """The cheapest allocation whose tensors take at most budget_bytes, and whose decoded token takes at most
    seconds_budget. Raises BudgetError outside what is reachable."""
    program = _Program.of(table, budget_bytes, max_groups)
    best = program.solved(0.0)
    if program.seconds(best.choice_U) <= seconds_budget:
        return program.allocation(best.choice_U, best.bound)

    def is_fast(found: _Solution) -> bool:
        return program.seconds(found.choice_U) <= seconds_budget

    last_slow, first_fast = program.price_where(best, is_fast)
    if first_fast is None:
        fastest = program.seconds(last_slow.choice_U)
        raise BudgetError(
            f"no allocation of {budget_bytes:,} bytes is predicted to decode a token in {seconds_budget * 1e3:.3g} ms; "
            f"the fastest takes {fastest * 1e3:.3g} ms"
        )
    return program.within(seconds_budget, [best, last_slow, first_fast])


def allocate_fast(table: CostTable, budget_bytes: int, *, max_groups: int = MAX_GROUPS) -> Allocation:
    """The allocation that decodes fastest, of those within KL_FOR_SPEED of the least predicted KL divergence in these
    bytes; then the cheapest one that is as fast. The table has seconds. Raises BudgetError as allocate does."""
    assert table.seconds_UJ is not None
    program = _Program.of(table, budget_bytes, max_groups)
    best = program.solved(0.0)
    cheapest = program.allocation(best.choice_U, best.bound)
    limit = (1 + KL_FOR_SPEED) * cheapest.predicted_kl
    last_near, _ = program.price_where(best, lambda found: program.cost(found.choice_U) > limit)
    seconds = program.seconds(last_near.choice_U)
    is_faster = cheapest.decode_seconds is not None and seconds < cheapest.decode_seconds
    found = program.within(seconds, [best, last_near]) if is_faster else cheapest
    return dataclasses.replace(found, best_decode_seconds=cheapest.decode_seconds)


@dataclasses.dataclass(frozen=True)
class _Solution:
    """Of the program without a limit on seconds, but at a price of them."""

    price: float  # cost of a second
    choice_U: np.ndarray  # i64
    allowed_UJ: np.ndarray  # bool: the few types of each layer
    bound: float  # cost and price together are nowhere lower


@dataclasses.dataclass(frozen=True)
class _Program:
    """A table's units that share a type are one unit here."""

    table: CostTable
    rows: list[list[int]]  # units of the table
    cost_UJ: np.ndarray
    bytes_UJ: np.ndarray
    seconds_UJ: np.ndarray  # zeros where speed was not measured
    blocks: list[tuple[np.ndarray, np.ndarray]]
    budget_bytes: int
    max_groups: int

    @classmethod
    def of(cls, table: CostTable, budget_bytes: int, max_groups: int) -> "_Program":
        """Raises BudgetError for bytes out of reach."""
        shared = table.layout == "stock" or max_groups == 1
        rows = _rows(table, shared=shared)
        seconds_UJ = np.zeros(table.cost_UJ.shape) if table.seconds_UJ is None else table.seconds_UJ
        cost_UJ, bytes_UJ, seconds_UJ = (
            np.array([of_unit_UJ[row].sum(0) for row in rows])
            for of_unit_UJ in (table.cost_UJ, table.bytes_UJ, seconds_UJ)
        )
        _check_reachable(table, cost_UJ, bytes_UJ, budget_bytes)
        blocks = [] if shared else _expert_blocks(table)
        return cls(table, rows, cost_UJ, bytes_UJ, seconds_UJ, blocks, budget_bytes, max_groups)

    @property
    def available(self) -> int:
        return self.budget_bytes - self.table.fixed_bytes

    def cost(self, choice_U: np.ndarray) -> float:
        return float(self.cost_UJ[np.arange(len(choice_U)), choice_U].sum())

    def seconds(self, choice_U: np.ndarray) -> float:
        return float(self.seconds_UJ[np.arange(len(choice_U)), choice_U].sum())

    def solved(self, price: float) -> _Solution:
        value_UJ = self.cost_UJ + price * self.seconds_UJ
        bound, allowed_UJ = _best_subsets(value_UJ, self.bytes_UJ, self.available, self.blocks, self.max_groups)
        choice_U = _knapsack(np.where(allowed_UJ, value_UJ, np.inf), self.bytes_UJ, self.available)
        return _Solution(price, choice_U, allowed_UJ, bound)

    def price_where(
        self, best: _Solution, is_enough: Callable[[_Solution], bool]
    ) -> tuple[_Solution, _Solution | None]:
        """At prices above that of the best, the last solution that is not enough, and the first that is; None where
        none is."""
        below, above = best, None
        total = self.seconds(below.choice_U)
        # where all of the seconds are as dear as all of the cost; then up until nothing but seconds counts
        price = self.cost(below.choice_U) / total if total > 0 else np.inf
        for _ in range(PRICE_STEPS):
            if above is not None or not np.isfinite(price):
                break
            found = self.solved(price)
            below, above = (below, found) if is_enough(found) else (found, None)
            price *= 8
        for _ in range(PRICE_STEPS):
            if above is None:
                break
            # prices span orders of magnitude
            found = self.solved(float(np.sqrt(max(below.price, above.price / 64) * above.price)))
            below, above = (below, found) if is_enough(found) else (found, above)
        return below, above

    def within(self, seconds_budget: float, solutions: list[_Solution]) -> Allocation:
        """The last of the solutions keeps to it; the others are for the bound."""
        last = solutions[-1]
        choice_U = _knapsack(
            np.where(last.allowed_UJ, self.cost_UJ, np.inf),
            self.bytes_UJ,
            self.available,
            _Limit(self.seconds_UJ, seconds_budget, last.price, last.choice_U),
        )
        # nothing within the limit is charged more than all of it
        return self.allocation(choice_U, max(s.bound - s.price * seconds_budget for s in solutions))

    def allocation(self, choice_U: np.ndarray, bound: float) -> Allocation:
        table = self.table
        types = {
            table.units[member].name: table.types[j]
            for row, j in zip(self.rows, choice_U, strict=True)
            for member in row
        }
        return Allocation(
            layout=table.layout,
            types={unit.name: types[unit.name] for unit in table.units},
            fixed=table.fixed,
            budget_bytes=self.budget_bytes,
            tensor_bytes=table.fixed_bytes + int(self.bytes_UJ[np.arange(len(choice_U)), choice_U].sum()),
            n_params=table.n_params,
            predicted_kl=self.cost(choice_U),
            lower_bound_kl=min(bound, self.cost(choice_U)),
            decode_seconds=None if table.seconds_UJ is None else self.seconds(choice_U),
        )


def describe_speed(allocation: Allocation) -> str:
    assert allocation.decode_seconds is not None and allocation.best_decode_seconds is not None
    return (
        f"{allocation.decode_seconds * 1e3:.3g} ms per token in matrix products, "
        f"{allocation.best_decode_seconds * 1e3:.3g} ms in the file with the least predicted KL divergence"
    )


def reachable_bytes(table: CostTable) -> tuple[int, int]:
    """Fewest and most bytes of tensors that any allocation can take."""
    rows = _rows(table, shared=table.layout == "stock")
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
    limits = [l for l in limits if not any(o != l and o[0] >= l[0] and o[1] >= l[1] for o in limits)]
    # where several do, the one that leaves most choice comes first
    return sorted(limits, key=lambda l: -l[0] * l[1])


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
    free = np.ones(len(cost_UJ), bool)
    for gate_up, down in blocks:
        free[gate_up] = free[down] = False
    bounds: list[float] = []
    allowed_of: dict[float, np.ndarray] = {}

    def taken(price: float) -> int:
        """Bytes of the relaxed problem's solution at this price; notes its value and the types it allows."""
        value_UJ = cost_UJ + price * bytes_UJ
        allowed_UJ = np.isfinite(cost_UJ)
        value = float(value_UJ[free].min(1).sum())
        for gate_up, down in blocks:
            best_gate_up, best_down = _best_sets(value_UJ[gate_up], most), _best_sets(value_UJ[down], most)
            a, b = min(limits, key=lambda l: best_gate_up[l[0] - 1][0] + best_down[l[1] - 1][0])
            for members, (total, types) in ((gate_up, best_gate_up[a - 1]), (down, best_down[b - 1])):
                value += total
                limit = a if members is gate_up else b
                only = np.zeros(n_types, bool)
                only[_widened(types, limit, cost_UJ[members], bytes_UJ[members], price)] = True
                allowed_UJ[members] &= only
        bounds.append(value - price * available)
        allowed_of[price] = allowed_UJ
        choice_U = np.where(allowed_UJ, value_UJ, np.inf).argmin(1)
        return int(bytes_UJ[np.arange(len(choice_U)), choice_U].sum())

    price = _exhausting_price(taken, cost_UJ, available)
    return max(bounds), allowed_of[price]


def _best_sets(value_EJ: np.ndarray, most: int) -> list[tuple[float, np.ndarray]]:
    """For each size 1..most, the cheapest set of at most so many types, one of them to each expert, and its total."""
    # a type that another one beats, or equals and precedes, for every expert need not be tried
    beats_JJ = (value_EJ[:, :, None] <= value_EJ[:, None, :]).all(0)
    beats_JJ &= ~beats_JJ.T | np.triu(np.ones_like(beats_JJ), 1)
    np.fill_diagonal(beats_JJ, False)
    useful = np.flatnonzero(~beats_JJ.any(0))
    best: list[tuple[float, np.ndarray]] = []
    for size in range(1, most + 1):
        if size <= len(useful):
            sets_nS = _sets(len(useful), size)
            total_n = value_EJ[:, useful][:, sets_nS].min(2).sum(0)
            n = int(total_n.argmin())
            found = float(total_n[n]), useful[sets_nS[n]]
        best.append(min([*best[-1:], found], key=lambda candidate: candidate[0]))
    return best


def _widened(types: np.ndarray, limit: int, cost_EJ: np.ndarray, bytes_EJ: np.ndarray, price: float) -> np.ndarray:
    """The set with as many types as the limit has room for: those that would help most at prices nearby, since the
    knapsack departs from the one price to use up the bytes."""
    values = [cost_EJ + price * factor * bytes_EJ for factor in (0.5, 2.0)]
    while len(types) < min(limit, cost_EJ.shape[1]):
        totals_J = sum(np.minimum(v[:, types].min(1)[:, None], v).sum(0) for v in values)
        totals_J = np.where(np.isin(np.arange(len(totals_J)), types), np.inf, totals_J)
        types = np.append(types, totals_J.argmin())
    return types


@functools.cache
def _sets(n: int, size: int) -> np.ndarray:
    return np.array(list(combinations(range(n), size)))


def _exhausting_price(taken: Callable[[float], int], cost_UJ: np.ndarray, available: int) -> float:
    """The lowest price per byte, to six digits, at which no more than `available` bytes are taken."""
    if taken(0.0) <= available:
        return 0.0
    # no exchange in the table is steeper than all of the highest cost for one byte
    low, high = 0.0, 2 * float(np.where(np.isfinite(cost_UJ), cost_UJ, 0).max()) or 1e-12
    if taken(high) > available:
        return high
    while low == 0 or high / low > 1 + 1e-6:
        # prices span many orders of magnitude
        price = float(np.sqrt(max(low, high * 1e-6) * high))
        if price == 0 or price >= high:
            break
        low, high = (low, price) if taken(price) <= available else (price, high)
    return high


@dataclasses.dataclass(frozen=True)
class _Limit:
    """A second one for a knapsack, beside its bytes."""

    seconds_UJ: np.ndarray
    seconds: float
    price: float  # at which it is nearly kept
    choice_U: np.ndarray  # keeps to both


def _knapsack(cost_UJ: np.ndarray, bytes_UJ: np.ndarray, available: int, limit: _Limit | None = None) -> np.ndarray:
    """One type per unit under the byte limit, and the other. -> i64 (U,)

    A price gives a lower bound, and a solution that is nearly as good. A type whose value at that price is above its
    unit's best by more than lies between the two is in no better solution: in a large model hardly any are left, and
    HiGHS gets the rest.
    """
    rows = np.arange(len(cost_UJ))
    priced_UJ = cost_UJ if limit is None else cost_UJ + limit.price * limit.seconds_UJ

    def choice(price: float) -> np.ndarray:
        return (priced_UJ + price * bytes_UJ).argmin(1)

    def total(of_UJ: np.ndarray, choice_U: np.ndarray) -> float:
        return of_UJ[rows, choice_U].sum()

    price = _exhausting_price(lambda price: int(total(bytes_UJ, choice(price))), priced_UJ, available)
    found_U = choice(price) if limit is None else limit.choice_U
    if total(bytes_UJ, found_U) > available:
        raise BudgetError(f"no allocation fits {available:,} bytes; raise --bits or --size")
    if price == 0 and limit is None:
        return found_U
    if limit is None:
        _fill(found_U, cost_UJ, bytes_UJ, available)

    above_UJ = priced_UJ + price * bytes_UJ
    bound = above_UJ.min(1).sum() - price * available - (0 if limit is None else limit.price * limit.seconds)
    above_UJ = above_UJ - above_UJ.min(1, keepdims=True)
    # rounding must not cut off what is just as good
    open_UJ = above_UJ <= (total(cost_UJ, found_U) - bound) * (1 + 1e-9)
    open_UJ[rows, found_U] = True
    units, types = np.nonzero(open_UJ)
    cost, n_bytes = cost_UJ[units, types], bytes_UJ[units, types]
    n = len(cost)
    # HiGHS has absolute tolerances near 1e-7: costs and bytes come to a scale where those mean nothing, and the limit
    # lies halfway between two sums of bytes that can occur
    divisor = int(np.gcd.reduce(n_bytes))
    most_bytes = (available // divisor + 0.5) * divisor
    constraints = [
        scipy.optimize.LinearConstraint(
            scipy.sparse.csr_array((np.ones(n), (units, np.arange(n))), shape=(len(rows), n)), 1, 1
        ),
        scipy.optimize.LinearConstraint(n_bytes[None] / n_bytes.max(), -np.inf, most_bytes / n_bytes.max()),
    ]
    if limit is not None:
        seconds = limit.seconds_UJ[units, types] / limit.seconds
        # seconds are no multiples of anything: what the tolerance lets through is turned down below
        constraints.append(scipy.optimize.LinearConstraint(seconds[None], -np.inf, 1 - 1e-6))
    with _silenced():
        result = scipy.optimize.milp(
            cost / (cost.max() or 1),
            constraints=constraints,
            integrality=np.ones(n),
            bounds=scipy.optimize.Bounds(0, 1),
            # nodes, not seconds: the same input must give the same bytes on a slower machine
            options={"presolve": True, "mip_rel_gap": SOLVER_GAP, "node_limit": SOLVER_NODES},
        )
    if result.x is not None:
        solved_U = found_U.copy()
        picked = result.x > 0.5
        solved_U[units[picked]] = types[picked]
        if (
            total(bytes_UJ, solved_U) <= available
            and (limit is None or total(limit.seconds_UJ, solved_U) <= limit.seconds)
            and total(cost_UJ, solved_U) < total(cost_UJ, found_U)
        ):
            return solved_U
    return found_U


@contextmanager
def _silenced() -> Iterator[None]:
    """HiGHS prints a line of its own for some models, whatever it is told; it goes past Python's stdout."""
    sys.stdout.flush()
    own = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)


def _fill(choice_U: np.ndarray, cost_UJ: np.ndarray, bytes_UJ: np.ndarray, available: int) -> None:
    """Takes the steepest exchange that still fits until none does, in place."""
    rows = np.arange(len(choice_U))
    left = available - int(bytes_UJ[rows, choice_U].sum())
    while True:
        gain_UJ = cost_UJ[rows, choice_U][:, None] - cost_UJ
        extra_UJ = bytes_UJ - bytes_UJ[rows, choice_U][:, None]
        usable_UJ = (gain_UJ > 0) & (extra_UJ <= left)
        if not usable_UJ.any():
            return
        # what costs no more bytes comes first
        rate_UJ = np.where(usable_UJ, gain_UJ / np.maximum(extra_UJ, 1e-9), 0)
        u, j = np.unravel_index(rate_UJ.argmax(), rate_UJ.shape)
        left -= int(extra_UJ[u, j])
        choice_U[u] = j


def to_json(allocation: Allocation) -> dict[str, Any]:
    content = dataclasses.asdict(allocation)
    for field in ("types", "fixed"):
        content[field] = {name: t.name for name, t in getattr(allocation, field).items()}
    return content


def from_json(content: dict[str, Any]) -> Allocation:
    """Raises KeyError, TypeError or AttributeError for what to_json did not make."""
    types = {field: {name: QuantType[t] for name, t in content[field].items()} for field in ("types", "fixed")}
    return Allocation(**(content | types))


def save_allocation(allocation: Allocation, path: Path) -> None:
    """JSON, written aside and renamed."""
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(json.dumps(to_json(allocation), indent=1) + "\n")
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another --outfile") from error


def load_allocation(path: Path) -> Allocation:
    try:
        return from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Moe2ggufError(f"{path} is not an allocation of `moe2gguf allocate` ({error})") from error
