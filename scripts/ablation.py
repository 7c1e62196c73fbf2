#!/usr/bin/env python3
"""What each part is worth: mean KL divergence at equal bytes, for all of allocators × texts × affinities × routers.

    python scripts/ablation.py demo out/ --calibration-text FILE … [--other-text FILE] [--text FILE …] [--bits 2.54]

All conversions of one calibration share its statistics, and all are measured on the same tokens, each text by itself. A
conversion that is there is not made again, and one without QESC is not made where QESC left all routers as they are.
"""

import dataclasses
import itertools
from pathlib import Path

import click

from moe2gguf.evaluate import Evaluation, evaluate, held_out_text
from moe2gguf.gguf_reader import read_gguf
from moe2gguf.llama import available_cores
from moe2gguf.pipeline import convert, write_float
from moe2gguf.provenance import ROUTER_KEY
from moe2gguf.settings import Calibration, Quantizer


@dataclasses.dataclass(frozen=True)
class Variant:
    allocator: str = "global"
    calibrated_on: str = "text"  # "text" | "other" | "sample" | "ebss"
    affinity: str = "gate"
    router: str = "qesc"
    layout: str = "grouped"
    feedback: bool = True
    tuned: bool = False

    def path(self, folder: Path, bits: float) -> Path:
        return folder / f"{bits:g}-{'-'.join(str(value) for value in vars(self).values())}.gguf"


PRODUCT = tuple(
    Variant(allocator, calibrated_on, affinity, router)
    for allocator, calibrated_on, affinity, router in itertools.product(
        ("uniform", "pmq", "global"), ("text", "ebss"), ("none", "gate", "gate2"), ("qesc", "none")
    )
)
BESIDE = (
    Variant(tuned=True),
    Variant(calibrated_on="sample"),
)
MORE = (
    Variant(calibrated_on="other"),
    Variant(router="none", feedback=False),
    Variant(layout="stock"),
)


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--calibration-text", type=click.Path(exists=True, path_type=Path), multiple=True)
@click.option("--other-text", type=click.Path(exists=True, path_type=Path), multiple=True, help="Of another domain.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), multiple=True, help="[default: CPython's own]")
@click.option("--bits", default="2.06,2.3,2.54,3.03,3.5", show_default=True)
@click.option("--more-at", default=2.54, show_default=True, help="Of these bits, more variants.")
@click.option("--seed", default=0, show_default=True, help="Of all calibrations.")
@click.option("--chunks", default=16, show_default=True, help="Of 512 tokens, of each text.")
def main(
    model: str,
    folder: Path,
    calibration_text: tuple[Path, ...],
    other_text: tuple[Path, ...],
    text: tuple[Path, ...],
    bits: str,
    more_at: float,
    seed: int,
    chunks: int,
) -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in text} or {"CPython": held_out_text(chunks * 3000)}
    calibrations = {
        "text": Calibration(text_paths=calibration_text, seed=seed),
        "other": Calibration(text_paths=other_text, seed=seed),
        "sample": Calibration(writer="sample", seed=seed),
        "ebss": Calibration(writer="ebss", seed=seed),
    }
    folder.mkdir(parents=True, exist_ok=True)
    base = write_float(model, folder / "base.gguf")
    names = [field.name.replace("_", " ") for field in dataclasses.fields(Variant)]
    heads = "".join(f" {name}: KLD | perplexity | same top |" for name in texts)
    click.echo(f"| bits | bytes | {' | '.join(names)} |{heads} mean KLD |")
    click.echo("|---:|---:|" + "---|" * len(names) + "---:|" * (3 * len(texts) + 1))
    measured: dict[Path, list[Evaluation]] = {}
    for wanted in (float(x) for x in bits.split(",")):
        for variant in PRODUCT + BESIDE + (MORE if wanted == more_at else ()):
            if variant.calibrated_on == "other" and not other_text:
                continue
            values = [str(value) for value in vars(variant).values()]
            path = variant.path(folder, wanted)
            if variant in PRODUCT and variant.router == "none":
                with_qesc = dataclasses.replace(variant, router="qesc").path(folder, wanted)
                if not any(read_gguf(with_qesc).kv[ROUTER_KEY]):
                    path = with_qesc
            if not path.exists():
                convert(
                    model,
                    path,
                    bits=wanted,
                    layout=variant.layout,
                    allocator=variant.allocator,
                    quantizer=Quantizer(
                        feedback=variant.feedback,
                        affinity=variant.affinity,
                        router=variant.router,
                        tuning=variant.tuned,
                    ),
                    calibration=calibrations[variant.calibrated_on],
                    work_folder=folder / f"calibrated-on-{variant.calibrated_on}",
                )
            if path not in measured:
                measured[path] = [
                    evaluate(base, [path], part, max_chunks=chunks, n_threads=available_cores())[0]
                    for part in texts.values()
                ]
            found = measured[path]
            cells = "".join(f" {e.kld_mean:.5f} | {e.perplexity:.3f} | {e.same_top:.1%} |" for e in found)
            mean = sum(e.kld_mean for e in found) / len(found)
            click.echo(f"| {wanted:g} | {path.stat().st_size:,} | {' | '.join(values)} |{cells} {mean:.5f} |")


if __name__ == "__main__":
    main()
