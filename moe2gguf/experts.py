"""One layer's experts as transformers holds them, behind plain (rows, columns) matrices.

transformers 5 fuses the experts of some seventy architectures into gate_up_proj and down_proj, whose layout
(transposed, interleaved, biased) the module itself declares. Here every matrix is (features out, features in) and gate
rows come before up rows, which is also the order in the GGUF. Where there is no gate, as in Nemotron's, up is all of
gate_up.

The module may hold them in bfloat16, or on a GPU (stream.py): what is given and asked for here is float32 and on the
CPU all the same, products computed as and where the module is.

Shapes: E experts, I intermediate, D hidden, T tokens, K selected experts per token, n tokens of one expert.
"""

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn

from moe2gguf.errors import SourceError

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class ExpertBlock:
    """The routed experts of one decoder layer, and what scores them."""

    module: Any  # transformers' experts module: no common base class declares its attributes
    router: Any  # has the matrix, is called with what it multiplies
    gate_scale_E: torch.Tensor | None = None  # of Gemma 4's gate weights, after the choice

    @property
    def router_ED(self) -> torch.Tensor:
        return self.router.weight

    @property
    def first(self) -> tuple[str, ...]:
        """The matrices that an expert's input is multiplied with, in the order of their rows."""
        return ("gate", "up") if self.module.has_gate else ("up",)

    @property
    def gate_up_name(self) -> str:
        """The module's, of all experts' together."""
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def gate_up_proj(self) -> nn.Parameter:
        return getattr(self.module, self.gate_up_name)

    @property
    def n_experts(self) -> int:
        return self.router_ED.shape[0]

    @property
    def n_intermediate(self) -> int:
        down = self.module.down_proj
        return down.shape[1] if self.module.is_transposed else down.shape[2]

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Of the router for what it is given, f32 (T, E), without biases."""
        return _product(x_TD, self.router_ED.T).to(CPU)

    def chosen_by(self, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """Of gate weights as applied those as the router gives them, f32 (T, K): what skipping compares."""
        return gates_TK if self.gate_scale_E is None else gates_TK / self.gate_scale_E.to(CPU)[ids_TK]

    def gate_up(self, expert: int) -> torch.Tensor:
        """f32 (2I, D), gate rows first, or (I, D). May share storage with the module."""
        return self.gate_up_rows(self.gate_up_proj[expert]).to(CPU, torch.float32)

    def down(self, expert: int) -> torch.Tensor:
        """f32 (D, I). May share storage with the module."""
        return self.down_rows(self.module.down_proj[expert]).to(CPU, torch.float32)

    def gate_up_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """An expert's as the module has it -> as `gate_up`."""
        weight = weight.T if self.module.is_transposed else weight
        return weight if self._is_concatenated else torch.cat([weight[::2], weight[1::2]])

    def down_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """An expert's as the module has it -> (D, I)."""
        return weight.T if self.module.is_transposed else weight

    def set_gate_up(self, expert: int, weight: torch.Tensor) -> None:
        """Takes what `gate_up` gives."""
        target = self.gate_up_proj.data[expert]
        target = target.T if self.module.is_transposed else target
        if self._is_concatenated:
            target.copy_(weight)
        else:
            for rows, part in zip((target[::2], target[1::2]), weight.chunk(2), strict=True):
                rows.copy_(part)

    def set_down(self, expert: int, weight: torch.Tensor) -> None:
        """Takes f32 (D, I)."""
        target = self.module.down_proj.data[expert]
        (target.T if self.module.is_transposed else target).copy_(weight)

    def activation(self, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
        """f32 (n, D) -> f32 (n, I): the input of the down projection."""
        return self._activation(expert, x_nD).to(CPU)

    def _activation(self, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up_proj[expert]
        out = _product(x_nD, gate_up if self.module.is_transposed else gate_up.T)
        if self.module.has_bias:
            out = out + getattr(self.module, f"{self.gate_up_name}_bias")[expert]
        return self._activated(out)

    def first_biases(self, expert: int) -> tuple[torch.Tensor | float, ...]:
        """Of each of the first matrices, f32 (I,), 0 without biases."""
        if not self.module.has_bias:
            return (0.0,) * len(self.first)
        bias = getattr(self.module, f"{self.gate_up_name}_bias")[expert].to(CPU)
        return bias.chunk(len(self.first)) if self._is_concatenated else (bias[::2], bias[1::2])

    def pre_activation(self, expert: int, x_nD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """f32 (n, D) -> what each of the first matrices gives, f32 (n, I), biases added."""
        found_nM = _product(x_nD, self.gate_up_rows(self.gate_up_proj[expert]).T).to(CPU)
        parts = found_nM.chunk(len(self.first), dim=-1)
        return tuple(part_nI + bias for part_nI, bias in zip(parts, self.first_biases(expert), strict=True))

    def activated(self, *parts_nI: torch.Tensor) -> torch.Tensor:
        """The module's own activation on what each of the first matrices gives, f32 (n, I') each, any I'."""
        if self._is_concatenated:
            return self._activated(torch.cat(parts_nI, dim=-1))
        return self._activated(torch.stack(parts_nI, dim=-1).flatten(-2))

    def _activated(self, out: torch.Tensor) -> torch.Tensor:
        return self.module._apply_gate(out) if self.module.has_gate else self.module.act_fn(out)

    @property
    def _is_concatenated(self) -> bool:
        return self.module.is_concatenated or not self.module.has_gate

    @torch.inference_mode(False)
    @torch.enable_grad()
    def slopes(self, *parts_nI: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of the activation, by each."""
        # no tensors of inference mode, which know no gradient
        parts_nI = tuple(x.clone().requires_grad_() for x in parts_nI)
        return torch.autograd.grad(self.activated(*parts_nI).sum(), parts_nI)

    def output(self, expert: int, hidden_nI: torch.Tensor) -> torch.Tensor:
        """f32 (n, I) -> f32 (n, D), before the gate weight."""
        return self._output(expert, hidden_nI).to(CPU)

    def _output(self, expert: int, hidden_nI: torch.Tensor) -> torch.Tensor:
        out = _product(hidden_nI, self.down_rows(self.module.down_proj[expert]).T)
        return out + self.module.down_proj_bias[expert] if self.module.has_bias else out

    def forward(self, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """As the module's and where it is, for passes with gradients. Its own makes one by all tokens for every
        expert, to add up: with many experts that takes as long as the products do; here they share one."""
        shared: list[torch.Tensor] = []
        hidden_TD = _Shared.apply(hidden_TD, shared)
        order_S = ids_TK.flatten().argsort(stable=True)
        n_tokens_E = torch.bincount(ids_TK.flatten(), minlength=self.n_experts)
        total_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        for expert, slot_n in enumerate(order_S.split(n_tokens_E.tolist())):
            if len(slot_n):
                token_n = slot_n // ids_TK.shape[1]
                output_nD = self._output(expert, self._activation(expert, _Taken.apply(hidden_TD, token_n, shared)))
                total_TD.index_add_(0, token_n, output_nD * gates_TK.flatten()[slot_n, None])
        return total_TD.to(hidden_TD.dtype)


class _Shared(torch.autograd.Function):
    """Hands on hidden states, and back the gradient by them that is in the list when all who took of them are done."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: torch.Tensor, gradient: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return hidden_TD.view_as(hidden_TD)

    @staticmethod
    def backward(ctx: Any, _gradient_TD: None) -> tuple[torch.Tensor | None, None]:
        return ctx.gradient.pop() if ctx.gradient else None, None


class _Taken(torch.autograd.Function):
    """Some tokens' hidden states, whose gradients are added to the shared one."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: torch.Tensor, token_n: torch.Tensor, gradient: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(token_n)
        ctx.shape, ctx.gradient = hidden_TD.shape, gradient
        return hidden_TD[token_n]

    @staticmethod
    def backward(ctx: Any, gradient_nD: torch.Tensor) -> tuple[None, None, None]:
        if not ctx.gradient:
            ctx.gradient.append(gradient_nD.new_zeros(ctx.shape))
        ctx.gradient[0].index_add_(0, *ctx.saved_tensors, gradient_nD)
        return None, None, None


def _product(x_nK: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
    """f32 (n, N), where the weight is."""
    return (x_nK.to(weight_KN.device, weight_KN.dtype) @ weight_KN).float()


def find_experts(layer: nn.Module) -> ExpertBlock | None:
    """The routed experts inside a decoder layer, None for a dense layer."""
    for name, module in layer.named_modules():
        _declare(module)
        if hasattr(module, "down_proj") and hasattr(module, "is_concatenated"):
            if getattr(module, "has_post_expert_norm", False):
                raise SourceError(f"experts that end in a norm ({type(module).__name__}) are not supported yet")
            n_experts = module.down_proj.shape[0]
            parent = layer.get_submodule(name.rpartition(".")[0])
            for child in parent.modules():
                weight = getattr(child, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == n_experts:
                    scale = getattr(parent, "router", None)
                    return ExpertBlock(module, child, getattr(scale, "per_expert_scale", None))
            raise SourceError(f"no router with {n_experts} rows beside {name} ({type(parent).__name__})")
    return None


def _declare(module: Any) -> None:
    """The layout as most have it, where the module is called as others are but does not say it, as Step 3.7's."""
    fused = getattr(module, "gate_up_proj", None)
    if isinstance(fused, nn.Parameter) and "top_k_index" in inspect.signature(module.forward).parameters:
        plain = {"is_concatenated": True, "is_transposed": False, "has_gate": True, "has_bias": False}
        for name, value in plain.items():
            if not hasattr(module, name):
                setattr(module, name, value)
