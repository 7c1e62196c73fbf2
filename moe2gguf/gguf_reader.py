"""Read a GGUF file's key-values and tensor table: one file, or all the shards of a split one.

gguf-py's reader makes an array object for every token of the vocabulary (seconds for a large one) and answers
a truncated file with an exception from numpy. This one walks the header once and says in a sentence what is
wrong. The layout is documented in llama.cpp's `ggml/include/gguf.h`.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moe2gguf.errors import FileFormatError

_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_DIMS = 4
_SCALARS: dict[gguf.GGUFValueType, np.dtype] = {
    gguf.GGUFValueType.UINT8: np.dtype("<u1"),
    gguf.GGUFValueType.INT8: np.dtype("<i1"),
    gguf.GGUFValueType.UINT16: np.dtype("<u2"),
    gguf.GGUFValueType.INT16: np.dtype("<i2"),
    gguf.GGUFValueType.UINT32: np.dtype("<u4"),
    gguf.GGUFValueType.INT32: np.dtype("<i4"),
    gguf.GGUFValueType.FLOAT32: np.dtype("<f4"),
    gguf.GGUFValueType.BOOL: np.dtype("?"),
    gguf.GGUFValueType.UINT64: np.dtype("<u8"),
    gguf.GGUFValueType.INT64: np.dtype("<i8"),
    gguf.GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. `shape` is in numpy order, `offset` in bytes from the file's start."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def n_params(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def n_bytes(self) -> int:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.n_params // block_size * block_bytes

    def blocks(self) -> np.ndarray:
        """The stored bytes, uint8 (*shape[:-1], bytes per row): a read-only memory map."""
        data = np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.n_bytes,))
        return data.reshape(*self.shape[:-1], -1)


@dataclass(frozen=True)
class GgufFile:
    """A model file: all its shards, the first shard's key-values, every shard's tensors in file order.

    `kv` holds Python scalars and strings, lists of strings, and numpy arrays for arrays of numbers.
    """

    paths: tuple[Path, ...]
    kv: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture` without the suffix of grouped files: the prefix of the file's keys."""
        return str(self.kv.get("general.architecture", "")).removesuffix("+grouped")

    @property
    def n_params(self) -> int:
        return sum(t.n_params for t in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors)

    @property
    def file_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.paths)

    @property
    def bits_per_weight(self) -> float:
        """Bytes of all tensors × 8 / parameters: what llama.cpp prints as BPW when it loads a file."""
        return self.tensor_bytes * 8 / self.n_params if self.tensors else 0.0

    def expert_order(self, layer: int) -> np.ndarray | None:
        """(E,) checkpoint expert id at each position, or None where the file keeps the checkpoint's order."""
        return self.kv.get(f"moe2gguf.expert_order.{layer}")


def read_gguf(path: str | Path) -> GgufFile:
    """Header of `path` and, if it is a shard (`name-00002-of-00003.gguf`), of all its siblings.

    Raises FileFormatError for a file that is missing, not GGUF, truncated, malformed, or lacks a shard.
    """
    path = Path(path)
    kv, tensors = _read_one(path)
    n_shards = int(kv.get("split.count", 1))
    if n_shards <= 1:
        return GgufFile((path,), kv, tensors)
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        raise FileFormatError(
            f"{path} is one of {n_shards} shards but is not called NAME-00001-of-{n_shards:05}.gguf, so the "
            f"others cannot be found; give it back its name"
        )
    paths = tuple(path.with_name(f"{match['prefix']}-{i + 1:05}-of-{n_shards:05}.gguf") for i in range(n_shards))
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise FileFormatError(f"{path} has {n_shards} shards, and {', '.join(missing)} is not beside it")
    shards = [_read_one(p) for p in paths]
    all_tensors = tuple(t for _, shard_tensors in shards for t in shard_tensors)
    _refuse_duplicates(path, all_tensors)
    return GgufFile(paths, shards[0][0], all_tensors)


def _read_one(path: Path) -> tuple[dict[str, Any], tuple[GgufTensor, ...]]:
    if not path.is_file():
        raise FileFormatError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; a GGUF file is needed")
    n_file_bytes = path.stat().st_size
    if n_file_bytes < 4:
        raise FileFormatError(f"{path} has {n_file_bytes} bytes; it is no GGUF file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        if data[:4] != b"GGUF":
            raise FileFormatError(f"{path} is no GGUF file: it begins with {data[:4]!r}, not b'GGUF'")
        cursor.offset = 4
        version = cursor.number("<I")
        if version not in (2, 3):
            raise FileFormatError(
                f"{path} says GGUF version {version}; versions 2 and 3 in little-endian order can be read"
            )
        n_tensors, n_kv = cursor.number("<Q"), cursor.number("<Q")
        kv: dict[str, Any] = {}
        for _ in range(n_kv):
            key = cursor.string()
            kv[key] = cursor.value(cursor.value_type())
        infos = [cursor.tensor_info() for _ in range(n_tensors)]
        alignment = int(kv.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
        if alignment <= 0 or alignment & (alignment - 1):
            raise FileFormatError(f"{path} has an alignment of {alignment} bytes; a power of two is needed")
        data_start = -(-cursor.offset // alignment) * alignment
    tensors = tuple(GgufTensor(name, type_, shape, path, data_start + offset) for name, type_, shape, offset in infos)
    for tensor in tensors:
        end = tensor.offset + tensor.n_bytes
        if end > n_file_bytes:
            raise FileFormatError(
                f"{path} is truncated: tensor {tensor.name} ends at byte {end}, the file at {n_file_bytes}; "
                f"fetch or convert it again"
            )
    _refuse_duplicates(path, tensors)
    return kv, tensors


def _refuse_duplicates(path: Path, tensors: tuple[GgufTensor, ...]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise FileFormatError(f"{path} holds two tensors called {tensor.name}")
        seen.add(tensor.name)


class _Cursor:
    """A position in a GGUF header. Every read checks the file's end first."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.offset = 0

    def take(self, n_bytes: int) -> int:
        start = self.offset
        if start + n_bytes > len(self.data):
            raise FileFormatError(
                f"{self.path} is truncated or damaged: its header asks for {n_bytes} bytes at byte {start}, "
                f"the file ends at {len(self.data)}; fetch or convert it again"
            )
        self.offset = start + n_bytes
        return start

    def number(self, code: str) -> int:
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        n_bytes = self.number("<Q")
        start = self.take(n_bytes)
        # a byte-level vocabulary may hold pieces that are no UTF-8 on their own
        return self.data[start : start + n_bytes].decode("utf-8", "replace")

    def value_type(self) -> gguf.GGUFValueType:
        raw = self.number("<I")
        try:
            return gguf.GGUFValueType(raw)
        except ValueError:
            raise FileFormatError(f"{self.path} is damaged: value type {raw} at byte {self.offset - 4}") from None

    def value(self, type_: gguf.GGUFValueType) -> Any:
        if type_ == gguf.GGUFValueType.STRING:
            return self.string()
        if type_ != gguf.GGUFValueType.ARRAY:
            return self.numbers(_SCALARS[type_], 1)[0].item()
        item_type, n_items = self.value_type(), self.number("<Q")
        if item_type in _SCALARS:
            return self.numbers(_SCALARS[item_type], n_items)
        if item_type == gguf.GGUFValueType.STRING:
            return [self.string() for _ in range(n_items)]
        raise FileFormatError(f"{self.path} is damaged: an array of arrays at byte {self.offset}")

    def numbers(self, dtype: np.dtype, count: int) -> np.ndarray:
        start = self.take(dtype.itemsize * count)
        return np.frombuffer(self.data[start : self.offset], dtype)

    def tensor_info(self) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
        name = self.string()
        n_dims = self.number("<I")
        if n_dims > _MAX_DIMS:
            raise FileFormatError(f"{self.path}: tensor {name} has {n_dims} dimensions; GGUF allows {_MAX_DIMS}")
        shape = tuple(reversed([self.number("<Q") for _ in range(n_dims)]))
        raw_type, start = self.number("<I"), self.number("<Q")
        try:
            type_ = gguf.GGMLQuantizationType(raw_type)
        except ValueError:
            raise FileFormatError(
                f"{self.path}: tensor {name} has type {raw_type}, which gguf {_gguf_version()} does not know"
            ) from None
        block_size = gguf.GGML_QUANT_SIZES[type_][0]
        if shape and shape[-1] % block_size:
            raise FileFormatError(
                f"{self.path}: tensor {name} has rows of {shape[-1]} weights, not a multiple of "
                f"{type_.name}'s block of {block_size}"
            )
        return name, type_, shape, start


def _gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")
