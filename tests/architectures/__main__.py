"""Prints the page of verdicts: python -m tests.architectures > docs/architectures.md; words choose classes."""

from .table import main

if __name__ == "__main__":
    main()
