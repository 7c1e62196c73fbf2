#!/usr/bin/env python3
"""Seconds that one layer of a model's shape takes, forward, and forward and back, in float32 and in bfloat16.

    python scripts/layer_time.py scripts/configs/qwen3_30b_a3b.json [--tokens 4096] [--length 512] [--rounds 3]

Random weights, as the stream runs them; the least of the rounds.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from planned_and_taken import write_checkpoint

from moe2gguf.dtypes import DTYPES
from moe2gguf.stream import LayerStream


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", default=4096, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(config: Path, tokens: int, length: int, rounds: int) -> None:
    hidden = json.loads(config.read_text())["hidden_size"]
    x_BLD = torch.randn(tokens // length, length, hidden, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(config, checkpoint := Path(folder) / config.stem, 1, 0)
        times = {name: _times(LayerStream(checkpoint, dtype), x_BLD, rounds) for name, dtype in DTYPES.items()}
    for what, exact, rounded in zip(("forward", "forward and back"), *times.values(), strict=True):
        print(f"{what}: f32 {exact:.2f} s, bf16 {rounded:.2f} s, {rounded / exact:.2f}")


def _times(stream: LayerStream, x_BLD: torch.Tensor, rounds: int) -> tuple[float, float]:
    given_BLD = x_BLD.clone().requires_grad_(True)
    with stream.layer(0) as layer:
        return (
            min(_seconds(lambda: stream.run(0, layer, x_BLD)) for _ in range(rounds)),
            min(_seconds(lambda: stream.apply(0, layer, given_BLD).sum().backward()) for _ in range(rounds)),
        )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
