"""Segments as pieces of text to be appended to each other, which is how OpenAI's event streams tell a transcript."""

from __future__ import annotations

import re

_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uff00-\uffef]")
"""Scripts written without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


class Deltas:
    """What has been said so far of one transcript."""

    def __init__(self) -> None:
        self.said = ""

    def add(self, text: str) -> str:
        """The next segment's text, with the space that belongs before it."""
        piece = self.spaced(text)
        self.said += piece
        return piece

    def spaced(self, text: str) -> str:
        """The same, without adding it."""
        return f" {text}" if _spaced(self.said, text) else text

    def rest(self, whole: str) -> str:
        """What the whole text has beyond what was said; nothing where it began differently."""
        return whole[len(self.said) :] if whole.startswith(self.said) else ""


def _spaced(before: str, after: str) -> bool:
    return before != "" and after != "" and not (_UNSPACED.match(before[-1]) or _UNSPACED.match(after[0]))
