"""Compiles kernels for a GPU on a machine without one, as the functions that launch them would.

python -m tests.kernels.machine_code CAPABILITY NAME...: 90 for an H100; a GGUF type, for the kernels over its blocks,
or "moments". Prints a line of JSON for each kernel: its name, the bytes of its machine code, and its shared memory.

A process of its own: where TRITON_INTERPRET is set, kernels cannot be compiled.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moe2gguf import backend
from moe2gguf.codec import CODECS
from moe2gguf.ggml import QuantType
from moe2gguf_kernels.decode import decode
from moe2gguf_kernels.moments import moments
from moe2gguf_kernels.pack import pack
from moe2gguf_kernels.walk import walk

N_EXPERTS, N_ROWS = 4, 64


def compile_blocks(quant_type: QuantType) -> None:
    codec, layout = CODECS[quant_type], backend.layout(quant_type, torch.device("cpu"))
    blocks_RB = torch.zeros((N_ROWS, codec.block_bytes), dtype=torch.uint8)
    decode(blocks_RB, layout)
    pack(*vars(codec.unpack(blocks_RB)).values(), layout)
    n_sub = codec.sub_weights
    scale_JEN = torch.ones(5, N_EXPERTS, N_ROWS)
    has_offset = codec.has_minimum or codec.sub_offset_Q is not None
    # as feedback passes it: a part of a larger matrix
    factor_ETT = torch.eye(512).expand(N_EXPERTS, -1, -1).contiguous()[:, :n_sub, :n_sub]
    walk(torch.zeros(n_sub, N_EXPERTS, N_ROWS), scale_JEN, scale_JEN if has_offset else None, factor_ETT, layout)


def compile_moments() -> None:
    token_n, offset_E1, weight_n = torch.arange(64), torch.arange(0, 65, 16), torch.ones(64)
    x_TK = torch.zeros(64, 256)
    total_EKK = moments(x_TK, token_n, offset_E1, weight_n)
    moments(x_TK.bfloat16(), token_n, offset_E1, weight_n, x_TK.bfloat16(), token_n, total_EKK)


def main() -> None:
    capability, *names = sys.argv[1:]
    target = GPUTarget("cuda", int(capability), 32)
    driver.set_active(
        SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target)
    )
    launch = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, **options: Any) -> None:
        compiled = launch(kernel, *args, **{**options, "warmup": True})
        size = len(compiled.asm["cubin"])
        print(json.dumps({"kernel": kernel.fn.__name__, "bytes": size, "shared": compiled.metadata.shared}), flush=True)

    JITFunction.run = compile_only
    for name in names:
        if name == "moments":
            compile_moments()
        else:
            compile_blocks(QuantType[name])


if __name__ == "__main__":
    main()
