"""Planted leaks: benchmark items copied into other text in several disguises, with the truth on disk.

Evaluating a scan needs a corpus in which every leak is known. The items of a question set are split into leaked
ones, which are inserted into pieces of other text; clean ones, which join them in the evaluation set; and controls,
which were never seen and form the null distribution.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stride_ray.corpus.documents import Document, read, resolve_columns
from stride_ray.corpus.splits import plan
from stride_ray.runtime.errors import StrideError

KINDS = ("verbatim", "paraphrase", "reordered", "answer")
# Characters per piece of the text that items are inserted into.
PIECE = 1500
_SYNONYMS = {
    "buys": "purchases", "buy": "purchase", "bought": "purchased", "gets": "receives", "got": "received",
    "makes": "earns", "sells": "is selling", "sold": "has sold", "spends": "uses up", "spent": "used up",
    "total": "overall", "altogether": "in sum", "each": "every", "every": "each", "many": "large a number of",
    "then": "afterwards", "needs": "requires", "need": "require", "wants": "would like", "starts": "begins",
    "gives": "hands", "gave": "handed", "takes": "uses", "has": "owns", "had": "owned", "more": "additional",
    "remaining": "leftover", "left": "remaining", "also": "as well", "big": "large", "small": "little",
    "child": "kid", "children": "kids", "friends": "pals", "friend": "pal", "house": "home", "store": "shop",
    "money": "cash", "costs": "is priced at", "cost": "price", "day": "date", "finds": "discovers", "if": "given that",
    "so": "therefore", "because": "since", "number": "count", "after": "following", "before": "prior to",
    "decides": "chooses", "half": "one half", "twice": "two times", "pays": "hands over", "per": "for every",
}  # fmt: skip
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_WORDS = {
    **_SYNONYMS,
    **{str(i): word for i, word in enumerate(_NUMBERS)},
    **{w: str(i) for i, w in enumerate(_NUMBERS)},
}
_TOKEN = re.compile(r"(?<![\w.<])(?:[A-Za-z]+|\d+)(?![\w.]*\d|>)")
_CLAUSE = re.compile(r"^(If|When|After|Before) ([^,.]+), ([^.?]+)([.?])$", re.I)


@dataclass(frozen=True)
class Planting:
    """How leaks are planted.

    Attributes:
        items: size of the evaluation set, leaked and clean items together.
        rate: share of them that leak, balanced over kinds and numbers of copies.
        copies: numbers of copies, assigned evenly.
        controls: items kept out of both.
        characters: of the text to plant into; 0: all.
        seed: for the split, the disguises and the positions.
    """

    items: int = 240
    rate: float = 0.5
    copies: tuple[int, ...] = (1, 4, 16)
    controls: int = 200
    characters: int = 0
    seed: int = 0


def plant(questions: Path, texts: Sequence[str], out: Path, planting: Planting) -> dict[str, Any]:
    """Write a corpus with leaks, the evaluation set, the controls and the truth.

    Args:
        questions: JSON Lines (``.gz`` too) with ``question`` and ``answer``.
        texts: files or folders of text to plant into.
        out: a folder; gets ``corpus/planted.jsonl``, ``sets/items.jsonl``, ``controls/controls.jsonl`` and
            ``truth.jsonl``, byte-identical for the same arguments.
        planting: how many of what.

    Returns:
        Counts: ``pieces``, ``planted`` (copies), ``leaked``, ``clean``, ``controls``.

    Raises:
        StrideError: if there are too few questions, or no text.
    """
    rng = random.Random(planting.seed)
    asked = questions_of(questions)
    wanted = planting.items + planting.controls
    if len(asked) < wanted:
        raise StrideError(f"{questions} has {len(asked)} items with question and answer; the planting needs {wanted}.")
    pieces = pieces_of(texts, planting.characters)
    if not pieces:
        raise StrideError(f"{', '.join(texts)}: no text to plant into.")
    chosen = rng.sample(asked, wanted)
    variety = [(kind, count) for count in planting.copies for kind in KINDS]
    leaked = round(planting.items * planting.rate)
    truth = []
    inserted: list[list[str]] = [[] for _ in pieces]
    for index, item in enumerate(chosen):
        role = "leaked" if index < leaked else "clean" if index < planting.items else "control"
        row: dict[str, Any] = {"id": item["id"], "role": role, "kind": "", "copies": 0, "documents": [], "text": ""}
        if role == "leaked":
            kind, copies = variety[index % len(variety)]
            text = disguised(item["question"], item["answer"], kind, rng)
            places = rng.sample(range(len(pieces)), min(copies, len(pieces)))
            for place in places:
                inserted[place].append(text)
            ids = [pieces[place]["id"] for place in sorted(places)]
            row |= {"kind": kind, "copies": len(places), "documents": ids, "text": text}
        truth.append(row)
    for piece, leaks in zip(pieces, inserted, strict=True):
        piece["text"] = _inserted(piece["text"], leaks, rng)
    evaluated = sorted(chosen[: planting.items], key=lambda item: item["id"])
    _write(out / "corpus/planted.jsonl", pieces)
    _write(out / "sets/items.jsonl", evaluated)
    _write(out / "controls/controls.jsonl", chosen[planting.items :])
    _write(out / "truth.jsonl", truth)
    counts = {role: sum(row["role"] == role for row in truth) for role in ("leaked", "clean")}
    planted = sum(row["copies"] for row in truth)
    return {"pieces": len(pieces), "planted": planted, **counts, "controls": planting.controls}


def disguised(question: str, answer: str, kind: str, rng: random.Random) -> str:
    """Disguise an item as one of KINDS.

    ``verbatim``: question and answer unchanged. ``paraphrase``: rule-based, with synonyms and numbers as words (or the
    reverse) at two out of three places, and conditional clauses moved to the end. ``reordered``: the question's
    sentences and the answer's lines, each shuffled. ``answer``: the answer alone, unchanged.
    """
    if kind == "answer":
        return answer
    if kind == "paraphrase":
        return f"{_paraphrased(question, rng)}\n{_paraphrased(answer, rng)}"
    if kind == "reordered":
        lines = answer.splitlines()
        return " ".join(_shuffled(sentences(question.strip()), rng)) + "\n" + "\n".join(_shuffled(lines, rng))
    return f"{question}\n{answer}"


def sentences(text: str) -> list[str]:
    """Split a text after full stops, question and exclamation marks."""
    return re.split(r"(?<=[.?!])\s+", text)


def _shuffled(parts: list[str], rng: random.Random) -> list[str]:
    """Shuffle the parts into another order, if there is one."""
    order = parts[:]
    for _ in range(10):
        rng.shuffle(order)
        if order != parts:
            break
    return order


def _paraphrased(text: str, rng: random.Random) -> str:
    def other(match: re.Match[str]) -> str:
        word = match.group()
        found = _WORDS.get(word.lower())
        if found is None or rng.random() > 2 / 3:
            return word
        return found.capitalize() if word[0].isupper() else found

    lines = []
    for line in text.splitlines():
        lines.append(_TOKEN.sub(other, " ".join(_clause(sentence) for sentence in sentences(line))))
    return "\n".join(lines)


def _clause(sentence: str) -> str:
    found = _CLAUSE.match(sentence)
    if not found:
        return sentence
    word, condition, rest, end = found.groups()
    return f"{rest[0].upper()}{rest[1:]} {word.lower()} {condition}{end}"


def _inserted(piece: str, texts: list[str], rng: random.Random) -> str:
    """Insert the texts as separate paragraphs, each at the start of a line of the piece."""
    starts = [0, *(match.end() for match in re.finditer(r"\n", piece))]
    places = sorted((rng.choice(starts), text) for text in texts)
    for place, text in reversed(places):
        piece = f"{piece[:place]}{text}\n{piece[place:]}"
    return piece


def questions_of(path: Path) -> list[dict[str, str]]:
    """Questions with answers, from JSON Lines (``.gz`` too): id, question, answer."""
    units = plan([str(path)], 2**26)
    found: list[dict[str, str]] = []
    for unit in units:
        for document in read(unit, {"prompt": "question", "answer": "answer"}):
            if isinstance(document, Document):
                item = {"question": document.prompt or "", "answer": document.answer or ""}
                found.append({"id": f"item-{len(found):05d}", **item})
    return found


def pieces_of(texts: Sequence[str], characters: int, size: int = PIECE) -> list[dict[str, str]]:
    """Cut the texts at line ends into pieces of about ``size`` characters: id, source, text.

    Args:
        texts: files or folders.
        characters: of them to use in all; 0: all.
        size: of a piece.
    """
    units = plan(texts, 2**26)
    columns = resolve_columns(units)
    pieces: list[dict[str, str]] = []
    room = characters or 2**62
    for unit in units:
        for document in read(unit, columns):
            if not isinstance(document, Document) or document.text is None or room <= 0:
                continue
            for text in _cut(document.text[:room], size):
                pieces.append({"id": f"piece-{len(pieces):06d}", "source": document.source, "text": text})
            room -= len(document.text)
    return pieces


def _cut(text: str, size: int) -> list[str]:
    found: list[str] = []
    held = ""
    for line in text.splitlines(keepends=True):
        held += line
        if len(held) >= size:
            found.append(held)
            held = ""
    return [piece for piece in (*found, held) if piece.strip()]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_lines(rows))


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows as JSON Lines, UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
