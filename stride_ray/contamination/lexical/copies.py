"""What a document's runs of a field's words amount to: a copy of the item, a passage that both quote, or a phrase.

Items quote public texts: verses, licences, definitions. A document that has the quoted words, but neither the words
that ask for something nor the answer, is no copy of an item whose answer is known. Nor are documents of several sources
that quote the same words, with the answer beside them (dictionaries), or that have a whole question because it is a
common phrase.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stride_ray.contamination.lexical.ngrams import Field

# ``part``: too little of the field to be any of the others.
KINDS = COPY, PASSAGE, PHRASE, PART = ("copy", "passage", "phrase", "part")
# A quotation misses at least this many words at an end of the field, and has at least this share of those between.
MISSING, INSIDE = 3, 0.8
# Minimum number of sources of a public text: repetition within one source may be a leak.
SOURCES = 3

# Fields of an item that hold what it is about, which may come from anywhere.
MATERIAL = frozenset(
    "passage context article story paragraph paragraphs document background support premise evidence abstract source "
    "dialogue excerpt facts contexts documents".split()
)

# A document: its source, its file and its place there.
Where = tuple[str, str, int]


@dataclass(frozen=True)
class Match:
    """A document's match with a field.

    Attributes:
        places: positions of the field's n-grams that the document has.
        near: whether the document has the item's answer near, or for the answer the question; None: the item does not
            give its answer.
        overlap: weighted share of the field's words, 0 to 1.
    """

    places: frozenset[int]
    near: bool | None
    overlap: float


def covered(field: Field, places: frozenset[int] | set[int]) -> np.ndarray:
    """Which of the field's words the n-grams at these positions cover, (words,) bool."""
    found = np.zeros(len(field.words.words), bool)
    for place in places:
        found[place : place + field.n] = True
    return found


def is_quotation(field: Field, places: frozenset[int] | set[int]) -> bool:
    """Whether these are almost all words of one stretch of the field, without those at one end or both.

    Example: of "Who said this? To be or not to be, that is the question", the stretch from "To" on.
    """
    held = np.flatnonzero(covered(field, places))
    if not len(held):
        return False
    # In a script without spaces, a word is a letter here.
    letters = len(field.words.words) / max(1, field.words.length)
    missing = max(held[0], len(field.words.words) - 1 - held[-1])
    return bool(missing >= MISSING * letters and len(held) >= INSIDE * (held[-1] - held[0] + 1))


class Public(NamedTuple):
    """Whether a field is a public text.

    Attributes:
        quoted: documents of several sources quote the same stretch of it.
        phrase: documents of several sources have all of it without the answer.
    """

    quoted: bool
    phrase: bool


def public_text(field: Field, matches: Mapping[Where, Match], threshold: float) -> Public:
    """Decide whether a field is a public text, by its matches of at least this overlap."""
    quoted, alone = set[str](), set[str]()
    for (source, *_), match in matches.items():
        if match.overlap >= threshold and is_quotation(field, match.places):
            quoted.add(source)
        elif match.overlap >= threshold and not match.near:
            alone.add(source)
    return Public(len(quoted) >= SOURCES, len(alone) >= SOURCES)


def kind_of(field: Field, match: Match, public: Public, threshold: float, words: int) -> str:
    """Decide what a match is.

    Args:
        field: of an item.
        match: of a document.
        public: of the field.
        threshold: smallest overlap of a copy.
        words: a field of fewer words may be a common phrase.
    """
    if match.overlap < threshold:
        return PART
    if is_quotation(field, match.places):
        return PASSAGE if public.quoted or match.near is False else COPY
    if field.name.partition(".")[0].lower() in MATERIAL and match.near is False:
        return PASSAGE
    return PHRASE if public.phrase and not match.near and field.words.length < words else COPY
