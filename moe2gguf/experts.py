"""One layer's experts as transformers holds them, behind plain (rows, columns) matrices.

transformers 5 fuses the experts of some seventy architectures into gate_up_proj and down_proj, whose layout
(transposed, interleaved, biased) the module itself declares. Here every matrix is (features out, features in) and gate
rows come before up rows, which is also the order in the GGUF.

Shapes: E experts, I intermediate, D hidden, T tokens, K selected experts per token, n tokens of one expert.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from moe2gguf.errors import SourceError


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
    def n_experts(self) -> int:
        return self.router_ED.shape[0]

    @property
    def n_intermediate(self) -> int:
        down = self.module.down_proj
        return down.shape[1] if self.module.is_transposed else down.shape[2]

    def chosen_by(self, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """Of gate weights as applied those as the router gives them, f32 (T, K): what skipping compares."""
        return gates_TK if self.gate_scale_E is None else gates_TK / self.gate_scale_E[ids_TK]

    def gate_up(self, expert: int) -> torch.Tensor:
        """f32 (2I, D), gate rows first. May share storage with the module."""
        return self.gate_up_rows(self.module.gate_up_proj[expert])

    def down(self, expert: int) -> torch.Tensor:
        """f32 (D, I). May share storage with the module."""
        return self.down_rows(self.module.down_proj[expert])

    def gate_up_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """An expert's as the module has it -> (2I, D), gate rows first."""
        weight = weight.T if self.module.is_transposed else weight
        return weight if self.module.is_concatenated else torch.cat([weight[::2], weight[1::2]])

    def down_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """An expert's as the module has it -> (D, I)."""
        return weight.T if self.module.is_transposed else weight

    def set_gate_up(self, expert: int, weight: torch.Tensor) -> None:
        """Takes f32 (2I, D), gate rows first."""
        target = self.module.gate_up_proj.data[expert]
        target = target.T if self.module.is_transposed else target
        if self.module.is_concatenated:
            target.copy_(weight)
        else:
            target[::2], target[1::2] = weight.chunk(2)

    def set_down(self, expert: int, weight: torch.Tensor) -> None:
        """Takes f32 (D, I)."""
        target = self.module.down_proj.data[expert]
        (target.T if self.module.is_transposed else target).copy_(weight)

    def activation(self, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
        """f32 (n, D) -> f32 (n, I): the input of the down projection."""
        module = self.module
        gate_up = module.gate_up_proj[expert]
        out = x_nD @ (gate_up if module.is_transposed else gate_up.T)
        if module.has_bias:
            out = out + module.gate_up_proj_bias[expert]
        return module._apply_gate(out)

    def gate_up_bias(self, expert: int) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """f32 (I,) each, 0 without biases."""
        if not self.module.has_bias:
            return 0.0, 0.0
        bias = self.module.gate_up_proj_bias[expert]
        gate_I, up_I = bias.chunk(2) if self.module.is_concatenated else (bias[::2], bias[1::2])
        return gate_I, up_I

    def pre_activation(self, expert: int, x_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f32 (n, D) -> gate and up, f32 (n, I) each, biases added."""
        gate_nI, up_nI = (x_nD @ self.gate_up(expert).T).chunk(2, dim=-1)
        gate_bias, up_bias = self.gate_up_bias(expert)
        return gate_nI + gate_bias, up_nI + up_bias

    def gated(self, gate_nI: torch.Tensor, up_nI: torch.Tensor) -> torch.Tensor:
        """The module's own activation on separate gate and up, f32 (n, I') each, any I'."""
        if self.module.is_concatenated:
            return self.module._apply_gate(torch.cat([gate_nI, up_nI], dim=-1))
        return self.module._apply_gate(torch.stack([gate_nI, up_nI], dim=-1).flatten(-2))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def slopes(self, gate_nI: torch.Tensor, up_nI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the activation, by each."""
        # no tensors of inference mode, which know no gradient
        gate_nI, up_nI = (x.clone().requires_grad_() for x in (gate_nI, up_nI))
        gate, up = torch.autograd.grad(self.gated(gate_nI, up_nI).sum(), (gate_nI, up_nI))
        return gate, up

    def output(self, expert: int, hidden_nI: torch.Tensor) -> torch.Tensor:
        """f32 (n, I) -> f32 (n, D), before the gate weight."""
        out = hidden_nI @ self.down(expert).T
        return out + self.module.down_proj_bias[expert] if self.module.has_bias else out


def find_experts(layer: nn.Module) -> ExpertBlock | None:
    """The routed experts inside a decoder layer, None for a dense layer."""
    for name, module in layer.named_modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "is_concatenated"):
            n_experts = module.gate_up_proj.shape[0]
            parent = layer.get_submodule(name.rpartition(".")[0])
            for child in parent.modules():
                weight = getattr(child, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == n_experts:
                    scale = getattr(parent, "router", None)
                    return ExpertBlock(module, child, getattr(scale, "per_expert_scale", None))
            raise SourceError(f"no router with {n_experts} rows beside {name} ({type(parent).__name__})")
        if hasattr(module, "down_proj") and hasattr(module, "is_concatenated"):
            raise SourceError(
                f"experts without a gate projection ({type(module).__name__}) are not supported yet; "
                "please report the model"
            )
    return None
