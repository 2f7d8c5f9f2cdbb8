"""Batches with any bits in them: a recipe of plain numbers, as hypothesis draws it and as tests/corpus keeps it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from cases import ROLLOUTS, Case, label, make, one_of_each, sampler
from hypothesis import strategies as st
from torch import Tensor

from grpo_kernels import Clip, LossConfig
from grpo_kernels.objectives.presets import PRESETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MANTISSAS = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


def of_bits(bits: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor of these patterns, cut to its width, -1 and below its special ones; nothing is converted, or payloads of
    NaN would change."""
    width = 8 * dtype.itemsize
    patterns = [special(dtype)[pattern] if pattern < 0 else pattern % (1 << width) for pattern in bits]
    unsigned = np.array(patterns, dtype=f"uint{width}")
    return torch.from_numpy(unsigned.view(f"int{width}")).view(dtype)


def special(dtype: torch.dtype) -> list[int]:
    """Zeros, subnormals, the smallest and largest numbers, infinities, quiet and signalling NaNs, of both signs."""
    width, mantissa = 8 * dtype.itemsize, MANTISSAS[dtype]
    infinity = ((1 << (width - 1)) - 1) >> mantissa << mantissa
    ones = (1 << mantissa) - 1
    numbers = [0, 1, ones, 1 << mantissa, infinity - 1, infinity]
    nans = [infinity | 1, infinity | 1 << (mantissa - 1), infinity | ones]
    return [bits | sign for bits in (*numbers, *nans) for sign in (0, 1 << (width - 1))]


def configs() -> dict[str, LossConfig]:
    """Every preset, surrogate, level, aggregation and rollout scheme, by a name that a file can keep."""
    lengths = {"constant_length": 11, "group_size": 1}
    named = {name: LossConfig.preset(name, **lengths) for name in PRESETS}
    others = [*one_of_each(), *(LossConfig(Clip(0.2, 0.28), rollout=scheme) for scheme in ROLLOUTS)]
    for level in ("sequence", "sequence_token", "sequence_product", "prefix_product", "prefix_min"):
        others += [LossConfig(Clip(0.2, 0.28), level=level, rollout=scheme) for scheme in ROLLOUTS]
    named |= {label(config): config for config in others}
    return {name: dataclasses.replace(config, group_size=1) for name, config in named.items()}


CONFIGS = configs()
POKED = ("logits", "advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights", "temperature")
"""What any bits may be put into."""


def recipes(dtypes: tuple[str, ...] = tuple(DTYPES)) -> st.SearchStrategy[dict[str, Any]]:
    """What ``batch_of`` makes a batch of: a seed for what is ordinary in it, and patterns with their places."""
    bits = st.one_of(st.integers(-len(special(torch.float32)), -1), st.integers(0, (1 << 64) - 1))
    poke = st.tuples(st.integers(0, 1 << 12), bits)
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(dtypes),
            "batch": st.integers(1, 3),
            "length": st.integers(1, 4),
            "vocab": st.sampled_from([1, 2, 3, 8, 17, 33, 70]),
            "seed": st.integers(0, 1 << 20),
            "spread": st.sampled_from([2.0, 0.1, 9.0]),
            "shift": st.sampled_from([0.0, 100.0, -1000.0]),
            "noise": st.sampled_from([0.3, 0.02, 3.0]),
            "form": st.sampled_from([[1.0, 1.0, None], [0.7, 1.5, None], [1.0, 1.0, 5.0], [1e-6, 1.0, None]]),
            "config": st.sampled_from(sorted(CONFIGS)),
            "mask": st.sampled_from(["bool", "uint8", "int64", "float32"]),
            "gaps": st.lists(st.integers(0, 9), min_size=3, max_size=3),
            "packed": st.booleans(),
            "raw_row": st.one_of(st.none(), st.integers(0, 1 << 12)),
            "pokes": st.fixed_dictionaries({name: st.lists(poke, max_size=3) for name in POKED}),
        }
    )


def batch_of(recipe: dict[str, Any]) -> Case:
    """The ordinary part of a recipe: a padded or packed batch with every tensor that a loss takes."""
    dtype = DTYPES[recipe["dtype"]]
    names = ("batch", "length", "vocab", "seed", "spread", "shift", "noise")
    temperature, scale, softcap = recipe["form"]
    form = {"temperature": temperature, "logit_scale": scale, "logit_softcap": softcap}
    case = make(dtype=dtype, extra_row=not recipe["packed"], empty=False, **form, **{n: recipe[n] for n in names})
    case.options["rollout_log_probs"] = sampler(case) if case.mask.sum() > 1 else case.options["old_log_probs"] + 0.1
    g = torch.Generator(device="cpu").manual_seed(recipe["seed"])
    case.options["token_weights"] = 0.5 + torch.rand(case.mask.shape, generator=g)
    case.advantages = case.advantages[:, None] + 0.1 * torch.randn(case.mask.shape, generator=g)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    case.options["temperature"] = torch.full(case.mask.shape, temperature, dtype=real)
    case.options |= {"config": CONFIGS[recipe["config"]], "grad_scale": 1.0}
    if recipe["packed"]:
        pack(case)
    return case


def pack(case: Case) -> None:
    """The sequences one behind the other, the bounds of the first and the last inside of theirs."""
    batch, length = case.mask.shape
    case.logits, case.mask = case.logits.flatten(0, 1), case.mask.flatten()
    case.token_ids, case.advantages = case.token_ids.flatten(), case.advantages.flatten()
    flat = {name: value.flatten() for name, value in case.options.items() if isinstance(value, Tensor)}
    bounds = torch.arange(batch + 1) * length
    if length > 1:  # the first and the last row belong to no sequence
        bounds[0] += 1
        bounds[-1] -= int(batch > 1)
    inside = (torch.arange(batch * length) >= bounds[0]) & (torch.arange(batch * length) < bounds[-1])
    case.mask &= inside  # as the loss reads it
    case.options |= {**flat, "cu_seqlens": bounds}


def rows_of(case: Case, tensor: Tensor) -> Tensor:
    """(tokens, V): the rows of a tensor shaped like the logits that predict a token."""
    rows = tensor if tensor.dim() == 2 else tensor[:, : case.mask.shape[-1]]
    return rows.flatten(0, -2) if tensor.dim() == 3 else rows


def poked(case: Case, recipe: dict[str, Any], where: Tensor, names: tuple[str, ...] = POKED) -> Case:
    """The batch with the recipe's patterns in these inputs at some of the tokens ``where``, a bool of tokens."""
    places = where.flatten().nonzero().flatten().tolist()
    again = Case(case.logits.clone(), case.token_ids, case.advantages.clone(), case.mask, {**case.options})
    rows, vocab = rows_of(again, again.logits), case.logits.shape[-1]
    if not places:
        return again
    if "logits" in names:
        for place, bits in recipe["pokes"]["logits"]:
            token = places[place % len(places)]
            index = torch.tensor([place // 7 % vocab])
            put(again, token, index, of_bits([bits], case.logits.dtype))
        if recipe["raw_row"] is not None:
            raw = np.random.default_rng(recipe["raw_row"]).integers(0, 1 << 63, vocab).tolist()
            put(again, places[recipe["raw_row"] % len(places)], torch.arange(vocab), of_bits(raw, rows.dtype))
    for name in [name for name in names if name != "logits"]:
        values = again.advantages if name == "advantages" else again.options[name].clone()
        for place, bits in recipe["pokes"][name]:
            values.view(-1)[places[place % len(places)]] = of_bits([bits], values.dtype)[0]
        if name == "advantages":
            again.advantages = values
        else:
            again.options[name] = values
    return again


def put(case: Case, token: int, columns: Tensor, values: Tensor) -> None:
    """Into the row of a token."""
    if case.logits.dim() == 2:
        case.logits[token, columns] = values
    else:
        length = case.mask.shape[-1]
        case.logits[token // length, token % length, columns] = values


def laid_out(values: Tensor, gaps: list[int]) -> Tensor:
    """The same numbers in memory that is NaN otherwise: an offset, gaps between rows and between sequences."""
    *batch, rows, columns = values.shape
    row_stride = columns + gaps[0]
    batch_stride = rows * row_stride + gaps[1]
    size = gaps[2] + math.prod(batch) * batch_stride + columns
    storage = torch.full((size,), math.nan, dtype=values.dtype, device=values.device)
    strides = (*([batch_stride] if batch else []), row_stride, 1)
    out = storage.as_strided(values.shape, strides, gaps[2])
    out.copy_(values)
    return out


def as_mask(live: Tensor, kind: str) -> Tensor:
    """The same mask of another dtype; any number above 0 counts, but one that is an id looks like the ids again."""
    return live if kind == "bool" else live.to(getattr(torch, kind)) * 101
