"""A budget to an allocation: what fits into so many bits, or into a file of so many bytes."""

import dataclasses
import json

from moe2gguf.allocate import Allocation, allocate_fast
from moe2gguf.allocators import ALLOCATORS
from moe2gguf.costs import CANDIDATES, CostTable, cost_table, source_digest
from moe2gguf.errors import BudgetError
from moe2gguf.gguf_file import file_bytes
from moe2gguf.provenance import provenance
from moe2gguf.quantize import FilePlan, plan_file
from moe2gguf.run import Note, Run
from moe2gguf.settings import NO_SKIPPING, Budget, Choice
from moe2gguf.skip import Skipping
from moe2gguf.source import Source
from moe2gguf.speeds import Speeds, measured_speeds, with_seconds
from moe2gguf.stats import SHRINKAGE_TOKENS, CalibrationStats

# of a file's size: the header grows with the number of groups, and groups change with the bytes that are left
SIZE_TRIES = 8
# an allocation that leaves more of its budget is said to
FILLED = 0.995


def provisional_allocation(source: Source, budget: Budget, choice: Choice) -> Allocation:
    """What fits the budget where all weights count alike. Raises BudgetError where nothing does."""
    table = cost_table(source, None, layout=choice.layout, types=choice.types, overrides=choice.overrides)
    return fit_budget(source, None, table, budget, choice)[0]


def speeds_for(source: Source, choice: Choice, run: Run, *, save: bool = True) -> Speeds | None:
    """What the objective asks to be measured; kept in the work folder."""
    if choice.objective != "speed":
        return None
    return measured_speeds(source, run.n_threads, run.work, save=save, progress=run.progress)


def fit_budget(
    source: Source,
    stats: CalibrationStats | None,
    table: CostTable,
    budget: Budget,
    choice: Choice,
    skipping: Skipping = NO_SKIPPING,
    speeds: Speeds | None = None,
) -> tuple[Allocation, FilePlan | None]:
    """The best allocation within the budget, and the plan of its file (none without statistics). `speeds` are those of
    the objective."""

    def best(tensor_bytes: int) -> Allocation:
        if speeds is not None and stats is not None:
            found = allocate_fast(with_seconds(table, speeds, stats), tensor_bytes, max_groups=choice.max_groups)
        else:
            found = ALLOCATORS[choice.allocator](table, stats, tensor_bytes, choice.max_groups)
        return dataclasses.replace(
            found,
            source_sha256=source_digest(source),
            recipe=_request_json(budget, choice, stats, speeds),
        )

    if budget.bits is not None:
        allocation = best(int(budget.bits * source.n_params / 8))
        return allocation, None if stats is None else plan_file(source, table, allocation, stats)
    assert budget.size_bytes is not None
    tensor_bytes = budget.size_bytes - file_bytes(source, FilePlan((), {}), {})
    if stats is None:
        return best(tensor_bytes), None
    for _ in range(SIZE_TRIES):
        allocation = best(tensor_bytes)
        plan = plan_file(source, table, allocation, stats)
        total = file_bytes(source, plan, provenance(source, stats, allocation, skipping=skipping))
        if total <= budget.size_bytes:
            return allocation, plan
        tensor_bytes = allocation.tensor_bytes - (total - budget.size_bytes)
    raise BudgetError(f"no allocation makes a file of at most {budget.size_bytes:,} bytes; raise --size")


def report_allocation(
    source: Source,
    table: CostTable,
    stats: CalibrationStats,
    allocation: Allocation,
    choice: Choice,
    note: Note,
) -> None:
    """What a user should know about the allocation and would not guess."""
    if allocation.layout != choice.layout:
        note(
            f"{source.name} chooses experts through groups or a table of ids, so they keep their order: "
            "one type per projection of a layer"
        )
    if table.small_block_units:
        note(
            f"{len(table.small_block_units)} matrices have columns that are no multiple of 256 and use types with "
            f"blocks of 32 (first: {table.small_block_units[0]})"
        )
    cold = {layer: experts.n_cold for layer, experts in stats.layers.items()}
    if sum(cold.values()):
        worst = max(cold, key=lambda layer: cold[layer])
        note(
            f"{sum(cold.values())} experts saw fewer than {SHRINKAGE_TOKENS} calibration tokens (most in layer "
            f"{worst}: {cold[worst]}); their importance leans on the layer's average"
        )
    if allocation.tensor_bytes < FILLED * allocation.budget_bytes:
        what = "the types allowed fill" if choice.objective == "size" else "the fastest types within a tenth fill"
        note(f"{what} {allocation.tensor_bytes:,} of {allocation.budget_bytes:,} bytes")


def _request_json(budget: Budget, choice: Choice, stats: CalibrationStats | None, speeds: Speeds | None) -> str:
    request: dict[str, object] = {
        "budget": budget.describe(),
        "layout": choice.layout,
        "allocator": choice.allocator,
        "objective": choice.objective,
        "max_groups": choice.max_groups,
        "types": [t.name for t in choice.types or CANDIDATES],
        "overrides": [[pattern, t.name] for pattern, t in choice.overrides],
    }
    if stats is not None:
        request["calibration"] = {
            "text": stats.text,
            "tokens": stats.n_tokens,
            "probe_tokens": stats.n_probe_tokens,
        }
    if speeds is not None:
        request["speeds"] = speeds.as_json()
    return json.dumps(request, sort_keys=True)
