"""Sizes of tiny models: one table for every config, then what single ones need."""

from __future__ import annotations

from typing import Any

VOCAB = 128
FIRST_SPECIAL = 96
"""Ids of images, audio and the like are moved to the end of the vocabulary, where no drawn token is."""
WIDTH = 32
NOISE = 0.1
"""Standard deviation of what is added to every parameter: 0.02 of transformers alone leaves logits near zero."""

SIZES = {
    r"type_vocab_size": 2,
    r"(.*_)?vocab_size|n_words|num_embeddings|num_embeds|vocab_size_per_layer_input|vision_vocab_size": VOCAB,
    r"num_kv_shared_layers|first_k_dense_replace|moe_layer_start_index|num_nextn_predict_layers": 0,
    r"num_dense_layers|num_residual_layers|num_adapter_layers|num_sparse_(en|de)coder_layers|moe_layer_end_index": 1,
    r"layers|(.*_)?(depth|n_layer|n_layers|num_layers|hidden_layers|layers)|num_blocks|num_layers_per_stack": 2,
    r"(.*_)?(num_mel_bins|n_mel_bins|mel_dim|input_feat_size|input_feat_per_channel|feature_size)": 16,
    r"qk_(nope|rope)_head_dim|index_head_dim": 8,
    r"(.*_)?head_dim|d_kv|d_head|dim_head|mamba_d_head|kv_channels|attention_head_size|attention_head_dim": 16,
    r"(.*_)?(num|n|q|kv|index)_?(attention_|attn_|key_value_|kv_|key_|value_)?heads|n_head|attention_heads": 2,
    r"(.*_)?(attention_heads|kv_n_heads|cross_num_attention_heads|mamba_n_heads)": 2,
    r"(.*_)?(q|kv|o)_lora_rank|gated_norm_rank|adapter_rank|laurel_rank|hc_lowrank": 8,
    r"(.*_)?(n_group|topk_group|moe_topk|moe_k|moe_top_k|num_experts_per_tok|top_k_experts)": 1,
    r"(.*_)?(n_routed_experts|num_experts|num_local_experts|moe_num_experts|ffn_num_experts)|zero_expert_num": 4,
    r"(.*_)?(mamba_d_state|ssm_state_size|state_size)": 8,
    r"(mamba_|block_)?chunk_size|mamba_chunk_size": 8,
    r"(.*_)?(sliding_window|attention_window|attention_window_size|sliding_window_size|local_attention)": 8,
    r"(.*_)?(image_size|crop_size|resolution|max_img_size|max_image_size|min_image_size)": 16,
    r"(.*_)?patch_size|encoder_stride": 4,
    r"rotary_dim|.*_rotary_dim": 8,
    r"(.*_)?num_position_embeddings|(.*_)?num_patches|num_image_tokens": 16,
    r"pos_emb_(height|width)|posemb_grid_size": 4,
    r"(.*_)?num_query_tokens|latent_query_num|(.*_)?(n|num)_latents": 4,
    r"n_positions|n_ctx|max_seq_len|seq_length|(.*_)?(max_.*position.*|max_text_.*|max_speech_.*)|context_length": 128,
    r"original_max_position_embeddings": 64,
    r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|d_inner|mlp_dim|n_inner|feed_forward_size)": 48,
    r"(moe_|shared_|dense_)?(shared_expert_|expert_|experts_)?(intermediate_size|share_expert_dim)(_mlp)?": 48,
    r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|hidden_dim)": WIDTH,
    r"(.*_)?projection_dim": WIDTH,
    r"(.*_)?(output_dim|out_dim|in_dim|input_dim|projector_(in|out)put_dim|embed_proj_dim|lru_width)": WIDTH,
    r"(.*_)?(projection_hidden_size|projector_hidden_size|hidden_size_global|out_hidden_size|output_channels)": WIDTH,
    r"(.*_)?(embed_size|posemb_size|mid_dim|units|condition_dim|latent_dim|codebook_dim|proj_size)": WIDTH,
    r"(.*_)?(base_channels|num_filters|conv_channels|latent_channels|initial_channel|out_channel)": 8,
    r"codebook_size|codebook_vocab_size": VOCAB,
}
"""Of a field of that name, everywhere in a config; its own default where that is smaller."""

LISTS: dict[str, Any] = {
    "no_rope_layers": None,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
}
"""Of a field that lists layers."""

KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Kinds of layers, one by one: a tiny model has one of each, and two layers at least."""

CONSTANTS = {
    "logit_scale": 0.3,
    "logits_scaling": 2.5,
    "final_logit_softcapping": 1.5,
    "logits_soft_cap": 1.5,
    "output_logit_soft_cap": 1.5,
    "output_multiplier": 0.7,
    "lm_head_multiplier": 0.6,
    "logits_mup_width_multiplier": 1.7,
    "unpadded_vocab_size": 120,
    "additional_vocab_size": 8,
    "scale_decoder_outputs": True,
    "lm_head_bias": True,
}
"""What stands between hidden states and logits, off its identity: numbers, sizes and switches."""


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}}


_HEAD = {"head_dim": 16}
_CHANNELS = {"base_channels": 32}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_REFORMER = {
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "local_attn_chunk_length": 3,
    "lsh_attn_chunk_length": 3,
    "num_buckets": 2,
    "hash_seed": 0,
}
_SOUND = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
_ZAMBA = {"attention_hidden_size": 64, "attention_head_dim": 32}
_OMNI = {"vision_start_token_id": 97, "vision_end_token_id": 98}
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_image_text"), _mrope(2, 3, 3)),
    **dict.fromkeys(("glm_ocr_text", "paddleocr_vl_text", "cosmos3_edge_text"), _mrope(2, 3, 3)),
    **dict.fromkeys(("qwen2_5_omni_text", "qwen3_omni_moe_text", "ernie4_5_vl_moe_text"), _mrope(3, 3, 2)),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEAD),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _OMNI),
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": 96, "IMGIMGA": 97, "IMGIMGB": 98, "<eos>": 2, "word": 5}},
    "codegen": {"n_head": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": WIDTH},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 1},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "diffusion_gemma_text": {
        "num_experts": 4,
        "top_k_experts": 1,
        "moe_intermediate_size": 16,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "emu3": {"vocabulary_map": {"<image>": 96, "<|extra_200|>": 97, "<|visual token 000000|>": 98}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm4v_moe_text": _mrope(1, 1, 2),
    "gemma3n_text": {"intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_vl_text": {"head_dim": 16, **_mrope(2, 2, 2, 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "num_layers": 1, "qk_head_dim": None, "moe_topk": 2},
    "mamba2": {"num_heads": 4, "n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": 2},
    "muse_spark_audio": {
        "patch_sizes": (4, 4),
        "hidden_sizes": (16, 16),
        "depths": (1, 1),
        "num_hidden_layers": 2,
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "reformer": {"is_decoder": True, "attn_layers": ("local", "lsh"), "axial_pos_embds": False, **_REFORMER},
    "step3p5": {"sliding_window": 8},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, **_ZAMBA},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"]},
    **dict.fromkeys(("chameleon_vqgan", "emu3_vqgan", "janus_vqgan", "glm_image_vqmodel"), _CHANNELS),
    "mimi": {"upsample_groups": 8},
    "blip-2": {"image_token_index": 96},
    "instructblip": {"image_token_index": 96},
    "instructblipvideo": {"video_token_index": 96},
    "florence_vision": {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (16, 32),
        "num_heads": (2, 2),
        "num_groups": (2, 2),
    },
    "inkling_vision": {"num_hidden_layers": 6},
    "gemma3": {"mm_tokens_per_image": 4},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [4, 4]},
    "vibevoice_acoustic_tokenizer": {"depths": (1, 1, 1), "downsampling_ratios": (2, 2)},
    "speecht5": {"vocab_size": VOCAB, **_SOUND},
    "wav2vec2": _SOUND,
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model"}},
    "paligemma": {"text_config": {"model_type": "gemma2"}},
    "perception_lm": {"vision_config": {"model_type": "siglip_vision_model", "model_args": {"embed_dim": WIDTH}}},
    "pp_formulanet_vision": {
        "post_conv_in_channels": WIDTH,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 32,
    },
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "speech-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
}
"""What single configs need, by model type; also of a sub-config, wherever it is."""

TRAINED = {
    "ReformerModelWithLMHead": "asserts that gradients are taken in train mode",
    "RwkvForCausalLM": "in eval mode its state is written in place, and no gradient can be taken",
}
"""Classes that are called in train mode, without dropout, and why."""
