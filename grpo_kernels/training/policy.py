"""The policy: a Hugging Face causal language model and its tokenizer; without a path, tiny ones made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..objectives.settings import first_line
from .tasks import Task


class Tokenizer(Protocol):
    pad_token_id: int
    eos_token_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def vocabulary(self) -> dict[Any, int]:
        """Return the id of every token, by the text that its saved form has for it."""

    def save_pretrained(self, folder: Path) -> Any:
        """Write files that transformers' AutoTokenizer reads."""


class ByteTokenizer:
    """One token for each byte of an alphabet, beside padding (0) and end (1); needs no download."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, alphabet: bytes) -> None:
        self.alphabet = alphabet
        self._ids = {byte: i + 2 for i, byte in enumerate(alphabet)}

    def __len__(self) -> int:
        return len(self.alphabet) + 2

    def encode(self, text: str) -> list[int]:
        return [self._ids[byte] for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(self.alphabet[i - 2] for i in ids if i >= 2).decode(errors="replace")

    def vocabulary(self) -> dict[Any, int]:
        letters = _letters_of_bytes()
        special = {"<pad>": self.pad_token_id, "<end>": self.eos_token_id}
        return special | {letters[byte]: number for byte, number in self._ids.items()}

    def save_pretrained(self, folder: Path) -> None:
        """Write it as a BPE without merges, whose tokens are bytes."""
        import transformers
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(self.vocabulary(), []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"pad_token": "<pad>", "eos_token": "<end>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _letters_of_bytes() -> dict[int, str]:
    """Return the letters that byte-level tokenizers write bytes as, since GPT-2's."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class _HubTokenizer:
    """A pretrained tokenizer behind the same four names."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no end-of-sequence token: set eos_token")
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = self.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def vocabulary(self) -> dict[Any, int]:
        ids: dict[Any, int] = self._tokenizer.get_vocab()
        return ids

    def save_pretrained(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def load_policy(
    model: str | None, task: Task, hidden: int, layers: int, device: torch.device, option: str = "--model"
) -> tuple[Any, Tokenizer]:
    """Return the model (path or hub name of an ``option``, or a tiny random Qwen3), and its tokenizer."""
    try:
        import transformers
    except ImportError as error:
        raise SystemExit("training needs transformers: pip install 'grpo-kernels[train]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if model is None:
        tokenizer = ByteTokenizer(task.alphabet)
        return _tiny_qwen3(transformers, len(tokenizer), hidden, layers).to(device), tokenizer
    kind = "folder" if Path(model).exists() else "path or hub name"
    try:
        # Without being told, transformers asks at the terminal whether to run a model's own code.
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=False, weights_only=True
        )
    except Exception as error:  # of many kinds where a file is damaged, missing, or no weights
        raise SystemExit(
            f"{option} {model}: no causal language model could be loaded from this {kind}: {error}"
        ) from error
    try:
        pretrained = _HubTokenizer(transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    except Exception as error:
        raise SystemExit(
            f"{option} {model}: the model is there, but no tokenizer could be loaded from this {kind} "
            f"({first_line(error)}). Save its tokenizer beside it: tokenizer.save_pretrained(folder)."
        ) from error
    return loaded.to(device), pretrained


def _tiny_qwen3(transformers: Any, vocab: int, hidden: int, layers: int) -> nn.Module:
    """Return a model with five times the usual initial scale: attention that starts out uniform in so small a model
    learns late."""
    heads = max(1, hidden // 16)
    config = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=ByteTokenizer.pad_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
        bos_token_id=None,
    )
    model: nn.Module = transformers.Qwen3ForCausalLM(config)
    return model


def response_inputs(ids: Tensor, attention_mask: Tensor, prompt_length: int) -> dict[str, Any]:
    """Return what a forward pass takes to give R+1 rows: those that predict the R response tokens, and one that
    predicts nothing.

    Left padding shifts positions: they count attended tokens, as ``generate`` counts them.
    """
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    keep = ids.shape[1] - prompt_length + 1
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": positions}
    return {**inputs, "use_cache": False, "logits_to_keep": keep}


def response_logits(model: nn.Module, ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Return logits (B, R+1, V): of the rows that predict the R response tokens, and of one that predicts nothing."""
    logits: Tensor = model(**response_inputs(ids, attention_mask, prompt_length)).logits
    return logits
