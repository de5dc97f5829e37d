"""A labelled set for contamination scans: leaks of every kind, and texts that only look like leaks.

False alarms come from items that quote public texts (verses, speeches, licences, definitions, formulas, idioms of
code), from templates that many items share, from everyday questions, and from texts that share a sentence with an item.
None of them shows that somebody copied the evaluation set.
"""

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stride_ray.evaluate.leaks.planting import disguised, json_lines, pieces_of, questions_of, sentences
from stride_ray.runtime.errors import StrideError

CORPUS = "corpus/documents.jsonl.gz"
_T = TypeVar("_T")
# Sites; characters of plain text before and after what a document contains.
SITES = [f"{name}.example" for name in "alder birch cedar dogwood elm fir gum hazel ilex juniper kauri larch".split()]
SITES += [
    f"{name}.example" for name in "maple nutmeg oak pine quince rowan spruce teak umbrella viburnum willow yew".split()
]
AROUND = 200
# Characters of plain text in the corpus.
FILLER = 60_000
TEMPLATE = (
    "Solve the following word problem. Think step by step, check every step of the calculation, and give the final "
    "answer as a single number after four hash marks."
)


@dataclass(frozen=True)
class Material:
    """What the set is made of.

    Attributes:
        problems: word problems with answers, (question, answer).
        glosses: words and their definitions.
        verses: (reference, text), in the order of the book.
        speeches, licences, formulas, idioms, everyday: public texts, each (name, text).
        filler: paragraphs of plain text.
    """

    problems: Sequence[tuple[str, str]]
    glosses: Sequence[tuple[str, str]]
    verses: Sequence[tuple[str, str]]
    speeches: Sequence[tuple[str, str]]
    licences: Sequence[tuple[str, str]]
    formulas: Sequence[tuple[str, str]]
    idioms: Sequence[tuple[str, str]]
    everyday: Sequence[tuple[str, str]]
    filler: Sequence[str]


@dataclass(frozen=True)
class Labelled:
    """A labelled set.

    Attributes:
        corpus: documents: id, source, text.
        items: evaluation items: id, question, answer, perhaps choices.
        labels: by item its kind, and whether it leaked.
    """

    corpus: list[dict[str, str]]
    items: list[dict[str, Any]]
    labels: list[dict[str, Any]]


def label_scan(material: Material, each: int = 12, seed: int = 0) -> Labelled:
    """Make a labelled set.

    Args:
        material: texts.
        each: items of a kind.
        seed: of all choices.
    """
    planter = _Planter(material, random.Random(seed))
    for kind, (leaked, make) in KINDS.items():
        for _ in range(each):
            planter.add(kind, leaked, make)
    return planter.finished()


class _Planter:
    """Draws items and plants texts."""

    def __init__(self, material: Material, rng: random.Random) -> None:
        self.material, self.rng = material, rng
        self.problems = _drawn(material.problems, rng, "word problems")
        self.short = _drawn(_defined(material.glosses, 3, 8), rng, "definitions of 3 to 8 words")
        self.long = _drawn(_defined(material.glosses, 14, 40), rng, "definitions of 14 to 40 words")
        self.planted: list[tuple[str, str]] = []  # site, text
        self.items: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []
        self.published: set[str] = set()
        self.quotable: dict[str, Iterator[tuple[str, str, str]]] = {}

    def add(self, kind: str, leaked: bool, make: "Make") -> None:
        name = f"{kind.replace(' ', '-')}-{sum(label['kind'] == kind for label in self.labels):02d}"
        self.items.append({"id": name, **make(self)})
        self.labels.append({"id": name, "kind": kind, "leaked": leaked})

    def plant(self, text: str, documents: int = 1, sites: int = 1) -> None:
        chosen = self.rng.sample(SITES, sites)
        for i in range(documents):
            self.planted.append((chosen[i % sites], text))

    def stretches(self, texts: str, size: int) -> Iterator[tuple[str, str, str]]:
        """Name, text and a stretch of so many sentences, of all texts of a sort in random order, each once."""
        if texts not in self.quotable:
            cut = [(name, text, sentences(text.strip())) for name, text in getattr(self.material, texts)]
            found = [
                (name, text, " ".join(parts[at : at + size]))
                for name, text, parts in cut
                for at in range(max(1, len(parts) - size + 1))
            ]
            self.quotable[texts] = _drawn(found, self.rng, f"stretches of {texts}")
        return self.quotable[texts]

    def publish(self, text: str, documents: int, sites: int) -> None:
        """Plant a public text, once."""
        if text not in self.published:
            self.published.add(text)
            self.plant(text, documents, sites)

    def finished(self) -> Labelled:
        corpus = []
        for site, text in self.planted:
            before, after = (_near(self.rng.choice(self.material.filler), AROUND) for _ in range(2))
            corpus.append({"source": site, "text": f"{before}\n\n{text}\n\n{after}"})
        for i, text in enumerate(self.material.filler):
            corpus.append({"source": SITES[i % len(SITES)], "text": _near(text, 4 * AROUND)})
        self.rng.shuffle(corpus)
        items = sorted(self.items, key=lambda item: item["id"])
        return Labelled([{"id": f"doc-{i:05d}", **row} for i, row in enumerate(corpus)], items, self.labels)


# Makes an item, and plants what belongs to it.
Make = Callable[[_Planter], dict[str, Any]]


def _drawn(given: Sequence[_T], rng: random.Random, what: str) -> Iterator[_T]:
    """Return an iterator over them in random order, which raises StrideError if one more is wanted."""
    order = rng.sample(list(given), len(given))

    def drawn() -> Iterator[_T]:
        yield from order
        raise StrideError(f"There are {len(order)} {what}, too few for so many items; give more, or lower --each.")

    return drawn()


def _defined(glosses: Sequence[tuple[str, str]], least: int, most: int) -> list[tuple[str, str]]:
    """Words whose definitions have so many words."""
    return [(word, gloss) for word, gloss in glosses if least <= len(gloss.split()) <= most]


def _near(text: str, characters: int) -> str:
    return text[:characters].rsplit(" ", 1)[0] if len(text) > characters else text


def _problem(plant: Callable[[_Planter, str, str], None]) -> Make:
    """An item that is a word problem, of which ``plant`` makes the copies."""

    def make(planter: _Planter) -> dict[str, Any]:
        question, answer = next(planter.problems)
        plant(planter, question, answer)
        return {"question": question, "answer": answer}

    return make


def _formatted(planter: _Planter, question: str, answer: str) -> None:
    lines, paragraphs = answer.splitlines(), "</p><p>".join(sentences(question.strip()))
    quoted = "\n> ".join(re.findall(r".{1,58}(?:\s|$)", question))
    forms = [
        f"<div class=q><p>{paragraphs}</p></div>\n<ul><li>{'</li><li>'.join(lines)}</li></ul>",
        f"> {quoted}\n\n" + "\n".join(f"* {line}" for line in lines),
        f"{question.upper()}\n{answer.upper()}",
        f"**Problem.** {question.replace(',', ' ,')}\n\n**Solution.** {answer}",
    ]
    planter.plant(planter.rng.choice(forms))


def _near_miss(planter: _Planter, question: str, answer: str) -> None:
    other, solution = next(planter.problems)
    first = sentences(question.strip())[0]
    planter.plant(f"{first} {' '.join(sentences(other.strip())[1:])}\n{solution}")


def _trivia(answered: bool) -> Make:
    def make(planter: _Planter) -> dict[str, Any]:
        word, gloss = next(planter.short)
        question = f"Which word means {gloss}?"
        planter.plant(f"Q: {question}\nA: {word}" if answered else f"{question}")
        return {"question": question, "answer": word}

    return make


def _choices(planter: _Planter) -> dict[str, Any]:
    pairs = [next(planter.short) for _ in range(4)]
    right = planter.rng.randrange(4)
    question, words = f"Which of the following words means {pairs[right][1]}?", [word for word, _ in pairs]
    listed = "\n".join(f"{letter}. {word}" for letter, word in zip("ABCD", words, strict=True))
    planter.plant(f"{question}\n{listed}\nAnswer: {'ABCD'[right]}")
    return {"question": question, "choices": words, "answer": right}


def _verse(planter: _Planter) -> dict[str, Any]:
    verses = planter.material.verses
    at = planter.rng.randrange(2, len(verses) - 2)
    while len(verses[at][1].split()) < 18 or verses[at][0] in planter.published:
        at = planter.rng.randrange(2, len(verses) - 2)
    reference, verse = verses[at]
    chapter = "\n".join(f"{name} {text}" for name, text in verses[at - 2 : at + 3])
    planter.published.add(reference)
    planter.publish(chapter, planter.rng.randint(3, 8), 3)
    return {"question": f"In which book of the Bible does this verse stand? “{verse}”", "answer": reference.split()[0]}


def _quoting(texts: str, ask: str, documents: int, sites: int, size: int) -> Make:
    """An item that quotes some sentences of a public text; each stretch is quoted once."""

    def make(planter: _Planter) -> dict[str, Any]:
        name, text, quoted = next(planter.stretches(texts, size))
        planter.publish(text, documents, sites)
        return {"question": ask.format(quoted), "answer": name}

    return make


def _definition(planter: _Planter) -> dict[str, Any]:
    word, gloss = next(planter.long)
    others = [next(planter.long) for _ in range(2)]
    page = "\n".join(f"{each} (noun): {text}." for each, text in sorted([(word, gloss), *others]))
    planter.publish(page, 4, 4)
    return {"question": f"Give the noun that is defined as follows: {gloss}.", "answer": word}


def _code(planter: _Planter) -> dict[str, Any]:
    number = sum(label["kind"] == "code" for label in planter.labels)
    name, idiom = planter.material.idioms[number % len(planter.material.idioms)]
    planter.publish(idiom, 12, 6)
    asked = f"What does this program print if it is called with {number + 3}?\n{idiom}\nprint(main({number + 3}))"
    return {"question": asked, "answer": name}


def _template(planter: _Planter) -> dict[str, Any]:
    (question, answer), (other, solution) = next(planter.problems), next(planter.problems)
    planter.plant(f"{TEMPLATE}\n{other}\n{solution}")
    return {"question": f"{TEMPLATE}\n{question}", "answer": answer}


def _everyday(planter: _Planter) -> dict[str, Any]:
    number = sum(label["kind"] == "everyday question" for label in planter.labels)
    question, answer = planter.material.everyday[number % len(planter.material.everyday)]
    planter.publish(f"“{question}” she asked, and nobody said a word.", 6, 5)
    return {"question": question, "answer": answer}


# Kind to whether such items leaked, and how one is made.
KINDS: dict[str, tuple[bool, Make]] = {
    "verbatim": (True, _problem(lambda planter, q, a: planter.plant(f"{q}\n{a}"))),
    "verbatim on many sites": (True, _problem(lambda planter, q, a: planter.plant(f"{q}\n{a}", 12, 6))),
    "question alone": (True, _problem(lambda planter, q, a: planter.plant(q))),
    "answer alone": (True, _problem(lambda planter, q, a: planter.plant(a))),
    "formatted": (True, _problem(_formatted)),
    "short, with answer": (True, _trivia(True)),
    "short question": (True, _trivia(False)),
    "choices": (True, _choices),
    "paraphrase": (True, _problem(lambda planter, q, a: planter.plant(disguised(q, a, "paraphrase", planter.rng)))),
    "reordered": (True, _problem(lambda planter, q, a: planter.plant(disguised(q, a, "reordered", planter.rng)))),
    "clean": (False, _problem(lambda planter, q, a: None)),
    "near miss": (False, _problem(_near_miss)),
    "template": (False, _template),
    "everyday question": (False, _everyday),
    "verse": (False, _verse),
    "speech": (False, _quoting("speeches", "Who said this, and on which occasion? “{}”", 10, 6, 2)),
    "licence": (False, _quoting("licences", "Which licence has the following clause? “{}”", 14, 7, 1)),
    "formula": (False, _quoting("formulas", "{} Apply it to a case of your own and explain each step.", 12, 5, 1)),
    "definition": (False, _definition),
    "code": (False, _code),
}


def write_labelled(found: Labelled, folder: Path) -> None:
    """Write ``corpus/documents.jsonl.gz``, ``items.jsonl`` and ``labels.jsonl``, byte-identical for the same set."""
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    (folder / CORPUS).write_bytes(gzip.compress(json_lines(found.corpus), mtime=0))
    (folder / "items.jsonl").write_bytes(json_lines(found.items))
    (folder / "labels.jsonl").write_bytes(json_lines(found.labels))


def read_material(problems: str, nouns: Path, verses: Path, public: Path, filler: Sequence[str]) -> Material:
    """Read what a set is made of.

    Args:
        problems: JSON Lines with ``question`` and ``answer``.
        nouns: WordNet's ``data.noun``.
        verses: a verse a line, its reference first.
        public: folder with ``speeches.jsonl`` and the other public texts, rows with name and text.
        filler: files or folders of plain text.
    """
    texts = [piece["text"] for piece in pieces_of(filler, FILLER, 4 * AROUND)]
    named = {
        name: [(row["name"], row["text"]) for row in map(json.loads, lines_of(public / f"{name}.jsonl"))]
        for name in ("speeches", "licences", "formulas", "idioms", "everyday")
    }
    asked = [(row["question"], row["answer"]) for row in questions_of(Path(problems))]
    book = [(reference, verse) for reference, _, verse in (line.partition(" ") for line in lines_of(verses))]
    return Material(asked, list(_glosses(nouns)), book, filler=texts, **named)


def lines_of(path: Path) -> list[str]:
    """Lines of a text file."""
    return path.read_text("utf-8").splitlines()


def _glosses(nouns: Path) -> Iterator[tuple[str, str]]:
    """Nouns of one word with their definitions, each word and definition once."""
    seen = set[str]()
    for line in lines_of(nouns):
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        definition = gloss.split(";")[0].split('"')[0].strip()
        if line.startswith(" ") or not definition or not fields[4].isalpha() or {fields[4], definition} & seen:
            continue
        seen |= {fields[4], definition}
        yield fields[4], definition
