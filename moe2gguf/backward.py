"""Gradients through the stream of layers: forward, then back, with one layer in memory at a time.

Of all activations only what each layer is given is kept. On the way back a layer is loaded again and runs once more,
with gradients, on that; what arrives at its input goes to the layer before.

Shapes: S sequences, L tokens of each, l tokens of one of them, B sequences at a time, D hidden, V vocabulary.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from moe2gguf.states import States
from moe2gguf.stream import LayerStream

# of what the layers are given in memory; the rest goes to disk
INPUTS_BYTES = 1 << 28
LOGITS_CHUNK_TOKENS = 256

# a layer's number and the layer, which has been loaded just before
Prepare = Callable[[int, nn.Module], None]
# logits f32 (l, V), and where they are: the sequence, its tokens
Loss = Callable[[torch.Tensor, int, slice], torch.Tensor]
Listen = Callable[[int, nn.Module], AbstractContextManager]
Last = Callable[[], AbstractContextManager]


def chunks(hidden_SLD: torch.Tensor) -> list[tuple[int, slice]]:
    """Sequence and tokens of parts whose logits are few enough for memory."""
    n_sequences, length = hidden_SLD.shape[:2]
    starts = range(0, length, LOGITS_CHUNK_TOKENS)
    return [(s, slice(start, min(start + LOGITS_CHUNK_TOKENS, length))) for s in range(n_sequences) for start in starts]


def backward(
    stream: LayerStream,
    hidden_SLD: torch.Tensor,
    loss: Loss,
    *,
    prepare: Prepare,
    finish: Prepare,
    batch_sequences: int,
    scratch_folder: Path,
    listen: Listen = lambda _index, _layer: nullcontext(),
    last: Last = nullcontext,
    without_experts: Collection[int] = (),
) -> tuple[float, torch.Tensor]:
    """The sum of the loss, and its gradient by hidden_SLD, what the first layer is given. Not in inference mode.

    `prepare` may ask parameters of the layer for gradients, which `finish` finds on them before the layer is emptied;
    those of what comes after the last layer are on the stream's own parameters. `listen` is around the second run,
    `last` around what comes after the last layer, there and back. Where the layer is loaded `without_experts`,
    `prepare` puts them in.
    """
    inputs = States[int](INPUTS_BYTES, scratch_folder)
    parts = [slice(s, s + batch_sequences) for s in range(0, len(hidden_SLD), batch_sequences)]
    for index in range(stream.n_layers):
        with stream.layer(index, without_experts=index in without_experts) as layer:
            prepare(index, layer)
            inputs[index] = hidden_SLD
            with torch.no_grad():
                hidden_SLD = torch.cat([stream.apply(index, layer, hidden_SLD[part]) for part in parts])
    total, gradient_SLD = 0.0, torch.empty_like(hidden_SLD)
    with last():
        for s, tokens in chunks(hidden_SLD):
            hidden_1lD = hidden_SLD[s : s + 1, tokens].requires_grad_(True)
            of_chunk = loss(stream.apply_head(hidden_1lD)[0], s, tokens)
            of_chunk.backward()
            total += float(of_chunk.detach())
            gradient_SLD[s : s + 1, tokens] = _gradient(hidden_1lD)
    for index in reversed(range(stream.n_layers)):
        with stream.layer(index, without_experts=index in without_experts) as layer:
            prepare(index, layer)
            hidden_SLD = inputs[index]
            with listen(index, layer):
                for part in parts:
                    hidden_BLD = hidden_SLD[part].detach().requires_grad_(True)
                    stream.apply(index, layer, hidden_BLD).backward(gradient_SLD[part])
                    gradient_SLD[part] = _gradient(hidden_BLD)
            finish(index, layer)
    inputs.close()
    return total, gradient_SLD


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad
