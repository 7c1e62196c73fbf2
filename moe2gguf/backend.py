"""Where the arithmetic runs: Triton kernels for tensors on a CUDA device, torch and what numba compiles for others.

The only importer of moe2gguf_kernels. Shapes: see moe2gguf.codec, moe2gguf.feedback and moe2gguf.moments.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moe2gguf import moments as plain_moments
from moe2gguf import walk as plain_walk
from moe2gguf.codec import CODECS, Codec, Fields
from moe2gguf.errors import DeviceError
from moe2gguf.ggml import QuantType
from moe2gguf.walk import Tries, Walked

if TYPE_CHECKING:
    from moe2gguf_kernels.layout import Layout

NO_TRITON = "triton is not installed; pip install 'moe2gguf[gpu]', or take --device cpu"


def device(name: str, note: Callable[[str], None] = lambda _: None) -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:<number>"; "auto" notes why it is not a GPU where it is not.

    Raises DeviceError where an explicitly named GPU cannot be used, or the name is none of these.
    """
    kind, _, number = name.partition(":")
    if name in ("auto", "cpu"):
        missing = _missing(0) if name == "auto" else None
        if missing:
            note(f"computing on the CPU: {missing}")
        return torch.device("cpu" if name == "cpu" or missing else "cuda:0")
    if kind != "cuda" or (name != "cuda" and not number.isdecimal()):
        raise DeviceError(f"there is no device {name!r}; it is auto, cpu, cuda or cuda:<number>")
    index = int(number or 0)
    if missing := _missing(index):
        raise DeviceError(f"{name} cannot be used: {missing}")
    return torch.device("cuda", index)


def _missing(index: int) -> str | None:
    """What keeps the kernels from running on this GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install one that has it, see https://pytorch.org/get-started"
    if not torch.cuda.is_available():
        return "torch finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu"
    if index >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} GPUs, numbered from 0"
    return None if importlib.util.find_spec("triton") else NO_TRITON


def has_kernels(x: torch.Tensor) -> bool:
    """Whether the kernels compute on this tensor. Raises DeviceError where they should and triton is missing."""
    if not x.is_cuda:
        return False
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(NO_TRITON)
    return True


@functools.cache
def layout(quant_type: QuantType, device: torch.device) -> "Layout":
    from moe2gguf_kernels.layout import layout

    codec = CODECS[quant_type]
    return layout(
        codec.block_weights,
        codec.block_bytes,
        codec.codebook_GW,
        codec.sub_scale_Q,
        codec.sub_offset_Q,
        vars(codec.places),
        device,
    )


def pack(codec: Codec, fields: Fields) -> torch.Tensor:
    """moe2gguf.codec.Codec.pack, on the device of its arguments: uint8 (R, B)"""
    arguments = (*vars(fields).values(), layout(codec.quant_type, fields.codes_RC.device))
    if has_kernels(fields.codes_RC):
        from moe2gguf_kernels import pack as triton_pack

        return triton_pack.pack(*arguments)
    if fields.codes_RC.is_cpu:
        from moe2gguf_kernels import pack_cpu

        return pack_cpu.pack(*arguments)
    return codec.pack(fields)


def decode(codec: Codec, blocks_RB: torch.Tensor) -> torch.Tensor:
    """uint8 (R, B) -> f32 (R, S)"""
    if not has_kernels(blocks_RB):
        return codec.decode(blocks_RB)
    from moe2gguf_kernels.decode import decode

    return decode(blocks_RB, layout(codec.quant_type, blocks_RB.device))


def walk(codec: Codec, target_TEN: torch.Tensor, tries: Tries, factor_ETT: torch.Tensor) -> Walked:
    """moe2gguf.walk.walk, on the device of its arguments."""
    arguments = (target_TEN, tries.scale_JEN, tries.offset_JEN, factor_ETT, layout(codec.quant_type, target_TEN.device))
    if has_kernels(target_TEN):
        from moe2gguf_kernels import walk as triton_walk

        return Walked(*triton_walk.walk(*arguments))
    if target_TEN.is_cpu:
        from moe2gguf_kernels import walk_cpu

        return Walked(*walk_cpu.walk(*arguments))
    return plain_walk.walk(codec, target_TEN, tries, factor_ETT)


def moments(
    x_TK: torch.Tensor,
    token_n: torch.Tensor,
    offset_E1: torch.Tensor,
    weight_n: torch.Tensor,
    other_SM: torch.Tensor | None = None,
    slot_n: torch.Tensor | None = None,
    total_EMK: torch.Tensor | None = None,
) -> torch.Tensor:
    """moe2gguf.moments.moments, on the device of its arguments: f32 (E, M, K)"""
    if not has_kernels(x_TK):
        return plain_moments.moments(x_TK, token_n, offset_E1, weight_n, other_SM, slot_n, total_EMK)
    from moe2gguf_kernels.moments import moments

    return moments(x_TK, token_n, offset_E1, weight_n, other_SM, slot_n, total_EMK)
