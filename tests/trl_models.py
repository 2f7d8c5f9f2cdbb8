"""Tiny models of every architecture that TRL's own tests of GRPO train, by their configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from trl_cases import VOCAB

_PLAIN = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
_PLAIN |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
_PLAIN |= {"initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {**_EXPERTS, "num_experts": 4},
    "Qwen2Moe": {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0},
    "FlexOlmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "MiniMaxM2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
}
"""Whose config has a coefficient for the router's auxiliary loss, and whose forward returns that loss."""
UNNAMED: dict[str, dict[str, Any]] = {
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
}
"""Whose config does not have ``num_experts``, which TRL reads."""
WITHOUT: dict[str, dict[str, Any]] = {
    "DeepseekV3": {**_EXPERTS, **_LATENT, **_GROUPS},
    "Glm4Moe": {**_EXPERTS, **_GROUPS},
}
"""Mixtures without one."""


def make_model(name: str, **changes: Any) -> Any:
    """Return a random causal model of a family, such as Qwen3Moe."""
    kind = getattr(transformers, f"{name}Config")
    sizes = {**_PLAIN, **{**MIXTURES, **UNNAMED, **WITHOUT}.get(name, {}), **changes}
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(kind(**sizes)).eval()
