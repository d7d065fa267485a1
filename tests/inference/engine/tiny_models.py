"""Architectures without a trained fixture: tiny, with random weights of a fixed seed. What they say means nothing, and never changes."""

import importlib
from functools import cache
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

VOCABULARY = 1000

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1000,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

# Each with the cache that it is expected to get on the CPU, and why it is here.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # convolutions beside attention: states and keys
    "lfm2": (
        "slots",
        {
            "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 4,
            "block_ffn_dim_multiplier": 2, "block_auto_adjust_ff_dim": True, "full_attn_idxs": [1, 3],
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    # recurrence alone: no keys at all
    "mamba2": (
        "slots",
        {
            "num_heads": 4, "head_dim": 32, "state_size": 16, "conv_kernel": 4, "expand": 2, "n_groups": 1, "use_bias": False,
            "use_conv_bias": True, "time_step_limit": [0.01, 10.0], "time_step_rank": "auto", "layer_norm_epsilon": 1e-5,
            "hidden_size": 64, "intermediate_size": 128,
        },
    ),
    # gated delta rule beside attention
    "qwen3_next": (
        "slots",
        {
            "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "shared_expert_intermediate_size": 64, "moe_intermediate_size": 64, "partial_rotary_factor": 0.5, "norm_topk_prob": True,
            "full_attention_interval": 2,
        },
    ),
    # windows of 8 tokens, and sinks in the softmax
    "gpt_oss": (
        "slots",
        {
            "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "rope_scaling": None,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # soft-capped attention of its own
    "gemma2": (
        "slots, gathered by heads",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    # keys and values compressed into one
    "deepseek_v3": (
        "slots, gathered",
        {
            "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 64, "n_shared_experts": 1, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "rope_scaling": None, "num_key_value_heads": 4,
        },
    ),
    # a cache of chunks that nobody shares
    "llama4": (
        "single",
        {
            "text_config": {
                **_COMMON, "attention_bias": False, "attention_chunk_size": 8, "head_dim": 16, "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 128, "model_type": "llama4", "num_experts_per_tok": 1, "num_local_experts": 2,
                "rope_scaling": None, "use_qk_norm": True,
            },
        },
    ),
}  # fmt: skip


def config_of(architecture: str) -> dict[str, Any]:
    _, own = CONFIGS[architecture]
    return {**_COMMON, "model_type": architecture, **own}


@cache
def tiny(architecture: str) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    model = module.Model(module.ModelArgs.from_dict(config_of(architecture)))
    mx.random.seed(7)

    def weight(old: mx.array) -> mx.array:
        if not mx.issubdtype(old.dtype, mx.floating):
            return old
        return (mx.random.normal(old.shape) * 0.2 if old.ndim > 1 else old).astype(mx.float32)

    model.update(tree_map(weight, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model
