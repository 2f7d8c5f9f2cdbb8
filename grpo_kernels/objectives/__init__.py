"""What papers define, in PyTorch alone: surrogates, KL, rollout weights, aggregations, metrics, advantages."""
