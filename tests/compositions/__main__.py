"""Prints the page of verdicts: python -m tests.compositions > docs/compositions.md."""

from .table import main

if __name__ == "__main__":
    main()
