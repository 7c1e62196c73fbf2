#!/usr/bin/env python3
"""What skipping costs: KL divergence and perplexity against the share of expert activations left out.

A BF16 file for each requested share, thresholds from the statistics, so that nothing but skipping tells it from the
base. The share left out is llama.cpp's own count.

    python scripts/skip_curve.py demo out/ --calibration-text FILE [--text FILE] [--plot curve.svg]
"""

import os
from pathlib import Path

import click

from moe2gguf.evaluate import evaluate, held_out_text
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_file import KeyValues, Target, write_gguf
from moe2gguf.llama import available_cores
from moe2gguf.pipeline import calibrated
from moe2gguf.plot import plot_skipping
from moe2gguf.provenance import skip_values
from moe2gguf.quantize import encode_tensors, plan_uniform
from moe2gguf.run import Run
from moe2gguf.settings import Calibration
from moe2gguf.skip import Skipping
from moe2gguf.source import Source, open_source


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--calibration-text", type=click.Path(exists=True, path_type=Path), multiple=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Held-out text [default: CPython's own].")
@click.option("--shares", default="0.05,0.1,0.15,0.2,0.25,0.3,0.35", show_default=True)
@click.option("--prompt-shares", default="0.05,0.1,0.15", show_default=True)
@click.option("--chunks", default=48, show_default=True, help="Of 512 tokens.")
@click.option("--plot", type=click.Path(path_type=Path), help="The curve, as .png or .svg.")
def main(
    model: str, folder: Path, calibration_text: tuple[Path, ...], text: Path | None, shares: str, prompt_shares: str,
    chunks: int, plot: Path | None,
) -> None:  # fmt: skip
    os.environ["LLAMA_EXPERT_SKIP_COUNT"] = "1"
    source = open_source(model)
    calibration = Calibration(text_paths=calibration_text)
    stats = calibrated(source, calibration, Run(folder / "work", available_cores(), note=click.echo))
    held_out = text.read_text(encoding="utf-8") if text else held_out_text(chunks * 3000)
    base = write(source, folder / "base.gguf", {})
    wanted = [("ratio", Skipping(float(share))) for share in shares.split(",")]
    wanted += [("frequency", Skipping(prompt_share=float(share))) for share in prompt_shares.split(",")]
    files = [
        write(source, folder / f"skip-{i}.gguf", skip_values(source, stats, skipping))
        for i, (_, skipping) in enumerate(wanted)
    ]
    found = evaluate(base, files, held_out, max_chunks=chunks)
    click.echo("| rule | asked | skipped | predicted KLD | mean KLD | perplexity |\n|---|---:|---:|---:|---:|---:|")
    points: dict[str, list[tuple[float, float]]] = {}
    for (rule, skipping), row in zip(wanted, found, strict=True):
        assert row.skipped is not None
        values = skip_values(source, stats, skipping)
        predicted = next(value for key, (value, _, _) in values.items() if key.endswith("kld.predicted"))
        asked = skipping.share or skipping.prompt_share
        points.setdefault(rule, []).append((row.skipped, row.kld_mean))
        click.echo(
            f"| {rule} | {asked:.2f} | {row.skipped:.3f} | {predicted:.5f} | {row.kld_mean:.5f} | "
            f"{row.perplexity / row.base_perplexity - 1:+.2%} |"
        )
    if plot is not None:
        plot_skipping(points, plot)


def write(source: Source, path: Path, values: KeyValues) -> Path:
    plan = plan_uniform(source, QuantType.BF16)
    encoded = encode_tensors(plan, available_cores(), lambda *_: None)
    return write_gguf(source, plan, encoded, values, Target(path, overwrite=True))[0]


if __name__ == "__main__":
    main()
