"""A tiny model of any class of transformers that generates text."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .sizes import CONFIGS, CONSTANTS, FIRST_SPECIAL, KINDS, LISTS, NOISE, SIZES, TRAINED

SUFFIX = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
CODES, UNITS = "codes of several codebooks, not text", "units or codes of speech, not text"
WHOLE = "no forward of its own: the thinker and the talker are other classes"
NOT_TEXT = {
    "ClvpModelForConditionalGeneration": "similarities of text and speech",
    "CsmDepthDecoderForCausalLM": CODES,
    "CsmForConditionalGeneration": CODES,
    "DiaForConditionalGeneration": CODES,
    "GradiumPhononTTSForConditionalGeneration": "one logit, of the end of speech",
    "HiggsAudioV2ForConditionalGeneration": CODES,
    "MoshiForConditionalGeneration": CODES,
    "MusicgenForCausalLM": CODES,
    "MusicgenForConditionalGeneration": CODES,
    "MusicgenMelodyForCausalLM": CODES,
    "MusicgenMelodyForConditionalGeneration": CODES,
    "PI0ForConditionalGeneration": "velocities of a robot's actions",
    "PocketTTSForConditionalGeneration": "one logit, of the end of speech",
    "Qwen2_5OmniForConditionalGeneration": WHOLE,
    "Qwen2_5OmniPreTrainedModelForConditionalGeneration": WHOLE,
    "Qwen2_5OmniTalkerForConditionalGeneration": UNITS,
    "Qwen3OmniMoeForConditionalGeneration": WHOLE,
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration": WHOLE,
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": CODES,
    "Qwen3OmniMoeTalkerForConditionalGeneration": UNITS,
    "SeamlessM4TTextToUnitForConditionalGeneration": UNITS,
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "drafts for another model, from that one's keys and values",
    ),
}
"""Classes whose name says that they generate text, and what they give instead. They are listed, and not tried."""

ORDINARY = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 2}
SPECIAL = re.compile(r"(.*_)?(token_id|token_index|image_patch_id|im_\w+_id|codec_\w+_id|(un)?k_index|mask_index)")


def class_names() -> list[str]:
    """Return every public class of transformers whose name or whose auto class says that it generates text."""
    auto = transformers.models.auto.modeling_auto
    mapped = set()
    for mapping in MAPPINGS:
        for found in getattr(auto, mapping).values():
            mapped |= {found} if isinstance(found, str) else set(found)
    named = {name for name in dir(transformers) if SUFFIX.search(name) and not name.startswith("Auto")}
    return sorted((named | mapped) - {*NOT_TEXT}, key=str.lower)


def small_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """Return a config of this class with small sizes, in its sub-configs as well.

    ``changes`` are fields; a mapping for a sub-config has fields of that.
    """
    default = _default(kind)
    own = {**CONFIGS.get(kind.model_type, {}), **changes}
    values: dict[str, Any] = {}
    kinds = {name: list(dict.fromkeys(default[name])) for name in KINDS if isinstance(default.get(name), list)}
    layers = max(2, *map(len, kinds.values())) if kinds else 2
    for name in dict.fromkeys((*(field.name for field in dataclasses.fields(kind)), *kind.sub_configs)):
        value = default.get(kind.attribute_map.get(name, name))
        if isinstance(value, PreTrainedConfig) or (isinstance(own.get(name), Mapping) and name in kind.sub_configs):
            values[name] = _small_sub_config(kind, name, value, own.pop(name, {}))
        elif (size := _small(name, value)) is not None:
            values[name] = size[0]
    for name, found in kinds.items():
        values[name] = [found[i % len(found)] for i in range(layers)]
    if "num_hidden_layers" in values:
        values["num_hidden_layers"] = layers
    return kind(**{**values, **own})


def _default(kind: type[PreTrainedConfig]) -> Mapping[str, Any]:
    """Return the fields of a config as it comes."""
    try:
        return vars(kind())
    except Exception:  # one that has no default
        return {
            field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING
        }


def _small_sub_config(kind: type[PreTrainedConfig], name: str, value: Any, changes: Mapping[str, Any]) -> Any:
    changes = {**changes}
    model_type = changes.pop("model_type", None)
    if model_type is not None:
        return small_config(CONFIG_MAPPING[model_type], **changes)
    return small_config(kind.sub_configs[name] if value is None else type(value), **changes)


def _small(name: str, value: Any) -> tuple[Any] | None:
    """Return a field's small value in a tuple; None where its own is kept."""
    if name in CONSTANTS and (value is None or isinstance(value, int | float)):
        return (CONSTANTS[name],)
    if name in LISTS and value is not None:
        return (LISTS[name],)
    if type(value) is not int:
        return None
    if SPECIAL.fullmatch(name):
        return (special_id(name),)
    for pattern, size in SIZES.items():
        if re.fullmatch(pattern, name):
            return (min(value, size),)
    return None


def special_id(name: str) -> int:
    """Return the id of a special token, the same for the same name in every config."""
    plain = re.sub(r"_(token_)?(id|index)$", "", name)
    if plain in ORDINARY:
        return ORDINARY[plain]
    return FIRST_SPECIAL + zlib.crc32(plain.encode()) % (CONSTANTS["unpadded_vocab_size"] - FIRST_SPECIAL)


def tiny(name: str, **changes: Any) -> nn.Module:
    """Return the model of a class, in eval mode, with noise on every parameter and every added bias."""
    transformers.logging.set_verbosity_error()
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    fields = {field.name for field in dataclasses.fields(kind.config_class)}
    if "is_decoder" in fields and not name.endswith("ForConditionalGeneration"):
        changes = {"is_decoder": True, **changes}
    model = kind(small_config(kind.config_class, **changes)).train(name in TRAINED)
    move_off(model)
    return model


def move_off(model: nn.Module) -> None:
    """Move parameters and the buffers that are biases off their first values, which leave much unseen."""
    with torch.no_grad():
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("logits_bias")]
        for tensor in (*model.parameters(), *biases):
            if tensor.is_floating_point():
                tensor.copy_(torch.nan_to_num(tensor).clamp(-4, 4) + NOISE * torch.randn_like(tensor))
