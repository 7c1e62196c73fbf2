"""Predicted against measured KL divergence of many allocations of one model, and how well the ranks agree.

Only experts are quantised; everything else is BF16, and all bytes are ggml's encoder's, which the prediction rests on.
Uniform types, one type per layer and projection (stock), one type per expert (grouped), at the same bytes: the table
also shows what the program gains over a uniform type.

    python scripts/predicted_kl.py demo out/ [--calibration-text FILE ...] [--text FILE] [--sensitivity probe]
"""

import dataclasses
from pathlib import Path

import click
import scipy.stats

from moe2gguf.costs import cost_table
from moe2gguf.evaluate import evaluate, held_out_text
from moe2gguf.fitting import fit_budget
from moe2gguf.ggml import QuantType, bits_per_weight
from moe2gguf.gguf_file import Target, write_gguf
from moe2gguf.llama import available_cores
from moe2gguf.pipeline import calibrated, write_float
from moe2gguf.quantize import encode_tensors, plan_file
from moe2gguf.run import Run
from moe2gguf.settings import Budget, Calibration, Choice
from moe2gguf.source import open_source

UNIFORM = tuple(QuantType[name] for name in ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
OTHERS_TO_Q8_0 = ((r"^(?!.*_exps\.)", QuantType.Q8_0),)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    expert_bits: float
    predicted_kl: float
    path: Path


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--calibration-text", type=click.Path(exists=True, path_type=Path), multiple=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Held-out text [default: CPython's own].")
@click.option("--probe-tokens", default=16384, show_default=True)
@click.option("--sensitivity", type=click.Choice(["gradient", "probe"]), default="gradient", show_default=True)
@click.option("--bits", default="2.3125,2.5625,2.8,3.0625", show_default=True, help="Bits per expert weight.")
def main(
    model: str,
    folder: Path,
    calibration_text: tuple[Path, ...],
    text: Path | None,
    probe_tokens: int,
    sensitivity: str,
    bits: str,
) -> None:
    source = open_source(model)
    calibration = Calibration(text_paths=calibration_text, n_probe_tokens=probe_tokens, sensitivity=sensitivity)
    n_threads = available_cores()
    stats = calibrated(source, calibration, Run(folder / "work", n_threads, note=click.echo))
    base = write_float(model, folder / "base.gguf", ftype="bf16")

    def build(name: str, expert_bits: float, choice: Choice) -> Row:
        table = cost_table(source, stats, layout=choice.layout, types=choice.types, overrides=choice.overrides)
        n_expert_params = sum(u.n_rows * u.n_columns for u in table.units if u.expert is not None)
        q8_0 = table.types.index(QuantType.Q8_0)
        others = sum(int(table.bytes_UJ[i, q8_0]) for i, u in enumerate(table.units) if u.expert is None)
        budget_bytes = table.fixed_bytes + others + int(expert_bits / 8 * n_expert_params)
        budget = Budget(bits=budget_bytes * 8 / source.n_params)
        allocation, _ = fit_budget(source, stats, table, budget, choice)
        plan = plan_file(source, table, allocation, stats)
        exact = [
            t if t.expert_matrices or not t.source.quantisable else dataclasses.replace(t, quant_type=QuantType.BF16)
            for t in plan.tensors
        ]
        plan = dataclasses.replace(plan, tensors=tuple(exact))
        encoded = encode_tensors(plan, n_threads, lambda *_: None)
        (path,) = write_gguf(source, plan, encoded, {}, Target(folder / f"{name}.gguf", overwrite=True))
        return Row(name, expert_bits, allocation.predicted_kl, path)

    rows = [
        build(
            t.name,
            bits_per_weight(t),
            Choice("stock", types=(t, QuantType.Q8_0), overrides=(*OTHERS_TO_Q8_0, (r"_exps\.", t))),
        )
        for t in UNIFORM
    ]
    for layout in ("stock", "grouped"):
        choice = Choice(layout, overrides=OTHERS_TO_Q8_0)
        rows += [build(f"{layout}-{b}", float(b), choice) for b in bits.split(",")]

    content = text.read_text(encoding="utf-8") if text else held_out_text(300_000)
    measured = evaluate(base, [row.path for row in rows], content)
    click.echo(f"{'allocation':16} {'expert bits':>11} {'predicted KL':>13} {'measured KL':>12} {'±':>8} {'ppl':>9}")
    for row, result in zip(rows, measured, strict=True):
        click.echo(
            f"{row.name:16} {row.expert_bits:11.4f} {row.predicted_kl:13.5f} {result.kld_mean:12.5f} "
            f"{result.kld_error:8.5f} {result.perplexity:9.4f}"
        )
    correlation = scipy.stats.spearmanr([r.predicted_kl for r in rows], [m.kld_mean for m in measured])
    click.echo(f"Spearman rank correlation over {len(rows)} allocations: {correlation.statistic:.3f}")


if __name__ == "__main__":
    main()
