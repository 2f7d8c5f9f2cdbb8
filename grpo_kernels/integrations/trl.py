"""TRL 1.16: ``FusedGRPOTrainer``, and ``patch_trl`` for the operators of its other trainers.

``FusedGRPOTrainer`` is ``GRPOTrainer`` with the whole loss computed inside the model's forward, from hidden
states; its metrics have TRL's names and values. ``patch_trl`` swaps the operators alone that TRL's trainers take
log-probs, entropies and divergences from.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import hf
from ..calls.outputs import LossOutput, TokenLogProbs
from ..calls.sighting import check_every
from ..objectives.checks import check_flag
from ..objectives.divergence import Divergence
from .objectives import OVER_ITEMS, UNBOUNDED, sampler_log_probs
from .patching import check_version
from .trl_options import check_arguments, check_teacher, check_trainer, objective_of
from .trl_patch import TARGET
from .trl_patch import patch_trl as patch_trl

try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer
    from trl.trainer import utils as trl_utils
except ImportError as error:
    raise ImportError("grpo_kernels.integrations.trl needs TRL 1.16: pip install 'trl>=1.16,<1.17'") from error


class FusedGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` whose loss never holds the logits: ``linear_grpo_loss`` inside the model's forward.

    Losses, metrics and weights are TRL's within rounding. The auxiliary loss of a mixture of experts is the one that
    the model returns. Options that the loss does not have are refused at construction, by name.

    Args:
        *args, **kwargs: as for ``trl.GRPOTrainer``.
        from_logits: run the model's own head and ``grpo_loss`` on its logits: for a head that ``hf.attach`` cannot
            trace.
        teacher: a model of transformers over the same vocabulary, of any width, whose distribution the policy learns
            beside the rewards: it runs on every batch of the loss, in evaluation mode, and makes no logits. It is
            moved to the trainer's device, and stays whole there.
        divergence: what is minimised between the two, and its coefficient: ``Divergence("reverse_kl", coef=0.05)``. As
            ``trainer.divergence`` it may be changed while training.
        shadow: micro-batches between two comparisons with TRL's own loss, the first among them; 0 is none. The logger
            ``grpo_kernels.shadow`` gets a line of both losses and the difference of their gradients with respect to
            hidden states and head, at WARNING where that is more than rounding. TRL's loss is given log-probs of the
            whole logits, which exist for as long as that takes; what trains and what is logged is ours.

    Raises:
        ValueError: an option of ``GRPOConfig`` that the loss does not have, with the nearest one that it has; a model
            without a head; of a step: a head that ``hf.attach`` refuses.
        RuntimeError: another version of TRL.
        TypeError: a class of the hierarchy that changes a method which this loss replaces, and would be passed over;
            one of ``teacher`` and ``divergence`` without the other.
    """

    entropy_coef: float
    _entropy_window_stats: Tensor | None

    def __init__(
        self,
        *args: Any,
        from_logits: bool = False,
        teacher: torch.nn.Module | None = None,
        divergence: Divergence | None = None,
        shadow: int = 0,
        **kwargs: Any,
    ) -> None:
        check_version(TARGET._replace(caller="FusedGRPOTrainer"))
        check_flag("FusedGRPOTrainer", "from_logits", from_logits)
        check_teacher(teacher, divergence, from_logits)
        self._watch = hf.Watch(check_every("FusedGRPOTrainer", shadow), self._loss_of_trl, "TRL")
        if shadow and teacher is not None:
            raise ValueError("FusedGRPOTrainer: expected shadow= or teacher=; got both: TRL's GRPO has no teacher.")
        _check_overrides(type(self), type(self)._compute_loss is not FusedGRPOTrainer._compute_loss)
        given = kwargs.get("args") or next((value for value in args if isinstance(value, GRPOConfig)), None)
        if given is not None:
            check_arguments(given, from_logits)
        own = type(self)._get_per_token_logps_and_entropies is not FusedGRPOTrainer._get_per_token_logps_and_entropies
        cast = given is not None and given.cast_lm_head_to_fp32
        with contextlib.nullcontext() if own or cast else _adapted_head_allowed():
            super().__init__(*args, **kwargs)
        self._from_logits = from_logits
        self.divergence = divergence
        self._ask_teacher = None if teacher is None else hf.teacher(teacher.to(self.accelerator.device))
        for model in (self.model, self.ref_model):
            if model is not None:
                self.attach_loss(model)

    def attach_loss(self, model: Any) -> None:
        """Attach the loss to whatever forward is: TRL's fused head, perhaps over the forward of an earlier trainer."""
        options = {"temperature": self.temperature, **({"inplace": True} if self._from_logits else {})}
        head_dtype = torch.float32 if self.args.cast_lm_head_to_fp32 else None
        inner = hf.causal_model(model, "FusedGRPOTrainer")
        hf.bind(inner, objective_of(self).config(), self._from_logits, options, head_dtype, watch=self._watch)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the old or reference pass by the kernels of the loss: TRL's own method slices the batch, and calls the
        model in our way."""

        def scored(input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
            live = attention_mask[:, -logits_to_keep:]
            tokens = {"token_ids": input_ids[:, -logits_to_keep:], "mask": live, "output": "log_probs"}
            return self._call(model, {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}, tokens)[1]

        found: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
            scored, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        _check_overrides(type(self), False)
        _check_patches(self)
        check_trainer(self)
        mode = "train" if self.model.training else "eval"
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        scale, normalizer = 1 / accumulated, None
        if self.loss_type in OVER_ITEMS:
            # The count spans the generation batch: this window's share, as TRL takes it; no further division.
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if mode == "train":
                normalizer = normalizer * accumulated / self.args.steps_per_generation
            scale = 1.0
        entropy_coef = self._entropy_coef_now() / accumulated / scale
        grpo = {
            "token_ids": inputs["completion_ids"],
            "mask": mask,
            "advantages": inputs["advantages"],
            "old_log_probs": inputs.get("old_per_token_logps"),
            "ref_log_probs": inputs["ref_per_token_logps"] if self.beta != 0 else None,
            "token_weights": self._token_weights(inputs, mask),
            "normalizer": normalizer,
            "entropy_coef": entropy_coef,
            "grad_scale": scale,
        }
        folded = self.loss_type == "vespo" and self._corrects_rollout
        if folded:
            weights = inputs["importance_sampling_ratio"]
            grpo["rollout_log_probs"] = sampler_log_probs(inputs["old_per_token_logps"], weights, mask)
        if self.aux_loss_enabled:
            grpo["aux_loss_coef"] = self.router_aux_loss_coef
            grpo["micro_batches"] = accumulated if normalizer is not None else None
        config = objective_of(self).config(folded)
        if self._ask_teacher is not None and self.divergence is not None:
            config = dataclasses.replace(config, divergence=self.divergence)
        self._watched = (model, inputs, scale)
        returned, out = self._loss_of(model, inputs, {**grpo, "config": config})
        self._log_step(mode, inputs, mask, out, grpo)
        if config.divergence is not None:
            self._log_divergence(self._metrics[mode], out)
        loss: Tensor = returned.loss * scale
        return loss

    def _loss_of_trl(self, logits: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Return TRL's own loss of plain log-probs and entropies, over the scale that ours is multiplied with.

        The trainer keeps its metrics, and its controller of the entropy.
        """
        model, inputs, scale = self._watched
        own = self.__dict__
        kept = {name: own[name] for name in _OF_A_LOSS if name in own}
        scored = (*hf.plain_log_probs(logits, given), torch.zeros((), device=logits.device))
        own["_metrics"] = {mode: collections.defaultdict(list) for mode in ("train", "eval")}
        self._get_per_token_logps_and_entropies = lambda *args, **kwargs: scored  # type: ignore[method-assign]
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            del self._get_per_token_logps_and_entropies
            own.update(kept)
        return loss / scale

    def _loss_of(self, model: Any, inputs: dict[str, Any], grpo: dict[str, Any]) -> tuple[Any, Any]:
        """Return what ``_call`` does of a batch's inputs, which TRL's own method makes, images included."""
        found: list[tuple[Any, Any]] = []

        def computed(**given: Any) -> Any:
            found.append(self._call(model, given, grpo))
            return found[-1][1]

        tokens = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        more = {name: inputs[name] for name in _OF_IMAGES if inputs.get(name) is not None}
        super()._get_per_token_logps_and_entropies(
            computed, *tokens, inputs["completion_ids"].shape[1], compute_aux_loss=self.aux_loss_enabled, **more
        )
        return found[-1]

    def _call(self, model: Any, inputs: dict[str, Any], grpo: dict[str, Any]) -> tuple[Any, Any]:
        """Return what the model returns, whose loss hooks know, and what was computed inside: FSDP's mixed precision
        rounds the tensors of plain dicts on the way in and every output on the way out. ``inputs`` are TRL's for its
        own head."""
        inside: list[Any] = []
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "fused_lm_head")}
        inputs["logits_to_keep"] = grpo["token_ids"].shape[1] + 1
        of_text = hf.causal_model(model, "FusedGRPOTrainer").config.get_text_config()
        if getattr(of_text, "output_router_logits", False):  # which TRL asks for where its trainer has a coefficient
            inputs.setdefault("output_router_logits", False)
        config = grpo.get("config")
        with self.accelerator.autocast():
            if self._ask_teacher is not None and config is not None and config.divergence is not None:
                own = {name: value for name, value in inputs.items() if name != "output_router_logits"}
                grpo = {**grpo, "teacher": self._ask_teacher(**own)}
            returned = model(**inputs, grpo=hf.batch(**grpo, receive=inside.append))
        if not inside:
            raise RuntimeError(
                "FusedGRPOTrainer: expected the policy or the reference model that the trainer was made with; got "
                f"another {type(model).__name__}. A model that takes the place of one needs trainer.attach_loss(model)."
            )
        return returned, inside[-1]

    def _entropy_coef_now(self) -> float:
        """Return the bonus that TRL's controller asks for in this accumulation window."""
        if not self._entropy_bonus_enabled:
            return 0.0
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return float(self.entropy_coef)

    @property
    def _corrects_rollout(self) -> bool:
        return bool(self.use_vllm and self.vllm_importance_sampling_correction)

    def _token_weights(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | Callable[[TokenLogProbs], Tensor] | None:
        """Return factors of the policy term: rollout weights, and masks that follow from the current policy's
        log-probs."""
        known = None
        if self._corrects_rollout and self.loss_type != "vespo":  # VESPO's are part of its ratio
            known = inputs["importance_sampling_ratio"].expand(mask.shape)
        if self.top_entropy_quantile >= 1.0 and self.off_policy_mask_threshold is None:
            return known

        def weights(policy: TokenLogProbs) -> Tensor:
            factor = torch.ones_like(policy.log_probs) if known is None else known.to(policy.log_probs)
            if self.top_entropy_quantile < 1.0:
                factor = factor * self.get_high_entropy_mask(policy.entropy, mask, 1 - self.top_entropy_quantile)
            if self.off_policy_mask_threshold is not None:
                old = inputs.get("old_per_token_logps")
                sampled = inputs.get("sampling_per_token_logps", policy.log_probs if old is None else old)
                factor = factor * self.get_off_policy_mask(
                    advantages=_per_row(inputs["advantages"]),
                    per_token_logps=policy.log_probs,
                    sampling_per_token_logps=sampled,
                    mask=mask,
                    off_policy_threshold=self.off_policy_mask_threshold,
                )
            return factor

        return weights

    @torch.no_grad()
    def _log_step(self, mode: str, inputs: dict[str, Any], mask: Tensor, out: LossOutput, grpo: dict[str, Any]) -> None:
        """Log TRL's metrics by TRL's names, from the log-probs and entropies that the loss returned."""
        metrics = self._metrics[mode]
        advantages = _per_row(inputs["advantages"])
        old = inputs.get("old_per_token_logps")
        log_ratio = own = _live(out.log_probs - (out.log_probs if old is None else old), mask)
        if self.importance_sampling_level == "sequence":
            log_ratio = (log_ratio.sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(1)
        ratio = log_ratio.exp()
        if self.beta != 0:
            behind = _live(inputs["ref_per_token_logps"] - out.log_probs, mask)
            kl = torch.exp(behind) - behind - 1
            metrics["kl"].append(self._mean(kl * ratio if self.args.use_bias_correction_kl else kl, mask))
        metrics["entropy"].append(self._mean(out.entropy, mask))
        self._log_bounds(metrics, inputs, mask, own, ratio, advantages)
        if self._entropy_bonus_enabled:
            bonus = _live(out.entropy, mask).sum() / mask.sum().clamp(min=1.0)
            policy_loss = out.loss + grpo["entropy_coef"] * bonus
            if out.aux_loss is not None:
                policy_loss = policy_loss - grpo["aux_loss_coef"] * out.aux_loss / (grpo["micro_batches"] or 1)
            metrics["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            self._control_entropy(mode, out.entropy, mask)
        if out.aux_loss is not None:
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(out.aux_loss).mean().item())

    def _log_divergence(self, metrics: dict[str, list[float]], out: LossOutput) -> None:
        """Log the mean divergence of the live tokens of every rank, and how unsure the teacher is."""
        for name in ("divergence", "teacher_entropy"):
            value = getattr(out.metrics, name).detach()
            metrics[name].append(self.accelerator.gather(value).nanmean().item())

    def _log_bounds(
        self,
        metrics: dict[str, list[float]],
        inputs: dict[str, Any],
        mask: Tensor,
        own: Tensor,
        ratio: Tensor,
        advantages: Tensor,
    ) -> None:
        """Log what bounded the ratios: TRL has another metric for each kind of loss. ``own`` are the tokens'
        log-ratios."""
        if self.loss_type == "cispo":
            capped = (ratio > self.epsilon_high) & (advantages > 0)
            metrics["cispo_clip_ratio"].append(self._mean(capped.float(), mask))
        if self.loss_type == "vespo":
            weights = inputs["importance_sampling_ratio"] if self._corrects_rollout else None
            phi = self.get_gamma_weights(advantages, own, mask, weights, *objective_of(self).vespo)
            metrics["vespo/phi_seq_mean"].append(self._mean(phi, mask))
        if self.loss_type in UNBOUNDED:
            return
        if self.args.delta is not None:
            ratio = ratio.clamp(max=self.args.delta)
        low = ((ratio < 1 - self.epsilon_low) & (advantages < 0)).float()
        high = ((ratio > 1 + self.epsilon_high) & (advantages > 0)).float()
        for name, clipped in (("low", low), ("high", high), ("region", low + high)):
            metrics[f"clip_ratio/{name}_mean"].append(self._mean(clipped, mask))
        for name, clipped, extreme in (("low_min", low, trl_utils.nanmin), ("high_max", high, trl_utils.nanmax)):
            each = clipped.squeeze(1) if clipped.shape[1] == 1 else (clipped * mask).sum(-1) / mask.sum(-1)
            metrics[f"clip_ratio/{name}"].append(extreme(self.accelerator.gather(each)).item())

    def _mean(self, values: Tensor, mask: Tensor) -> float:
        """Return the mean over the live tokens of every rank; over sequences where there is one value for each."""
        if values.shape[1] == 1:
            sums = torch.stack([values.sum(), torch.tensor(float(len(values)), device=values.device)])
        else:
            sums = torch.stack([_live(values, mask).sum(), mask.sum().to(values.dtype)])
        total, count = self.accelerator.reduce(sums, reduction="sum")
        return float(total / count.clamp(min=1.0))

    def _control_entropy(self, mode: str, entropy: Tensor, mask: Tensor) -> None:
        """Move TRL's adaptive coefficient a step towards the target after each accumulation window."""
        if mode != "train":
            return
        last = self.accelerator.sync_gradients
        if self.use_adaptive_entropy:
            window = torch.stack([_live(entropy, mask).sum(), mask.sum().to(entropy.dtype)])
            if self._entropy_window_stats is not None:
                window = self._entropy_window_stats + window
            self._entropy_window_stats = None if last else window
            if last:
                total, count = self.accelerator.reduce(window, reduction="sum")
                self._last_world_entropy = float(total / count.clamp(min=1.0))
                rising = self._last_world_entropy <= self.args.entropy_target
                moved = self.entropy_coef + (1 if rising else -1) * self.args.entropy_coef_delta
                self.entropy_coef = min(max(moved, self.args.entropy_coef_min), self.args.entropy_coef_max)
        if last:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)


_OF_A_LOSS = ("_metrics", "_entropy_window_stats", "_last_world_entropy", "entropy_coef")
"""What TRL's loss changes of its trainer."""
_OF_IMAGES = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[8:]
"""What a batch may hold for a model that sees, pixel_values first."""


@contextlib.contextmanager
def _adapted_head_allowed() -> Iterator[None]:
    """Let TRL's constructor pass an adapter on the head, which it refuses since its own loss would not train it. It
    stays refused where log-probs are a class's own, and with ``cast_lm_head_to_fp32``, for which TRL replaces the
    forward that the adapter is in."""
    if not hasattr(grpo_trainer, "BaseTunerLayer"):  # without PEFT
        yield
        return
    plain = grpo_trainer.BaseTunerLayer
    grpo_trainer.BaseTunerLayer = type("NoLayer", (), {})
    try:
        yield
    finally:
        grpo_trainer.BaseTunerLayer = plain


_REPLACED = ("_compute_loss", "_get_per_token_logps_and_entropies", "get_gamma_weights")
"""Of trl.GRPOTrainer; what else its loss calls, the fused loss calls too."""


def _check_overrides(kind: type, own_loss: bool) -> None:
    """Refuse a change of what the fused loss replaces: it would train something else in silence. ``own_loss``: a class
    in front of FusedGRPOTrainer has a loss of its own, and may use what is overridden there."""
    front = kind.__mro__[: kind.__mro__.index(FusedGRPOTrainer)]
    for other in kind.__mro__:
        for name in _REPLACED:
            if other is GRPOTrainer:
                changed = _is_patched_method(getattr(other, name))
            else:
                honoured = other in front and (own_loss or name == "_compute_loss")
                changed = name in vars(other) and other is not FusedGRPOTrainer and not honoured
            if changed:
                raise TypeError(_way_out(kind, other, name))


def _check_patches(trainer: Any) -> None:
    """Refuse what is put on a trainer itself in the place of a method that the fused loss does not call."""
    for name in _REPLACED[1:]:
        if name in vars(trainer):
            raise TypeError(
                f"trainer.{name} is patched, which the fused loss does not use: use trl.GRPOTrainer with "
                "grpo_kernels.integrations.trl.patch_trl(), which keeps every loss of TRL's trainers."
            )


def _is_patched_method(method: Any) -> bool:
    """Whether the code of a method of TRL's, or of what is wrapped around it, is somebody else's: a wrapper takes over
    its name and module."""
    while method is not None:
        if not hf.named(method).startswith(("trl.", "torch.")):
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def _way_out(kind: type, other: type, name: str) -> str:
    """Return what to do about a method that would be passed over."""
    out = "override _compute_loss in a class in front of FusedGRPOTrainer"
    if "_compute_loss" in vars(other) and other is not GRPOTrainer:
        out = (
            f"class {kind.__name__}({other.__name__}, FusedGRPOTrainer) runs its _compute_loss, on log-probs of these "
            "kernels, or around the fused loss if it calls super()"
        )
    return (
        f"{other.__name__} overrides {name}, which the fused loss of {kind.__name__} does not use: {out}; or leave "
        "FusedGRPOTrainer out and call grpo_kernels.integrations.trl.patch_trl(), which keeps every loss of TRL's "
        "trainers."
    )


def _live(values: Tensor, mask: Tensor) -> Tensor:
    """Return values, and 0 where the mask is, whatever is there: a product would keep NaN and infinities."""
    return torch.where(mask != 0, values, 0.0)


def _per_row(advantages: Tensor) -> Tensor:
    """Return (B, 1) of (B,), for maths with (B, T)."""
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
