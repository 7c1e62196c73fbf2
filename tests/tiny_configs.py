"""What the tiny checkpoints of tiny_moe.py are configured as: each architecture's peculiarities, in few weights."""

from typing import Any

N_VOCAB = 320

# config.json of published checkpoints, which llama.cpp's converter expects, where transformers writes something else
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "step3p7": {
        "text_config": {
            "rope_parameters": None,
            "rope_theta": [5e6, 1e4, 5e6],
            "partial_rotary_factors": [0.5, 1.0, 0.5],
            "num_attention_groups": 2,
            "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 2},
            "moe_layers_enum": "1,2",
            "norm_expert_weight": True,
        }
    },
    "minimax_m3_vl": {
        "text_config": {
            "moe_layer_freq": [0, 1, 1],
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "sparse_attention_config": {
                "sparse_attention_freq": [0, 1, 1],
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 64,
                "sparse_topk_blocks": 16,
                "sparse_block_size": 128,
                "sparse_local_block": 1,
            },
        }
    },
    "mimo_v2_flash": {
        "rope_parameters": None,
        "rope_theta": 5e6,
        "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.334,
        "hybrid_layer_pattern": [0, 1, 0],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 96,
        "swa_v_head_dim": 64,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
    },
}

# and the names of tensors, likewise
NAMED_AS_PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    "hy_v4": (
        (r"\.hc_pre\.hc_(attn|mlp)_layer\.", r".hc_\1_layer.hc_pre."),
        (r"\.hc_pre\.hc_head\.", ".hc_head."),
        (r"\.mlp(\.shared_experts)?\.linear_gate\.", r".mlp\1.gate_proj."),
    ),
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
    "glm_moe_dsa": ("n_routed_experts", "moe_intermediate_size"),
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
    "mimo_v2_flash": ("n_routed_experts", "moe_intermediate_size"),
    "hy_v4": ("n_routed_experts", "moe_intermediate_size"),
    "step3p7": ("n_routed_experts", "moe_intermediate_size"),
    "minimax_m3_vl": ("num_local_experts", "intermediate_size"),
    "glm5_next": ("n_routed_experts", "moe_intermediate_size"),
    "deepseek_v32": ("n_routed_experts", "moe_intermediate_size"),
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
# and only to tokens that a few small heads choose
CHOSEN_ATTENTION = LATENT_ATTENTION | {
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "index_head_dim": 128,
    "index_n_heads": 2,
    "index_topk": 128,
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
NAMED_TOKENS = dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "glm5_next"), GLM_TOKENS) | {
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
    # attention to the tokens that a few small heads choose, or that those of another layer chose
    "glm_moe_dsa": CHOSEN_ATTENTION
    | DENSE_FIRST
    | SHARED_EXPERT
    | {
        "indexer_types": ["full", "shared", "full"],
        "scoring_func": "sigmoid",
    },
    "deepseek_v32": CHOSEN_ATTENTION
    | DENSE_FIRST
    | {
        "n_group": 2,
        "topk_group": 1,
        "scoring_func": "sigmoid",
    },
    # four streams of hidden states, which layers read and write in shares of their own (hyper-connections)
    "hy_v4": CHOSEN_ATTENTION
    | {
        "num_hidden_layers": 3,
        "intermediate_size": 512,
        "indexer_types": ["full", "shared", "full"],
    },
    # the same; linear attention, and MLA without positions to tokens chosen in pools
    "glm5_next": CHOSEN_ATTENTION
    | {
        "num_hidden_layers": 3,
        "intermediate_size": 512,
        "qk_rope_head_dim": 0,
        "mla_use_nope": True,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "indexer_types": ["full"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "first_k_dense_replace": 1,
        "linear_attn_config": {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0},
    },
    # more heads where there is a window, a gate for each head
    "step3p7": {
        "num_hidden_layers": 3,
        "head_dim": 64,
        "share_expert_dim": 256,
        "intermediate_size": 512,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_sliding_attention_heads": 8,
        "rope_theta": [5e6, 1e4, 5e6],
        "partial_rotary_factors": [0.5, 1.0, 0.5],
        "moe_router_scaling_factor": 3.0,
    },
    # attention to blocks of tokens that a few small heads choose
    "minimax_m3_vl": {
        "num_hidden_layers": 3,
        "head_dim": 64,
        "rotary_dim": 32,
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "dense_intermediate_size": 512,
        "index_n_heads": 2,
        "index_head_dim": 64,
    },
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
    # attention sinks and more heads of keys where there is a window; values of another width
    "mimo_v2_flash": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 32,
        "head_dim": 96,
        "v_head_dim": 64,
        "intermediate_size": 512,
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
    "step3p7": {"width": 64, "layers": 1, "heads": 2, "patch_size": 4, "image_size": 16},
    "minimax_m3_vl": {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 16,
    },
    "glm5_next": {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "projection_intermediate_size": 64,
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
