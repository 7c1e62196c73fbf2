"""ggml's own encoder and decoder, from the libggml that llama-cpp-python installs, through ctypes.

Both release the GIL, so threads scale. Shapes: R rows, K columns (features in), B bytes of one encoded row.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType

from moe2gguf.errors import RuntimeMissing

_LIBRARY_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


def library_folder() -> Path:
    """Folder of libggml-base. LLAMA_CPP_LIB_PATH wins, as in llama-cpp-python itself."""
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeMissing("llama-cpp-python is not installed; run `moe2gguf runtime install`")
    return Path(spec.submodule_search_locations[0]) / "lib"


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_folder() / _LIBRARY_NAMES.get(sys.platform, "libggml-base.so")
    if not path.is_file():
        raise RuntimeMissing(f"{path} is missing; run `moe2gguf runtime install`")
    library = ctypes.CDLL(str(path))
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_nrows.restype = ctypes.c_int64
    library.ggml_nrows.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # src, f32 (R, K)
        ctypes.c_void_p,  # dst, (R, B) bytes
        ctypes.c_int64,  # first element
        ctypes.c_int64,  # R
        ctypes.c_int64,  # K
        ctypes.c_void_p,  # importance, f32 (K,), or NULL
    ]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


@contextmanager
def encoding_threads(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose queue is dropped when something fails: after Ctrl-C nobody waits for a layer's worth of jobs."""
    pool = ThreadPoolExecutor(n_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def block_shape(quant_type: QuantType) -> tuple[int, int]:
    """(weights, bytes) of one block."""
    return gguf.GGML_QUANT_SIZES[quant_type]


def row_bytes(quant_type: QuantType, n_columns: int) -> int:
    """Bytes of one encoded row of n_columns weights."""
    block_weights, block_bytes = block_shape(quant_type)
    assert n_columns % block_weights == 0, (quant_type, n_columns)
    return n_columns // block_weights * block_bytes


def bits_per_weight(quant_type: QuantType) -> float:
    block_weights, block_bytes = block_shape(quant_type)
    return block_bytes * 8 / block_weights


def fits(quant_type: QuantType, n_columns: int) -> bool:
    return n_columns % block_shape(quant_type)[0] == 0


def encode(weight_RK: np.ndarray, quant_type: QuantType, importance_K: np.ndarray | None = None) -> np.ndarray:
    """f32 (R, K) -> uint8 (R, B), ggml_quantize_chunk's bytes.

    importance_K: f32 (K,), mean of c·x² over the tokens that reach the matrix; None weighs all columns alike, which
    some types insist on being told: they get ones.
    """
    weight_RK = np.ascontiguousarray(weight_RK, dtype=np.float32)
    n_rows, n_columns = weight_RK.shape
    if quant_type == QuantType.F32:
        return weight_RK.view(np.uint8).reshape(n_rows, -1)
    if quant_type in (QuantType.BF16, QuantType.F16):
        return gguf.quants.quantize(weight_RK, quant_type).view(np.uint8).reshape(n_rows, -1)
    if importance_K is None:
        importance_K = np.ones(n_columns, np.float32)
    importance_K = np.ascontiguousarray(importance_K, dtype=np.float32)
    assert importance_K.shape == (n_columns,)
    blocks_RB = np.empty((n_rows, row_bytes(quant_type, n_columns)), np.uint8)
    n_bytes = _library().ggml_quantize_chunk(
        int(quant_type), weight_RK.ctypes.data, blocks_RB.ctypes.data, 0, n_rows, n_columns, importance_K.ctypes.data
    )
    assert n_bytes == blocks_RB.nbytes
    return blocks_RB


def decode(blocks_RB: np.ndarray, quant_type: QuantType, n_columns: int) -> np.ndarray:
    """uint8 (R, B) -> f32 (R, n_columns), by ggml's to_float."""
    blocks_RB = np.ascontiguousarray(blocks_RB)
    n_rows = blocks_RB.shape[0]
    if quant_type == QuantType.F32:
        return blocks_RB.view(np.float32).reshape(n_rows, n_columns)
    weight_RK = np.empty((n_rows, n_columns), np.float32)
    to_float = _library().ggml_get_type_traits(int(quant_type)).contents.to_float
    to_float(blocks_RB.ctypes.data, weight_RK.ctypes.data, weight_RK.size)
    return weight_RK


def round_trip(weight_RK: np.ndarray, quant_type: QuantType, importance_K: np.ndarray | None = None) -> np.ndarray:
    """What the runtime will compute with: decode(encode(weight))."""
    return decode(encode(weight_RK, quant_type, importance_K), quant_type, weight_RK.shape[1])


def tensor_name(tensor: int) -> str:
    """Of a struct ggml_tensor *."""
    return _library().ggml_get_name(tensor).decode("utf-8", "replace")


def tensor_rows(tensor: int, n_columns: int) -> np.ndarray:
    """i32 (rows, n_columns) of a tensor of 32-bit integers, which may be the left part of a wider one."""
    library = _library()
    n_rows, n_bytes = library.ggml_nrows(tensor), library.ggml_nbytes(tensor)
    stride = (n_bytes // 4 - n_columns) // (n_rows - 1) if n_rows > 1 else n_columns
    values = np.empty(n_rows * stride, np.int32)
    library.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, n_bytes)
    return values.reshape(n_rows, stride)[:, :n_columns].copy()
