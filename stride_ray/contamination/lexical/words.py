"""Normalised words of a text, with their positions: the units that the lexical channel compares.

A word is a run of letters, digits and combining marks (vowel signs, points, accents) of the readable text (markup.py),
case-folded and in Unicode compatibility form (ligatures, full-width letters), with the digits of any script as 0 to 9.
The English words for 0 to 10 are their digits.
The vowel points of Hebrew and Arabic do not count: most texts, and most copies, leave them out.
In a script without spaces (Chinese, Japanese, Thai and others) each letter with its marks is a word of its own.
Punctuation and white space are ignored. What a browser does not show is split apart from the text that it stands in.
"""

import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import regex

from stride_ray.contamination.lexical.markup import Readable, readable

# To be raised with every change to normalisation: results of a search under other rules are not reused.
RULES = 9
_SPACELESS = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Line_Break=Complex_Context}\u30fc\uff70]&&[\p{L}\p{N}]]"
# In half-width katakana the voicing marks are letters.
_LETTER = rf"{_SPACELESS}[\p{{M}}\uff9e\uff9f]*+"
_ASCII = regex.compile(r"[A-Za-z0-9]++")
_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*+")
_WORD_OR_LETTER = regex.compile(
    rf"{_LETTER}|[[\p{{L}}\p{{N}}]--{_SPACELESS}][[\p{{L}}\p{{N}}\p{{M}}]--{_SPACELESS}]*+", regex.V1
)
_ANY_SPACELESS = regex.compile(_SPACELESS, regex.V1)
# Where the scripts without spaces are, and little else.
_HIGH = regex.compile(r"[\u0e01-\u1fff\u2e80-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00010000-\U0010ffff]")
_ALPHABETIC = regex.compile(r"\p{Line_Break=Complex_Context}")
# Words in the cache; a web corpus has millions of distinct ones.
_REMEMBERED = 1_000_000
_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
# Characters per chunk, which bounds the words held as strings at once.
_CHUNK = 1 << 20


# Vowel points and other reading aids of Hebrew and Arabic, which most texts leave out; not the marks that distinguish
# letters (hamza, madda), nor those of scripts that are never written without.
_POINTS = regex.compile(
    r"[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u0652\u0670\u06d6-\u06dc\u06df-\u06e4"
    r"\u06e7\u06e8\u06ea-\u06ed]"
)


class Words(NamedTuple):
    """Words of a text.

    Attributes:
        words: normalised, in order.
        spans: (n, 2) int64, each word's start and end (exclusive) in characters of the raw text.
    """

    words: list[str]
    spans: np.ndarray

    @property
    def length(self) -> int:
        """Number of words as people count them: two Chinese or Japanese letters, or four Thai (or similar) ones."""
        letters = [word for word in self.words if not word.isascii() and _ANY_SPACELESS.match(word)]
        short = sum(_ALPHABETIC.match(word) is not None for word in letters)
        return len(self.words) - len(letters) + (2 * len(letters) - short) // 4


def normalised(word: str) -> str:
    """Normalise one word of a readable text; empty if nothing of it remains."""
    if word.isascii():
        return _NUMBERS.get(word.lower(), word.lower())
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
    # The Turkish letters: capital dotted and small dotless i have no other fold that all writers share.
    plain = plain.replace("i\u0307", "i").replace("\u0131", "i")
    plain = plain.replace("\u0671", "\u0627")  # alef wasla, the plain alef of pointed texts
    if _POINTS.search(plain):
        plain = unicodedata.normalize("NFKC", _POINTS.sub("", plain))
    return "".join(_plain_character(character) for character in plain)


def _plain_character(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    return character if kind[0] in "LN" or kind in ("Mn", "Mc") else ""


def split(text: str, is_word: Callable[[str], bool] | None = None) -> Words:
    """Split what a reader sees of a text into normalised words with their spans; ``is_word`` as in markup.readable."""
    return passages(text, is_word)[0]


def passages(text: str, is_word: Callable[[str], bool] | None = None) -> list[Words]:
    """Split what a reader sees of a text, then each passage that stands apart from it (markup.readable), into words."""
    words, spans = list[str](), array("q")
    apart = list[Words]()
    start = 0
    for chunk in chunks(text):
        seen, *hidden = readable(chunk, is_word, places=True)
        _add_words(seen, start, words, spans)
        apart += [_passage_words(passage, start) for passage in hidden]
        start += len(chunk)
    return [_to_words(words, spans), *apart]


def _passage_words(now: Readable, start: int) -> Words:
    words, spans = list[str](), array("q")
    _add_words(now, start, words, spans)
    return _to_words(words, spans)


def _to_words(words: list[str], spans: "array[int]") -> Words:
    return Words(words, np.array(spans, np.int64).reshape(-1, 2))


def _add_words(now: Readable, start: int, words: list[str], spans: "array[int]") -> None:
    """Append the words of a readable text whose raw text begins at character ``start``."""
    starts, stops = now.starts.tolist(), now.stops.tolist()
    for match in _word_pattern(now.text).finditer(now.text):
        if word := normalised(match.group()):
            words.append(word)
            spans.extend((start + starts[match.start()], start + stops[match.end() - 1]))


def joined(passages: Sequence[Words]) -> Words:
    """Concatenate the words of several passages."""
    return Words([word for each in passages for word in each.words], np.concatenate([each.spans for each in passages]))


def _word_pattern(text: str) -> "regex.Pattern[str]":
    """Return the fastest pattern that finds all words of this text."""
    if text.isascii():
        return _ASCII
    return _WORD_OR_LETTER if _HIGH.search(text) and _ANY_SPACELESS.search(text) else _WORD


class Numbering(dict[str, int]):
    """Cached map from readable words to numbers: 1 and up in the vocabulary, 0 outside it, -1 if nothing remains.

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

    def is_word(self, word: str) -> bool:
        """Whether the vocabulary has a readable word."""
        return self[word] > 0

    def numbers(self, text: str) -> list[np.ndarray]:
        """Return the numbers (n,) int32 of a text's words by passage, aligned with ``passages(text, self.is_word)``."""
        seen, apart = array("i"), list["array[int]"]()
        for chunk in chunks(text):
            first, *hidden = readable(chunk, self.is_word)
            seen.extend(self._word_numbers(first))
            apart += [array("i", self._word_numbers(passage)) for passage in hidden]
        found = [np.frombuffer(each, np.int32) if each else np.zeros(0, np.int32) for each in (seen, *apart)]
        return [numbers[numbers >= 0] for numbers in found]

    def _word_numbers(self, now: Readable) -> Iterator[int]:
        return map(self.__getitem__, _word_pattern(now.text).findall(now.text))


def chunks(text: str) -> list[str]:
    """Cut a text, losslessly, into chunks of about a million characters, at white space if there is any."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + _CHUNK
        if stop < len(text):
            # Cut after white space, which ends any word; a million characters without any hold no words worth finding.
            space = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
            stop = space + 1 if space > start else stop
        pieces.append(text[start:stop])
        start = stop
    return pieces
