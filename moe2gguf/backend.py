"""Where the arithmetic runs: Triton kernels for tensors on a CUDA device, torch and what numba compiles for others.

The only importer of moe2gguf_kernels. Triton launches on the thread's current GPU, wherever the tensors are, so that is
made theirs. Shapes: see moe2gguf.codec, moe2gguf.feedback and moe2gguf.moments.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moe2gguf import moments as plain_moments
from moe2gguf import passes, scales
from moe2gguf import walk as plain_walk
from moe2gguf.codec import CODECS, Codec, Fields
from moe2gguf.errors import DeviceError
from moe2gguf.experts import CPU
from moe2gguf.ggml import QuantType
from moe2gguf.passes import Blocks
from moe2gguf.walk import Tries, Walked

if TYPE_CHECKING:
    from moe2gguf_kernels.layout import Layout

# of the kernels' products
LEAST_CAPABILITY = (8, 0)
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
        elif name == "auto":
            note("computing on cuda:0, which no test has run on yet; take --device cpu if it fails, and report it")
        return CPU if name == "cpu" or missing else _exact(0)
    if kind != "cuda" or (name != "cuda" and not number.isdecimal()):
        raise DeviceError(f"there is no device {name!r}; it is auto, cpu, cuda or cuda:<number>")
    index = int(number or 0)
    if missing := _missing(index):
        raise DeviceError(f"{name} cannot be used: {missing}")
    return _exact(index)


def _exact(index: int) -> torch.device:
    """A GPU, whose products in f32 are kept from having 11 bits, as some containers set."""
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", index)


def _missing(index: int) -> str | None:
    """What keeps the kernels from running on this GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install one that has it, see https://pytorch.org/get-started"
    if not torch.cuda.is_available():
        return "torch finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu"
    if index >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} GPUs, numbered from 0"
    if (capability := torch.cuda.get_device_capability(index)) < LEAST_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"its compute capability is {found}, the kernels need {needed}; take --device cpu"
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

        with torch.cuda.device_of(fields.codes_RC):
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

    with torch.cuda.device_of(blocks_RB):
        return decode(blocks_RB, layout(codec.quant_type, blocks_RB.device))


def walk(codec: Codec, target_TEN: torch.Tensor, tries: Tries, factor_ETT: torch.Tensor) -> Walked:
    """moe2gguf.walk.walk, on the device of its arguments."""
    arguments = (target_TEN, tries.scale_JEN, tries.offset_JEN, factor_ETT, layout(codec.quant_type, target_TEN.device))
    if has_kernels(target_TEN):
        from moe2gguf_kernels import walk as triton_walk

        with torch.cuda.device_of(target_TEN):
            return Walked(*triton_walk.walk(*arguments))
    if target_TEN.is_cpu:
        from moe2gguf_kernels import walk_cpu

        return Walked(*walk_cpu.walk(*arguments))
    return plain_walk.walk(codec, target_TEN, tries, factor_ETT)


def first_pass(
    codec: Codec, weight_SEN: torch.Tensor, factor_ESS: torch.Tensor
) -> tuple[Blocks, torch.Tensor, torch.Tensor]:
    """moe2gguf.passes.first_pass, on the device of its arguments."""
    # powers of two have no even steps
    if not weight_SEN.is_cpu or codec.places.d is None:
        return passes.first_pass(codec, weight_SEN, factor_ESS, walk)
    from moe2gguf_kernels import passes_cpu

    if codec.has_minimum:
        how, unit = passes_cpu.BY_LINE, 1.0
    elif codec.width > 1:
        how, unit = passes_cpu.BY_CODEBOOK, scales.codebook_unit(codec)
    else:
        how, unit = passes_cpu.BY_TURNED_RANGE if scales.turns_around(codec) else passes_cpu.BY_RANGE, 1.0
    of_type, d_1EN, dmin_1EN = layout(codec.quant_type, weight_SEN.device), None, None
    if scales.has_block_scale(codec):
        cost_SE = factor_ESS.diagonal(dim1=-2, dim2=-1).T ** -2
        (multiple,) = scales.block_multiples(codec)
        scale_PEN, low_PEN = passes_cpu.fits(weight_SEN, cost_SE, how, unit, multiple, of_type)
        d_1EN, dmin_1EN = scales.block_scales(codec, scale_PEN, low_PEN if codec.has_minimum else None)
    code_CEN, negative_SEN, scale_PEN, sub_PEN, minimum_PEN, found_SEN, error_SEN = passes_cpu.first_pass(
        weight_SEN, factor_ESS, passes.diagonal_blocks(factor_ESS, codec.sub_weights), _units(d_1EN, dmin_1EN), how,
        unit, scales.first_multiples(codec), of_type,
    )  # fmt: skip
    d_DEN = scale_PEN.half() if d_1EN is None else d_1EN
    return Blocks(code_CEN, negative_SEN, d_DEN, sub_PEN, dmin_1EN, minimum_PEN), found_SEN, error_SEN


def sweep(
    codec: Codec,
    blocks: Blocks,
    found_SEN: torch.Tensor,
    slope_SEN: torch.Tensor,
    hessian_ESS: torch.Tensor,
    factor_EPTT: torch.Tensor,
) -> tuple[Blocks, torch.Tensor, torch.Tensor]:
    """moe2gguf.passes.sweep, on the device of its arguments."""
    if not found_SEN.is_cpu:
        return passes.sweep(codec, blocks, found_SEN, slope_SEN, hessian_ESS, factor_EPTT, walk)
    from moe2gguf_kernels import passes_cpu

    of_type, by_unit = layout(codec.quant_type, found_SEN.device), scales.has_block_scale(codec)
    tries = None if by_unit else passes.sweep_tries(codec, blocks)
    code_CEN, negative_SEN, sub_PEN, minimum_PEN, found_SEN, slope_SEN, tried_PEN = passes_cpu.sweep(
        blocks.code_CEN, blocks.negative_SEN, blocks.sub_PEN if by_unit else None, blocks.minimum_PEN,
        _units(blocks.d_DEN, blocks.dmin_DEN) if by_unit else None, None if tries is None else tries.scale_JEN,
        factor_EPTT, hessian_ESS, found_SEN, slope_SEN, of_type,
    )  # fmt: skip
    if tries is None:
        after = Blocks(code_CEN, negative_SEN, blocks.d_DEN, sub_PEN, blocks.dmin_DEN, minimum_PEN)
    else:
        after = dataclasses.replace(blocks, code_CEN=code_CEN, negative_SEN=negative_SEN)
        after = passes.with_scales(codec, after, tries, tried_PEN)
    return after, found_SEN, slope_SEN


def _units(d_1EN: torch.Tensor | None, dmin_1EN: torch.Tensor | None) -> torch.Tensor | None:
    """What sub-blocks' scales and minimums are in units of: f32 (1 or 2, E, N)."""
    units = [x_1EN.float() for x_1EN in (d_1EN, dmin_1EN) if x_1EN is not None]
    return torch.cat(units) if units else None


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

    with torch.cuda.device_of(x_TK):
        return moments(x_TK, token_n, offset_E1, weight_n, other_SM, slot_n, total_EMK)
