"""Hugging Face causal models: the loss inside ``forward``, from hidden states.

``attach(model)`` gives the model's forward one more keyword, ``grpo``; with it the head is never applied to all rows,
and hooks of DDP, FSDP, ZeRO and gradient checkpointing fire as for any forward. Needs transformers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.outputs import LossOutput, TokenLogProbs
from ..calls.sharding import is_dtensor
from ..calls.sighting import check_every
from ..linear import linear_grpo_loss, linear_token_log_probs
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives.checks import FLOAT_DTYPES, check_flag, fail, fits
from ..objectives.compiler import leaving_graphs, with_frames
from ..objectives.config import LossConfig, resolve_config
from ..objectives.sequences import Packed, read_live
from .form import Autocast
from .frozen import teacher as teacher
from .given import OF_A_CALL, OUTPUTS, check_given, check_keywords, keywords
from .given import batch as batch
from .head import TracedHead, check_backward_hooks, head_of, in_fsdp_units
from .head import named as named
from .model import causal_model as causal_model
from .model import check_dtypes, completed, signature_of
from .outputs import ModelLogProbs as ModelLogProbs
from .outputs import with_model_output
from .parts import Parts
from .proof import EVERY, Proof, row_logits
from .watched import Watch as Watch
from .watched import plain_log_probs as plain_log_probs


def attach(
    model: nn.Module,
    config: LossConfig | str = "grpo",
    *,
    from_logits: bool = False,
    head_dtype: torch.dtype | None = None,
    proof_every: int = EVERY,
    shadow: int = 0,
    **options: Any,
) -> nn.Module:
    """Let ``model(..., grpo=dict(...))`` return the loss of ``linear_grpo_loss`` instead of logits.

        attach(model, "dapo", temperature=0.9)
        out = model(input_ids=ids, attention_mask=attention, grpo=dict(token_ids=token_ids, advantages=A, mask=mask))
        out.loss.backward()

    ``grpo`` holds keywords of ``linear_grpo_loss``, ``teacher=hf.teacher(big_model)(...)`` among them; with
    ``output="log_probs"`` the call returns ``linear_token_log_probs`` (the old or reference pass), and keywords that
    only the loss has are left aside. ``token_ids`` are (B, L-1) from ``align``, or (B, R) with
    ``logits_to_keep=R + 1``; of an encoder-decoder, of its decoder's inputs. ``advantages`` may be missing where the
    config has no policy term. ``token_weights`` may be a function of the ``TokenLogProbs`` of the policy, which are
    computed first then, without gradient; ``config`` replaces the one attached; ``receive`` is a function that is
    called with the result before wrappers see it. Without ``grpo`` nothing changes.

    The model's own forward runs. Its head makes no logits; what the model, adapters and hooks do to them (LoRA and DoRA
    on the head, a bias, a scale, a cap, columns that are cut) is traced at every call and computed with them, and what
    cannot be is refused by name. At the first call in each state of the model, and every ``proof_every`` calls, one
    live row is compared with the model's own logits; the first look waits for the device, a later one makes the loss
    NaN, and eight calls later the reason is raised.

    Whatever else is asked of the model (``output_hidden_states``, ``output_router_logits``, ``use_cache``, ...) comes
    with the result: ``out.model_output``. ``out.aux_loss`` is the auxiliary loss of a mixture of experts as the model
    returns it, outside of ``out.loss``; ``aux_loss_coef=`` asks for it and adds it, times the coefficient. With a
    ``normalizer=``, which spans the micro-batches of a step, ``micro_batches=`` says how many, and it is divided by
    them. Forward hooks of the model itself see the result in the place of its output.

    FSDP2 may shard the head as a unit of its own or with others. FSDP's mixed precision rounds the tensors of a plain
    dict on the way in, old log-probs among them, and may round outputs on the way out: ``grpo=batch(...)`` and
    ``receive`` go around it. Tensor parallelism may shard the head (``ColwiseParallel``, transformers' plans; before
    ``attach`` or after), under FSDP2 too: each rank then computes with its own rows of the head, and loss and log-probs
    are the same on all of them. Pickle a model detached; ``nn.DataParallel`` is not served.

    Args:
        model: a causal, multimodal or encoder-decoder model of transformers, bare or inside PEFT, DDP or FSDP
            wrappers. Attach before ``accelerator.prepare``.
        config: a LossConfig or a preset's name.
        from_logits: run the model's own head and ``grpo_loss`` on its logits: for any head, at the memory of the
            logits.
        head_dtype: of the head's GEMMs and logits, outside of autocast; torch.float32 is a head in full precision
            behind a backbone in bf16. A weight of another dtype is cast at every call.
        proof_every: calls between two looks at one row; 0 looks at the first call in each state alone.
        shadow: losses with a gradient between two comparisons, the first among them; 0 is none. Then the loss of the
            whole logits in plain PyTorch, ``reference.grpo_loss``, and its gradients with respect to hidden states and
            head stand beside the fused ones: a line of the logger ``grpo_kernels.shadow``, at WARNING where they differ
            by more than rounding. Such a call holds several tensors of the logits' size; what it cannot compare (ranks
            that share a vocabulary or a sequence, losses of tokens) is logged, and training goes on.
        **options: keywords of ``linear_grpo_loss`` (of ``grpo_loss``) to fix (temperature, chunk_bytes, inplace, ...),
            and ``aux_loss_coef``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a model without a head, or attached already; of a call: a head that cannot be traced (quantised,
            or not linear), log-probs that are others than the model's own, ids that are not shifted.
    """
    resolved = resolve_config(config)
    inner = causal_model(model, "attach")
    if _attached(inner):
        fail("attach", "a model that is not attached", "one that is", hint="grpo_kernels.hf.detach(model) first")
    _check_unprepared(inner, "attach")
    if type(proof_every) is not int or proof_every < 0:
        fail("attach", "proof_every to be an int >= 0", repr(proof_every))
    watch = Watch(check_every("attach", shadow))
    if head_dtype is not None and head_dtype not in FLOAT_DTYPES:
        error = ValueError if isinstance(head_dtype, torch.dtype) else TypeError
        fail("attach", "head_dtype to be a torch.dtype of floats, like torch.float32", repr(head_dtype), error=error)
    check_flag("attach", "from_logits", from_logits)
    if head_dtype is not None and from_logits:
        fail("attach", "head_dtype= without from_logits=True", "both", hint="the model's own head has a dtype")
    names = [name for name in keywords(grpo_loss if from_logits else linear_grpo_loss) if name not in OF_A_CALL]
    check_keywords("attach: the option", options, [*names, "aux_loss_coef"])
    bind(inner, resolved, from_logits, options, head_dtype, proof_every, watch)
    return model


def bind(
    inner: Any,
    config: LossConfig,
    from_logits: bool,
    options: Mapping[str, Any],
    head_dtype: torch.dtype | None = None,
    proof_every: int = EVERY,
    watch: Watch | None = None,
) -> None:
    """Do what ``attach`` does, without its checks, over whatever ``inner.forward`` is."""
    if not from_logits:
        head_of(inner)
    before = inner.forward
    method = getattr(before, "__func__", None)
    signature = signature_of(inner)
    positions = list(signature.parameters)[1:]

    def original(self: Any, *args: Any, **inputs: Any) -> Any:
        return before(*args, **inputs) if method is None else method(self, *args, **inputs)

    proof = Proof(method or before, proof_every)
    watch = watch or Watch(0)

    @functools.wraps(method or type(inner).forward)
    def forward(self: Any, *args: Any, grpo: Mapping[str, Any] | None = None, **inputs: Any) -> Any:
        if grpo is None:
            return original(self, *args, **inputs)
        return called(self, grpo, {**inputs, **dict(zip(positions, args, strict=False))})

    @leaving_graphs
    def called(compiled: Any, self: Any, grpo: Mapping[str, Any], inputs: dict[str, Any]) -> Any:
        check_given(grpo, config, options, from_logits, inputs, self)
        given = {"config": config, **options, **grpo}
        extras = {name: given.pop(name, None) for name in ("receive", "aux_loss_coef", "micro_batches")}
        inputs = completed(signature, inputs, extras["aux_loss_coef"])
        keep = None if "logits_to_keep" in signature.parameters else inputs.pop("logits_to_keep", None)
        kept = slice(-keep, None) if isinstance(keep, int) else keep  # as the models that know it have it
        if from_logits:
            with with_frames(compiled):
                output = original(self, **inputs)
            logits = output.logits if kept is None else output.logits[:, kept]
            _check_columns(self, logits, given)
            given = _with_vocabulary(self, given)
            if hasattr(logits.grad_fn, "_saved_result"):  # autograd needs them once more
                given.pop("inplace", None)
            fused = functools.partial(_run, grpo_loss, token_log_probs)
            watch.look(fused, lambda rows: rows, (logits,), {**given, "inplace": False}, {})
            out = fused((logits,), given)
        else:
            call = functools.partial(original, self, **inputs)
            with proof.alone(self):
                output, out = _from_hidden(self, call, compiled, kept, given, head_dtype, proof, watch)
        result = with_model_output(out, output, self, inputs, extras["aux_loss_coef"], extras["micro_batches"] or 1)
        if extras["receive"] is not None:
            extras["receive"](result)
        return result

    del forward.__wrapped__  # accelerate's unwrap_model would follow it past this function
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.grpo_kernels_before = (before, method)  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)


def _from_hidden(
    model: Any,
    call: Callable[[], Any],
    compiled: Any,
    kept: Any,
    given: dict[str, Any],
    head_dtype: torch.dtype | None,
    proof: Proof,
    watch: Watch,
) -> tuple[Any, Any]:
    """Run the model's own forward with a head that makes no logits, and the loss from the head's states where its
    weight is whole."""
    head = head_of(model)
    check_backward_hooks(head)
    parts = Parts(model, head)
    with proof.refusing(parts):
        traced = proof.traced(parts, call, compiled, kept)
        return traced.output, _with_head(model, traced, call, given, head_dtype, proof, parts, watch)


def _with_head(
    model: Any,
    traced: TracedHead,
    call: Callable[[], Any],
    given: dict[str, Any],
    head_dtype: torch.dtype | None,
    proof: Proof,
    parts: Parts,
    watch: Watch,
) -> Any:
    hidden = traced.main.states
    _check_rows(hidden, given["token_ids"])
    given = _with_vocabulary(model, given)
    row, logits = proof.row(traced, parts, call, hidden, given.get("mask")), []
    device = hidden.device.type

    def run(states: Tensor) -> Any:
        operands, autocast = traced.operands(head_dtype), traced.form.autocast
        if given.get("teacher") is not None and is_dtensor(operands.weight):
            hint = "ref_log_probs= with KL(...) works there"
            fail("attach", "a whole head beside teacher=", "one that tensor parallelism shards", hint=hint)
        if head_dtype is not None:
            states, autocast = states.to(head_dtype), Autocast(False, autocast.dtype)
        elif not autocast.enabled:
            check_dtypes("attach", states, operands.weight)
        head: dict[str, Any] = {"bias": operands.bias}
        if operands.adapter is not None:
            head["adapter"] = operands.adapter
        fused = functools.partial(_run, linear_grpo_loss, linear_token_log_probs)
        rows, of_head = (states, operands.weight), given | operands.transform
        with autocast.around(device):
            watch.look(fused, operands.logits, rows, of_head, head)
            out = fused(rows, of_head, **head)
        if row is not None:
            logits.append(row_logits(row))
        return out

    out = in_fsdp_units(model, traced.layer, run, hidden)
    if row is None:
        return out
    dtype = None if head_dtype is None else traced.main.weight.dtype
    factor = proof.compare(row, logits[0], traced, parts, call, dtype)
    return out if factor is None else _spoilt(out, factor)


def _spoilt(out: Any, factor: Tensor) -> Any:
    """Return a result times 1 or NaN."""
    if isinstance(out, TokenLogProbs):
        return TokenLogProbs.by(out.log_probs * factor, out.entropy * factor, out.made)
    if out.token_losses is not None:
        return out._replace(token_losses=out.token_losses * factor)
    return out._replace(loss=out.loss * factor)


def _check_rows(hidden: Tensor, token_ids: Tensor) -> None:
    """Raise where a wrapper has put rows in front of the tokens'."""
    if token_ids.dim() == 2 and hidden.dim() == 3 and len(token_ids) == len(hidden):
        rows, tokens = hidden.shape[1], token_ids.shape[1]
        if rows > tokens + 1:
            hint = (
                f"prompt tuning and image tokens put rows in front: logits_to_keep={tokens + 1} in the model's call "
                "takes those of token_ids"
            )
            fail(
                "attach", f"{tokens} or {tokens + 1} rows for token_ids {tuple(token_ids.shape)}", f"{rows}", hint=hint
            )


def _with_vocabulary(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what is given with the vocabulary of the model, where ranks are said to share it: a head that is whole on
    each of them is then noticed."""
    if given.get("vocab_group") is None or "vocab_size" in given:
        return given
    return {**given, "vocab_size": model.config.get_text_config().vocab_size}


def _check_columns(model: Any, logits: Tensor, given: Mapping[str, Any]) -> None:
    """Raise where a rank of tensor parallelism has some of the logits' columns, and the call does not say so."""
    if is_dtensor(logits) or given.get("vocab_group") is not None:
        return
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(layer, "weight", None)
    if is_dtensor(weight) and logits.shape[-1] == weight.to_local().shape[0] < weight.shape[0]:
        hint = "vocab_group=tp among the options of attach, or ColwiseParallel(..., use_local_output=False)"
        fail("attach", f"logits of {weight.shape[0]} columns", f"{logits.shape[-1]}, those of this rank", hint=hint)


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``; returns ``model``."""
    inner = causal_model(model, "detach")
    _check_unprepared(inner, "detach")
    if not _attached(inner):
        fail("detach", "a model that attach() was called on", "one that is as it was")
    before, method = inner.forward.__func__.grpo_kernels_before
    del inner.forward
    if method is not type(inner).forward:  # somebody else's, from before
        inner.forward = before if method is None else types.MethodType(method, inner)
    return model


def _attached(inner: Any) -> bool:
    """Whether a model is attached, by what its forward is: a pickled one comes back with the original's name, without
    ours."""
    return hasattr(getattr(inner.forward, "__func__", None), "grpo_kernels_before")


def _check_unprepared(inner: Any, function: str) -> None:
    if hasattr(inner, "_original_forward"):  # accelerate's name
        fail(function, "a model before accelerator.prepare", "one that accelerate has wrapped")


def _run(
    loss: Callable[..., LossOutput],
    log_probs: Callable[..., TokenLogProbs],
    rows: tuple[Tensor, ...],
    given: dict[str, Any],
    **head: Any,
) -> LossOutput | TokenLogProbs:
    """Return what was asked for, of logits or of hidden states and head."""
    token_ids, mask, output = given.pop("token_ids"), given.pop("mask", None), given.pop("output", OUTPUTS[0])
    known = {name: given[name] for name in keywords(log_probs) if name in given}
    if given.get("cu_seqlens") is not None and "temperature" in known:
        known["temperature"] = _of_tokens(known["temperature"], token_ids, given["cu_seqlens"], given.get("check"))
    if output == "log_probs":
        inside = _inside(token_ids, mask, given.get("cu_seqlens"), given.get("check"))
        out: LossOutput | TokenLogProbs = log_probs(*rows, token_ids, inside, **head, **known)
    else:
        if callable(given.get("token_weights")):
            known.pop("live_tokens", None)  # of the loss, which may skip rows
            inside = _inside(token_ids, mask, given.get("cu_seqlens"), given.get("check"))
            with torch.no_grad():
                given["token_weights"] = given["token_weights"](log_probs(*rows, token_ids, inside, **head, **known))
        out = loss(*rows, token_ids, given.pop("advantages", None), mask, **head, **given)
    return out


def _of_tokens(temperature: Any, token_ids: Tensor, cu_seqlens: Tensor, check: bool | None) -> Any:
    """Return a packed batch's temperatures of sequences as those of its tokens, which log-probs take; anything else as
    it is."""
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        return temperature
    named = {"token_ids": token_ids, "cu_seqlens": cu_seqlens, "temperature": temperature}
    packed = Packed.read("attach", cu_seqlens, token_ids.numel(), named, check)
    if not fits(temperature, (packed.count,), (packed.count, 1)):
        return temperature
    return packed.expand(temperature.reshape(-1)).view(token_ids.shape)


def _inside(token_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, check: bool | None) -> Tensor | None:
    """Return the mask without what lies outside of every packed sequence."""
    if cu_seqlens is None:
        return mask
    mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    return read_live("attach", mask, cu_seqlens, check)
