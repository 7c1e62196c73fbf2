"""How fast the kernels quantise on a GPU, by type, against what its memory and arithmetic allow.

    make bench-gpu          or: python scripts/bench_kernels.py [TYPE ...] [--device cuda:0]

For each type: weights a second through quantising with feedback, whole and for the walk alone; the walk's share of the
floor; and what that makes for the experts of Mixtral-8x7B and Qwen3-30B-A3B. The floor is the larger of two times: to
read the targets and write codes and errors once, and to compute every distance (or, with levels, every candidate).
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import click
import torch

from moe2gguf import backend, feedback
from moe2gguf.codec import CODECS, Codec
from moe2gguf.errors import DeviceError
from moe2gguf.factors import inverse
from moe2gguf.ggml import QuantType
from moe2gguf.walk import Tries

N_EXPERTS, N_ROWS, N_COLUMNS = 8, 4096, 2048
REPEATS = 3
# an H100 SXM's data sheet: HBM3, and f32 multiply-adds outside the tensor cores
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 3.35e12, 33.5e12
# a product of depth 16 on tensor cores runs beside them; a comparison and two selections do not
OPERATIONS_PER_DISTANCE = 4
# the feedback of half a sub-block on average, and some twenty for the nearest level and two divisions
OPERATIONS_PER_LEVEL = 36
# experts' weights: layers * experts * 3 matrices
MODELS = {"Mixtral-8x7B": 32 * 8 * 3 * 4096 * 14336, "Qwen3-30B-A3B": 48 * 128 * 3 * 2048 * 768}


def seconds(function: Callable[[], object]) -> float:
    """The least of some runs after one that compiles."""
    function()
    taken = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def floor_seconds(codec: Codec, n_weights: int, n_tries: int) -> float:
    """Of one walk."""
    n_bytes = n_weights * (4 + 4 + 4 / codec.width + codec.has_signs)
    per_weight = OPERATIONS_PER_LEVEL
    if codec.width > 1:
        per_weight = OPERATIONS_PER_DISTANCE * len(codec.codebook_GW) / codec.width
    return max(n_bytes / BYTES_PER_SECOND, n_tries * n_weights * per_weight / OPERATIONS_PER_SECOND)


def measure(codec: Codec, device: torch.device) -> tuple[float, float, float]:
    """Seconds of quantising all columns, of one walk, and the least one walk can take."""
    generator = torch.Generator(device).manual_seed(0)
    weight_ENK = torch.randn(N_EXPERTS, N_ROWS, N_COLUMNS, device=device, generator=generator)
    x_ETK = torch.randn(N_EXPERTS, 2 * N_COLUMNS, N_COLUMNS, device=device, generator=generator)
    costs = feedback.curvature(x_ETK.mT @ x_ETK, 0.01)
    with ThreadPoolExecutor(1) as pool:
        whole = seconds(lambda: feedback.quantize(weight_ENK, codec.quant_type, costs, pool))
    n_sub, n_tries = codec.sub_weights, 5
    target_TEN = weight_ENK[..., :n_sub].permute(2, 0, 1).contiguous()
    scale_JEN = torch.full((n_tries, N_EXPERTS, N_ROWS), 0.1, device=device)
    factor_ETT = inverse(costs.root_EKK[:, :n_sub, :n_sub])
    walk = seconds(lambda: backend.walk(codec, target_TEN, Tries(scale_JEN), factor_ETT))
    return whole, walk, floor_seconds(codec, target_TEN.numel(), n_tries)


@click.command(help=__doc__)
@click.argument("types", nargs=-1, type=click.Choice([t.name for t in CODECS]))
@click.option("--device", "name", default="cuda", show_default=True)
def main(types: tuple[str, ...], name: str) -> None:
    try:
        device = backend.device(name)
    except DeviceError as error:
        sys.exit(f"Error: {error}")
    if device.type != "cuda":
        sys.exit(f"Error: the kernels run on a CUDA device, not on {device}")
    models = "  ".join(f"{model:>13}" for model in MODELS)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"{'type':8}  {'weights/s':>10}  {'walk alone':>10}  {'of floor':>8}  {models}")
    for quant_type in [QuantType[t] for t in types] or CODECS:
        codec = CODECS[quant_type]
        whole, walk, floor = measure(codec, device)
        rate = N_EXPERTS * N_ROWS * N_COLUMNS / whole
        walked = N_EXPERTS * N_ROWS * codec.sub_weights / walk
        minutes = "  ".join(f"{n / rate / 60:9.1f} min" for n in MODELS.values())
        print(f"{quant_type.name:8}  {rate:10.2e}  {walked:10.2e}  {floor / walk:8.0%}  {minutes}", flush=True)


if __name__ == "__main__":
    main()
