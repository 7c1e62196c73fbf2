"""Tiny random MoE checkpoints, one per architecture, as save_pretrained writes them.

Two layers, all weights from one seed. Each matrix is scaled by its fan-in, so activations keep their size,
the router prefers some experts without always taking the same, and logits spread over several nats.
"""

import json
import math
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
from transformers import AutoConfig, Mxfp4Config, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from moe2gguf.stream import auto_class

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "The old lighthouse keeper counted ships until the fog came in, and then he counted 12 waves instead.",
    "def mean(values): return sum(values) / len(values)  # of 3 or more",
    "It's said that she'd never seen the harbour, though they're sure she'll come back to it.",
    "Experts are chosen for each token; the router keeps the best and forgets the others.",
)
N_VOCAB = 320

# config.json of published checkpoints, which llama.cpp's converter expects, where transformers writes something else
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}

COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": N_VOCAB,
    "tie_word_embeddings": False,
    "bos_token_id": N_VOCAB - 1,
    "eos_token_id": N_VOCAB - 1,
    "pad_token_id": N_VOCAB - 1,
}


# model type -> what its configuration calls the number of experts and the width of one
SIZES = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen2_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    "olmoe": ("num_experts", "intermediate_size"),
    "deepseek_v2": ("n_routed_experts", "moe_intermediate_size"),
    "deepseek_v3": ("n_routed_experts", "moe_intermediate_size"),
    "granitemoe": ("num_local_experts", "intermediate_size"),
    "granitemoe_swa": ("num_local_experts", "intermediate_size"),
    "phimoe": ("num_local_experts", "intermediate_size"),
    "gpt_oss": ("num_local_experts", "intermediate_size"),
    "granitemoeshared": ("num_local_experts", "intermediate_size"),
    "glm4_moe": ("n_routed_experts", "moe_intermediate_size"),
    "dots1": ("n_routed_experts", "moe_intermediate_size"),
    "minimax_m2": ("num_local_experts", "intermediate_size"),
    "lfm2_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3_next": ("num_experts", "moe_intermediate_size"),
    "qwen3_5_moe_text": ("num_experts", "moe_intermediate_size"),
    "qwen3_5_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3_vl_moe": ("num_experts", "moe_intermediate_size"),
    "gemma4": ("num_experts", "moe_intermediate_size"),
    "granitemoehybrid": ("num_local_experts", "intermediate_size"),
    "glm4_moe_lite": ("n_routed_experts", "moe_intermediate_size"),
    "exaone_moe": ("num_experts", "moe_intermediate_size"),
    "nemotron_h": ("n_routed_experts", "moe_intermediate_size"),
    "glm4v_moe": ("n_routed_experts", "moe_intermediate_size"),
    "mistral3": ("n_routed_experts", "moe_intermediate_size"),
    "hy_v3": ("num_experts", "moe_intermediate_size"),
    "afmoe": ("num_experts", "moe_intermediate_size"),
    "laguna": ("num_experts", "moe_intermediate_size"),
    "solar_open": ("n_routed_experts", "moe_intermediate_size"),
    "ernie4_5_moe": ("moe_num_experts", "moe_intermediate_size"),
    "mellum": ("num_experts", "moe_intermediate_size"),
    "cohere2_moe": ("num_experts", "intermediate_size"),
    "kimi_linear": ("num_experts", "moe_intermediate_size"),
    "jamba": ("num_experts", "intermediate_size"),
}
MODEL_TYPES = tuple(SIZES)
# what some call the number of experts of a token
TOP_K = {"gemma4": "top_k_experts", "ernie4_5_moe": "moe_k"}

LATENT_ATTENTION = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
# the first layer is dense: three, so that two have experts
DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 512, "num_hidden_layers": 3}
# but for every nth layer; a shared expert with a gate of its own; norms of 1 + weight
LINEAR_ATTENTION = {
    "full_attention_interval": 2,
    "head_dim": 64,
    "shared_expert_intermediate_size": 512,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
SHARED_EXPERT = {"n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
# that the converter gives a part by their names
GLM_TOKENS = ["[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>"]
NAMED_TOKENS = dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm4v_moe"), GLM_TOKENS) | {
    "solar_open": ["<|endoftext|>", "<|im_end|>", "<unk>", "<|startoftext|>"]
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_BY_LAYER = {"full_attention": ROPE, "sliding_attention": ROPE}
GRANITE_SCALES = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_multiplier": 1 / 16,
}
# what each configuration has beside COMMON and SIZES
SPECIAL: dict[str, dict[str, Any]] = {
    "mixtral": {},
    # a shared expert with a gate of its own, biases on q, k and v
    "qwen2_moe": {"shared_expert_intermediate_size": 512, "intermediate_size": 512},
    "qwen3_moe": {"head_dim": 32, "intermediate_size": 512, "norm_topk_prob": True},
    # q and k normalised over all heads at once, for which llama.cpp needs as many of k as of q
    "olmoe": {"num_key_value_heads": 4},
    "deepseek_v2": LATENT_ATTENTION | DENSE_FIRST | {"n_shared_experts": 2, "routed_scaling_factor": 1.5},
    # sigmoid router with a bias that counts for the choice only, and a choice among groups of experts before;
    # the published configuration names the sigmoid, transformers' own does not
    "deepseek_v3": LATENT_ATTENTION
    | DENSE_FIRST
    | {"n_group": 2, "topk_group": 1, "num_mtp_layers": 0, "scoring_func": "sigmoid"},
    # the experts of a layer merged in the checkpoint
    "granitemoe": GRANITE_SCALES,
    # gate and up of an expert stay one matrix in the GGUF too, and of the shared expert
    "granitemoe_swa": GRANITE_SCALES | {"shared_intermediate_size": 512, "sliding_window": 32},
    # biases on attention, norms and output; LongRoPE comes in make_tiny
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "granitemoeshared": GRANITE_SCALES | {"shared_intermediate_size": 512},
    # sigmoid routers with a bias for the choice, one group
    "glm4_moe": DENSE_FIRST | SHARED_EXPERT | {"head_dim": 32, "use_qk_norm": True, "attention_bias": True},
    "dots1": DENSE_FIRST | SHARED_EXPERT | {"num_key_value_heads": 4, "scoring_func": "sigmoid"},
    "minimax_m2": {"head_dim": 64, "rotary_dim": 32, "scoring_func": "sigmoid"},
    # convolutions in the place of attention, but for some layers
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
        "intermediate_size": 512,
        "tie_word_embeddings": True,
    },
    "qwen3_next": LINEAR_ATTENTION,
    # its tokenizer adds tokens of its own
    "qwen3_5_moe_text": LINEAR_ATTENTION | {"vocab_size": N_VOCAB + 32},
    "qwen3_5_moe": LINEAR_ATTENTION | {"vocab_size": N_VOCAB + 32},
    # pairs beyond three times their section llama.cpp does not turn; of published models those are the slowest two
    "qwen3_vl_moe": {"head_dim": 64, "rope_parameters": {"rope_theta": 1e4, "mrope_section": [11, 11, 10]}},
    # the router has a norm of its own, and experts a scale; a dense part beside them; capped logits
    "gemma4": {
        "head_dim": 32,
        "global_head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "intermediate_size": 512,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0,
    },
    # state-space layers in the place of attention, but for some
    "granitemoehybrid": GRANITE_SCALES
    | {
        "shared_intermediate_size": 512,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 64,
        "position_embedding_type": "nope",
    },
    # experts without a gate; a layer has one of state space, attention and experts
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "head_dim": 64,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "ssm_state_size": 64,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 512,
        "routed_scaling_factor": 2.5,
    },
    "glm4_moe_lite": LATENT_ATTENTION | DENSE_FIRST | SHARED_EXPERT | {"scoring_func": "sigmoid"},
    "exaone_moe": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "sliding_window": 32,
        "sliding_window_pattern": 3,
        "intermediate_size": 512,
        "num_shared_experts": 1,
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    },
    "glm4v_moe": DENSE_FIRST
    | SHARED_EXPERT
    | {
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": ROPE | {"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5},
    },
    # Mistral 4, which is published with Mistral 3's part for pictures
    "mistral3": LATENT_ATTENTION
    | SHARED_EXPERT
    | {
        "model_type": "mistral4",
        "qk_rope_head_dim": 32,
        "head_dim": 64,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "intermediate_size": 512,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "hy_v3": DENSE_FIRST | {"head_dim": 64, "num_shared_experts": 1},
    # scaled embeddings; a sliding window in all layers but every fourth
    "afmoe": {
        "num_hidden_layers": 4,
        "num_dense_layers": 2,
        "head_dim": 64,
        "sliding_window": 32,
        "intermediate_size": 512,
        "num_shared_experts": 1,
        "mup_enabled": True,
        "score_func": "sigmoid",
        "route_norm": True,
    },
    "laguna": {"num_hidden_layers": 3, "intermediate_size": 512, "rope_parameters": ROPE_BY_LAYER},
    "solar_open": {
        "n_shared_experts": 1,
        "intermediate_size": 512,
        "head_dim": 64,
        "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    "mellum": {
        "head_dim": 64,
        "sliding_window": 32,
        "intermediate_size": 512,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": ROPE_BY_LAYER,
    },
    # attention and experts side by side
    "cohere2_moe": {"head_dim": 64, "sliding_window": 32},
    # linear attention and MLA
    "kimi_linear": {
        "head_dim": 32,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 0,
        "moe_router_activation_func": "sigmoid",
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
    },
    # state-space layers; experts in every second layer
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 32,
        "mamba_d_state": 16,
        "use_mamba_kernels": False,
    },
    # biases on attention, router and experts, attention sinks, a sliding window in every second layer
    "gpt_oss": {
        "head_dim": 64,
        "sliding_window": 32,
        # published with truncate=False, which llama.cpp's YaRN does not have: it rounds the ends of the ramp
        # to whole dimensions
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "original_max_position_embeddings": 16,
        },
    },
}

# of models that see pictures, whose part for text has what is above
_VIT: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
VISION: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": _VIT,
    "qwen3_vl_moe": _VIT | {"deepstack_visual_indexes": [0]},
    "glm4v_moe": {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
    },
    "mistral3": {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "head_dim": 32,
        "patch_size": 4,
        "image_size": 16,
    },
    "gemma4": {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "position_embedding_size": 16,
        "patch_size": 4,
    },
}


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
    mxfp4: bool = False,
    **options: Any,
) -> Path:
    """Writes a random checkpoint with its tokenizer into `folder`; `options` override the config class's.

    `mxfp4` stores the experts of gpt_oss as its published checkpoints do.
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
    if mxfp4:
        _experts_to_mxfp4(folder)
    if model_type == "qwen3_vl_moe":
        _transpose_experts(folder)
    if model_type in AS_PUBLISHED:
        _edit_json(folder / "config.json", **AS_PUBLISHED[model_type])
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
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if "quantization_config" in config else {}
    whole = auto_class(AutoConfig.from_pretrained(folder))
    model = whole.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager", **options)
    return model.float().eval()


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
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=1))
