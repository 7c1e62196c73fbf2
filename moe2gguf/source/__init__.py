"""A Hugging Face MoE checkpoint as GGUF would hold it: key-values and lazy tensors, by llama.cpp's converter.

Names, tokenizer, metadata, row permutations and merged experts are the converter's. Expert e of a merged
tensor is the checkpoint's expert e. E experts, N out features, K in features.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from moe2gguf.errors import SourceError
from moe2gguf.source.checkpoint import check_files, published_name, read_json, resolve_model
from moe2gguf.source.converter import convert_lazily
from moe2gguf.source.lazy import evaluate

__all__ = ["KeyValue", "Source", "SourceTensor", "expert_axis", "layer_of", "open_source", "resolve_model"]

FLOAT_TYPES = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16}
EXPERT_FIRST = re.compile(r"\.(ffn_(gate|up|down|gate_up)_exps\.|ffn_gate_inp\.(weight|bias)$|exp_probs_b(\.bias)?$)")

# llama.cpp src/llama-quant.cpp, tensor_allows_quantization: parts of a name that keep a tensor from being
# quantised. Its list goes on with encoders of images and sound, which a text model does not have.
NEVER_QUANTISED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    "position_embd.weight",
    "token_types.weight",
    *(f"time_mix_{letter}{index}.weight" for letter in "wvag" for index in range(3)),
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
)
NEVER_QUANTISED_BY_ARCH = {
    "glm5-next": (
        "hc_",
        "indexer.attn_q_b",
        "indexer.attn_k",
        "indexer.proj",
        "indexer_compressor_gate",
        "indexer_compressor_ape",
        *(f"ssm_{part}.weight" for part in ("f_a", "f_b", "g_a", "g_b", "beta")),
        "attn_kv_a_mqa.weight",
        "attn_k_b.weight",
        "attn_v_b.weight",
    )
}


@dataclass(frozen=True)
class KeyValue:
    """One GGUF key-value pair as gguf.GGUFWriter.add_key_value takes it."""

    key: str
    value: Any
    type: gguf.GGUFValueType
    sub_type: gguf.GGUFValueType | None


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the file to be. `load` reads it anew at every call and keeps nothing."""

    name: str  # "blk.0.ffn_gate_exps.weight"
    shape: tuple[int, ...]  # numpy order, (E, N, K) for experts
    quantisable: bool  # by llama-quantize's own rule; what is not is stored as F32
    load: Callable[[], np.ndarray]  # f32, C-contiguous; raises SourceError on a weight that is not finite
    native_type: gguf.GGMLQuantizationType | None = None  # a checkpoint that is MXFP4 already
    load_native: Callable[[], np.ndarray] | None = None  # uint8 (..., bytes per row), the same values without loss
    columns_K: np.ndarray | None = None  # i64, the checkpoint's, where the converter puts them in another order


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. Opening reads headers, configuration and tokenizer, not weights."""

    path: Path
    hparams: dict[str, Any]
    arch: str  # llama.cpp's name, "qwen3moe"
    name: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_expert_groups: int  # groups among which the router chooses first; 1 almost always
    tensors: tuple[SourceTensor, ...]
    kv: tuple[KeyValue, ...]
    metadata: gguf.Metadata

    @property
    def label(self) -> str:
        """What folders of ours are called after."""
        return published_name(self.path) or self.path.name

    @property
    def n_params(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    def tensor(self, name: str) -> SourceTensor:
        """Raises KeyError if there is none of that name."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)


def open_source(
    model: str | Path,
    *,
    pre_tokenizer: str | None = None,
    model_name: str | None = None,
    metadata_file: Path | None = None,
) -> Source:
    """Opens a folder, a Hub id or "demo". Every tensor stays unread until its `load`.

    Raises SourceError: no such model, files missing or cut short, not a MoE, or an architecture, tokenizer or
    quantisation that llama.cpp's converter does not take.
    """
    folder = resolve_model(model)
    check_files(folder)
    if metadata_file is not None:
        read_json(metadata_file)  # the converter passes over a file that is not there
    converted = convert_lazily(
        folder,
        pre_tokenizer=pre_tokenizer,
        model_name=model_name,
        metadata_file=metadata_file,
    )
    writer = converted.gguf_writer
    kv = tuple(KeyValue(key, v.value, v.type, v.sub_type) for key, v in writer.kv_data[0].items())
    values = {pair.key: pair.value for pair in kv}
    arch = values["general.architecture"]
    tensors = tuple(
        replace(_source_tensor(name, info, arch, folder), columns_K=_moved_columns(name, converted))
        for name, info in writer.tensors[0].items()
    )
    n_expert = values.get(f"{arch}.expert_count", 0)
    if not n_expert or not any("_exps." in tensor.name for tensor in tensors):
        raise SourceError(f"{folder} is a dense {arch} model without experts; moe2gguf is for mixtures of experts")
    return Source(
        path=folder,
        hparams=converted.hparams,
        arch=arch,
        name=values["general.name"],
        n_layer=values[f"{arch}.block_count"],
        n_expert=n_expert,
        n_expert_used=values[f"{arch}.expert_used_count"],
        n_expert_groups=values.get(f"{arch}.expert_group_count", 1),
        tensors=tensors,
        kv=kv,
        metadata=converted.metadata,
    )


def expert_axis(name: str) -> int | None:
    """The axis of a GGUF tensor that runs over routed experts, None without one. Shared ones do not count."""
    return 0 if EXPERT_FIRST.search(name) else None


def layer_of(name: str) -> int | None:
    """The decoder layer of a GGUF tensor, None for embeddings, output and the like."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def _moved_columns(name: str, converted: Any) -> np.ndarray | None:
    """Of what linear attention gives: Qwen3.5's converter has the heads of values in another order than those of keys
    share them by. Other matrices it moves by rows."""
    if not name.endswith(".ssm_out.weight") or not hasattr(converted, "_reorder_v_heads"):
        return None
    n_keys, n_values, width = (
        converted.hparams[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "value_head_dim")
    )
    if n_keys == n_values:
        return None
    columns_1K = torch.arange(n_values * width)[None]
    return converted._reorder_v_heads(columns_1K, 1, n_keys, n_values // n_keys, width)[0].numpy()


def _source_tensor(name: str, info: gguf.gguf_writer.TensorInfo, arch: str, folder: Path) -> SourceTensor:
    shape = tuple(int(extent) for extent in info.shape)
    if "exp_probs_b" in name:  # ERNIE's is a matrix of one row
        shape = (prod(shape),)
    quantisable = _is_quantisable(name, shape, arch)
    lazy = info.tensor
    if info.dtype in FLOAT_TYPES:
        return SourceTensor(name, shape, quantisable, lambda: _finite_f32(evaluate(lazy), name, folder).reshape(shape))
    if info.dtype != gguf.GGMLQuantizationType.MXFP4:
        raise SourceError(f"{name} of {folder} is stored as {info.dtype.name}, which moe2gguf does not read")

    def load_native() -> np.ndarray:
        return np.ascontiguousarray(evaluate(lazy))

    def load() -> np.ndarray:
        return _finite_f32(gguf.dequantize(load_native(), info.dtype), name, folder)

    return SourceTensor(name, shape, quantisable, load, info.dtype, load_native)


def _finite_f32(values: np.ndarray, name: str, folder: Path) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    # a NaN is its own minimum, so two reductions find every fault without an array of flags
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):
        n_bad = int(values.size - np.isfinite(values).sum())
        raise SourceError(
            f"{name} of {folder} holds {n_bad} weights that are NaN or infinite, out of {values.size}; "
            "the checkpoint is damaged"
        )
    return values


def _is_quantisable(name: str, shape: tuple[int, ...], arch: str) -> bool:
    # ggml does not count leading dimensions of extent 1
    n_dims = len(shape) - next((axis for axis, extent in enumerate(shape) if extent > 1), len(shape))
    never = (*NEVER_QUANTISED, *NEVER_QUANTISED_BY_ARCH.get(arch, ()))
    return n_dims >= 2 and name.endswith("weight") and not any(part in name for part in never)
