"""What a model is run in while it is calibrated and quantised: products in float32, or in bfloat16 as it was trained.

A processor with units for bfloat16 computes it two to eight times as fast; others do not, and some virtual machines
advertise such units and trap on their instructions. So it is tried, once, in a process of its own.
"""

import dataclasses
import functools
import subprocess
import sys

import torch
from safetensors import safe_open

from moe2gguf.errors import DeviceError
from moe2gguf.settings import Calibration
from moe2gguf.source import Source

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# of models with so many parameters products take hours; below, nobody need think of rounding
BF16_PARAMS = 1e9
# how many times as fast bfloat16 is at least, to be chosen
FASTER = 1.3
# prints that
_PROGRAM = """
import time, torch

def seconds(dtype):
    x, found = torch.ones(512, 1024, dtype=dtype), []
    for _ in range(8):
        start = time.perf_counter()
        x @ x.T
        found.append(time.perf_counter() - start)
    return min(found)

print(seconds(torch.float32) / seconds(torch.bfloat16))
"""


def settled(calibration: Calibration, source: Source, device: torch.device) -> Calibration:
    """With a key of DTYPES for its "auto". Raises DeviceError where the processor cannot compute what is asked for."""
    if calibration.dtype == "bf16" and device.type == "cpu" and not speed_of_bf16():
        raise DeviceError("this machine fails to multiply in bfloat16; take --dtype f32")
    if calibration.dtype != "auto":
        return calibration
    is_large = source.n_params >= BF16_PARAMS and stored_in_bf16(source)
    return dataclasses.replace(calibration, dtype="bf16" if is_large and _is_faster(device) else "f32")


def _is_faster(device: torch.device) -> bool:
    # GPUs that the kernels run on have units for it
    return device.type == "cuda" or speed_of_bf16() >= FASTER


def stored_in_bf16(source: Source) -> bool:
    """By its configuration, where transformers wrote it under either of two names; without, by its tensors."""
    said = source.hparams.get("dtype") or source.hparams.get("torch_dtype")
    if said is not None:
        return "bfloat16" in str(said)
    with safe_open(min(source.path.glob("model*.safetensors")), framework="pt") as shard:
        return any(shard.get_slice(name).get_dtype() == "BF16" for name in shard.keys())  # noqa: SIM118 (no iterator)


@functools.cache
def speed_of_bf16() -> float:
    """Of products, over float32's; 0 where they end the process."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else 0.0
