"""The model writes its own calibration text: plain sampling through the runtime, many sequences at a time.

The runtime maps its weights from disk, so this holds no model in memory; the file it runs is a temporary one. Every
step reads nearly all experts, so sequences go side by side, as many as keys and values have room for.

Shapes: S sequences, L tokens of each, P sequences in parallel, V vocabulary.
"""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe2gguf.errors import Moe2ggufError
from moe2gguf.ggml import QuantType
from moe2gguf.llama import OpenModel, captured_log, open_model
from moe2gguf.source import Source
from moe2gguf.text import CalibrationText

MAX_PARALLEL_SEQUENCES = 128
KV_CACHE_BYTES = 2 << 30
# from so many on experts have half the bytes, which are read for every step
HALF_BYTE_PARAMS = 10e9
# below this, a step is shorter than the wait for another thread
ONE_THREAD_FILE_BYTES = 256 << 20


def writer_type(source: Source) -> QuantType:
    """Of experts in the file that the model writes its text with, whose others are nearly exact."""
    return QuantType.Q4_0 if source.n_params >= HALF_BYTE_PARAMS else QuantType.Q8_0


def kv_bytes_per_token(source: Source) -> int:
    """Keys and values in 16 bits, for MLA the compressed ones; where no matrix tells, as if each head had its own."""
    rows = [t.shape[0] for t in source.tensors if re.search(r"\.attn_(k|v|kv_a_mqa)\.weight$", t.name)]
    return 2 * sum(rows) if rows else 4 * source.n_layer * source.tensor("token_embd.weight").shape[1]


def n_at_once(n_sequences: int, sequence_tokens: int, kv_bytes_per_token: int) -> int:
    """How many sequences the key-value cache holds side by side."""
    return max(1, min(n_sequences, MAX_PARALLEL_SEQUENCES, KV_CACHE_BYTES // (kv_bytes_per_token * sequence_tokens)))


def sample_text(
    gguf_path: Path,
    n_sequences: int,
    sequence_tokens: int,
    *,
    kv_bytes_per_token: int,
    n_threads: int,
    gpu: int | None = None,
    seed: int,
    progress: Callable[[int, int], None],
) -> CalibrationText:
    """Every token is drawn from the model's own distribution, after the token that begins a document.

    kv_bytes_per_token bounds how many sequences are held in the key-value cache side by side.
    """
    n_parallel = n_at_once(n_sequences, sequence_tokens, kv_bytes_per_token)
    if gguf_path.stat().st_size < ONE_THREAD_FILE_BYTES:
        n_threads = 1
    tokens_SL = np.empty((n_sequences, sequence_tokens), np.int64)
    with (
        captured_log() as errors,
        open_model(
            gguf_path,
            errors,
            sequence_tokens=sequence_tokens,
            n_batch=n_parallel,
            n_sequences=n_parallel,
            n_threads=n_threads,
            gpu=gpu,
        ) as model,
    ):
        for first in range(0, n_sequences, n_parallel):
            group = slice(first, min(first + n_parallel, n_sequences))
            rng = np.random.default_rng([seed, first])
            tokens_P = np.full(group.stop - group.start, first_token(model))
            model.forget()
            for position in range(sequence_tokens):
                progress(first * sequence_tokens + position * len(tokens_P), n_sequences * sequence_tokens)
                tokens_SL[group, position] = tokens_P
                if position + 1 < sequence_tokens:
                    tokens_P = draw(decode(model, tokens_P, np.arange(len(tokens_P)), position), rng)
    return CalibrationText(tokens_SL, "self-sampled")


def first_token(model: OpenModel) -> int:
    """What begins a document: BOS, or else what ends the one before, <|endoftext|> where EOS is the end of a turn.
    Where the file says nothing of them, llama.cpp answers with GPT-2's, whatever token has its number."""
    lib, end = model.lib, b"<|endoftext|>"
    if _is_said(model, "bos"):
        return int(lib.llama_vocab_bos(model.vocab))
    token = (lib.llama_token * len(end))()
    if lib.llama_tokenize(model.vocab, end, len(end), token, len(end), False, True) == 1:
        return int(token[0])
    return int(lib.llama_vocab_eos(model.vocab)) if _is_said(model, "eos") else 0


def _is_said(model: OpenModel, token: str) -> bool:
    key, value = f"tokenizer.ggml.{token}_token_id".encode(), ctypes.create_string_buffer(32)
    return model.lib.llama_model_meta_val_str(model.model, key, value, len(value)) >= 0


def decode(model: OpenModel, tokens_P: np.ndarray, names_P: np.ndarray, position: int) -> np.ndarray:
    """One token for each sequence of these names at the same position -> logits f32 (P, V), until the next step."""
    batch = model.lib.llama_batch_init(len(tokens_P), 0, 1)
    try:
        batch.n_tokens = len(tokens_P)
        for i, (token, name) in enumerate(zip(tokens_P.tolist(), names_P.tolist(), strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = name, True
        status = model.lib.llama_decode(model.context, batch)
    finally:
        model.lib.llama_batch_free(batch)
    if status != 0:
        raise Moe2ggufError(f"the runtime failed while sampling calibration text (llama_decode: {status})")
    return np.ctypeslib.as_array(model.lib.llama_get_logits(model.context), (len(tokens_P), model.n_vocab))


def draw(logits_PV: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One token a row, at temperature 1."""
    probability_PV = np.exp((logits_PV - logits_PV.max(1, keepdims=True)).astype(np.float64))
    cumulative_PV = probability_PV.cumsum(1)
    threshold_P = rng.random(len(logits_PV)) * cumulative_PV[:, -1]
    return (cumulative_PV <= threshold_P[:, None]).sum(1)
