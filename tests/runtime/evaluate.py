"""Load a model and save its logits. Run as a child, `python -m tests.runtime.evaluate MODEL OUT.npy OPTION...`.

Options: mmap, repack, lora=FILE; gpu_layers=N, cpu_moe (the experts stay in main memory), stay (and so does their
computation). Without gpu_layers all is on the CPU. Writes f32 (T + D, vocab): the logits of T prompt tokens in one
batch, then of D tokens decoded one by one. Where the model or the adapter cannot be loaded, exits with 3 and what
llama.cpp logged.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp
import numpy as np

from moe2gguf.llama import available_cores
from moe2gguf.runtime import find_runtime
from moe2gguf.runtime.smoke import load

N_PROMPT, N_DECODE = 128, 3  # a full ubatch
CANNOT_LOAD = 3


class BufferTypeOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override: where the tensors lie whose names match. An empty one ends a list."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def main(model_path: str, target: str, *options: str) -> None:
    logged: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        logged.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if "mmap" in options else llama_cpp.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = "repack" in options
    gpu_layers = [int(option.removeprefix("gpu_layers=")) for option in options if option.startswith("gpu_layers=")]
    params.n_gpu_layers = gpu_layers[0] if gpu_layers else 0
    if on_cpu := [option.removeprefix("cpu=") for option in options if option.startswith("cpu=")]:
        ggml = load(find_runtime().libraries, "ggml-base")
        ggml.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
        overrides = (BufferTypeOverride * 2)((on_cpu[0].encode(), ggml.ggml_backend_cpu_buffer_type()))
        params.tensor_buft_overrides = ctypes.addressof(overrides)
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
    if not model:
        print("".join(logged))
        sys.exit(CANNOT_LOAD)
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = 256
    context_params.n_batch = context_params.n_ubatch = N_PROMPT
    context_params.op_offload = bool(gpu_layers) and "stay" not in options
    context_params.n_threads = context_params.n_threads_batch = available_cores()
    context = llama_cpp.llama_init_from_model(model, context_params)
    for lora in (option.removeprefix("lora=") for option in options if option.startswith("lora=")):
        adapter = llama_cpp.llama_adapter_lora_init(model, lora.encode())
        if not adapter:
            print("".join(logged))
            sys.exit(CANNOT_LOAD)
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
    tokens = np.random.default_rng(0).integers(0, n_vocab, N_PROMPT + N_DECODE)

    logits = np.full((len(tokens), n_vocab), np.nan, dtype=np.float32)
    for first, n in [(0, N_PROMPT)] + [(N_PROMPT + i, 1) for i in range(N_DECODE)]:
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(tokens[first + i]), first + i, 1, 1
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(context, batch) != 0:
            sys.exit("llama_decode failed")
        for i in range(n):
            pointer = llama_cpp.llama_get_logits_ith(context, i)
            logits[first + i] = np.ctypeslib.as_array(pointer, (n_vocab,))
        llama_cpp.llama_batch_free(batch)
    np.save(target, logits)
    # what is read from where, for the tests that want a certain kind of buffer
    print("".join(line for line in logged if "buffer size" in line))


if __name__ == "__main__":
    main(*sys.argv[1:])
