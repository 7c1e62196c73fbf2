#!/usr/bin/env python3
"""Parameters per second of error feedback against ggml's encoder (llama-quantize's), on all cores, alternating.

    python scripts/bench_quantisers.py IQ2_XXS Q4_K

Experts of Qwen3-30B-A3B's shape: gate and up 768 x 2048, which share a Hessian, and down 2048 x 768. Feedback's time
includes factoring the Hessians; "by rows" those make up for each other too, and what tells how is factored as well: for
each gate and up, and for down projections once in a layer of 128 experts, whose share of that counts. The ratios are
medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from moe2gguf import feedback, ggml
from moe2gguf.codec import CODECS
from moe2gguf.ggml import QuantType
from moe2gguf.llama import available_cores

N_EXPERTS, N_HIDDEN, N_INTERMEDIATE, N_LAYER_EXPERTS = 4, 2048, 768, 128
DAMPING = 0.03


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", type=lambda name: QuantType[name.upper()], default=list(CODECS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rng = torch.Generator().manual_seed(0)
    gate_up_EMIK = torch.randn(N_EXPERTS, 2, N_INTERMEDIATE, N_HIDDEN, generator=rng)
    down_EMDI = torch.randn(N_EXPERTS, 1, N_HIDDEN, N_INTERMEDIATE, generator=rng)
    hessians = [second_moments(weight_EMNK.shape[3], rng) for weight_EMNK in (gate_up_EMIK, down_EMDI)]
    weights = [gate_up_EMIK, down_EMDI]
    gate_up_EMII = second_moments(N_INTERMEDIATE, rng, 2 * N_EXPERTS).unflatten(0, (-1, 2))
    down_1DD = second_moments(N_HIDDEN, rng, 1)
    down_feedback_EMDD = feedback.row_feedback(down_1DD).expand(N_EXPERTS, 1, -1, -1)
    n_million = sum(weight_EMNK.numel() for weight_EMNK in weights) / 1e6

    print(f"type      ggml M/s  feedback M/s  ratio  by rows M/s  ratio  ({available_cores()} threads)")
    with ThreadPoolExecutor(available_cores()) as pool:
        for quant_type in arguments.types:

            def plain(quant_type: QuantType = quant_type) -> None:
                def encode(job: tuple[torch.Tensor, torch.Tensor]) -> None:
                    ggml.encode(job[0].flatten(0, 1).numpy(), quant_type, job[1].diagonal().numpy())

                jobs = [job for pair in zip(weights, hessians, strict=True) for job in zip(*pair, strict=True)]
                list(pool.map(encode, jobs))

            def fed_back(quant_type: QuantType = quant_type) -> None:
                for weight_EMNK, hessian_EKK in zip(weights, hessians, strict=True):
                    costs = feedback.curvature(hessian_EKK, DAMPING, pool)
                    feedback.quantize(weight_EMNK.flatten(1, 2), quant_type, costs, pool)

            def by_rows(quant_type: QuantType = quant_type) -> None:
                gate_up_feedback_EMII = torch.stack(list(pool.map(feedback.row_feedback, gate_up_EMII)))
                feedbacks = [gate_up_feedback_EMII, down_feedback_EMDD]
                for weight_EMNK, hessian_EKK, feedback_EMNN in zip(weights, hessians, feedbacks, strict=True):
                    costs = feedback.curvature(hessian_EKK, DAMPING, pool)
                    feedback.quantize_by_rows(weight_EMNK, quant_type, costs, feedback_EMNN, pool)

            # builds the codebook's tables, and compiles
            ggml.encode(gate_up_EMIK[0, 0, :1].numpy(), quant_type, hessians[0][0].diagonal().numpy())
            few = feedback.curvature(hessians[1][:1, :256, :256], DAMPING)
            feedback.quantize(down_EMDI[:1, 0, :2, :256], quant_type, few, pool)
            shared = timed(lambda: feedback.row_feedback(down_1DD)) * N_EXPERTS / N_LAYER_EXPERTS
            rounds = [(timed(plain), timed(fed_back), timed(by_rows) + shared) for _ in range(arguments.rounds)]
            rates = [n_million / statistics.median(times) for times in zip(*rounds, strict=True)]
            ratios = [statistics.median(times[0] / times[i] for times in rounds) for i in (1, 2)]
            figures = f"{rates[0]:9.2f} {rates[1]:13.2f} {ratios[0]:6.2f} {rates[2]:12.2f} {ratios[1]:6.2f}"
            print(f"{quant_type.name:8} {figures}", flush=True)


def second_moments(n_columns: int, rng: torch.Generator, n_experts: int = N_EXPERTS) -> torch.Tensor:
    """Of twice as many tokens as columns, with a spectrum that falls as activations' do: f32 (E, K, K)."""
    x_EnK = torch.randn(n_experts, 2 * n_columns, n_columns, generator=rng) * torch.arange(1, n_columns + 1) ** -0.25
    return x_EnK.mT @ x_EnK


if __name__ == "__main__":
    main()
