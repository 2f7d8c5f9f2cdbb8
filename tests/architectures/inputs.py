"""What a tiny model is called with: text for every class, images and sounds where a class takes nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sizes import FIRST_SPECIAL

Extra = Callable[[Any], dict[str, Any]]
BATCH, LENGTH = 3, 9
FIRST = 3
"""Ids before it are pad, bos and eos."""


@dataclass(frozen=True)
class Call:
    """A call of a model, and the tokens that its logits are read at."""

    inputs: Mapping[str, Any]
    token_ids: Tensor
    """(B, T-1): the ids that its rows predict."""
    mask: Tensor
    advantages: Tensor

    @property
    def grpo(self) -> dict[str, Tensor]:
        return {"token_ids": self.token_ids, "mask": self.mask, "advantages": self.advantages}


def draw_ids(seed: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(FIRST, FIRST_SPECIAL, (BATCH, length), generator=generator, device="cpu")


def call_of(model: nn.Module) -> Call:
    """Return a batch of three rows: one padded on the left, and a prompt that no loss is taken of."""
    name = type(model).__name__
    takes = inspect.signature(type(model).forward).parameters
    decodes = "decoder_input_ids" in takes and not getattr(model.config, "use_decoder_only_language_model", False)
    ids, attention = draw_ids(1), torch.ones(BATCH, LENGTH, dtype=torch.long)
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = draw_ids(2) if decodes else ids
        if "attention_mask" in takes:
            inputs["attention_mask"] = attention
    if decodes:
        inputs["decoder_input_ids"] = ids
    elif "attention_mask" in inputs:
        attention[1, :3] = 0
    if name in EXTRA:
        inputs |= EXTRA[name](model)
    predicted = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
    predicted = predicted[..., 0] if predicted.dim() == 3 else predicted  # text beside codes of sound
    mask = predicted[:, 1:] < FIRST_SPECIAL
    mask[:, :3] = False
    mask[2, -1] = False
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return Call(inputs, predicted[:, 1:], mask, torch.tensor([1.0, -0.5, 0.3]))


def normal(*shape: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(3)
    return torch.randn(*shape, generator=generator, device="cpu")


def image_ids(token: int, count: int) -> dict[str, Tensor]:
    """Return ids with an image's places before the text of each row."""
    ids = torch.cat([torch.full((BATCH, count), token), draw_ids(1)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures() -> Tensor:
    return normal(BATCH, 3, 16, 16)


def _qwen_vl(model: Any) -> dict[str, Any]:
    """One image of 4 x 4 patches a row, merged to four places."""
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    ids = image_ids(model.config.image_token_id, 4)
    types = (ids["input_ids"] == model.config.image_token_id).long()
    return {**ids, "pixel_values": normal(BATCH * 16, 96), "image_grid_thw": grid, "mm_token_type_ids": types}


def _seen(count: int, name: str = "image_token_id") -> Extra:
    """One image a row, that has ``count`` places."""
    return lambda model: {**image_ids(getattr(model.config, name), count), "pixel_values": pictures()}


def _heard(name: str, *shape: int) -> Extra:
    """Sounds or patches, without a mask of the encoder's."""
    return lambda model: {name: normal(BATCH, *shape), "attention_mask": None}


EXTRA: dict[str, Extra] = {
    "BlipForConditionalGeneration": lambda model: {"pixel_values": pictures()},
    "Blip2ForConditionalGeneration": _seen(4, "image_token_index"),
    "CanaryForConditionalGeneration": _heard("input_features", 32, 16),
    "CohereAsrForConditionalGeneration": _heard("input_features", 32, 16),
    "FSMTForConditionalGeneration": lambda model: {"use_cache": False},  # with a cache it has no causal mask
    "Gemma3ForConditionalGeneration": _seen(4),
    "IdeficsForVisionText2Text": lambda model: {
        "pixel_values": pictures()[:, None],
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
    },
    "InstructBlipForConditionalGeneration": lambda model: {
        **_seen(4, "image_token_index")(model),
        "qformer_input_ids": draw_ids(5),
    },
    "InstructBlipVideoForConditionalGeneration": lambda model: {
        **image_ids(model.config.video_token_index, 4),
        "pixel_values": pictures()[:, None],
        "qformer_input_ids": draw_ids(5),
    },
    "InternVLForConditionalGeneration": _seen(4),
    "Kosmos2ForConditionalGeneration": lambda model: {
        "pixel_values": pictures(),
        "image_embeds_position_mask": (torch.arange(LENGTH) < 4).expand(BATCH, LENGTH),
    },
    "KyutaiSpeechToTextForConditionalGeneration": lambda model: {
        "input_ids": torch.cat([draw_ids(1)[..., None], draw_ids(2)[..., None].expand(-1, -1, 32)], -1),
        "attention_mask": None,
    },
    "LlavaForConditionalGeneration": _seen(16),
    "MoonshineForConditionalGeneration": _heard("input_values", 4000),
    "MoonshineStreamingForConditionalGeneration": _heard("input_values", 80 * 32),
    "Pix2StructForConditionalGeneration": lambda model: {"flattened_patches": normal(BATCH, 4, 2 + 32).abs()},
    "PPFormulaNetForConditionalGeneration": lambda model: {
        "pixel_values": pictures(),
        "input_ids": None,
        "attention_mask": None,
    },
    "Qwen2VLForConditionalGeneration": _qwen_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "SeamlessM4TForSpeechToText": _heard("input_features", 32, 32),
    "SeamlessM4Tv2ForSpeechToText": _heard("input_features", 32, 32),
    "Speech2TextForConditionalGeneration": _heard("input_features", 32, 16),
    "SpeechEncoderDecoderModel": _heard("input_values", 400),
    "SpeechT5ForSpeechToText": _heard("input_values", 400),
    "UdopForConditionalGeneration": lambda model: {"bbox": normal(BATCH, LENGTH, 4).sigmoid()},
    "VisionEncoderDecoderModel": lambda model: {"pixel_values": pictures()},
    "VoxtralRealtimeForConditionalGeneration": _heard("input_features", 16, 8 * LENGTH),
    "WhisperForConditionalGeneration": _heard("input_features", 16, 256),
}
"""By class: what its forward needs beside ids, or in their place; None takes an input away."""
