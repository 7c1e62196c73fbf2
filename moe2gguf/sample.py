"""The model writes its own calibration text: plain sampling through the runtime, many sequences at a time.

The runtime maps its weights from disk, so this holds no model in memory; the file it runs is a temporary Q8_0 one.

Shapes: S sequences, L tokens of each, P sequences in parallel, V vocabulary.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe2gguf.errors import Moe2ggufError
from moe2gguf.text import CalibrationText

MAX_PARALLEL_SEQUENCES = 128
KV_CACHE_BYTES = 1 << 30
# below this, a step is shorter than the wait for another thread
ONE_THREAD_FILE_BYTES = 256 << 20


def sample_text(
    gguf_path: Path,
    n_sequences: int,
    sequence_tokens: int,
    *,
    n_threads: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> CalibrationText:
    """Every token is drawn from the model's own distribution, after the token that begins a document."""
    import llama_cpp

    model = _Model(llama_cpp, gguf_path, sequence_tokens, n_threads)
    try:
        tokens_SL = np.empty((n_sequences, sequence_tokens), np.int64)
        for first in range(0, n_sequences, model.n_parallel):
            group = slice(first, min(first + model.n_parallel, n_sequences))
            rng = np.random.default_rng([seed, first])
            tokens_P = np.full(group.stop - group.start, model.first_token)
            model.forget()
            for position in range(sequence_tokens):
                progress(first * sequence_tokens + position * len(tokens_P), n_sequences * sequence_tokens)
                tokens_SL[group, position] = tokens_P
                if position + 1 < sequence_tokens:
                    tokens_P = _draw(model.step(tokens_P, position), rng)
        return CalibrationText(tokens_SL, "self-sampled")
    finally:
        model.close()


def _draw(logits_PV: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One token a row, at temperature 1."""
    probability_PV = np.exp((logits_PV - logits_PV.max(1, keepdims=True)).astype(np.float64))
    cumulative_PV = probability_PV.cumsum(1)
    threshold_P = rng.random(len(logits_PV)) * cumulative_PV[:, -1]
    return (cumulative_PV <= threshold_P[:, None]).sum(1)


class _Model:
    """llama.cpp's C interface, as far as sampling many sequences side by side needs it."""

    def __init__(self, llama_cpp, gguf_path: Path, sequence_tokens: int, n_threads: int):
        self._lib = llama_cpp
        llama_cpp.llama_log_set(_quiet_log(llama_cpp), ctypes.c_void_p(0))
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(gguf_path).encode(), model_params)
        if not self._model:
            raise Moe2ggufError(
                f"the runtime cannot load {gguf_path}, so the model cannot write its own calibration text; give --text"
            )
        params = llama_cpp.llama_context_default_params()
        # keys and values in 16 bits, as if every head had its own
        token_bytes = 4 * llama_cpp.llama_model_n_layer(self._model) * llama_cpp.llama_model_n_embd(self._model)
        self.n_parallel = max(1, min(MAX_PARALLEL_SEQUENCES, KV_CACHE_BYTES // (token_bytes * sequence_tokens)))
        params.n_ctx = sequence_tokens * self.n_parallel
        params.n_batch = params.n_ubatch = params.n_seq_max = self.n_parallel
        threads = 1 if gguf_path.stat().st_size < ONE_THREAD_FILE_BYTES else n_threads
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        candidates = (llama_cpp.llama_vocab_bos(vocab), llama_cpp.llama_vocab_eos(vocab), 0)
        self.first_token = next(token for token in candidates if token >= 0)
        self._batch = llama_cpp.llama_batch_init(self.n_parallel, 0, 1)

    def forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def step(self, tokens_P: np.ndarray, position: int) -> np.ndarray:
        """One token for each sequence at the same position -> logits f32 (P, V)."""
        batch = self._batch
        batch.n_tokens = len(tokens_P)
        for i, token in enumerate(tokens_P.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = i, True
        if (status := self._lib.llama_decode(self._context, batch)) != 0:
            raise Moe2ggufError(f"the runtime failed while sampling calibration text (llama_decode: {status})")
        logits = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(tokens_P), self.n_vocab)).copy()

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


_LOG_CALLBACKS: list = []  # ctypes needs them alive as long as the library may call them


def _quiet_log(llama_cpp):
    if not _LOG_CALLBACKS:
        _LOG_CALLBACKS.append(llama_cpp.llama_log_callback(lambda level, text, user_data: None))
    return _LOG_CALLBACKS[0]
