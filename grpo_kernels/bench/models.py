"""Names the vocabulary and the hidden size of common open models, as their published configurations have them."""

from __future__ import annotations

from typing import NamedTuple


class ModelShape(NamedTuple):
    """The two sizes of a model that the loss step depends on."""

    vocab: int
    hidden: int


MODELS = {
    "qwen2.5-0.5b": ModelShape(151936, 896),
    "qwen2.5-1.5b": ModelShape(151936, 1536),
    "qwen2.5-3b": ModelShape(151936, 2048),
    "qwen2.5-7b": ModelShape(152064, 3584),
    "qwen2.5-14b": ModelShape(152064, 5120),
    "qwen2.5-32b": ModelShape(152064, 5120),
    "qwen2.5-72b": ModelShape(152064, 8192),
    "qwen3-0.6b": ModelShape(151936, 1024),
    "qwen3-1.7b": ModelShape(151936, 2048),
    "qwen3-4b": ModelShape(151936, 2560),
    "qwen3-8b": ModelShape(151936, 4096),
    "qwen3-14b": ModelShape(151936, 5120),
    "qwen3-32b": ModelShape(151936, 5120),
    "llama-2-7b": ModelShape(32000, 4096),
    "llama-3.1-8b": ModelShape(128256, 4096),
    "llama-3.1-70b": ModelShape(128256, 8192),
    "llama-3.2-1b": ModelShape(128256, 2048),
    "llama-3.2-3b": ModelShape(128256, 3072),
    "mistral-7b-v0.3": ModelShape(32768, 4096),
    "mistral-nemo-12b": ModelShape(131072, 5120),
    "gemma-2-2b": ModelShape(256000, 2304),
    "gemma-2-9b": ModelShape(256000, 3584),
    "gemma-3-4b": ModelShape(262208, 2560),
    "gemma-3-27b": ModelShape(262208, 5376),
    "phi-4": ModelShape(100352, 5120),
    "deepseek-v3": ModelShape(129280, 7168),
    "smollm2-135m": ModelShape(49152, 576),
    "smollm2-1.7b": ModelShape(49152, 2048),
    "olmo-2-7b": ModelShape(100352, 4096),
}
