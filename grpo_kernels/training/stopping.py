"""How a run is asked to stop: Ctrl-C, a scheduler's SIGTERM, a terminal that is closed."""

from __future__ import annotations

import signal
from types import FrameType

from .. import interrupt
from ..streams import say
from .ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Interrupt:
    """The first of SIGNALS asks the loop to stop after its step; the second stops at once. Of several ranks the
    first signal to any stops all, and no other does: torchrun passes a terminal's Ctrl-C on, which comes twice then."""

    def __init__(self, ranks: Ranks) -> None:
        self.asked = False
        self._ranks = ranks
        # SIGINT even where a shell that started this in its background has it ignored: somebody sends it on purpose.
        handled = [number for number in SIGNALS if signal.getsignal(number) is not None]
        taken = [number for number in handled if number == signal.SIGINT or not interrupt.stays(number)]
        self._previous = {number: signal.signal(number, self._handle) for number in taken}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._ranks.several:
            raise KeyboardInterrupt
        if self._ranks.writes and not self.asked:
            again = "" if self._ranks.several else " (Ctrl-C again: stop at once, unsaved)"
            say(f"\nfinishing this step, then saving{again}")
        self.asked = True

    def stops(self) -> bool:
        """Whether any rank was asked to stop. Every rank must ask."""
        return self._ranks.largest(int(self.asked)) > 0

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
