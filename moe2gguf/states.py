"""Hidden states of many streams: in memory up to a limit, the rest in files of a scratch folder.

Shapes: S sequences, L tokens of each, D hidden.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

import numpy as np
import torch

from moe2gguf.alone import alone_in
from moe2gguf.errors import Moe2ggufError, OutputError

SCRATCH_PREFIX = "moe2gguf-streams-"

Key = TypeVar("Key")


def remove_left_behind(work_folder: Path) -> None:
    """By runs that were killed: in the folder, and in those of quantised experts in it."""
    for place in (work_folder, *work_folder.glob("experts-*")):
        for folder in place.glob(f"{SCRATCH_PREFIX}*"):
            with suppress(Moe2ggufError, FileNotFoundError), alone_in(folder) as is_known:
                if is_known:
                    shutil.rmtree(folder, ignore_errors=True)


def by_sequence(hidden_SLD: torch.Tensor, limit_bytes: int, scratch_folder: Path) -> "States[int]":
    """Each sequence by its number."""
    states = States[int](limit_bytes, scratch_folder)
    for s in range(len(hidden_SLD)):
        # a part of it would keep all of it
        states[s] = hidden_SLD[s : s + 1].clone()
    return states


def write(path: Path, values: torch.Tensor) -> None:
    """Not by numpy's tofile, which on a full disk says neither why nor where."""
    try:
        with open(path, "wb") as file:
            file.write(values.contiguous().numpy().data)
    except OSError as error:
        raise OutputError(
            f"cannot write {values.nbytes:,} bytes to {path}: {error.strerror}; make room there"
        ) from error


class States(Generic[Key]):
    """f32 (S, L, D), or (S, L, streams, D) of hyper-connections, by key, all of one shape. The files go with the
    object, or at the latest with the process."""

    def __init__(self, limit_bytes: int, scratch_folder: Path):
        self._limit_bytes, self._scratch_folder = limit_bytes, scratch_folder
        self._in_memory: dict[Key, torch.Tensor] = {}
        self._on_disk: dict[Key, Path] = {}
        self._shape: torch.Size | None = None
        self._folder: TemporaryDirectory | None = None
        self._lock = ExitStack()

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._on_disk)

    def __iter__(self) -> Iterator[Key]:
        return iter([*self._in_memory, *self._on_disk])

    def __setitem__(self, key: Key, state_SLD: torch.Tensor) -> None:
        self._shape = state_SLD.shape
        is_new = key not in self._on_disk
        if is_new and (len(self._in_memory | {key: None})) * state_SLD.nbytes <= self._limit_bytes:
            self._in_memory[key] = state_SLD
            return
        if self._folder is None:
            self._folder = TemporaryDirectory(dir=self._scratch_folder, prefix=SCRATCH_PREFIX)
            self._lock.enter_context(alone_in(Path(self._folder.name)))
        path = self._on_disk.setdefault(key, Path(self._folder.name) / f"{len(self._on_disk)}.f32")
        write(path, state_SLD)

    def __getitem__(self, key: Key) -> torch.Tensor:
        if key in self._in_memory:
            return self._in_memory[key]
        assert self._shape is not None
        return torch.from_numpy(np.fromfile(self._on_disk[key], np.float32)).view(self._shape)

    def part(self, key: Key, sequence: int, tokens: slice) -> torch.Tensor:
        """f32 (1, tokens, …)"""
        if key in self._in_memory:
            return self._in_memory[key][sequence : sequence + 1, tokens]
        assert self._shape is not None
        _, length, *of_token = self._shape
        width, first, n = prod(of_token), tokens.start, tokens.stop - tokens.start
        with open(self._on_disk[key], "rb") as file:
            file.seek((sequence * length + first) * width * 4, os.SEEK_SET)
            values = np.fromfile(file, np.float32, n * width)
        return torch.from_numpy(values).view(1, n, *of_token)

    def parts(self, keys: Iterable[Key]) -> torch.Tensor:
        """One after the other, f32 (Σ S, L, D)."""
        return torch.cat([self[key] for key in keys])

    def close(self) -> None:
        self._in_memory.clear()
        if self._folder is not None:
            self._folder.cleanup()
        self._lock.close()
