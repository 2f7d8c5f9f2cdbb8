"""Which architectures attach serves: every class of transformers that generates text, tiny, beside its own logits."""
