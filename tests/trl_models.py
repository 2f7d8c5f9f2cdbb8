"""Tiny models of every architecture that TRL's own tests of GRPO train, by their configs."""

from __future__ import annotations

import copy
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


DENSE: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 8},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Gemma3Text": {"sliding_window": 8},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "Granite": {"logits_scaling": 3.0},
    "FalconH1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "Phi3": {},
    "Olmo3": {},
    "NemotronH": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_n_groups": 1,
        "n_groups": 1,
        "ssm_state_size": 8,
        "mamba_d_conv": 4,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "use_mamba_kernels": False,
        "moe_shared_expert_intermediate_size": 32,
    },
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
}
"""Others, with a scale, a cap or a tied head, and without."""


def make_model(name: str, **changes: Any) -> Any:
    """Return a random causal model of a family, such as Qwen3Moe."""
    kind = getattr(transformers, f"{name}Config")
    sizes = {**_PLAIN, **{**MIXTURES, **UNNAMED, **WITHOUT, **DENSE}.get(name, {}), **changes}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kind(**sizes)).eval()


_IMAGE, _START, _END, _VIDEO = 60, 61, 62, 63
"""Ids of tokens that stand for images."""
_TEXT = {name: value for name, value in _PLAIN.items() if name != "bos_token_id"}
_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP |= {"image_size": 8, "patch_size": 4, "projection_dim": 32}
_GRID = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "hidden_act": "silu"}
_MARKS = {
    "image_token_id": _IMAGE,
    "video_token_id": _VIDEO,
    "vision_start_token_id": _START,
    "vision_end_token_id": _END,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_MROPE = {**_TEXT, **_ROPE}
_SIGHT = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 2, **_GRID}
_QWEN3_VL = {**_SIGHT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_QWEN3_5 = {**_SIGHT, "num_position_embeddings": 16}
_GATED = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
_GATED |= {"linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
_SMOL = {key: value for key, value in _CLIP.items() if key != "projection_dim"}

SEEING: dict[str, dict[str, Any]] = {
    "Qwen2VL": {
        **_MARKS,
        "text_config": _MROPE,
        "vision_config": {**_GRID, "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    },
    "Qwen2_5_VL": {
        **_MARKS,
        "text_config": _MROPE,
        "vision_config": {**_SIGHT, "window_size": 16, "fullatt_block_indexes": [1]},
    },
    "Qwen3VL": {**_MARKS, "text_config": _MROPE, "vision_config": _QWEN3_VL},
    "Qwen3VLMoe": {
        **_MARKS,
        "text_config": {**_MROPE, **MIXTURES["Qwen3Moe"], "decoder_sparse_step": 1},
        "vision_config": _QWEN3_VL,
    },
    "Qwen3_5": {**_MARKS, "text_config": {**_MROPE, **_GATED}, "vision_config": _QWEN3_5},
    "Qwen3_5Moe": {
        **_MARKS,
        "text_config": {**_MROPE, **_GATED, **MIXTURES["Qwen3Moe"], "shared_expert_intermediate_size": 32},
        "vision_config": _QWEN3_5,
    },
    "Llava": {
        "image_token_index": _IMAGE,
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_CLIP, "model_type": "clip_vision_model"},
    },
    "LlavaNext": {
        "image_token_index": _IMAGE,
        "image_grid_pinpoints": [[8, 8]],
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_CLIP, "model_type": "clip_vision_model"},
    },
    "Gemma3": {
        "image_token_index": _IMAGE,
        "mm_tokens_per_image": 4,
        "text_config": {**_TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**_SMOL, "model_type": "siglip_vision_model"},
    },
    "Gemma4": {
        "image_token_id": _IMAGE,
        "text_config": {
            **_TEXT,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "sliding_window": 16,
            "final_logit_softcapping": 5.0,
        },
        "vision_config": {
            **_SMOL,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "default_output_length": 4,
        },
    },
    "SmolVLM": {
        "image_token_id": _IMAGE,
        "scale_factor": 1,
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _SMOL,
    },
    "InternVL": {
        "image_token_id": _IMAGE,
        "image_seq_length": 1,
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_SMOL, "image_size": [8, 8], "patch_size": [4, 4]},
    },
}
"""Models with images, small enough that one takes four tokens or fewer."""


def make_seeing(name: str, text_config: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Return a random model of a family with images, such as Qwen2VL."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    sizes = copy.deepcopy(SEEING[name]) | changes
    sizes["text_config"] |= text_config or {}
    model = kind(getattr(transformers, f"{name}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def images_of(name: str, counts: list[int]) -> tuple[dict[str, Any], list[list[int]]]:
    """Return what TRL's batches hold of images, ``counts`` of them in each row, and the prompts' tokens for them."""
    generator, total = torch.Generator().manual_seed(7), sum(counts)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found: dict[str, Any] = {"num_images": counts}
    sizes = [4] * total
    if name.startswith("Qwen"):
        grid = torch.tensor([[1, 4, 4] if i % 2 else [1, 2, 4] for i in range(total)])
        sizes = (grid.prod(-1) // 4).tolist()
        found |= {"image_grid_thw": grid, "pixel_values": pixels(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)}
    elif name == "LlavaNext":  # the image, and its one tile with a column of newlines
        sizes = [10] * total
        found |= {"pixel_values": pixels(total, 2, 3, 8, 8), "image_sizes": torch.full((total, 2), 8)}
    elif name == "SmolVLM":  # as many images for every row
        most = max(counts)
        found["pixel_values"] = pixels(len(counts), most, 3, 8, 8)
        found["pixel_attention_mask"] = torch.ones(len(counts), most, 8, 8, dtype=torch.bool)
        for row, count in enumerate(counts):
            found["pixel_values"][row, count:] = 0
    elif name == "Gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        found |= {"pixel_values": pixels(total, 16, 48), "image_position_ids": places.expand(total, 16, 2)}
    elif name == "InternVL":
        sizes, found["num_tiles"] = [1] * total, counts
        found["pixel_values"] = pixels(total, 3, 8, 8)
    else:
        found["pixel_values"] = pixels(total, 3, 8, 8)
    each = iter(sizes)
    return found, [
        [token for _ in range(count) for token in (_START, *[_IMAGE] * next(each), _END)] for count in counts
    ]


def with_images(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of TRL's whose prompts begin with images: one in each row, two in the third."""
    more, tokens = images_of(name, [2 if row == 2 else 1 for row in range(len(inputs["prompt_ids"]))])
    longest = max(len(row) for row in tokens)
    front = torch.tensor([[0] * (longest - len(row)) + row for row in tokens])
    seen = front != 0
    clean = torch.where(inputs["prompt_ids"] < _IMAGE, inputs["prompt_ids"], 2)
    completion = torch.where(inputs["completion_ids"] < _IMAGE, inputs["completion_ids"], 2)
    mask = torch.ones_like(inputs["prompt_mask"])
    inputs = {**inputs, **more, "completion_ids": completion}
    inputs |= {"prompt_ids": torch.cat([front, clean], 1), "prompt_mask": torch.cat([seen.long(), mask], 1)}
    kind = "mm_token_type_ids" if name.startswith("Qwen") else "token_type_ids" if name == "Gemma3" else None
    if kind is not None:
        inputs[kind] = (torch.cat([inputs["prompt_ids"], completion], 1) == _IMAGE).long()
    return inputs
