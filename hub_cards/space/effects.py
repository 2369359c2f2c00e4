"""What a change does to a mask: measured once, and said in the same numbers before and after it is made.

The forecast of a concept is the very decoding that switching it off would show, so it is exact. Knows nothing about
where masks come from or about HTML.
"""

from dataclasses import dataclass

import numpy as np

MOVED = 0.99
"""Share of a mask from which it has moved away."""
HARDLY = 0.005
"""Share of a mask below which a change is none to the eye."""
NEEDED = 0.3
"""A mask that changes by this share without a concept needs it."""


@dataclass(frozen=True)
class Effect:
    """The difference between two masks of one slot."""

    had: bool
    """whether there was a mask."""
    has: bool
    """whether there is one now."""
    gone: float
    """share of the mask that is not in the other any more, in [0, 1]; 0 where there was none."""
    added: float
    """pixels that are new, as a share of the mask's, at least 0; 0 where there was none or is none."""
    reason: str = ""
    """why there is no mask now; "" where there is one."""
    to: str = ""
    """where the mask is now; "" where that is not known."""

    @property
    def moved(self) -> bool:
        """Whether the mask is elsewhere now."""
        return self.had and self.has and self.gone >= MOVED

    @property
    def size(self) -> float:
        """How much of the mask changes, in [0, 1]."""
        return min(1.0, max(self.gone, self.added))

    @property
    def brief(self) -> str:
        """In a few words, as beside a concept."""
        if not self.has:
            return "no mask left" if self.had else "still no mask"
        if not self.had:
            return f"a mask appears at {self.to}" if self.to else "a mask appears"
        if self.size < HARDLY:
            return "no change" if self.size == 0 else "under 1% changes"
        if self.moved:
            return f"it moves to {self.to}" if self.to else "it moves away"
        return self._listed("goes", "added")

    @property
    def sentence(self) -> str:
        """The same in a sentence without its beginning and end."""
        if not self.has:
            return f"{'no mask is left' if self.had else 'there still is no mask'} ({self.reason})"
        if not self.had:
            return f"a mask appears at {self.to}" if self.to else "a mask appears"
        if self.size == 0:
            return "the mask does not change"
        if self.size < HARDLY:
            return "under 1% of the mask changes"
        if self.moved:
            return f"the mask moves to {self.to}" if self.to else "the mask moves away"
        return self._listed("of the mask goes", "of its size is added")

    def _listed(self, goes: str, added: str) -> str:
        parts = [(self.gone, goes), (self.added, added)]
        return ", ".join(f"{percent(share)} {word}" for share, word in parts if share >= HARDLY)


def effect(before: np.ndarray | None, after: np.ndarray | None, reason: str = "") -> Effect:
    """What becomes of a mask.

    Args:
        before: bool (H, W), not empty; None where there is no mask.
        after: the same after a change.
        reason: why there is none after it.

    Returns:
        Effect.
    """
    if before is None or after is None:
        return Effect(before is not None, after is not None, float(before is not None and after is None), 0.0, reason)
    whole = max(int(before.sum()), 1)
    gone, added = float((before & ~after).sum() / whole), float((after & ~before).sum() / whole)
    return Effect(True, True, gone, added)


def percent(share: float) -> str:
    """A share in whole percent; never 0% or 100% where it is neither."""
    if 0 < share < 0.005:
        return "under 1%"
    if 0.995 <= share < 1:
        return "over 99%"
    return f"{share:.0%}"


def said(change: float | str) -> str:
    """A change in a word or two, such as "off" or "→ blue"."""
    if isinstance(change, str):
        return f"→ {change}"
    return "off" if change == 0 else f"× {change:g}"
