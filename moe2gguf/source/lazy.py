"""Evaluation of the converter's lazy tensors, one at a time and without keeping anything.

gguf's own `to_eager` stores every intermediate result in its node: after a pass over all tensors the whole
model would be in memory. This walks the same graph and stores nothing beyond one call.
"""

from typing import Any

import gguf
import numpy as np
import torch


def evaluate(lazy: Any) -> np.ndarray:
    """The values of a lazy or ordinary array. Nothing is cached: a second call reads the checkpoint again."""
    if isinstance(lazy, gguf.LazyChunkedTensor):
        chunks = [np.asarray(load_chunk(), dtype=np.float32) for load_chunk in lazy._chunks]
        return np.concatenate(chunks).reshape(lazy.shape)
    with torch.inference_mode():
        return _evaluate(lazy, {})


def _evaluate(value: Any, seen: dict[int, Any]) -> Any:
    """`seen` maps nodes to values within one call: a node that several others use is computed once."""
    if isinstance(value, (list, tuple)):
        return type(value)(_evaluate(item, seen) for item in value)
    if not isinstance(value, gguf.LazyBase):
        return value
    if value._data is not None:
        return value._data
    if id(value) not in seen:
        if value._func is torch.stack and value._kwargs in ({}, {"dim": 0}) and len(value._args) == 1:
            seen[id(value)] = _stack_one_by_one(value)
        else:
            assert value._func is not None
            seen[id(value)] = value._func(*_evaluate(value._args, seen), **value._kwargs)
    return seen[id(value)]


def _stack_one_by_one(node: Any) -> torch.Tensor:
    """Experts are merged with torch.stack; filling the result expert by expert needs half the memory."""
    stacked = torch.empty(node._meta.shape, dtype=node._meta.dtype)
    for index, part in enumerate(node._args[0]):
        stacked[index] = _evaluate(part, {})
    return stacked
