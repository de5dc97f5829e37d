"""Normalised words of a text, with their places in it: what the lexical channel compares.

A word is a run of letters and digits, in lower case, its Unicode compatibility form taken (ligatures, full-width
letters) and accents that stand apart composed; characters that do not show (soft hyphens, joiners) are left out, and
each character of a script without spaces (Chinese, Japanese) is a word of its own. Punctuation and space never count.
"""

import re
import unicodedata
from array import array
from typing import NamedTuple

import numpy as np

_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_INSIDE = "\u0300-\u036f\u00ad\u200b-\u200d\u2060\ufeff"  # combining accents and what does not show
WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}](?:[^\W_{_SINGLE}]|[{_INSIDE}])*")
_HIDDEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
# Words whose number is remembered; a corpus of the web has millions of distinct ones.
_REMEMBERED = 1_000_000
# Characters of a text whose words are held as strings at once.
_CHUNK = 1 << 20


class Words(NamedTuple):
    """Words of one text.

    Attributes:
        words: normalised, in order.
        spans: (n, 2) int64, first character and the one after the last in the text.
    """

    words: list[str]
    spans: np.ndarray


def normalised(word: str) -> str:
    """One word as it is compared; empty where nothing of it remains."""
    if word.isascii():
        return word.lower()
    plain = unicodedata.normalize("NFKC", _HIDDEN.sub("", word)).casefold()
    return "".join(character for character in unicodedata.normalize("NFC", plain) if character.isalnum())


def split(text: str) -> Words:
    """The words of a text with their places."""
    words: list[str] = []
    spans = array("q")
    start = 0
    for chunk in chunks(text):
        for match in WORD.finditer(chunk):
            if word := normalised(match.group()):
                words.append(word)
                spans.extend((start + match.start(), start + match.end()))
        start += len(chunk)
    return Words(words, np.array(spans, np.int64).reshape(-1, 2))


class Numbering(dict[str, int]):
    """Words as they stand in texts to numbers: those of a vocabulary from 1 on, 0 any other, -1 none at all.

    Args:
        vocabulary: normalised word to number.
    """

    def __init__(self, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        plain = normalised(word)
        number = self[word] = self.vocabulary.get(plain, 0) if plain else -1
        return number

    def numbers(self, text: str) -> np.ndarray:
        """(n,) int32: the text's words, as many as ``split`` finds."""
        found = array("i")
        for chunk in chunks(text):
            found.extend(map(self.__getitem__, WORD.findall(chunk)))
        numbers = np.frombuffer(found, np.int32) if found else np.zeros(0, np.int32)
        return numbers[numbers >= 0]


def chunks(text: str) -> list[str]:
    """A text in pieces of about a million characters, never cut inside a word; joined they are the text."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + _CHUNK
        if stop < len(text):
            # A space ends any word; a text of a million characters without one has none worth finding.
            space = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
            stop = space + 1 if space > start else stop
        pieces.append(text[start:stop])
        start = stop
    return pieces
