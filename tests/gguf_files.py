"""Small GGUF files of a random MoE's tensors, grouped and reordered or not, written by gguf-py alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType

N_LAYERS, N_EXPERTS, HIDDEN, VOCAB = 3, 6, 64, 32
# types that gguf-py itself encodes, so that these files need no libggml
MIXED = (Q.Q4_0, Q.Q4_0, Q.Q8_0, Q.Q5_0, Q.Q5_0, Q.Q5_0)  # by position in the file


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Checkpoint tensors by GGUF name, f32, experts in the checkpoint's order."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    weights = {"token_embd.weight": draw(VOCAB, HIDDEN), "output.weight": draw(VOCAB, HIDDEN)}
    for layer in range(N_LAYERS):
        weights[f"blk.{layer}.attn_norm.weight"] = draw(HIDDEN)
        weights[f"blk.{layer}.attn_q.weight"] = draw(HIDDEN, HIDDEN)
        weights[f"blk.{layer}.ffn_gate_inp.weight"] = draw(N_EXPERTS, HIDDEN)
        for projection in ("gate", "up", "down"):
            weights[f"blk.{layer}.ffn_{projection}_exps.weight"] = draw(N_EXPERTS, HIDDEN, HIDDEN)
    return weights


def random_orders(seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {layer: rng.permutation(N_EXPERTS) for layer in range(N_LAYERS)}


def type_runs(types: Sequence[Q]) -> list[tuple[int, int, Q]]:
    """(start, end, type) of each run of equal types."""
    starts = [i for i in range(len(types)) if i == 0 or types[i] != types[i - 1]]
    return [(s, e, types[s]) for s, e in zip(starts, [*starts[1:], len(types)], strict=True)]


def write_moe(
    path: Path,
    weights: Mapping[str, np.ndarray],
    *,
    expert_types: Sequence[Q] = (Q.Q8_0,) * N_EXPERTS,  # by position
    orders: Mapping[int, np.ndarray] | None = None,
    stated_orders: Mapping[int, np.ndarray] | None = None,  # what the file claims; `orders` unless a test lies
    matrix_type: Q = Q.Q8_0,
    extra_kv: Mapping[str, object] | None = None,
    rename: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
    split_max_tensors: int = 0,
) -> Path:
    """Experts in `orders`' order, one tensor per run of `expert_types`; norms and router stay f32."""
    orders = orders or {}
    runs = type_runs(expert_types)
    arch = "qwen3moe+grouped" if len(runs) > 1 else "qwen3moe"
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    writer.add_name("Random MoE")
    for key, value in {"block_count": N_LAYERS, "expert_count": N_EXPERTS, "expert_used_count": 2}.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    for layer, order in (orders if stated_orders is None else stated_orders).items():
        writer.add_array(f"moe2gguf.expert_order.{layer}", [int(e) for e in order])
    for key, value in (extra_kv or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, str(value))

    def add(name: str, weight: np.ndarray, quant_type: Q) -> None:
        if name not in leave_out:
            blocks = gguf.quants.quantize(np.ascontiguousarray(weight), quant_type)
            writer.add_tensor((rename or {}).get(name, name), blocks, raw_dtype=quant_type)

    for name, weight in weights.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        if "_exps." in name or "ffn_gate_inp" in name:
            weight = weight[orders.get(layer, np.arange(N_EXPERTS))]
        if "_exps." in name:
            for i, (start, end, quant_type) in enumerate(runs):
                part = name if len(runs) == 1 else name.replace(".weight", f".g{i}.weight")
                add(part, weight[start:end], quant_type)
        else:
            add(name, weight, Q.F32 if weight.ndim == 1 or "ffn_gate_inp" in name else matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewritten(
    path: Path,
    out: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    plain: bool = False,  # without "+grouped" after the architecture
    arrays: Mapping[str, Sequence[float]] | None = None,  # more keys, after the architecture's prefix
) -> Path:
    """A GGUF with the key-values of another, and its tensors or these as F32."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    prefix = arch.removesuffix("+grouped")
    writer = gguf.GGUFWriter(out, prefix if plain else arch)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for key, values in (arrays or {}).items():
        writer.add_key_value(f"{prefix}.{key}", list(values), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32)
    if tensors is None:
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    else:
        for name, value in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
