"""An hour of calls and accidents, at random: python -m tests.soak."""
