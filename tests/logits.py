"""Logits of llama.cpp on a GGUF file and of transformers on a checkpoint, both in f32 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import torch
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
    """(T, V) f32, with phimoe computed as llama.cpp does it."""
    model = from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode(), phimoe_as_in_llama_cpp(model.config.model_type == "phimoe"):
        return model(torch.tensor([tokens])).logits[0].numpy()


@contextmanager
def phimoe_as_in_llama_cpp(active: bool = True) -> Iterator[None]:
    """llama.cpp runs phimoe with RMS norms where the model has LayerNorms, and with the top k's softmax
    weights, rescaled to sum to 1, where it has SparseMixer's (src/models/phi3.cpp). The rest is alike."""
    if not active:
        yield
        return
    layer_norm, mixer = torch.nn.LayerNorm.forward, modeling_phimoe.sparsemixer

    def rms_norm(self: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, list(self.normalized_shape), self.weight, self.eps) + self.bias

    def softmax_of_top_k(
        scores_TE: torch.Tensor, jitter_eps: float, training: bool, top_k: int = 2
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights_Tk, experts_Tk = torch.softmax(scores_TE, dim=-1).topk(top_k)
        return weights_Tk / weights_Tk.sum(dim=-1, keepdim=True), experts_Tk

    torch.nn.LayerNorm.forward, modeling_phimoe.sparsemixer = rms_norm, softmax_of_top_k  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.LayerNorm.forward, modeling_phimoe.sparsemixer = layer_norm, mixer  # type: ignore[assignment, method-assign]
