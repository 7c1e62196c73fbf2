"""Logits of llama.cpp on a GGUF file and of transformers on a checkpoint, both in f32 throughout."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import llama_cpp
import numpy as np
import torch
from transformers.models.hy_v4 import modeling_hy_v4
from transformers.models.phimoe import modeling_phimoe

from tests.tiny_moe import from_pretrained

# of the logits' spread, where ggml looks an activation up in a table of f16
TABLE_NOISE = {"gemma4": 5e-4}


def llama_logits(gguf_path: Path, tokens: list[int]) -> np.ndarray:
    """(T, V) f32. The KV cache is f32 too: f16 moves logits by 1e-3 and flips near-tied experts."""
    model = llama_cpp.Llama(
        str(gguf_path),
        n_ctx=256,
        n_batch=256,
        n_threads=2,
        logits_all=True,
        verbose=False,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    try:
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)], dtype=np.float32)
    finally:
        model.close()


def transformers_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """(T, V) f32, computed as llama.cpp does it where it runs another function than transformers."""
    model = from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode(), as_in_llama_cpp(model.config.model_type):
        return model(torch.tensor([tokens])).logits[0].numpy()


@contextmanager
def as_in_llama_cpp(model_type: str) -> Iterator[None]:
    """phimoe with RMS norms where the model has LayerNorms, and with the top k's softmax weights, rescaled to sum to 1,
    where it has SparseMixer's (src/models/phi3.cpp); hy_v4 with rotary pairs of neighbours, where transformers has
    those of the halves (src/llama-model.cpp). The rest is alike."""
    with ExitStack() as patches:
        if model_type == "phimoe":
            patches.enter_context(patch.object(torch.nn.LayerNorm, "forward", _rms_norm))
            patches.enter_context(patch.object(modeling_phimoe, "sparsemixer", _softmax_of_top_k))
        if model_type == "hy_v4":
            patches.enter_context(patch.object(modeling_hy_v4, "apply_rotary_pos_emb", _rotated_neighbours))
        yield


def _rms_norm(self: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, list(self.normalized_shape), self.weight, self.eps) + self.bias


def _softmax_of_top_k(
    scores_TE: torch.Tensor, jitter_eps: float, training: bool, top_k: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    weights_Tk, experts_Tk = torch.softmax(scores_TE, dim=-1).topk(top_k)
    return weights_Tk / weights_Tk.sum(dim=-1, keepdim=True), experts_Tk


def _rotated_neighbours(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    # each angle is there twice, once for either half
    cos, sin = (part.chunk(2, dim=-1)[0].unsqueeze(unsqueeze_dim) for part in (cos, sin))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)

    return rotated(q), rotated(k)
