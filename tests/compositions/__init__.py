"""What goes with what: every pair of features of a call, run and judged: python -m tests.compositions."""
