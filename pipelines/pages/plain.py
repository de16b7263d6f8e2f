"""Texts that may hold anything, such as names in a stranger's cache, for people to read."""

from __future__ import annotations


def plain(text: str) -> str:
    """A text as one line, without what would move a cursor or change colours: a "?" for each such sign.

    >>> plain("ViT-L\\x1b[2J, \\n24 layers")
    'ViT-L?[2J,  24 layers'
    """
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in text)
