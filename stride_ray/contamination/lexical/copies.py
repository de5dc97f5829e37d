"""What a document's runs of a field's words amount to: a copy of the item, a passage that both quote, or a phrase.

Items quote public texts: verses, licences, definitions. A document that has the quoted words, but neither the words
that ask for something nor the answer, is no copy of an item whose answer is known. Nor are documents of several sources
that quote the same words, with the answer beside them (dictionaries), or that have a whole question because it is a
common phrase; nor one that has the text that an item is about, without its question.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stride_ray.contamination.lexical.ngrams import Field

# ``part``: too little of the field to be any of the others.
KINDS = COPY, PASSAGE, PHRASE, PART = ("copy", "passage", "phrase", "part")
# A quotation misses at least this many words at an end of the field, and this share of them (of a public text any), and
# has at least INSIDE of those between.
MISSING, SHARE, INSIDE = 3, 0.1, 0.8
# Characters between a question and a long answer that stand together.
TOGETHER = 1000
# Minimum number of sources of a public text: repetition within one source may be a leak.
SOURCES = 3

# Fields of an item that hold what it is about, which may come from anywhere.
MATERIAL = frozenset(
    "passage context article story paragraph paragraphs document background support premise evidence abstract source "
    "dialogue excerpt facts contexts documents".split()
)

# The number of a shard, and what follows it, in the name of a file.
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?(\.\w+)*$")

# A document: its source, its file and its place there.
Where = tuple[str, str, int]


@dataclass(frozen=True)
class Match:
    """A document's match with a field.

    Attributes:
        places: positions of the field's n-grams that the document has.
        near: whether the document has the item's answer near, or for any other field the question; None: the item does
            not give its answer.
        overlap: weighted share of the field's words, 0 to 1.
        material: whether the document also has the text that the item is about.
    """

    places: frozenset[int]
    near: bool | None
    overlap: float
    material: bool = False


class Stretch(NamedTuple):
    """Where a run of a field's words stands in a document: its part, and characters in it."""

    field: str
    part: str
    start: int
    stop: int


def role(name: str) -> str:
    """What a field is of an item: "question", "answer" (a choice too), "material", or "other"."""
    if name in ("question", "whole"):
        return "question"
    if name == "answer" or name.startswith("choice "):
        return "answer"
    return "material" if name.partition(".")[0].lower() in MATERIAL else "other"


def is_near(name: str, found: Sequence[Stretch], short: bool, answered: bool) -> bool | None:
    """Match.near of a field in a document.

    Args:
        name: of the field.
        found: all runs of the item's fields in the document.
        short: whether the item's short answer is near one of the field's runs.
        answered: whether the item gives its answer.
    """
    wanted = "answer" if role(name) == "question" else "question"
    mine = [each for each in found if each.field == name]
    others = [each for each in found if role(each.field) == wanted]
    if (short and wanted == "answer") or any(_together(one, other) for one in mine for other in others):
        return True
    return None if role(name) == "other" or (wanted == "answer" and not answered) else False


def _together(one: Stretch, other: Stretch) -> bool:
    """Whether two runs stand near each other; parts of a document are its turns, or prompt and answer."""
    return one.part != other.part or max(one.start, other.start) - min(one.stop, other.stop) <= TOGETHER


def covered(field: Field, places: frozenset[int] | set[int]) -> np.ndarray:
    """Which of the field's words the n-grams at these positions cover, (words,) bool."""
    found = np.zeros(len(field.words.words), bool)
    for place in places:
        found[place : place + field.n] = True
    return found


def is_quotation(field: Field, places: frozenset[int] | set[int], share: float = SHARE) -> bool:
    """Whether these are almost all words of one stretch of the field, without those at one end or both.

    Example: of "Who said this? To be or not to be, that is the question", the stretch from "To" on.

    Args:
        field: of an item.
        places: positions of the field's n-grams that a document has.
        share: at least this share of the field's words is missing at an end.
    """
    held = np.flatnonzero(covered(field, places))
    if not len(held):
        return False
    # In a script without spaces, a word is a letter here.
    words = len(field.words.words)
    letters = words / max(1, field.words.length)
    least = max(MISSING * letters, share * words)
    missing, inside = max(held[0], words - 1 - held[-1]), held[-1] - held[0] + 1
    return bool(missing >= least and len(held) >= INSIDE * inside)


class Public(NamedTuple):
    """Whether a field is a public text.

    Attributes:
        quoted: documents of several sources quote the same stretch of it.
        phrase: documents of several sources have all of it without the answer.
    """

    quoted: bool
    phrase: bool


def site(source: str) -> str:
    """A source without the number of a shard, since shards are one source: "wiki" of "wiki-00003.jsonl"."""
    return _SHARD.sub("", source)


def public_text(field: Field, matches: Mapping[Where, Match], threshold: float) -> Public:
    """Decide whether a field is a public text, by its matches of at least this overlap.

    Sources are counted as ``site`` says.
    """
    quoted, alone = set[str](), set[str]()
    for (source, *_), match in matches.items():
        if match.overlap >= threshold and is_quotation(field, match.places, share=0):
            quoted.add(site(source))
        elif match.overlap >= threshold and not match.near:
            alone.add(site(source))
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
    what = role(field.name)
    if what == "material" or (what == "answer" and match.material):
        return COPY if match.near else PASSAGE
    if public.quoted and is_quotation(field, match.places, share=0):
        return PASSAGE
    if is_quotation(field, match.places):
        return PASSAGE if match.near is False else COPY
    phrase = public.phrase and not match.near and field.name != "whole"  # of which the answer is a part
    return PHRASE if phrase and field.words.length < words else COPY
