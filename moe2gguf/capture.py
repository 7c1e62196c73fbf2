"""Hooks on one decoder layer: the inputs of its matrices and everything its experts are given.

Shapes: T tokens, K selected experts per token or columns of a matrix, D hidden, E experts, n sampled tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe2gguf.experts import CPU, ExpertBlock

# how many tokens of each batch, or of a layer, are kept as a sample
LAYER_SAMPLE_TOKENS = 64
GOLDEN_RATIO = (5**0.5 - 1) / 2


class MatrixCapture:
    """One linear module beside the experts: sums x² over all tokens, keeps a sample of its inputs."""

    def __init__(self, module: nn.Linear):
        self.module = module
        self._sq_sum_K = torch.zeros(module.weight.shape[1], dtype=torch.float64)
        self.n_tokens = 0
        self._samples: list[torch.Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        handle = self.module.register_forward_pre_hook(self.see)
        try:
            yield
        finally:
            handle.remove()

    def see(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x_TK = args[0].reshape(-1, args[0].shape[-1]).float()
        self._sq_sum_K += x_TK.square().sum(0).to(CPU)
        self.n_tokens += len(x_TK)
        # off the first tokens of sequences, whose states are unlike all others
        stride = max(1, len(x_TK) // LAYER_SAMPLE_TOKENS)
        self._samples.append(_rows(x_TK[stride // 2 :: stride]))

    def importance_K(self) -> np.ndarray:
        return (self._sq_sum_K / max(self.n_tokens, 1)).float().numpy()

    def sample_nK(self) -> torch.Tensor:
        return torch.cat(self._samples)


class ExpertCapture:
    """Hooks on one layer's experts: everything they are given."""

    def __init__(self, block: ExpertBlock | None):
        self._block = block
        self._x: list[torch.Tensor] = []
        self._scored: list[torch.Tensor] = []  # where the router is given something else
        self._at_router: torch.Tensor | None = None
        self._ids: list[torch.Tensor] = []
        self._gates: list[torch.Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = self._hooks()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self) -> list[RemovableHandle]:
        if self._block is None:
            return []
        return [
            self._block.router.register_forward_pre_hook(self._see_router, with_kwargs=True),
            self._block.module.register_forward_pre_hook(self._see_experts, with_kwargs=True),
        ]

    def _see_router(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._at_router = (*args, *kwargs.values())[0].detach()

    def _see_experts(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        # every experts module takes hidden states, ids and gate weights, in this order, under various names
        hidden, ids, gates = (x.detach() for x in (*args, *kwargs.values())[:3])
        # Gemma 4 normalises for each; in others it is the same memory
        if self._at_router is not None and self._at_router.data_ptr() != hidden.data_ptr():
            self._scored.append(_rows(self._at_router))
        self._at_router = None
        self._x.append(_rows(hidden))
        self._ids.append(ids.reshape(-1, ids.shape[-1]).to(CPU, copy=True))
        self._gates.append(_rows(gates))

    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x f32 (T, D), ids i64 (T, K), gate weights as applied f32 (T, K)."""
        return _joined(self._x), self.selected(), _joined(self._gates)

    def scored(self) -> torch.Tensor:
        """What the router multiplied, f32 (T, D'): x in most models, and then the same tensor."""
        return _joined(self._scored or self._x)

    def selected(self) -> torch.Tensor:
        """ids i64 (T, K)"""
        return _joined(self._ids)


class LayerCapture(ExpertCapture):
    """Hooks on one decoder layer: inputs of its linear modules, and everything its experts are given."""

    def __init__(self, layer: nn.Module, block: ExpertBlock | None):
        super().__init__(block)
        self.matrices = {
            name: MatrixCapture(module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)
        }
        if block is not None:
            # routers built on nn.Linear are not quantised
            self.matrices = {n: m for n, m in self.matrices.items() if m.module.weight is not block.router_ED}

    def _hooks(self) -> list[RemovableHandle]:
        return [m.module.register_forward_pre_hook(m.see) for m in self.matrices.values()] + super()._hooks()


class GradedCapture(ExpertCapture):
    """Also the gradient by what the experts of the layer give together, batch by batch as they are given."""

    def __init__(self, block: ExpertBlock):
        super().__init__(block)
        self._module = block.module
        self._gradients: list[torch.Tensor] = []

    def _hooks(self) -> list[RemovableHandle]:
        return [*super()._hooks(), self._module.register_forward_hook(self._await_gradient)]

    def _await_gradient(self, _module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: self._gradients.append(_rows(gradient)))

    def gradient_TD(self) -> torch.Tensor:
        return _joined(self._gradients)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, f32 (T, columns)."""
    return x.reshape(-1, x.shape[-1]).to(CPU, torch.float32, copy=True)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One below the other. Of the list only the result is left, so that no more than one part lies in memory twice."""
    whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
    filled = 0
    while parts:
        part = parts.pop(0)
        whole[filled : filled + len(part)] = part
        filled += len(part)
    parts.append(whole)
    return whole


def tokens_of(expert: int, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens an expert was routed, i64 (n,), and with what gate weights, f32 (n,)."""
    token_n, slot_n = torch.where(ids_TK == expert)
    return token_n, gates_TK[token_n, slot_n]


def layer_sample_tokens(n_tokens: int) -> torch.Tensor:
    """Tokens of the whole layer, i64 (n,). They stand in where an expert has seen too little: it is run on tokens that
    it did not win, each weighed by the expert's softmax probability there."""
    return spread_tokens(n_tokens, LAYER_SAMPLE_TOKENS)


def spread_tokens(n_tokens: int, n_wanted: int) -> torch.Tensor:
    """So many of all, i64 (n,), ascending: one in each of as many equal runs of tokens, at a place in it that goes on
    by the golden ratio. At even steps all could be at one place of their sequences, such as the first."""
    n = min(n_tokens, n_wanted)
    border_n = torch.arange(n + 1) * n_tokens // max(n, 1)
    place_n = (torch.arange(n, dtype=torch.float64) * GOLDEN_RATIO) % 1
    return border_n[:-1] + (place_n * border_n.diff()).long()
