"""The tensors of a checkpoint as its files store them, and as what they stand for where they are quantised.

Nothing is read before transformers takes a slice of it, and a quantised tensor is decoded then, by itself.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe2gguf.errors import SourceError
from moe2gguf.source.checkpoint import WEIGHTS_INDEX
from moe2gguf.source.converter import dequantised

# matrices of experts, as checkpoints name them: one by one, or Step 3.7's
_OF_EXPERTS = re.compile(r"\.experts\.|\.moe\.\w+_proj\.")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Shards:
    """Where each checkpoint tensor lives."""

    file_of: dict[str, Path]

    @classmethod
    def of(cls, folder: Path) -> "Shards":
        index = folder / WEIGHTS_INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            return cls({name: folder / file for name, file in sorted(weight_map.items())})
        file_of = {}
        for file in sorted(folder.glob("model*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                file_of.update(dict.fromkeys(shard.keys(), file))
        if not file_of:
            raise SourceError(f"{folder} holds no model*.safetensors; calibration needs safetensors weights")
        return cls(file_of)

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """The named tensors, read from disk only when used."""
        with ExitStack() as stack:
            shards = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in sorted({self.file_of[name] for name in names})
            }
            yield {name: shards[self.file_of[name]].get_slice(name) for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.file_of[name], framework="pt") as shard:
            return shard.get_tensor(name)


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """In place of a slice: a tensor of a quantised checkpoint, read and decoded when it is asked for."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def get_dtype(self) -> str:
        return "BF16"  # which holds four bits and a scale's as well as training did


class Stored:
    """A checkpoint's tensors for transformers to load. `method`: how it is quantised, by its configuration."""

    def __init__(self, folder: Path, method: str | None):
        self._shards = Shards.of(folder)
        self._mxfp4 = method == "mxfp4"
        self._decoded: dict[str, Callable[[], torch.Tensor]] = {}
        if method is not None and not self._mxfp4:
            readers = {name: partial(self._shards.tensor, name) for name in self._shards.file_of}
            self._decoded = dequantised(folder, readers)

    @property
    def names(self) -> list[str]:
        return sorted(self._decoded or self._shards.file_of)

    @contextmanager
    def state(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Slices of the named tensors, by the names that these would have if they were not quantised."""
        if self._decoded:
            yield {name: _Decoded(self._decoded[name]) for name in names}
        else:
            with self._shards.slices(names) as slices:
                yield _decode_mxfp4(slices) if self._mxfp4 else slices


def experts_dtype(state: dict[str, Any]) -> torch.dtype:
    """What fuses them: it takes twice their memory, so 16 bits if all are stored in the same."""
    experts = [tensor for name, tensor in state.items() if _OF_EXPERTS.search(name)]
    found = {t.dtype if isinstance(t, torch.Tensor) else _DTYPES.get(t.get_dtype(), torch.float32) for t in experts}
    return found.pop() if len(found) == 1 else torch.float32


def _decode_mxfp4(slices: dict[str, Any]) -> dict[str, Any]:
    """gpt-oss stores experts as MXFP4 blocks and scales: hand transformers the bf16 matrices they stand for."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    state = {}
    for name, lazy in slices.items():
        if name.endswith("_blocks"):
            scales = slices[name.removesuffix("_blocks") + "_scales"][:]
            state[name.removesuffix("_blocks")] = convert_moe_packed_tensors(lazy[:], scales)
        elif not name.endswith("_scales"):
            state[name] = lazy
    return state
