"""The header of a GGUF file, taken apart so that any of it can be made wrong. Tensors are zeros."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

from tests.runtime.ops import Group, Type
from tests.runtime.tiny_gguf import write_model

ALIGNMENT = 32
GROUPED = b"+grouped"
MAX_FILE_BYTES = 64 << 20  # a header may claim exabytes

# the types of GGUF values
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


@dataclasses.dataclass(eq=False)
class Tensor:
    name: bytes
    ne: list[int]
    type: int
    offset: int | None = None  # None: behind the one before it

    @property
    def n_bytes(self) -> int:
        block, n_bytes = _block(self.type)
        return math.prod(self.ne) // block * n_bytes


@dataclasses.dataclass
class Header:
    arch: str  # the prefix of the keys
    values: list[tuple[bytes, bytes]]  # keys, and the type with what follows it
    tensors: list[Tensor]
    version: int = 3
    n_values: int | None = None  # None: as many as there are
    n_tensors: int | None = None
    damage: list[Callable[[bytes], bytes]] = dataclasses.field(default_factory=list)  # done to the bytes at the end

    def put(self, key: str, value: bytes) -> None:
        """Replace or add a value; KEY without the architecture."""
        name = f"{self.arch}.{key}".encode()
        self.values = [pair for pair in self.values if pair[0] != name] + [(name, value)]

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())

    def groups(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors if plain_name(tensor)]

    def siblings(self, tensor: Tensor) -> list[Tensor]:
        """The groups that TENSOR is one of."""
        return [other for other in self.groups() if plain_name(other) == plain_name(tensor)] or [tensor]

    def merge(self, groups: Sequence[Tensor], type: int) -> None:
        """One plain tensor of TYPE in place of GROUPS."""
        name, first = plain_name(groups[0]), self.tensors.index(groups[0])
        if name is not None:
            experts = sum(group.ne[-1] for group in groups if group.ne)
            self.tensors = [tensor for tensor in self.tensors if tensor not in groups]
            self.tensors.insert(first, Tensor(name, [*groups[0].ne[:-1], experts], type))

    def to_bytes(self) -> bytes:
        n_values = len(self.values) if self.n_values is None else self.n_values
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        parts = [b"GGUF", struct.pack("<IQQ", self.version, n_tensors, n_values)]
        for key, value in self.values:
            parts += [string(key), value]
        end = 0
        for tensor in self.tensors:
            offset = end if tensor.offset is None else tensor.offset
            ne = [n % (1 << 64) for n in tensor.ne]
            parts += [string(tensor.name), struct.pack(f"<I{len(ne)}Q", len(ne), *ne)]
            parts.append(struct.pack("<IQ", tensor.type % (1 << 32), offset % (1 << 64)))
            end += _padded(tensor.n_bytes)
        header = b"".join(parts)
        for damage in self.damage:
            header = damage(header)
        return header

    def write(self, path: Path) -> Path:
        header = self.to_bytes()
        n_data = sum(_padded(tensor.n_bytes) for tensor in self.tensors)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(_padded(len(header)) + max(0, min(n_data, MAX_FILE_BYTES)))
        return path


def parse(data: bytes, arch: str) -> Header:
    """The inverse of to_bytes. Raises struct.error or KeyError where DATA is no header."""
    position = 0

    def take(format: str) -> tuple:
        nonlocal position
        position += struct.calcsize(format)
        return struct.unpack_from(format, data, position - struct.calcsize(format))

    def take_string() -> bytes:
        return take(f"{take('<Q')[0]}s")[0]

    def skip_value(type: int) -> None:
        if type == STRING:
            take_string()
        elif type == ARRAY:
            item, n = take("<IQ")
            for _ in range(n):
                skip_value(item)
        else:
            take("<" + _LETTERS[type])

    _, version, n_tensors, n_values = take("<4sIQQ")
    values = []
    for _ in range(n_values):
        key, start = take_string(), position
        skip_value(take("<I")[0])
        values.append((key, data[start:position]))
    tensors = []
    for _ in range(n_tensors):
        name, (n_dims,) = take_string(), take("<I")
        ne = list(take(f"<{n_dims}Q"))
        type, _ = take("<IQ")
        tensors.append(Tensor(name, ne, type))
    return Header(arch, values, tensors, version)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def scalar(type: int, item: float | int) -> bytes:
    return struct.pack(f"<I{_LETTERS[type]}", type, item)


def array(type: int, items: Sequence, claimed: int | None = None) -> bytes:
    """An array of ITEMS, which says that it has CLAIMED."""
    if type == STRING:
        body = b"".join(string(str(item).encode()) for item in items)
    else:
        body = struct.pack(f"<{len(items)}{_LETTERS[type]}", *items)
    return struct.pack("<IIQ", ARRAY, type, len(items) if claimed is None else claimed) + body


def plain_name(tensor: Tensor) -> bytes | None:
    """The name of the tensor that TENSOR is a group of."""
    match = re.fullmatch(rb"(.*_exps)\.g\d+(\.weight)", tensor.name)
    return match[1] + match[2] if match else None


def numbered(tensor: Tensor, number: object) -> bytes:
    """The name of TENSOR with another number."""
    return re.sub(rb"\.g\d+\.", f".g{number}.".encode(), tensor.name)


class Zeros:
    """In place of a quantizer."""

    def quantize(self, type: Type, weight_ENK: np.ndarray) -> Group:
        e, n, k = weight_ENK.shape
        block, n_bytes = _block(type)
        return Group(type, np.zeros((e, n, k // block * n_bytes), np.uint8))


def tiny_header(folder: Path, arch: str, groups: Sequence[tuple[Type, int]]) -> Header:
    """Of a model that write_model writes."""
    path = write_model(folder / f"{arch}.gguf", Zeros(), arch=arch, groups=groups)  # type: ignore[arg-type]
    return parse(path.read_bytes(), arch)


def plain_files(header: Header, our_keys: bytes) -> list[Header]:
    """The header without groups and without OUR_KEYS, as upstream knows it: one for each type that a group has."""
    if header.damage:
        try:
            header = parse(header.to_bytes(), header.arch)
        except (struct.error, KeyError, MemoryError, OverflowError):
            return []
    files = []
    for type in sorted({group.type for group in header.groups()}) or [0]:
        file = copy.deepcopy(header)
        names = {plain_name(group) for group in file.groups()}
        file.tensors = [tensor for tensor in file.tensors if tensor.name not in names]
        while groups := file.groups():
            file.merge(file.siblings(groups[0]), type)
        file.values = [(key, _plain_value(key, value)) for key, value in file.values if our_keys not in key]
        files.append(file)
    return files


def _plain_value(key: bytes, value: bytes) -> bytes:
    if key == b"general.architecture" and value.endswith(GROUPED):
        return struct.pack("<I", STRING) + string(value[12:].removesuffix(GROUPED))
    return value


def _block(type: int) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES.get(type, (1, 4))  # type: ignore[call-overload]


def _padded(n_bytes: int) -> int:
    return (n_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
