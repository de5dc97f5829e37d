"""Normalised words of a text, with their positions: the units that the lexical channel compares.

A word is a run of letters and digits, case-folded, in Unicode compatibility form (ligatures, full-width letters) with
combining accents composed and invisible characters (soft hyphens, joiners) removed. Each character of a script without
spaces (Chinese, Japanese) is a word of its own. Punctuation and white space are ignored.
"""

import re
import unicodedata
from array import array
from typing import NamedTuple

import numpy as np

_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_INSIDE = "\u0300-\u036f\u00ad\u200b-\u200d\u2060\ufeff"  # combining accents and invisible characters
WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}](?:[^\W_{_SINGLE}]|[{_INSIDE}])*")
_HIDDEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
# Words in the cache; a web corpus has millions of distinct ones.
_REMEMBERED = 1_000_000
# Characters per chunk, which bounds the words held as strings at once.
_CHUNK = 1 << 20


class Words(NamedTuple):
    """Words of a text.

    Attributes:
        words: normalised, in order.
        spans: (n, 2) int64, each word's start and end (exclusive) in characters of the text.
    """

    words: list[str]
    spans: np.ndarray


def normalised(word: str) -> str:
    """Normalise one word; empty if nothing of it remains."""
    if word.isascii():
        return word.lower()
    plain = unicodedata.normalize("NFKC", _HIDDEN.sub("", word)).casefold()
    return "".join(character for character in unicodedata.normalize("NFC", plain) if character.isalnum())


def split(text: str) -> Words:
    """Split a text into normalised words with their spans."""
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
    """Cached map from raw words to numbers: 1 and up in the vocabulary, 0 outside it, -1 if nothing remains.

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
        """Return the numbers (n,) int32 of a text's words, aligned with ``split``."""
        found = array("i")
        for chunk in chunks(text):
            found.extend(map(self.__getitem__, WORD.findall(chunk)))
        numbers = np.frombuffer(found, np.int32) if found else np.zeros(0, np.int32)
        return numbers[numbers >= 0]


def chunks(text: str) -> list[str]:
    """Cut a text, losslessly, into chunks of about a million characters, at white space if there is any."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + _CHUNK
        if stop < len(text):
            # Cut after white space, which ends any word; a million characters without any have no words worth finding.
            space = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
            stop = space + 1 if space > start else stop
        pieces.append(text[start:stop])
        start = stop
    return pieces
