"""Passages of a text layer: which lines are none, and where one is on its page."""

from __future__ import annotations

import re

_LEADER = re.compile(r"^.*?(?:\.\s?){4,}\s*(\S+)$")
"""A line with dots that lead to its last word."""
_NO_WORDS = re.compile(r"[\W\d_]*|[ivxl]+", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2,}")
_CONTENTS = 3  # lines with rising page numbers make a table of contents


def drop_contents(text: str) -> str:
    r"""Return a text without its table of contents, whose entries name other pages.

    The lines of a price list stay.

    >>> drop_contents("iv\nTea . . . . . 1\nMilk . . . . . 1\nSugar . . . . . 7\nAll of it.\n.")
    'iv\nAll of it.\n.'
    >>> drop_contents("Tea . . . . . 4\nMilk . . . . . 1\nSugar . . . . . 7").count("\n")
    2
    """
    lines = text.splitlines()
    leads = [found for line in lines if (found := _LEADER.match(line))]
    numbers = [int(lead[1]) for lead in leads if lead[1].isdecimal()]
    is_contents = len(numbers) >= _CONTENTS and numbers == sorted(numbers)
    return "\n".join(line for line in lines if not (is_contents and _LEADER.match(line)))


def drop_furniture(text: str) -> str:
    r"""Return a text without its table of contents and lines without words, as page numbers are.

    >>> drop_furniture("iv\nMild\nAll of it.\n.\n12")
    'Mild\nAll of it.'
    """
    lines = drop_contents(text).splitlines()
    return "\n".join(line for line in lines if not _NO_WORDS.fullmatch(line))


def is_passage(text: str) -> bool:
    """Tell whether a text has a word.

    >>> is_passage("R."), is_passage(". . . 12"), is_passage("No."), is_passage("東京")
    (False, False, True, True)
    """
    return _WORD.search(text) is not None


def locate(text: str, passage: str) -> tuple[int, int] | None:
    r"""Return where a passage begins and ends in a text, whatever is between its words.

    >>> locate("One.\nTwo\nthree. Four", "Two three.")
    (5, 15)
    """
    words = map(re.escape, passage.split())
    found = re.search(r"\s+".join(words), text)
    return found.span() if found and found[0] else None


def choose_excerpt(text: str, words: set[str]) -> str:
    r"""Return the two lines of a text that have the most of these lower-case words.

    >>> choose_excerpt("Contents\nA red apple\nfalls down.\nThe end", {"apple", "falls"})
    'A red apple falls down.'
    """
    lines = drop_contents(text).splitlines()
    pairs = [" ".join(lines[at : at + 2]) for at in range(max(1, len(lines) - 1))]
    return max(pairs, key=lambda pair: len(words & set(re.findall(r"\w\w+", pair.lower()))))
