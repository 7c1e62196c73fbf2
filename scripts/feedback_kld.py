#!/usr/bin/env python3
"""What error feedback is worth: all experts at one type, everything else BF16, against ggml's encoder.

    python scripts/feedback_kld.py --calib calib.txt --eval eval.txt -- IQ2_XXS IQ3_XXS Q4_K

One line per type: mean KL divergence from BF16 with ggml's encoder and an importance matrix, and for each affinity
error feedback's share of it; perplexity's rise likewise. --eval files count alike, a few chunks of each.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from moe2gguf.codec import CODECS
from moe2gguf.encode_experts import encode_experts
from moe2gguf.evaluate import Evaluation, evaluate
from moe2gguf.ggml import QuantType
from moe2gguf.gguf_file import Target, write_gguf
from moe2gguf.llama import available_cores
from moe2gguf.pipeline import calibrated, write_float
from moe2gguf.quantize import FilePlan, TensorPlan, encode_tensors
from moe2gguf.run import Run
from moe2gguf.runtime import tool
from moe2gguf.settings import AFFINITIES, AFFINITY, Calibration
from moe2gguf.source import Source, open_source
from moe2gguf.spool import Spool
from moe2gguf.stats import CalibrationStats
from moe2gguf.stream import LayerStream

CHUNK_CHARACTERS = 3000  # more than 512 tokens of any text in the demo's vocabulary


def uniform_plan(source: Source, stats: CalibrationStats, quant_type: QuantType) -> FilePlan:
    plans = []
    for tensor in source.tensors:
        plan = TensorPlan(tensor.name, tensor, quant_type if tensor.quantisable else QuantType.F32, None)
        if not plan.expert_matrices:
            plans.append(plan if not tensor.quantisable else dataclasses.replace(plan, quant_type=QuantType.BF16))
            continue
        layer = stats.layers[int(tensor.name.split(".")[1])]
        down = plan.expert_matrices == ("down",)
        importance_EK = layer.importance_down_EI if down else layer.importance_gate_up_ED
        plans.append(dataclasses.replace(plan, importance_EK=importance_EK))
    return FilePlan(tuple(plans), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", type=lambda name: QuantType[name.upper()], default=list(CODECS))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", type=Path, nargs="+", required=True)
    parser.add_argument("--eval", type=Path, nargs="+", required=True)
    parser.add_argument("--affinity", nargs="+", choices=AFFINITIES, default=[AFFINITY])
    parser.add_argument("--sequences", type=int, default=128, help="of 512 tokens, of calibration text")
    parser.add_argument("--chunks", type=int, default=16, help="of 512 tokens, from each --eval file")
    parser.add_argument(
        "--exact", action="store_true", help="run the values in F32, without the type's own kernel's 8-bit activations"
    )
    parser.add_argument("--work", type=Path, default=Path("feedback-out"))
    arguments = parser.parse_args()

    source, n_threads = open_source(arguments.model), available_cores()
    calibration = Calibration(tuple(arguments.calib), n_sequences=arguments.sequences)
    stats = calibrated(source, calibration, Run(arguments.work, n_threads))
    base = arguments.work / "base.gguf"
    if not base.exists():
        write_float(arguments.model, base)
    text = "".join(path.read_text(encoding="utf-8")[: arguments.chunks * CHUNK_CHARACTERS] for path in arguments.eval)

    def evaluated(plan: FilePlan, spool: Spool | None) -> Evaluation:
        path = arguments.work / "candidate.gguf"
        encoded = encode_tensors(plan, n_threads, lambda *_: None, spool)
        write_gguf(source, plan, encoded, {}, Target(path, overwrite=True))
        if arguments.exact:
            quantised, path = path, path.with_name("exact.gguf")
            subprocess.run(
                [tool("llama-quantize"), "--allow-requantize", quantised, path, "F32"], check=True, capture_output=True
            )
        return evaluate(base, [path], text, max_chunks=arguments.chunks * len(arguments.eval))[0]

    print(
        "type     ggml KLD              perplexity    "
        + "".join(f"  {a:>5}: KLD            rise of ppl   kept" for a in arguments.affinity)
    )
    for quant_type in arguments.types:
        plan = uniform_plan(source, stats, quant_type)
        ggml = evaluated(plan, None)
        rise = ggml.perplexity - ggml.base_perplexity
        line = (
            f"{quant_type.name:8} {ggml.kld_mean:.5f} ± {ggml.kld_error:.5f}   {ggml.base_perplexity:.3f} +{rise:.3f}"
        )
        for affinity in arguments.affinity:
            spool = Spool(arguments.work / f"{quant_type.name}-{affinity}")
            encode_experts(
                LayerStream(source.path),
                stats.tokens_SL,
                plan.expert_types(stats.layers),
                spool,
                affinity=affinity,
                device=torch.device("cpu"),
                n_threads=n_threads,
                progress=lambda *_: None,
                output_moments=stats.output_moments,
            )
            kept = Counter(outcome.damping is not None for outcome in spool.outcomes())
            found = evaluated(plan, spool)
            spool.remove()
            line += f"      {found.kld_mean / ggml.kld_mean:.3f}x ± {found.kld_error / ggml.kld_mean:.3f}"
            line += f"      {(found.perplexity - found.base_perplexity) / rise:.3f}x    {kept[True]}/{kept.total()}"
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
