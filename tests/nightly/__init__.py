"""The tests that are too long for every change, in parts of less than half an hour: python -m tests.nightly."""
