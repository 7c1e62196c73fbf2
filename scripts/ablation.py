#!/usr/bin/env python3
"""What each part is worth: mean KL divergence at equal bytes by allocator, with and without router calibration.

    python scripts/ablation.py demo out/ --calibration-text FILE … [--text FILE …] [--bits 2.06,2.54,3.03]

All conversions share their statistics and are measured on the same tokens, each text by itself.
"""

from pathlib import Path

import click

from moe2gguf import pipeline
from moe2gguf.evaluate import evaluate, held_out_text
from moe2gguf.llama import available_cores
from moe2gguf.pipeline import Quantizer

# layout, allocator, router
VARIANTS = (
    ("grouped", "uniform", "none"),
    ("grouped", "pmq", "none"),
    ("grouped", "global", "none"),
    ("grouped", "global", "qesc"),
    ("stock", "global", "qesc"),
)


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--calibration-text", type=click.Path(exists=True, path_type=Path), multiple=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), multiple=True, help="[default: CPython's own]")
@click.option("--bits", default="2.06,2.54,3.03", show_default=True)
@click.option("--chunks", default=16, show_default=True, help="Of 512 tokens, of each text.")
def main(
    model: str, folder: Path, calibration_text: tuple[Path, ...], text: tuple[Path, ...], bits: str, chunks: int
) -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in text} or {"CPython": held_out_text(chunks * 3000)}
    folder.mkdir(parents=True, exist_ok=True)
    base = pipeline.write_float(model, folder / "base.gguf")
    heads = "".join(f" {name}: KLD | perplexity | same top |" for name in texts)
    click.echo(f"| bpw | layout | allocator | router |{heads} mean KLD |")
    click.echo("|---:|---|---|---|" + "---:|" * (3 * len(texts) + 1))
    for wanted in (float(x) for x in bits.split(",")):
        for layout, allocator, router in VARIANTS:
            result = pipeline.convert(
                model,
                folder / f"{wanted:g}-{layout}-{allocator}-{router}.gguf",
                bits=wanted,
                layout=layout,
                allocator=allocator,
                quantizer=Quantizer(router=router),
                calibration=pipeline.Calibration(text_paths=calibration_text),
                work_folder=folder / "work",
                overwrite=True,
            )
            found = [
                evaluate(base, [result.path], part, max_chunks=chunks, n_threads=available_cores())[0]
                for part in texts.values()
            ]
            cells = "".join(f" {e.kld_mean:.5f} | {e.perplexity:.3f} | {e.same_top:.1%} |" for e in found)
            mean = sum(e.kld_mean for e in found) / len(found)
            bpw = result.allocation.bits_per_weight
            click.echo(f"| {bpw:.3f} | {layout} | {allocator} | {router} |{cells} {mean:.5f} |")


if __name__ == "__main__":
    main()
