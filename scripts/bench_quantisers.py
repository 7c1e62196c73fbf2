#!/usr/bin/env python3
"""Parameters per second of error feedback against ggml's encoder (llama-quantize's), on all cores, alternating.

    python scripts/bench_quantisers.py IQ2_XXS Q4_K

Eight experts of Qwen3-30B-A3B's gate shape, 768 x 2048. Feedback's time includes factoring the Hessians. The ratio is
the median over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from moe2gguf import feedback, ggml
from moe2gguf.codec import CODECS
from moe2gguf.ggml import QuantType
from moe2gguf.llama import available_cores

N_EXPERTS, N_ROWS, N_COLUMNS = 8, 768, 2048


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
    weight_ENK = torch.randn(N_EXPERTS, N_ROWS, N_COLUMNS, generator=rng)
    # as many tokens as columns, with a spectrum that falls as activations' do
    x_EnK = torch.randn(N_EXPERTS, 2 * N_COLUMNS, N_COLUMNS, generator=rng) * torch.arange(1, N_COLUMNS + 1) ** -0.25
    hessian_EKK = x_EnK.mT @ x_EnK
    importance_EK = hessian_EKK.diagonal(dim1=1, dim2=2).numpy()

    print(f"type      ggml M/s  feedback M/s  ratio  ({available_cores()} threads)")
    with ThreadPoolExecutor(available_cores()) as pool:
        for quant_type in arguments.types:

            def plain(quant_type: QuantType = quant_type) -> None:
                def encode(weight_NK: torch.Tensor, importance_K: np.ndarray) -> None:
                    ggml.encode(weight_NK.numpy(), quant_type, importance_K)

                list(pool.map(encode, weight_ENK, importance_EK))

            def fed_back(quant_type: QuantType = quant_type) -> None:
                factor_EKK = feedback.inverse_factor(hessian_EKK, 0.03)
                feedback.quantize(weight_ENK, quant_type, factor_EKK, pool)

            ggml.encode(weight_ENK[0, :1].numpy(), quant_type, importance_EK[0])  # builds the codebook's tables
            rounds = [(timed(plain), timed(fed_back)) for _ in range(arguments.rounds)]
            rates = [weight_ENK.numel() / 1e6 / statistics.median(times) for times in zip(*rounds, strict=True)]
            ratio = statistics.median(a / b for a, b in rounds)
            print(f"{quant_type.name:8} {rates[0]:9.2f} {rates[1]:13.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
