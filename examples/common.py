"""What the examples share: a model, a task, and samples of it.

Without ``--model`` the model is a Qwen3 of random weights with a tokenizer of single characters, made here: nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

warnings.simplefilter("ignore", FutureWarning)  # of TRL and PEFT, about names of transformers

CHARACTERS = [chr(code) for code in range(32, 127)]
PROMPTS, GROUP = 8, 8
"""Problems in a step, and answers to each."""


def options(
    description: str | None, arguments: list[str] | None, steps: int, lr: float, teacher: bool = False
) -> argparse.Namespace:
    """Return the options of an example's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model; default: a tiny random one")
    if teacher:
        parser.add_argument("--teacher", help="a model with the same vocabulary; default: a tiny random one, wider")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--lr", type=float, default=lr, help="of a pretrained model, 1e-6 to 1e-5")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args(arguments)
    if found.steps < 1 or not 0 < found.lr < math.inf:
        parser.error(f"--steps must be at least 1 and --lr > 0; got {found.steps} and {found.lr}")
    random.seed(found.seed)
    torch.manual_seed(found.seed)
    return found


def is_shown(step: int, options: argparse.Namespace, every: int = 5) -> bool:
    """Whether a step is one to print: every fifth, and the last."""
    return step % every == every - 1 or step == options.steps - 1


def load(name: str | None, device: str, hidden: int = 64) -> tuple[Any, Any]:
    """Return a model and its tokenizer, which pads prompts on the left."""
    transformers.logging.set_verbosity_error()
    if name is None:
        return tiny_model(hidden).to(device), tiny_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.generation_config = transformers.GenerationConfig()  # its own may penalise what the log-probs do not
    return model.to(device), tokenizer


def tiny_model(hidden: int = 64) -> Any:
    """Return a Qwen3 with two layers; its initial scale is large, since attention that starts uniform learns late."""
    config = transformers.Qwen3Config(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return transformers.Qwen3ForCausalLM(config)


def tiny_tokenizer() -> Any:
    """Return a tokenizer with one token for each character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def problems(count: int) -> list[str]:
    """Return prompts of several lengths that ask for a digit, again and again."""
    asked = ("", "Repeat ", "Please repeat the digit ")
    return [f"{random.choice(asked)}{random.randrange(10)}:" for _ in range(count)]


def reward(prompt: str, answer: str) -> float:
    """Return how much of the first four characters is right: half for a digit, the whole for the prompt's."""
    given = answer.strip()[:4]
    return (sum(letter.isdigit() for letter in given) + given.count(prompt[-2])) / 8


@torch.no_grad()
def sample(model: Any, tokenizer: Any, **generation: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """Return PROMPTS · GROUP records as ``grpo_kernels.collate`` takes them, and their rewards; the answers to one
    prompt lie next to each other."""
    texts = [prompt for prompt in problems(PROMPTS) for _ in range(GROUP)]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    lengths = batch.attention_mask.sum(-1).tolist()
    whole = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=4,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        **generation,
    )
    records, rewards = [], []
    for text, length, ids in zip(texts, lengths, whole, strict=True):
        start = batch.input_ids.shape[1]
        ended = (ids[start:] == tokenizer.eos_token_id).nonzero()
        end = start + (int(ended[0]) + 1 if len(ended) else len(ids) - start)  # the end token is part of the answer
        answer = torch.arange(length + end - start, device=ids.device) >= length
        records.append({"input_ids": ids[start - length : end], "loss_mask": answer})
        rewards.append(reward(text, tokenizer.decode(ids[start:end], skip_special_tokens=True)))
    return records, torch.tensor(rewards, device=model.device)
