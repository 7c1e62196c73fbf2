#!/usr/bin/env python3
"""What probing on less text costs: allocations by fewer probe tokens, judged by the costs that many tokens give.

    python scripts/probe_tokens.py demo out/ --calibration-text FILE --tokens 4096,2048,1024

Predicted KL divergence of each allocation over that of the best one, which knows the judge's costs.
"""

import dataclasses
from pathlib import Path

import click

from moe2gguf.allocate import Allocation
from moe2gguf.costs import CostTable, cost_table
from moe2gguf.fitting import fit_budget
from moe2gguf.llama import available_cores
from moe2gguf.pipeline import calibrated
from moe2gguf.run import Run
from moe2gguf.settings import Budget, Calibration, Choice
from moe2gguf.source import open_source


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--calibration-text", type=click.Path(exists=True, path_type=Path), multiple=True)
@click.option("--judge-tokens", default=32768, show_default=True)
@click.option("--tokens", default="4096,2048,1024", show_default=True)
@click.option("--bits", default="2.06,2.3,2.54,3.03,3.5", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    folder: Path,
    calibration_text: tuple[Path, ...],
    judge_tokens: int,
    tokens: str,
    bits: str,
    seed: int,
) -> None:
    source = open_source(model)
    calibration = Calibration(text_paths=calibration_text, seed=seed)
    budgets = [Budget(float(b)) for b in bits.split(",")]

    def allocations(n_tokens: int, layout: str) -> tuple[CostTable, list[Allocation]]:
        run = Run(folder / f"work-{n_tokens}", available_cores())
        stats = calibrated(source, dataclasses.replace(calibration, n_probe_tokens=n_tokens), run)
        table, choice = cost_table(source, stats, layout=layout), Choice(layout)
        return table, [fit_budget(source, stats, table, budget, choice)[0] for budget in budgets]

    print("layout   tokens " + "".join(f"{budget.bits:9.2f}" for budget in budgets))
    for layout in ("grouped", "stock"):
        judge, best = allocations(judge_tokens, layout)
        for n_tokens in map(int, tokens.split(",")):
            _, found = allocations(n_tokens, layout)
            ratios = [expected_kl(judge, a) / expected_kl(judge, b) for a, b in zip(found, best, strict=True)]
            print(f"{layout:8} {n_tokens:6} " + "".join(f"{ratio:9.4f}" for ratio in ratios), flush=True)


def expected_kl(table: CostTable, allocation: Allocation) -> float:
    """Nats per token."""
    units = enumerate(table.units)
    return sum(float(table.cost_UJ[u, table.types.index(allocation.types[unit.name])]) for u, unit in units)


if __name__ == "__main__":
    main()
