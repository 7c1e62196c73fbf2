"""Tiny random MoE checkpoints, one per architecture, as save_pretrained writes them.

Two layers, all weights from one seed. Each matrix is scaled by its fan-in, so activations keep their size,
the router prefers some experts without always taking the same, and logits spread over several nats.
"""

import json
import math
import re
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from moe2gguf.stream import auto_class
from tests.tiny_configs import (
    AS_PUBLISHED,
    COMMON,
    N_VOCAB,
    NAMED_AS_PUBLISHED,
    NAMED_TOKENS,
    SIZES,
    SPECIAL,
    TOP_K,
    VISION,
)

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FP8_BLOCK = 128
INT4_GROUP = 32
CORPUS = (
    "The old lighthouse keeper counted ships until the fog came in, and then he counted 12 waves instead.",
    "def mean(values): return sum(values) / len(values)  # of 3 or more",
    "It's said that she'd never seen the harbour, though they're sure she'll come back to it.",
    "Experts are chosen for each token; the router keeps the best and forgets the others.",
)


def _long_rope(n_rotary: int) -> dict[str, Any]:
    max_positions, trained_positions = COMMON["max_position_embeddings"], 256
    scale = math.sqrt(1 + math.log(max_positions / trained_positions) / math.log(trained_positions))
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": trained_positions,
        "short_factor": [1.0] * (n_rotary // 2),
        "long_factor": [1.5] * (n_rotary // 2),
        "short_mscale": scale,
        "long_mscale": scale,
    }


def make_tiny(
    model_type: str,
    folder: Path,
    *,
    hidden: int = 256,
    intermediate: int = 256,
    n_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    stored: str | None = None,
    **options: Any,
) -> Path:
    """Writes a random checkpoint with its tokenizer into `folder`; `options` override the config class's.

    `stored` quantises it as published checkpoints are, "mxfp4" for gpt_oss, else "fp8" or "int4".
    """
    n_experts_key, width_key = SIZES[model_type]
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        n_experts_key: n_experts,
        TOP_K.get(model_type, "num_experts_per_tok"): top_k,
        # not square, or transformers could not tell which way round a checkpoint has them
        width_key: 3 * intermediate if model_type == "qwen3_vl_moe" else intermediate,
    }
    if model_type == "ernie4_5_moe":  # the converter divides this by the heads of k for the shared expert's width
        sizes["intermediate_size"] = COMMON["num_key_value_heads"] * intermediate
    if model_type == "minimax_m3_vl":  # llama.cpp takes one width for all experts
        sizes["shared_intermediate_size"] = intermediate
    if model_type == "phimoe":
        sizes["rope_parameters"] = _long_rope(hidden // COMMON["num_attention_heads"])
    of_text = COMMON | SPECIAL[model_type] | sizes | options
    if model_type in VISION:
        vision = VISION[model_type] | ({"out_hidden_size": hidden} if "depth" in VISION[model_type] else {})
        tied = of_text["tie_word_embeddings"]
        config = AutoConfig.for_model(model_type, text_config=of_text, vision_config=vision, tie_word_embeddings=tied)
    else:
        config = AutoConfig.for_model(model_type, **of_text)
    with no_init_weights():
        model = auto_class(config).from_config(config, dtype=torch.float32)
    model.tie_weights()  # which comes with the initialisation otherwise
    _fill(model, seed)
    model.to(dtype).save_pretrained(folder)
    _save_tokenizer(folder, model_type)
    for pattern, published in NAMED_AS_PUBLISHED.get(model_type, ()):
        tensors = load_file(folder / "model.safetensors")
        renamed = {re.sub(pattern, published, name): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    if stored is not None:
        {"mxfp4": _experts_to_mxfp4, "fp8": _to_fp8, "int4": _experts_to_int4}[stored](folder)
    if model_type == "qwen3_vl_moe":
        _transpose_experts(folder)
    if model_type in AS_PUBLISHED:
        _edit_json(folder / "config.json", **AS_PUBLISHED[model_type])
    if model_type == "step3p7":
        _edit_json(folder / "config.json", text_config={"moe_num_experts": n_experts, "moe_top_k": top_k})
    return folder


def with_head_ahead(folder: Path, published: Path) -> Path:
    """With a head that predicts a further token, a copy of the last layer, where published checkpoints have it."""
    shutil.copytree(folder, published)
    config = json.loads((folder / "config.json").read_text())
    n_layers, tensors = config["num_hidden_layers"], load_file(folder / "model.safetensors")
    last = f"model.layers.{n_layers - 1}."
    ahead = "mtp.layers.0." if config["model_type"] == "qwen3_next" else f"model.layers.{n_layers}."
    tensors |= {name.replace(last, ahead): x.clone() for name, x in tensors.items() if name.startswith(last)}
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    _edit_json(published / "config.json", num_nextn_predict_layers=1)
    return published


def load_whole(folder: Path) -> PreTrainedModel:
    """The whole model in f32, its experts computed one after the other: other ways sum in another order."""
    config = json.loads((folder / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    dequantised = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    options = {"quantization_config": dequantised[method](dequantize=True)} if method else {}
    return from_pretrained(folder, experts_implementation="eager", **options)


def from_pretrained(folder: Path, **options: Any) -> PreTrainedModel:
    model = auto_class(AutoConfig.from_pretrained(folder))
    return model.from_pretrained(folder, dtype=torch.float32, **options).eval().float()  # from MXFP4 and FP8 in BF16


def _fill(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # experts of gpt_oss multiply from the right: (E, in, out)
    in_axis = -2 if model.config.model_type == "gpt_oss" else -1
    with torch.no_grad():
        # DeepSeek-V3's choice bias is a buffer
        biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("_bias")]
        for name, parameter in sorted([*model.named_parameters(), *biases], key=itemgetter(0)):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or name.endswith("_bias"):
                is_factor = name.endswith("scale") or ("norm" in name and name.endswith("weight"))
                # 1 is added: queries and keys twice as large would attend to one token each
                is_factor &= model.config.model_type not in ("minimax_m3_vl", "step3p7")
                # Gemma 4 divides by it, so that its routers would not tell experts apart
                by_root = math.sqrt(len(noise)) if name.endswith("router.scale") else 1.0
                parameter.copy_(by_root * (0.1 * noise + is_factor))
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[in_axis if parameter.dim() == 3 else -1]
                parameter.copy_(noise * (2.0 if "lm_head" in name else 1.0) / math.sqrt(fan_in))


def _transpose_experts(folder: Path) -> None:
    """As they are published: inputs by outputs."""
    tensors = load_file(folder / "model.safetensors")
    experts = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    transposed = {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
    save_file(tensors | transposed, folder / "model.safetensors", metadata={"format": "pt"})


def _experts_to_mxfp4(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight_ENK = tensors.pop(name).float().transpose(1, 2).contiguous().numpy()
        blocks = gguf.quantize(weight_ENK, gguf.GGMLQuantizationType.MXFP4)
        blocks = blocks.reshape(*weight_ENK.shape[:2], -1, 17)  # scale, then codes of elements j and j + 16 in one byte
        codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
        # the checkpoint pairs neighbours: elements 2j and 2j + 1
        tensors[f"{name}_blocks"] = torch.from_numpy(codes[..., ::2] | (codes[..., 1::2] << 4))
        tensors[f"{name}_scales"] = torch.from_numpy(blocks[..., 0].copy())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    not_converted = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": not_converted},
    )


def _to_fp8(folder: Path) -> None:
    """As DeepSeek-V3 and MiniMax-M2 are: a scale for each 128 × 128 of every projection."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".layers." in n and n.endswith(".weight") and tensors[n].dim() == 2]:
        if re.search(r"norm|router|\.gate\.", name):
            continue
        weight_NK = tensors[name].float()
        rows, columns = (-(-extent // FP8_BLOCK) for extent in weight_NK.shape)
        blocks = [
            (slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK), slice(j * FP8_BLOCK, (j + 1) * FP8_BLOCK))
            for i in range(rows)
            for j in range(columns)
        ]
        scales = torch.tensor([weight_NK[block].abs().max() / 448 for block in blocks])
        for block, scale in zip(blocks, scales, strict=True):
            weight_NK[block] /= scale
        tensors[name] = weight_NK.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales.reshape(rows, columns)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    _edit_json(folder / "config.json", quantization_config=config)


def _experts_to_int4(folder: Path) -> None:
    """As Kimi K2 is since Thinking: compressed-tensors' packed codes, a scale for each 32."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".mlp.experts." in n and n.endswith(".weight")]:
        weight_NK = tensors.pop(name).float()
        n_rows, n_columns = weight_NK.shape
        groups_NGk = weight_NK.reshape(n_rows, -1, INT4_GROUP)
        scales_NG = (groups_NGk.abs().amax(-1) / 7).to(torch.bfloat16)
        codes_NGk = (groups_NGk / scales_NG.float()[..., None]).round().clamp(-8, 7).to(torch.int64) + 8
        places = torch.arange(0, 32, 4)
        packed = (codes_NGk.reshape(n_rows, -1, 8) << places).sum(-1)
        tensors[f"{name}_packed"] = packed.to(torch.int32)
        tensors[f"{name}_scale"] = scales_NG
        tensors[f"{name}_shape"] = torch.tensor([n_rows, n_columns])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "group_size": INT4_GROUP, "strategy": "group", "type": "int", "symmetric": True}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    _edit_json(folder / "config.json", quantization_config=config)


def _save_tokenizer(folder: Path, model_type: str) -> None:
    """A byte-level BPE trained on a few sentences: llama.cpp's converter cannot know the hash of its ids."""
    if model_type in ("gemma4", "jamba", "ernie4_5_moe"):
        return _save_byte_fallback_tokenizer(folder, model_type)
    tokenizer = Tokenizer(models.BPE())
    # the converter takes a BPE for phimoe only from a GPT2Tokenizer, whose own pre-tokenizer is GPT-2's
    split = [] if model_type == "phimoe" else [pre_tokenizers.Split(Regex(QWEN2_REGEX), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = NAMED_TOKENS.get(model_type, [])
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 1 - len(named), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_tokens(named, special_tokens=True)
    assert len(fast) == N_VOCAB
    fast.save_pretrained(folder)
    if model_type == "phimoe":
        _edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


def _save_byte_fallback_tokenizer(folder: Path, model_type: str) -> None:
    """A BPE of characters, as the converter expects Gemma's to be: bytes stand for those that it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 1, show_progress=False, special_tokens=["<unk>", *of_bytes], max_token_length=4
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = {"unk_token": "<unk>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    assert len(fast) == N_VOCAB
    fast.save_pretrained(folder)
    if model_type == "ernie4_5_moe":
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), model_type="bpe",
            vocab_size=N_VOCAB, byte_fallback=True, minloglevel=2,
        )  # fmt: skip


def _edit_json(file: Path, **changes: Any) -> None:
    config = json.loads(file.read_text())
    parts = {key: config.get(key, {}) | value for key, value in changes.items() if isinstance(value, dict)}
    file.write_text(json.dumps(config | changes | parts, indent=1))
