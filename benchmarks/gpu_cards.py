"""Computes what is expected of the cards that the CUDA kernels are made for, from bytes and their bandwidth."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """A kind of GPU."""

    copy: float
    """Bytes a second that a device-to-device copy moves, reading and writing."""
    slack: float
    """A time of up to ``slack`` times the computed one is as predicted."""


# On both the same multiprocessors compute; the H100 leaves them 1.4 times as long for a byte.
CARDS = {"H100 80GB HBM3": Card(3.0e12, 1.05), "H200": Card(4.3e12, 1.08)}


def card_of(name: str) -> Card | None:
    """Find a card by the name that the driver gives; None for a card that nothing was computed for."""
    return next((card for kind, card in CARDS.items() if kind in name), None)


def computed_ms(logits_bytes: int, name: str) -> float | None:
    """Compute the time of loss and gradient by memory alone: the logits are read once and written once."""
    card = card_of(name)
    return None if card is None else 2e3 * logits_bytes / card.copy


def as_predicted(ms: float, logits_bytes: int, name: str) -> str:
    """ "yes", or how many times the computed time it takes; empty where nothing is computed."""
    card, computed = card_of(name), computed_ms(logits_bytes, name)
    if card is None or computed is None:
        return ""
    return "yes" if ms <= card.slack * computed else f"{ms / computed:.2f} times it"
