#!/usr/bin/env python3
"""What a conversion takes, beside what its plan says: peak memory and time of calibration and of quantisation.

    python scripts/planned_and_taken.py scripts/configs/olmoe.json out/ --layers 2 --text FILE [-- --sequences 64 …]

On a checkpoint of random weights in the shape of CONFIG, cut to so many layers; made in out/ unless it is there. What
stands after `--` goes to both commands. Memory is the most a process ever holds, pages of mapped files among it.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from plan_from_config import write_skeleton

from moe2gguf.child import run_child

CHUNK_WEIGHTS = 1 << 24


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--layers", type=int, required=True)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--bits", default=2.54, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(config: Path, folder: Path, layers: int, text: Path, bits: float, seed: int, options: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, work = folder / f"{config.stem}-{layers}", folder / "work"
    if not checkpoint.exists():
        write_checkpoint(config, checkpoint, layers, seed)
    n_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    print(f"{checkpoint}: {n_bytes / 1e9:.2f} GB")

    def moe2gguf(*words: object) -> tuple[str, float, int]:
        command = [sys.executable, "-m", "moe2gguf.cli", *words, "--text", text, "--work", work, *options]
        done = run_child(command, folder / "log", what=str(words[0]))
        return done.output, done.seconds, done.peak_rss_bytes

    convert = "convert", checkpoint, "--bits", bits, "--outfile", folder / "model.gguf", "--force"
    plan, _, _ = moe2gguf(*convert, "--dry-run")
    print("\n".join(line for line in plan.splitlines() if line.startswith(("memory", "time"))))
    for what, words in (("calibration", ("calibrate", checkpoint)), ("quantisation", convert)):
        _, seconds, peak_rss_bytes = moe2gguf(*words)
        print(f"{what}: {peak_rss_bytes / 2**30:.2f} GiB, {seconds / 60:.1f} min", flush=True)


def write_checkpoint(config: Path, checkpoint: Path, layers: int, seed: int) -> None:
    """Norms of ones; matrices that keep their inputs' size."""
    with tempfile.TemporaryDirectory() as other:
        cut = Path(other) / config.name
        cut.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers}))
        unfinished = write_skeleton(cut, checkpoint.with_name(f"{checkpoint.name}.part"))
    generator = torch.Generator().manual_seed(seed)
    path = unfinished / "model.safetensors"
    with path.open("rb") as file:
        header_bytes = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(header_bytes))
    data = np.memmap(path, np.uint16, "r+", offset=8 + header_bytes)
    for tensor in header.values():
        first, last = (offset // 2 for offset in tensor["data_offsets"])
        for start in range(first, last, CHUNK_WEIGHTS):
            values = torch.ones(min(CHUNK_WEIGHTS, last - start))
            if len(tensor["shape"]) > 1:
                values = values.normal_(generator=generator) / tensor["shape"][-1] ** 0.5
            data[start : start + len(values)] = values.bfloat16().view(torch.uint16).numpy()
    data.flush()
    unfinished.rename(checkpoint)


if __name__ == "__main__":
    main()
