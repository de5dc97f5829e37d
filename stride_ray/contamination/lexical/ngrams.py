"""N-gram index of all items: finds exact runs of equal words in a text, with their positions in item and text.

An item's question, each of its choices, its free answer and each of its other texts are searched separately, because
copies put other words between them. A field's n is the scan's (13), or half its words if it has fewer than 2n, but at
least ``scan.shortest``. Fields with fewer words than that are not searched alone; if an item has no longer question,
choice or answer, these are joined, as are the short texts of one other field (a list of tests).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from stride_ray.contamination.items import Item, field_name
from stride_ray.contamination.lexical.words import Numbering, Words, joined, passages

# An n-gram with more occurrences in fields than this identifies no item; it is left out and counted.
COMMON = 100
# An answer is near a question within this many words; one of a single word, which may stand there by chance, within
# fewer.
NEAR, NEAR_WORD = 100, 25
# One of fewer letters than SHORT_WORD must follow within NEAR_SHORT words.
SHORT_WORD, NEAR_SHORT = 4, 3
_DECIMALS = re.compile(r"(\d)\.0+\s*$")
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it permutes 64-bit numbers


class Field(NamedTuple):
    """One searched text of an item.

    Attributes:
        key: of the item.
        name: "question", "choice 1" …, "answer", or "whole" for these joined; of another text its path, or its
            outermost field for the short ones joined.
        text: the text that character offsets refer to.
        words: of the text.
        n: length of its n-grams in words.
    """

    key: str
    name: str
    text: str
    words: Words
    n: int


class Run(NamedTuple):
    """A run of equal words in an item's field and a text.

    Attributes:
        field: index of the field.
        first, stop: range of the field's words, ``stop`` excluded.
        place: the text's word where the run begins.
    """

    field: int
    first: int
    stop: int
    place: int


def fields_of(item: Item, n: int, shortest: int) -> list[Field]:
    """Return the fields of an item to search for; empty if it has fewer than ``shortest`` words in all."""
    texts = [("question", item.question)]
    texts += [(f"choice {i}", choice) for i, choice in enumerate(item.choices, 1)]
    texts += [("answer", item.answer)] if item.answer and not item.choices else []
    found = [_make_field(item.key, name, text, n, shortest) for name, text in texts]
    found = [field for field in found if field.words.length >= shortest]
    if not found:
        whole = _make_field(item.key, "whole", "\n".join(text for _, text in texts), n, shortest)
        found = [whole] if whole.words.length >= shortest else []
    return found + _other_fields(item, n, shortest)


def _other_fields(item: Item, n: int, shortest: int) -> list[Field]:
    """Return the fields of an item's other texts."""
    found: list[Field] = []
    short: dict[str, list[str]] = {}
    for path, text in item.others:
        field = _make_field(item.key, _other_name(path), text, n, shortest)
        if field.words.length >= shortest:
            found.append(field)
        else:
            short.setdefault(path.partition(".")[0], []).append(text)
    joined = [_make_field(item.key, _other_name(path), "\n".join(texts), n, shortest) for path, texts in short.items()]
    return found + [field for field in joined if field.words.length >= shortest]


def _other_name(path: str) -> str:
    return f"other {path}" if path in ("question", "answer", "whole") or path.startswith("choice ") else path


def searched_fields(item: Item, n: int, shortest: int) -> tuple[set[str], set[str]]:
    """Return the names of an item's fields that are searched, and of those that are not because they are short.

    The choices are one field, "choices"; a list or record is searched if one of its texts is.
    """
    names = {field.name.removeprefix("other ") for field in fields_of(item, n, shortest)}
    whole = {"question", *(("choices",) if item.choices else ("answer",) if item.answer else ())}
    texts = whole | {field_name(path) for path, _ in item.others}
    searched = {"choices" if name.startswith("choice ") else field_name(name) for name in names - {"whole"}}
    searched |= {name for name in texts if name.partition(".")[0] in names} | (whole if "whole" in names else set())
    return searched, texts - searched


def _make_field(key: str, name: str, text: str, n: int, shortest: int) -> Field:
    words = joined(passages(text))
    # In a script without spaces, a word is a letter here: take as many letters as make up ``shortest`` words.
    least = -(-shortest * len(words.words) // max(1, words.length))
    return Field(key, name, text, words, min(n, max(least, len(words.words) // 2)))


def short_answer(item: Item, shortest: int) -> list[str]:
    """Return the words of an answer that is too short to be searched for alone; empty if it is not, or not known."""
    final = item.answer.rpartition("####")[2]  # after a worked solution, as GSM8K has it
    words = joined(passages(_DECIMALS.sub(r"\1", final)))
    return words.words if words.length < shortest else []


class Index:
    """All n-grams of the fields, sorted by hash.

    Args:
        fields: the fields to search for.
        answers: by item's key the words of its short answer, which ``has_answer`` looks for.

    Attributes:
        fields: the same.
        vocabulary: their words, numbered from 1.
        common: number of distinct n-grams left out because they occur more than COMMON times.
    """

    def __init__(self, fields: Sequence[Field], answers: Mapping[str, Sequence[str]] | None = None) -> None:
        self.fields = list(fields)
        self.vocabulary: dict[str, int] = {}
        self.numbers = [self._number(field.words.words) for field in self.fields]
        self.answers = {key: self._number(words) for key, words in (answers or {}).items() if words}
        self.words = {number: word for word, number in self.vocabulary.items()}
        self.common = 0
        self._tables = {n: self._table(n) for n in sorted({field.n for field in self.fields})}

    def _number(self, words: Sequence[str]) -> np.ndarray:
        return np.array([self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in words], np.int32)

    def has_answer(self, run: Run, numbers: np.ndarray, before: np.ndarray, after: np.ndarray) -> bool:
        """Whether a document has the item's short answer near a run, before or after it.

        Args:
            run: found in a passage.
            numbers: (words,) int32 of the passage.
            before: numbers of the words that precede the passage (other turns), NEAR at most.
            after: those that follow it.
        """
        answer = self.answers.get(self.fields[run.field].key)
        if answer is None:
            return False
        stop = run.place + run.stop - run.first
        ahead = np.concatenate([before, numbers[max(0, run.place - NEAR) : run.place]])
        behind = np.concatenate([numbers[stop : stop + NEAR], after])
        around = (ahead[-NEAR:], behind[:NEAR])
        if len(answer) == 1:
            word = self.words[answer[0]]
            # "a" and "no" stand anywhere; right after a question they answer it.
            common = word.isalpha() and word.isascii() and len(word) < SHORT_WORD
            around = (ahead[:0], behind[:NEAR_SHORT]) if common else (ahead[-NEAR_WORD:], behind[:NEAR_WORD])
        windows = (sliding_window_view(each, len(answer)) for each in around if len(each) >= len(answer))
        return any(bool((window == answer).all(1).any()) for window in windows)

    def _table(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return hashes (m,) ascending, field indices (m,) and positions (m,) of the n-grams of fields with this n."""
        chosen = [i for i, field in enumerate(self.fields) if field.n == n]
        hashes = [_ngram_hashes(self.numbers[i], n) for i in chosen]
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
        """Find the maximal runs of at least n equal words, sorted.

        Args:
            numbers: (words,) int32 of a passage, from ``Numbering(self.vocabulary)``.
        """
        runs: list[Run] = []
        for n, (hashes, fields, places) in self._tables.items():
            at = _positions_in_vocabulary(numbers, n)
            if not len(at) or not len(hashes):
                continue
            found = _ngram_hashes(numbers, n)[at]
            low = np.searchsorted(hashes, found, side="left")
            hit = (low < len(hashes)) & (hashes[np.minimum(low, len(hashes) - 1)] == found)
            at, low = at[hit], low[hit]
            counts = np.searchsorted(hashes, found[hit], side="right") - low
            entries = np.repeat(low - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
            at = np.repeat(at, counts)
            runs += self._merge_hits(n, numbers, at, fields[entries], places[entries])
        return sorted(runs)

    def _merge_hits(
        self, n: int, numbers: np.ndarray, at: np.ndarray, fields: np.ndarray, places: np.ndarray
    ) -> Iterator[Run]:
        """Merge consecutive hits (one word further in both texts) into runs; drop hash collisions."""
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
    """Return the word numbering for texts passed to the index's ``find``."""
    return Numbering(index.vocabulary)


def _ngram_hashes(numbers: np.ndarray, n: int) -> np.ndarray:
    """Hash each n-gram: (words − n + 1,) uint64."""
    count = max(0, len(numbers) - n + 1)
    wide = numbers.astype(np.uint64)
    found = np.zeros(count, np.uint64)
    for shift in range(n):
        found = (found ^ wide[shift : shift + count]) * _PRIME
        found ^= found >> np.uint64(29)
    return found


def _positions_in_vocabulary(numbers: np.ndarray, n: int) -> np.ndarray:
    """Return the positions where n consecutive words are in the vocabulary."""
    if len(numbers) < n:
        return np.zeros(0, np.int64)
    before = np.concatenate([[0], np.cumsum(numbers == 0)])
    return np.flatnonzero(before[n:] == before[:-n])
