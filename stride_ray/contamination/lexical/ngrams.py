"""The n-grams of all items, and where a text holds some: exact runs of equal words, with their places in both.

An item's question, each of its choices and its free answer are searched for by themselves, because copies put other
words between them. The n of a field is the scan's (13), or half its words where it has less than twice as many; fields
of few words are not searched alone, and if an item has no other, its fields are joined.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical.words import Numbering, Words, split

# An n-gram that more fields than this hold says nothing of any one item; it is left out, and counted.
COMMON = 100
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it permutes 64-bit numbers


class Field(NamedTuple):
    """One searched text of an item.

    Attributes:
        key: the item's.
        name: "question", "choice 1" …, "answer", or "whole" for joined fields.
        text: whose characters offsets count.
        words: of the text.
        n: words of its n-grams.
    """

    key: str
    name: str
    text: str
    words: Words
    n: int


class Run(NamedTuple):
    """Equal words in a row.

    Attributes:
        field: number of the item's field in the index.
        first, stop: its words, the last one not included.
        place: the text's word where the run begins.
    """

    field: int
    first: int
    stop: int
    place: int


def fields_of(item: Item, n: int, shortest: int) -> list[Field]:
    """What is searched of an item; empty where it has less than ``shortest`` words in all."""
    texts = [("question", item.question)]
    texts += [(f"choice {i}", choice) for i, choice in enumerate(item.choices, 1)]
    texts += [("answer", item.answer)] if item.answer and not item.choices else []
    found = [_field(item.key, name, text, n, shortest) for name, text in texts]
    found = [field for field in found if len(field.words.words) >= shortest]
    if found:
        return found
    whole = _field(item.key, "whole", "\n".join(text for _, text in texts), n, shortest)
    return [whole] if len(whole.words.words) >= shortest else []


def _field(key: str, name: str, text: str, n: int, shortest: int) -> Field:
    words = split(text)
    return Field(key, name, text, words, min(n, max(shortest, len(words.words) // 2)))


class Index:
    """All n-grams of some fields, sorted by their hashes.

    Args:
        fields: what is searched for.

    Attributes:
        fields: the same.
        vocabulary: their words, numbered from 1.
        common: how many different n-grams were left out because more than COMMON fields hold them.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = list(fields)
        self.vocabulary: dict[str, int] = {}
        self.numbers = [
            np.array([self.vocabulary.setdefault(w, len(self.vocabulary) + 1) for w in field.words.words], np.int32)
            for field in self.fields
        ]
        self.common = 0
        self._tables = {n: self._table(n) for n in sorted({field.n for field in self.fields})}

    def _table(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hashes (m,) ascending, field numbers (m,) and places (m,) of all n-grams of fields with this n."""
        chosen = [i for i, field in enumerate(self.fields) if field.n == n]
        hashes = [_hashes(self.numbers[i], n) for i in chosen]
        sizes = [len(each) for each in hashes]
        numbers = np.repeat(np.array(chosen, np.int32), sizes)
        places = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        flat = np.concatenate(hashes)
        order = np.argsort(flat, kind="stable")
        flat, numbers, places = flat[order], numbers[order], places[order]
        _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
        rare = counts[inverse] <= COMMON
        self.common += int((counts > COMMON).sum())
        return flat[rare], numbers[rare], places[rare]

    def find(self, numbers: np.ndarray) -> list[Run]:
        """The longest runs of at least n equal words, sorted.

        Args:
            numbers: (words,) int32 of a text, as ``Numbering(self.vocabulary)`` gives them.
        """
        runs: list[Run] = []
        for n, (hashes, fields, places) in self._tables.items():
            at = _known(numbers, n)
            if not len(at) or not len(hashes):
                continue
            found = _hashes(numbers, n)[at]
            low = np.searchsorted(hashes, found, side="left")
            hit = (low < len(hashes)) & (hashes[np.minimum(low, len(hashes) - 1)] == found)
            at, low = at[hit], low[hit]
            counts = np.searchsorted(hashes, found[hit], side="right") - low
            entries = np.repeat(low - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
            at = np.repeat(at, counts)
            runs += self._joined(n, numbers, at, fields[entries], places[entries])
        return sorted(runs)

    def _joined(
        self, n: int, numbers: np.ndarray, at: np.ndarray, fields: np.ndarray, places: np.ndarray
    ) -> Iterator[Run]:
        """Hits in a row (each one word on in both texts) as one run; hits of equal hash but other words left out."""
        order = np.lexsort((at, at - places, fields))
        at, fields, places = at[order], fields[order], places[order]
        ends = np.ones(len(at), bool)
        ends[:-1] = (np.diff(at) != 1) | (np.diff(places) != 1) | (np.diff(fields) != 0)
        first = 0
        for last in np.flatnonzero(ends).tolist():
            field, place, start = int(fields[first]), int(places[first]), int(at[first])
            length = last - first + n
            if np.array_equal(self.numbers[field][place : place + length], numbers[start : start + length]):
                yield Run(field, place, place + length, start)
            first = last + 1


def numbering(index: Index) -> Numbering:
    """How texts are numbered for an index's ``find``."""
    return Numbering(index.vocabulary)


def _hashes(numbers: np.ndarray, n: int) -> np.ndarray:
    """(words − n + 1,) uint64, one of each n words in a row."""
    count = max(0, len(numbers) - n + 1)
    wide = numbers.astype(np.uint64)
    found = np.zeros(count, np.uint64)
    for shift in range(n):
        found = (found ^ wide[shift : shift + count]) * _PRIME
        found ^= found >> np.uint64(29)
    return found


def _known(numbers: np.ndarray, n: int) -> np.ndarray:
    """Where n words of the vocabulary begin."""
    if len(numbers) < n:
        return np.zeros(0, np.int64)
    before = np.concatenate([[0], np.cumsum(numbers == 0)])
    return np.flatnonzero(before[n:] == before[:-n])
