"""Batches of sequences, padded or packed: shifted, as models and losses take them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..objectives.checks import (
    check_bounds,
    check_device,
    check_flag,
    check_ids_dtype,
    check_tensors,
    fail,
    read_mask,
)
from .tokens import align

_MADE = ("token_ids", "mask", "cu_seqlens")
"""What a batch has for the loss whatever else is in it."""
_OF_A_SAMPLE = ("input_ids", "loss_mask")


def pack(
    input_ids: Tensor, loss_mask: Tensor, attention_mask: Tensor, **values: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return padded sequences one behind the other, shifted, without their padding: what a model takes, and the loss.

        inputs, tokens = pack(input_ids, response_mask, attention_mask, advantages=A, old_log_probs=old)
        out = grpo_loss(model(**inputs).logits, **tokens)

    Padding may be on any side. Waits for the device, to count.

    Args:
        input_ids: integer ids (B, L), prompt and response.
        loss_mask: (B, L), bool or numbers >= 0, non-zero where the token counts (the response).
        attention_mask: (B, L), non-zero where there is a token.
        **values: what else the loss takes, by its names: (B,), of sequences; or (B, R, ...) with R <= L-1, of the last
            R tokens: (B, L-1) as ``align`` has ids, or of the responses alone, which hold all tokens that count.

    Returns:
        inputs: ``input_ids`` and ``position_ids`` (1, N), which begin anew with each sequence, and
            ``use_cache=False``: with a cache, models of transformers attend across sequences.
        tokens: ``token_ids``, ``mask`` (1, N) and ``cu_seqlens`` (B+1,), int32; values of tokens (1, N, ...), each at
            the row that predicts its token, 0 where there is none.

    Raises:
        ValueError: shapes that differ, a token that counts without being attended to, or before the first of a value.
    """
    tensors = {"input_ids": input_ids, "loss_mask": loss_mask, "attention_mask": attention_mask, **values}
    check_tensors("pack", tensors, needed=tensors)
    check_ids_dtype("pack", input_ids, tensors)
    if input_ids.dim() != 2 or not input_ids.shape == loss_mask.shape == attention_mask.shape:
        hint = "a batch that is packed already needs align(input_ids, loss_mask, cu_seqlens) alone"
        fail("pack", "input_ids, loss_mask and attention_mask (B, L)", "other shapes", tensors, hint)
    check_device("pack", tensors)
    _check_names("pack", values)
    present = read_mask("pack", attention_mask, tensors, name="attention_mask")
    counts = read_mask("pack", loss_mask, tensors, name="loss_mask")
    if bool((counts & ~present).any()):
        hint = "attention_mask is 1 at prompt and response and 0 at padding, loss_mask is 1 at the response alone"
        fail("pack", "tokens that count to be attended to", "some with attention_mask 0", tensors, hint)
    positions = (present.cumsum(-1) - 1)[present].unsqueeze(0)
    bounds = torch.nn.functional.pad(present.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
    ids = input_ids[present].unsqueeze(0)
    token_ids, mask = align(ids, counts[present].unsqueeze(0), bounds)
    tokens = {"token_ids": token_ids, "mask": mask, "cu_seqlens": bounds}
    ends = (positions[0] == 0).roll(-1)
    for name, value in values.items():
        if value.shape == input_ids.shape[:1]:
            tokens[name] = value
        else:
            flat = _of_tokens(name, value, counts, tensors)[present].roll(-1, 0)
            tokens[name] = flat.masked_fill(ends.view(-1, *[1] * (flat.dim() - 1)), 0).unsqueeze(0)
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}, tokens


def _of_tokens(name: str, value: Tensor, counts: Tensor, tensors: Mapping[str, object]) -> Tensor:
    """Return the values of the last tokens as those of all (B, L, ...), 0 at the others, of which none counts."""
    rows, columns = counts.shape
    missing = columns - value.shape[1] if value.dim() > 1 else 0
    if value.shape[:1] != counts.shape[:1] or missing < 1:
        shift = f"{name}[:, 1:] of what belongs to the tokens, {name}[:, :-1] of what belongs to the rows of a model"
        expected = f"{name} ({rows},) of sequences, or ({rows}, R, ...) of the last R <= {columns - 1} tokens"
        whole = value.shape[:2] == counts.shape
        fail("pack", expected, str(tuple(value.shape)), tensors, hint=shift if whole else None)
    if bool(counts[:, 1:missing].any()):
        single = f"one value for each sequence is ({rows},)" if value.shape[1] == 1 else None
        expected = f"{name} of all tokens that count, in the last {value.shape[1]} columns"
        fail("pack", expected, "tokens before them that count", tensors, hint=single)
    return torch.cat([value.new_zeros(rows, missing, *value.shape[2:]), value], 1)


def unpack(values: Tensor, cu_seqlens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return values of packed rows sequence by sequence, padded with 0, differentiable; the inverse of ``pack``.

    Column t is row t of the sequence: of log-probs, what it predicts. Waits for the device, to count.

    Args:
        values: (N,) or (1, N, ...): log-probs, entropies, logits.
        cu_seqlens: (S+1,) bounds; what lies outside of them is left out.
        attention_mask: (S, L), non-zero where the rows are to lie, as ``pack`` was given it; None: from the first
            column on, L that of the longest sequence.

    Returns:
        (S, L, ...)
    """
    tensors = {"values": values, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
    check_tensors("unpack", tensors, needed=("values", "cu_seqlens"))
    if values.dim() == 0 or (values.dim() > 1 and values.shape[0] != 1):
        fail("unpack", "packed values (N,) or (1, N, ...)", f"shape {tuple(values.shape)}", tensors)
    flat = values if values.dim() == 1 else values[0]
    check_bounds("unpack", cu_seqlens, len(flat), tensors, check=True)
    lengths = cu_seqlens.diff()
    if attention_mask is None:
        places = torch.arange(int(lengths.max()), device=values.device) < lengths.unsqueeze(-1)
    else:
        places = read_mask("unpack", attention_mask, tensors, name="attention_mask")
        if places.dim() != 2 or len(places) != len(lengths) or not torch.equal(places.sum(-1), lengths.long()):
            expected = "attention_mask (S, L) with as many tokens in each row as cu_seqlens has"
            fail("unpack", expected, "another mask", tensors, hint="the one that pack was given")
    first, last = cu_seqlens[[0, -1]].tolist()
    return flat.new_zeros(*places.shape, *flat.shape[1:]).index_put((places,), flat[first:last])


def collate(samples: Sequence[Mapping[str, Any]], *, packed: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return samples of a DataLoader as one batch, shifted: what a model takes, and the loss.

        loader = DataLoader(samples, batch_size=8, collate_fn=collate)
        for inputs, tokens in loader:
            grpo_loss(model(**inputs).logits, **tokens).loss.backward()

    Args:
        samples: mappings with the same names: ``input_ids`` (L,), prompt and response; ``loss_mask`` (L,), non-zero
            where the token counts; and what else the loss takes, by its names: a number, of the sequence
            (``advantages``), or (L,), of every token, or one for each token that counts, as samplers return log-probs.
            Lists, arrays or tensors.
        packed: one behind the other, as ``pack`` returns them, in place of padded on the right with id 0.

    Returns:
        inputs: ``input_ids`` and ``attention_mask`` (B, L); packed as ``pack``.
        tokens: ``token_ids``, ``mask`` and values of tokens (B, L-1), each at the row that predicts its token, for
            logits (B, L, V) as a causal model returns them; values of sequences (B,). Packed as ``pack``.

    Raises:
        ValueError, TypeError: what a sample lacks, or has of another length, with its number.
    """
    if not isinstance(samples, Sequence) or not all(isinstance(sample, Mapping) for sample in samples):
        hint = "collate(list(samples)); each has input_ids, loss_mask and what else the loss takes, by its names"
        fail("collate", "a list of mappings, one of each sample", type(samples).__name__, hint=hint, error=TypeError)
    if len(samples) == 0:
        fail("collate", "at least one sample", "none")
    check_flag("collate", "packed", packed)
    columns: dict[str, list[Tensor]] = {name: [] for name in dict.fromkeys((*_OF_A_SAMPLE, *samples[0]))}
    _check_names("collate", columns)
    if "attention_mask" in columns:
        hint = "leave it out, and padding with it: the batch's is made here"
        fail("collate", "samples without padding", "attention_mask", hint=hint)
    for number, sample in enumerate(samples):
        for name, value in _read_sample(number, sample, list(columns)).items():
            columns[name].append(value)
    for name, values in columns.items():
        if len({value.dim() for value in values}) > 1:
            fail("collate", f"{name} of tokens in every sample, or a number in every one", "some of each")
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))  # not that of the first
        columns[name] = [value.to(dtype) for value in values]
    whole = {
        name: torch.stack(values) if values[0].dim() == 0 else pad_sequence(values, batch_first=True)
        for name, values in columns.items()
    }
    input_ids, loss_mask = (whole.pop(name) for name in _OF_A_SAMPLE)
    attention_mask = pad_sequence([torch.ones_like(ids) for ids in columns["input_ids"]], batch_first=True)
    shifted = {name: value if value.dim() == 1 else value[:, 1:] for name, value in whole.items()}
    if packed:
        return pack(input_ids, loss_mask, attention_mask, **shifted)
    token_ids, mask = align(input_ids, loss_mask)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return inputs, {"token_ids": token_ids, "mask": mask, **shifted}


def _read_sample(number: int, sample: Mapping[str, Any], names: list[str]) -> dict[str, Tensor]:
    """Return the values of one sample: 0-d of the sequence, (L,) of its tokens, 0 at those that do not count."""
    if set(sample) != set(names):
        fail("collate", f"samples that all have {', '.join(names)}", f"sample {number} with {', '.join(sample)}")
    read = {name: _tensor(name, value, number) for name, value in sample.items()}
    ids, loss_mask = (read[name] for name in _OF_A_SAMPLE)
    if ids.dim() != 1 or len(ids) == 0 or ids.shape != loss_mask.shape:
        got = f"{tuple(ids.shape)} and {tuple(loss_mask.shape)} in sample {number}"
        fail("collate", "input_ids and loss_mask of one length >= 1", got)
    check_ids_dtype(f"collate, sample {number}", ids)
    counts = read_mask("collate", loss_mask, read, name="loss_mask")
    read["loss_mask"] = counts
    live = int(counts.sum())
    for name in set(names) - {*_OF_A_SAMPLE}:
        value = read[name]
        if value.dim() == 1 and len(value) == live < len(ids):
            read[name] = value.new_zeros(len(ids)).index_put((counts,), value)
        elif value.dim() > 0 and value.shape != ids.shape:
            expected = f"{name} to be a number, ({len(ids)},) of every token or ({live},) of those that count"
            fail("collate", expected, f"shape {tuple(value.shape)} in sample {number}")
    return read


def _tensor(name: str, value: Any, number: int) -> Tensor:
    """Return what a sample has by a name; Python's floats in fp32 at least, whatever the default dtype is."""
    try:
        tensor = torch.as_tensor(value)
        if tensor.is_floating_point() and not hasattr(value, "dtype"):
            tensor = torch.as_tensor(value, dtype=torch.promote_types(tensor.dtype, torch.float32))
    except (TypeError, ValueError, RuntimeError):  # what it raises depends on what it finds
        hint = "leave out what the loss does not take"
        fail("collate", f"{name} of numbers", f"{type(value).__name__} in sample {number}", hint=hint, error=TypeError)
    check_tensors(f"collate, sample {number}", {name: tensor})
    return tensor


def _check_names(function: str, names: Mapping[str, object]) -> None:
    """Raise for what a batch makes itself."""
    for name in _MADE:
        if name in names:
            hint = "the shift and the bounds are made here, of input_ids and loss_mask"
            fail(function, "what the loss takes beside its tokens", f"{name}=", hint=hint)
