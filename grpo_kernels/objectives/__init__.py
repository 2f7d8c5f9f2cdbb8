"""What papers define, in PyTorch alone: surrogates, KL, rollout weights, aggregations, metrics, advantages."""

from . import presets as presets  # fills the table that LossConfig.preset reads
