"""Word error rate, the usual measure of a recogniser: word edits (Levenshtein 1966) over words of the reference."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Word edits that turn the hypothesis into the reference, and the words of the reference; letter case and
    punctuation do not count."""
    expected, heard = _words(reference), _words(hypothesis)
    row = list(range(len(heard) + 1))
    for i, word in enumerate(expected, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1], len(expected)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))
