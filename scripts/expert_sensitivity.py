"""What each expert's quantisation really costs, against what the probes and the gradient say.

One matrix of one expert at a time is quantised in the whole model, with ggml's encoder, and the KL divergence of that
is measured on the probes' tokens. The table has, for each layer and projection, the rank correlation of that over the
experts with their costs by errors, and by the loss's gradient; and the sum of the latter over what the probe measured.

    python scripts/expert_sensitivity.py demo out/ --calibration-text FILE … [--layers 0,4]
"""

from pathlib import Path

import click
import numpy as np
import scipy.stats
import torch
import transformers

from moe2gguf import ggml
from moe2gguf.experts import find_experts
from moe2gguf.ggml import QuantType
from moe2gguf.llama import available_cores
from moe2gguf.pipeline import calibrated
from moe2gguf.run import Run
from moe2gguf.settings import Calibration
from moe2gguf.source import open_source

BATCH_SEQUENCES = 4


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--calibration-text", type=click.Path(exists=True, path_type=Path), multiple=True)
@click.option("--layers", default="", help="[default: all]")
@click.option("--quant-type", default="IQ2_XXS", show_default=True, help="One that experts are probed with.")
@torch.inference_mode()
def main(model: str, folder: Path, calibration_text: tuple[Path, ...], layers: str, quant_type: str) -> None:
    source, chosen = open_source(model), QuantType[quant_type]
    calibration = Calibration(text_paths=calibration_text, sensitivity="gradient")
    stats = calibrated(source, calibration, Run(folder / "work", available_cores(), note=click.echo))
    n_sequences, length = stats.tokens_SL.shape
    probed = np.linspace(0, n_sequences - 1, stats.n_probe_tokens // length).round().astype(int)
    batches = torch.from_numpy(stats.tokens_SL[probed]).long().split(BATCH_SEQUENCES)
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    clean = [whole(tokens_BL).logits.log_softmax(-1) for tokens_BL in batches]

    def measured_kl() -> float:
        pairs = zip(clean, batches, strict=True)
        kls = [(c.exp() * (c - whole(tokens_BL).logits.log_softmax(-1))).sum(-1).flatten() for c, tokens_BL in pairs]
        return float(torch.cat(kls).mean(dtype=torch.float64))

    click.echo("| layer | projection | rank correlation: errors | gradient | sum over experts: gradient / probe |")
    click.echo("|---:|---|---:|---:|---:|")
    for index in [int(x) for x in layers.split(",")] if layers else sorted(stats.layers):
        block = find_experts(whole.model.layers[index])
        assert block is not None
        of_layer = stats.layers[index]
        for projection, get, put, importance_EK in (
            ("gate_up", block.gate_up, block.set_gate_up, of_layer.importance_gate_up_ED),
            ("down", block.down, block.set_down, of_layer.importance_down_EI),
        ):
            errors = stats.errors[f"layers.{index}.{projection}"]
            assert errors.graded_EJ is not None
            j, probe = stats.types.index(chosen), errors.probe_kl[errors.probe_types.index(chosen)]
            kl_E = []
            for expert in range(block.n_experts):
                exact = get(expert).clone()
                put(expert, torch.from_numpy(ggml.round_trip(exact.numpy(), chosen, importance_EK[expert])))
                kl_E.append(measured_kl())
                put(expert, exact)
            ranks = [scipy.stats.spearmanr(kl_E, cost[:, j]).statistic for cost in (errors.error_EJ, errors.graded_EJ)]
            click.echo(
                f"| {index} | {projection} | {ranks[0]:.2f} | {ranks[1]:.2f} | "
                f"{errors.graded_EJ[:, j].sum() / probe:.2f} |"
            )


if __name__ == "__main__":
    main()
