#!/usr/bin/env python3
"""Error feedback's output error over ggml's encoder's, on Gaussian weights and inputs correlated more and more.

    python scripts/feedback_error.py IQ2_XXS Q4_K

256 x 1024 weights; 4096 inputs whose spectrum falls as i^-p in directions that are no column's; ggml gets the
diagonal of their second moments as importance. A column for each p.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from moe2gguf import feedback, ggml
from moe2gguf.codec import CODECS
from moe2gguf.ggml import QuantType
from moe2gguf.llama import available_cores

N_ROWS, N_COLUMNS, N_TOKENS = 256, 1024, 4096
POWERS = (0.0, 0.5, 1.0)
DAMPING = 0.01


def second_moments(power: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    basis_KK = np.linalg.qr(rng.standard_normal((N_COLUMNS, N_COLUMNS)))[0]
    spread_K = np.arange(1, N_COLUMNS + 1.0) ** (-power / 2)
    x_TK = rng.standard_normal((N_TOKENS, N_COLUMNS)) * spread_K @ basis_KK.T
    return (x_TK.T @ x_TK / N_TOKENS).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", type=lambda name: QuantType[name.upper()], default=list(CODECS))
    arguments = parser.parse_args()
    weight_NK = np.random.default_rng(0).standard_normal((N_ROWS, N_COLUMNS)).astype(np.float32)
    hessians = [second_moments(power) for power in POWERS]
    print("type     " + "".join(f"  p={power:g}".ljust(8) for power in POWERS))
    with ThreadPoolExecutor(available_cores()) as pool:
        for quant_type in arguments.types:

            def error(blocks_NB: np.ndarray, hessian_KK: np.ndarray, quant_type: QuantType = quant_type) -> float:
                miss_NK = ggml.decode(blocks_NB, quant_type, N_COLUMNS) - weight_NK
                return float((miss_NK @ hessian_KK * miss_NK).sum())

            line = f"{quant_type.name:9}"
            for hessian_KK in hessians:
                plain_NB = ggml.encode(weight_NK, quant_type, hessian_KK.diagonal().copy())
                costs = feedback.curvature(torch.from_numpy(hessian_KK)[None], DAMPING)
                found_NB = feedback.quantize(torch.from_numpy(weight_NK)[None], quant_type, costs, pool)[0].numpy()
                line += f"  {error(found_NB, hessian_KK) / error(plain_NB, hessian_KK):.2f}  "
            print(line, flush=True)


if __name__ == "__main__":
    main()
