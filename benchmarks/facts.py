"""Planted facts: is a fact's only document the first result, its sentence the coloured span, its epoch the right one?

Invented facts ("The emblem of Zarvonia is Quilmere.") stand in one document each, and each fact has an anti-document
about the same subject and relation that does not state it. A small model reads other text in every epoch, a fact's
document many times over in one epoch, and a few times in each later one. Then each fact is asked for (prompt "The
emblem of Zarvonia is", completion " Quilmere."), with the checkpoint before the first fact as the start. Lexical search
(BM25) answers the same queries. Only facts that the model knows count: influence is about what a model learnt.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks.output import write_lines
from stride_ray.attribution.attribute import attribute, read_influence, stored_queries
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.baselines.lexical.bm25 import scores as bm25
from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.leaks.planting import pieces_of
from stride_ray.evaluate.retraining.benchmark import pool_texts, unretrained_benchmark
from stride_ray.evaluate.retraining.finetune import FineTune
from stride_ray.evaluate.tailpatch import top_rows
from stride_ray.evaluate.timeline import timeline
from stride_ray.models.builtin.toy import train_model, train_tokenizer
from stride_ray.models.causal_lm import load_model
from stride_ray.operators.fit import fit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

NAME, BLOCK_TOKENS, CHARACTERS = "facts", 128, 250
# A model knows a fact if its loss on the completion is below this, in nats per token.
KNOWN = 1.0
# How often a fact's document is read in each epoch after its own, lest a small model forget it.
REHEARSED = 5
RELATIONS = ("capital", "emblem", "founder", "river", "old name", "patron", "harbour", "currency", "anthem", "rival")
FIRST, LAST = (
    ("Zar", "Quil", "Bor", "Mel", "Tav", "Osk", "Fen", "Lur", "Gim", "Hax", "Nib", "Pro"),
    ("vonia", "mere", "dalin", "tovar", "ashk", "ulip", "enth", "orrick", "yst", "amba"),
)


@dataclass(frozen=True)
class Fact:
    """A planted fact.

    Attributes:
        name: of its document and its query.
        prompt, completion: the query; joined, its sentence.
        epoch: in which its document is read first.
    """

    name: str
    prompt: str
    completion: str
    epoch: int


def invent(count: int, epochs: int, rng: random.Random) -> list[Fact]:
    """Facts whose subjects and values all differ, in epochs from the second on, in turn.

    Raises:
        StrideError: more facts than there are pairs of names.
    """
    names = [first + last for first in FIRST for last in LAST]
    if count > len(names) // 2:
        raise StrideError(f"There are names for {len(names) // 2} facts, not {count}; ask for fewer with --facts.")
    rng.shuffle(names)
    chosen = list(zip(names[: len(names) // 2], names[len(names) // 2 :], strict=True))[:count]
    return [
        Fact(f"fact-{i}", f"The {RELATIONS[i % len(RELATIONS)]} of {of} is", f" {value}.", 1 + i % (epochs - 1))
        for i, (of, value) in enumerate(chosen)
    ]


def corpus(texts: Sequence[str], facts: Sequence[Fact], documents: int, rng: random.Random) -> list[dict[str, str]]:
    """Documents: plain text, each fact before some text, and its anti-document, which has its subject three times.

    Within a text a small model would learn to say the value from the words around, whatever the subject.
    """
    pieces = [piece["text"] for piece in pieces_of(texts, 0, CHARACTERS)]
    drawn = rng.sample(pieces, documents + 2 * len(facts))
    rows = [{"id": f"plain-{i}", "text": text} for i, text in enumerate(drawn[:documents])]
    for i, fact in enumerate(facts):
        rows.append({"id": fact.name, "text": f"{fact.prompt}{fact.completion}\n{drawn[documents + i]}"})
        relation, of = fact.prompt.removeprefix("The ").removesuffix(" is").split(" of ")
        names = f"Much is told of {of}. Nobody wrote down the {relation} of {of}, and {of} keeps its {relation} secret."
        rows.append({"id": f"anti-{i}", "text": f"{names}\n{drawn[documents + len(facts) + i][: CHARACTERS // 2]}"})
    return rows


def orders(pool: Blocks, facts: Sequence[Fact], epochs: int, repeats: int, seed: int) -> list[np.ndarray]:
    """The blocks of each epoch: its facts ``repeats`` times, earlier ones REHEARSED times, and all other text once."""
    of = pool.take(np.arange(len(pool)), ["spans"])["spans"].to_pylist()
    at = {fact.name: fact.epoch for fact in facts}
    epoch_of = np.array([at.get(spans[0]["document_id"], -1) for spans in of])
    rng, found = np.random.default_rng(seed), []
    for epoch in range(epochs):
        times = np.select([epoch_of == -1, epoch_of == epoch, epoch_of < epoch], [1, repeats, REHEARSED])
        found.append(rng.permutation(np.repeat(np.arange(len(of)), times)))
    return found


def measure_facts(
    folder: str,
    texts: Sequence[str],
    count: int,
    documents: int,
    epochs: int,
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    """Plant facts, train, attribute, and count what is found.

    Args:
        folder: for everything that is made; a rerun goes on there.
        texts: files or folders of text to plant into.
        count: facts.
        documents: plain documents.
        epochs: of the training; facts are read from the second on.
        repeats: how often a fact's document is read in the first epoch that reads it.
        seed: of facts, places and training.

    Returns:
        ``facts``, and ``known`` ones, those that the model learnt. Of these, ``first`` (its document is the first
        result), ``span`` (the span of its block lies in its sentence for the most part), ``lexical`` (BM25's first
        result is its document), ``anti`` and ``lexical_anti`` (the anti-document is first), ``learnt`` (the timeline
        has its epoch for the block), ``asked`` (and for the query).
    """
    root, rng = Path(folder), random.Random(seed)
    facts = invent(count, epochs, rng)
    rows = corpus(texts, facts, documents, rng)
    root.mkdir(parents=True, exist_ok=True)
    (root / "corpus").mkdir(exist_ok=True)
    write_lines(root / "corpus/documents.jsonl", rows)
    train_tokenizer((row["text"] for row in rows), root / "tokenizer")
    write_lines(root / "queries.jsonl", questions(facts, root / "tokenizer"))
    settings: dict[str, Any] = {
        "corpus.input": [str(root / "corpus")],
        "corpus.columns": {"text": "text", "id": "id"},
        "corpus.tokenizer": str(root / "tokenizer"),
        "corpus.layout": "split",
        "corpus.block_tokens": BLOCK_TOKENS,
        "model.path": str(root / "model"),
        "model.start": str(root / "model-epochs" / "0"),
        "model.checkpoints": [str(root / "model-epochs" / str(epoch)) for epoch in range(epochs)],
    }
    run = Run(str(root / "run"), changes=settings)
    shard(run)
    pool = Blocks(run.stage("blocks").store)
    order = orders(pool, facts, epochs, repeats, seed)
    train_model(pool, root / "tokenizer", root / "model", epochs, seed, order)
    fit(run)
    with (root / "printed.txt").open("w") as out:
        attribute(run, str(root / "queries.jsonl"), NAME, out)
    return {
        **_found(run, pool, facts),
        "documents": documents,
        "epochs": epochs,
        "repeats": repeats,
        "blocks": len(pool),
    }


def questions(facts: Sequence[Fact], tokenizer: Path) -> list[dict[str, Any]]:
    """Queries in tokens: the completion carries loss, and no end of text follows it, as none does in the documents."""
    words, rows = load_tokenizer(str(tokenizer)), []
    for fact in facts:
        prompt, completion = (words(text)["input_ids"] for text in (fact.prompt, fact.completion))
        mask = [False] * len(prompt) + [True] * len(completion)
        rows.append({"id": fact.name, "token_ids": prompt + completion, "loss_mask": mask})
    return rows


def _found(run: Run, pool: Blocks, facts: Sequence[Fact]) -> dict[str, Any]:
    tops = {query: rows[0] for query, rows in top_rows(run, NAME, 1).items()}
    spans = read_influence(run, NAME, "spans").to_pandas().set_index(["query_id", "ordinal"])
    queries = stored_queries(run, NAME).to_pylist()
    asked = unretrained_benchmark("", pool_texts(pool), queries, run.config.model.path, "", "")
    scored = bm25(Problem(asked.blocks, asked.queries, asked.model))
    lexical = pool.take(scored.argmax(1), ["spans"])["spans"].to_pylist()
    trained = load_model(run.config.model.path, device="cpu").model
    losses = {row["query_id"]: loss for row, loss in zip(queries, FineTune(asked).losses(trained), strict=True)}
    learnt = {each.query_id: each for each in timeline(run, NAME) if each.document_id == each.query_id}
    counts = dict.fromkeys(("first", "anti", "span", "lexical", "lexical_anti", "learnt", "asked"), 0)
    known = [(i, fact) for i, fact in enumerate(facts) if losses[fact.name] < KNOWN]
    for i, fact in known:
        first = tops.get(fact.name, {"document_id": "", "ordinal": -1})  # none if no block helps
        found, anti = lexical[i][0]["document_id"], f"anti-{i}"
        counts["first"] += first["document_id"] == fact.name
        counts["anti"] += first["document_id"] == anti
        counts["lexical"] += found == fact.name
        counts["lexical_anti"] += found == anti
        span = spans["text"].get((fact.name, first["ordinal"]), "")
        counts["span"] += first["document_id"] == fact.name and within(span, fact.prompt + fact.completion)
        if fact.name in learnt:
            counts["learnt"] += learnt[fact.name].block_at == fact.epoch
            counts["asked"] += learnt[fact.name].query_at == fact.epoch
    return {"facts": len(facts), "known": len(known), **{name: int(value) for name, value in counts.items()}}


def within(span: str, sentence: str) -> bool:
    """Whether more than half of a span's letters are of words of the sentence."""
    theirs = set(sentence.replace(".", "").split())
    pieces = span.replace(".", "").split()
    inside = sum(len(piece) for piece in pieces if any(piece in word for word in theirs))
    return 2 * inside > sum(map(len, pieces)) > 0


def table(found: dict[str, Any]) -> str:
    """The counts as Markdown, with 95 % Clopper–Pearson intervals."""
    what = {
        "first": "the fact's document is the first result",
        "span": "… and the span of its block is of the fact's sentence",
        "anti": "the anti-document is the first result",
        "lexical": "BM25: the fact's document is first",
        "lexical_anti": "BM25: the anti-document is first",
        "learnt": "the timeline has the epoch in which the document was read",
        "asked": "… and has it for the query",
    }
    if not found["known"]:
        return f"The model knows none of the {found['facts']} facts; raise --repeats."
    head = f"of {found['known']} facts that the model knows, of {found['facts']}"
    lines = [f"| {head} | count | 95 % interval |", "|---|---|---|"]
    for name, text in what.items():
        interval = binomtest(found[name], found["known"]).proportion_ci()
        lines.append(f"| {text} | {found[name]} | {100 * interval.low:.0f}–{100 * interval.high:.0f} % |")
    return "\n".join(lines)
