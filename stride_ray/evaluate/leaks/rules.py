"""The rules of two other scanners, to compare with: which items of an evaluation set a corpus contaminates.

``harness``: that of lm-evaluation-harness and of GPT-3 (arXiv 2005.14165, appendix C): a run of 13 words of the item's
question stands in a document, unless it stands in more than ten. ``decon``: that of Ai2's decon, as its documentation
states it: weighted overlap of 5-grams within a cluster, the answer near, and a threshold that is harder to reach for
short texts. Clusters begin at every n-gram here, where decon samples one in ten.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

N_HARNESS, MOST_DOCUMENTS = 13, 10
N_DECON, MISSES, THRESHOLD = 5, 11, 0.8
# Texts of at most so many words need a perfect match, those of so many THRESHOLD; in between, in proportion.
PERFECT_UP_TO, USUAL_FROM = 20, 50
# An answer of at most this many words is looked for as it stands, within this many words of the question or more.
SHORT_ANSWER, NEAR = 5, 50
_WORD = re.compile(r"\w+")

Ngrams = dict[tuple[str, ...], list[int]]


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _WORD.findall(text.lower())


def harness(corpus: Sequence[str], items: Sequence[dict[str, Any]]) -> set[str]:
    """Ids of the items whose question shares a run of 13 words with 1 to 10 documents."""
    wanted = defaultdict[tuple[str, ...], set[str]](set)
    for item in items:
        for gram in _ngrams(words(item["question"]), N_HARNESS):
            wanted[gram].add(item["id"])
    held = defaultdict[tuple[str, ...], int](int)
    for text in corpus:
        for gram in _ngrams(words(text), N_HARNESS).keys() & wanted.keys():
            held[gram] += 1
    return {name for gram, count in held.items() if count <= MOST_DOCUMENTS for name in wanted[gram]}


def decon(corpus: Sequence[str], items: Sequence[dict[str, Any]]) -> set[str]:
    """Ids of the items whose score in some document reaches THRESHOLD."""
    questions = {item["id"]: words(item["question"]) for item in items}
    answers = {item["id"]: words(_answer(item)) for item in items}
    grams = {name: _ngrams(asked, N_DECON) for name, asked in questions.items()}
    parts = {name: _ngrams(said, N_DECON) for name, said in answers.items()}
    index, idf = defaultdict[tuple[str, ...], set[str]](set), dict[tuple[str, ...], float]()
    for held in (grams, parts):
        counts = defaultdict[tuple[str, ...], int](int)
        for found in held.values():
            for gram in found:
                counts[gram] += 1
        idf |= {gram: math.log(1 + len(items) / count) for gram, count in counts.items()}
    for name, found in grams.items():
        for gram in found:
            index[gram].add(name)
    flagged = set[str]()
    for text in corpus:
        said = words(text)
        places = _ngrams(said, N_DECON)
        at = defaultdict[str, list[int]](list)
        for gram in places.keys() & index.keys():
            for name in index[gram] - flagged:
                at[name] += places[gram]
        for name, found_at in at.items():
            for first, last in _clusters(sorted(found_at)):
                around = said[first : last + N_DECON]
                overlap = _overlap(around, grams[name], idf)
                near = _answer_near(said, first, last + N_DECON, answers[name], parts[name], idf)
                if _score(overlap, near, len(grams[name])) >= _required(len(questions[name] + answers[name])):
                    flagged.add(name)
    return flagged


def _answer(item: dict[str, Any]) -> str:
    answer = item["answer"]
    return str(item["choices"][answer]) if item.get("choices") else str(answer)


def _ngrams(said: list[str], n: int) -> Ngrams:
    found: Ngrams = {}
    for at in range(len(said) - n + 1):
        found.setdefault(tuple(said[at : at + n]), []).append(at)
    return found


def _clusters(places: list[int]) -> list[tuple[int, int]]:
    """Ranges of n-gram positions with at most MISSES positions without a hit between two hits."""
    found = [(places[0], places[0])]
    for place in places[1:]:
        first, last = found[-1]
        if place - last > MISSES:
            found.append((place, place))
        else:
            found[-1] = (first, place)
    return found


def _overlap(said: list[str], wanted: Ngrams, idf: dict[tuple[str, ...], float]) -> float:
    held = _ngrams(said, N_DECON).keys() & wanted.keys()
    return sum(idf[gram] for gram in held) / max(1e-9, sum(idf[gram] for gram in wanted))


def _answer_near(
    said: list[str], first: int, stop: int, answer: list[str], parts: Ngrams, idf: dict[tuple[str, ...], float]
) -> float | None:
    """Overlap of the answer with the words around a cluster; None without an answer."""
    if not answer:
        return None
    room = max(NEAR, 2 * len(answer))
    around = [said[max(0, first - room) : first], said[stop : stop + room]]
    if len(answer) > SHORT_ANSWER:
        return max(_overlap(each, parts, idf) for each in around)
    return float(any(tuple(answer) in _ngrams(each, len(answer)) for each in around))


def _score(question: float, answer: float | None, grams: int) -> float:
    """Weighted overlaps of question and answer; a short question counts for less. 0 if the answer is not near."""
    if answer is None:
        return question
    weight = 0.75 * min(1.0, 0.5 + 0.5 * grams / PERFECT_UP_TO)
    return question * weight + answer * (1 - weight) if answer else 0.0


def _required(length: int) -> float:
    """The score that question and answer of ``length`` words together need: a perfect one if they are short."""
    share = min(1.0, max(0.0, (length - PERFECT_UP_TO) / (USUAL_FROM - PERFECT_UP_TO)))
    return 1 - 1e-9 - (1 - THRESHOLD) * share
