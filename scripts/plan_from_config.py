#!/usr/bin/env python3
"""What converting a model takes, from its config.json alone: size by role, memory, disk, and time on this machine.

    python scripts/plan_from_config.py scripts/configs/olmoe.json --bits 2.54

The planner wants a checkpoint, so one is made of holes: the tensors' names and shapes as transformers would save them,
in the header of a sparse file that takes no room. Without a tokenizer beside config.json the bundled model's stands in;
the real one adds its words to the GGUF's header, some MB at most.
"""

import json
import shutil
import struct
import tempfile
from pathlib import Path

import click
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from moe2gguf.plan import make_plan, render_plan
from moe2gguf.settings import Budget, Calibration, Choice
from moe2gguf.source.checkpoint import TOKENIZER_FILES, resolve_model


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bits", type=float, required=True)
@click.option("--layout", type=click.Choice(["grouped", "stock"]), default="grouped", show_default=True)
@click.option("--sequences", default=128, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--own-text", is_flag=True, help="Written by the model.")
@click.option("--name", help="Of the file  [default: the configuration's].")
def main(config: Path, bits: float, layout: str, sequences: int, length: int, own_text: bool, name: str | None) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = write_skeleton(config, Path(parent) / (name or config.stem))
        plan = make_plan(
            str(folder),
            Path(f"{folder.name}-{bits:g}.gguf"),
            Budget(bits),
            Choice(layout),
            # a text, where none is to be written; it is not read
            Calibration(() if own_text else (config,), n_sequences=sequences, sequence_tokens=length),
            work_folder=folder,
            pre_tokenizer=None,
        )
        Console().print(render_plan(plan))


def write_skeleton(config: Path, folder: Path) -> Path:
    """A checkpoint folder whose weights are all holes."""
    folder.mkdir()
    shutil.copy(config, folder / "config.json")
    given = [path for pattern in TOKENIZER_FILES for path in config.parent.glob(pattern)]
    stand_in = resolve_model("demo")
    for path in [*given, *config.parent.glob("tokenizer_config.json")] if given else stand_in.glob("*token*.json"):
        shutil.copy(path, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    saved = revert_weight_conversion(model, dict(model.state_dict()))
    if model.config.tie_word_embeddings:
        saved.pop("lm_head.weight", None)
    header, end = {}, 0
    for tensor_name, tensor in sorted(saved.items()):
        n_bytes = 2 * tensor.numel()
        header[tensor_name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


if __name__ == "__main__":
    main()
