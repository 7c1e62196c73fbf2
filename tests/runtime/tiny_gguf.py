"""Tiny random MoE models as GGUF files, plain or with their experts in groups, for llama.cpp to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from tests.runtime.ops import Ops, Type

N_VOCAB, N_EMBD, N_FF, N_LAYER, N_EXPERT, N_USED, N_HEAD, HEAD_DIM = 96, 256, 256, 2, 8, 3, 2, 64


def dense_and_router(arch: str, seed: int) -> dict[str, np.ndarray]:
    """Everything but the expert matrices, f32."""
    rng = np.random.default_rng(seed)

    def matrix(n: int, k: int) -> np.ndarray:
        return rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))

    tensors = {"token_embd.weight": matrix(N_VOCAB, N_EMBD), "output_norm.weight": np.ones(N_EMBD, np.float32)}
    for i in range(N_LAYER):
        layer = {
            "attn_norm": np.ones(N_EMBD, np.float32),
            "attn_q": matrix(N_HEAD * HEAD_DIM, N_EMBD),
            "attn_k": matrix(N_HEAD * HEAD_DIM, N_EMBD),
            "attn_v": matrix(N_HEAD * HEAD_DIM, N_EMBD),
            "attn_output": matrix(N_EMBD, N_HEAD * HEAD_DIM),
            "ffn_gate_inp": matrix(N_EXPERT, N_EMBD),
        }
        if arch == "qwen3moe":
            layer |= {
                "attn_q_norm": np.ones(HEAD_DIM, np.float32),
                "attn_k_norm": np.ones(HEAD_DIM, np.float32),
                "ffn_norm": np.ones(N_EMBD, np.float32),
            }
        if arch == "gpt-oss":
            layer |= {"post_attention_norm": np.ones(N_EMBD, np.float32), "attn_sinks": matrix(1, N_HEAD)[0]}
            biases = {
                "attn_output": matrix(1, N_EMBD)[0],
                "ffn_gate_inp": matrix(1, N_EXPERT)[0],
                "ffn_gate_exps": matrix(N_EXPERT, N_FF),
                "ffn_up_exps": matrix(N_EXPERT, N_FF),
                "ffn_down_exps": matrix(N_EXPERT, N_EMBD),
            }
            tensors |= {f"blk.{i}.{name}.bias": array for name, array in biases.items()}
        tensors |= {f"blk.{i}.{name}.weight": array for name, array in layer.items()}
    if arch == "gpt-oss":
        tensors["output.weight"] = matrix(N_VOCAB, N_EMBD)
    return tensors


def expert_matrices(arch: str, seed: int) -> dict[str, np.ndarray]:
    """The expert matrices, f32 (E, N, K): gate and up fused in cohere2moe, else apart."""
    rng = np.random.default_rng(seed)
    shapes = {"ffn_gate_up_exps": 2 * N_FF} if arch == "cohere2moe" else {"ffn_gate_exps": N_FF, "ffn_up_exps": N_FF}
    matrices = {}
    for i in range(N_LAYER):
        for name, n in {**shapes, "ffn_down_exps": N_EMBD}.items():
            k = N_FF if name == "ffn_down_exps" else N_EMBD
            weight_ENK = rng.standard_normal((N_EXPERT, n, k), dtype=np.float32) / np.float32(np.sqrt(k))
            matrices[f"blk.{i}.{name}"] = weight_ENK
    return matrices


def write_model(
    path: Path,
    ops: Ops,
    *,
    arch: str = "qwen3moe",
    groups: Sequence[tuple[Type, int]] = ((Type.F16, N_EXPERT),),
    suffix: str | None = None,
    rename: Mapping[str, str] = {},
    extra: Mapping[str, np.ndarray] = {},
    blocks: tuple[Type, Mapping[str, np.ndarray]] | None = None,
    seed: int = 7,
) -> Path:
    """Write a model whose experts are split into GROUPS of (type, number of experts); one group is a plain tensor.

    To make a file malformed: SUFFIX overrides what follows the architecture's name, RENAME changes or (with "")
    drops tensor names, EXTRA adds f32 tensors. BLOCKS are the expert matrices where they are quantised already.
    """
    writer = gguf.GGUFWriter(path, arch)
    if suffix is None:
        suffix = "+grouped" if len(groups) > 1 else ""
    writer.kv_data[0][gguf.Keys.General.ARCHITECTURE].value = arch + suffix
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_USED)
    if arch in ("cohere2moe", "gpt-oss"):
        writer.add_sliding_window(128)
    if arch == "cohere2moe":
        writer.add_layer_norm_eps(1e-5)
        writer.add_logit_scale(1.0)
        writer.add_leading_dense_block_count(0)

    def add(name: str, array: np.ndarray, type: Type = Type.F32) -> None:
        name = rename.get(name, name)
        if name:
            writer.add_tensor(name, array, raw_dtype=type)

    for name, array in dense_and_router(arch, seed).items():
        add(name, array)
    type, quantised = blocks or (Type.F32, {})
    for name, blocks_ENB in quantised.items():
        add(f"{name}.weight", blocks_ENB, type)
    for name, weight_ENK in expert_matrices(arch, seed + 1).items() if blocks is None else ():
        first = 0
        for i, (type, n) in enumerate(groups):
            group = ops.quantize(type, weight_ENK[first : first + n])
            add(f"{name}.g{i}.weight" if len(groups) > 1 else f"{name}.weight", group.blocks, type)
            first += n
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
