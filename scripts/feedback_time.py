#!/usr/bin/env python3
"""Where error feedback's time goes: nanoseconds of one thread per weight, each row for itself.

    python scripts/feedback_time.py IQ2_S Q6_K

What all types have in common, of one Hessian of 2048 columns for 1536 rows; then passes over one block, by type.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from moe2gguf import backend, feedback, passes
from moe2gguf.codec import CODECS
from moe2gguf.factors import inverse
from moe2gguf.ggml import QuantType
from moe2gguf.walk import feed_back, product

N_COLUMNS, N_ROWS, BLOCK_COLUMNS = 2048, 1536, 256
DAMPING = 0.03


def nanoseconds(work: Callable[[], object], n_weights: int, n_times: int = 3) -> float:
    work()
    start = time.perf_counter()
    for _ in range(n_times):
        work()
    return (time.perf_counter() - start) / n_times / n_weights * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", type=lambda name: QuantType[name.upper()], default=list(CODECS))
    types = parser.parse_args().types
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x_nK = torch.randn(2 * N_COLUMNS, N_COLUMNS, generator=rng) * torch.arange(1, N_COLUMNS + 1) ** -0.25
    hessian_EKK = (x_nK.T @ x_nK)[None]
    costs = feedback.curvature(hessian_EKK, DAMPING)
    weight_KEN = torch.randn(N_COLUMNS, 1, N_ROWS, generator=rng)
    owns = [slice(start, start + BLOCK_COLUMNS) for start in range(0, N_COLUMNS, BLOCK_COLUMNS)]

    def products() -> None:
        for own in owns:
            product(costs.hessian_EKK[:, own], weight_KEN)

    def feeding_back() -> None:
        left_KEN = weight_KEN.clone()
        for own in owns:
            feed_back(left_KEN[own.start :], weight_KEN[own], costs.root_EKK[:, own, own.start :])

    for name, work in (
        ("factoring", lambda: feedback.curvature(hessian_EKK, DAMPING)),
        ("products with the Hessian, a sweep", products),
        ("feeding back", feeding_back),
    ):
        print(f"{name:34} {nanoseconds(work, weight_KEN.numel()):6.1f}")
    for quant_type in types:
        codec = CODECS[quant_type]
        own = slice(0, codec.block_weights)
        weight_SEN, hessian_ESS = weight_KEN[own].contiguous(), costs.hessian_EKK[:, own, own].contiguous()
        factor_ESS = inverse(costs.root_EKK[:, own, own])
        block, found_SEN, _ = backend.first_pass(codec, weight_SEN, factor_ESS)
        slope_SEN = product(hessian_ESS, found_SEN - weight_SEN)
        first_pass = partial(backend.first_pass, codec, weight_SEN, factor_ESS)
        factor_EPTT = passes.sub_factors(codec, hessian_ESS)
        sweep = partial(backend.sweep, codec, block, found_SEN, slope_SEN, hessian_ESS, factor_EPTT)
        first, again = (nanoseconds(work, weight_SEN.numel()) for work in (first_pass, sweep))
        print(f"{quant_type.name:8} first pass {first:6.1f}  a sweep {again:6.1f}", flush=True)


if __name__ == "__main__":
    main()
