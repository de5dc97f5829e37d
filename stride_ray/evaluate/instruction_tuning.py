"""Instruction tuning end to end: fine-tune on instructions, then find which of them taught the model an answer.

Only answers carry loss: in training, in the pool's blocks and in the queries. The model is fine-tuned on the very
blocks that are attributed, and influence is summed per instruction. Half of the queries have near copies planted in the
training set, a check with known truth; for the others no truth is known.
"""

import io
import json
import random
import tempfile
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest, hypergeom

from stride_ray.attribution.attribute import attribute, mode_of, read_influence, stored_queries
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.queries import read_queries
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.leaks.planting import disguised
from stride_ray.evaluate.retraining.benchmark import Benchmark, pool_texts, put_files, unretrained_benchmark
from stride_ray.evaluate.retraining.finetune import FineTune
from stride_ray.evaluate.retraining.instructions import read_instructions, saveable_copy
from stride_ray.evaluate.retraining.lds import Interval, mean_interval
from stride_ray.evaluate.tailpatch import INFLUENCE, LEXICAL, tail_patch
from stride_ray.evaluate.word_counts import tfidf, words
from stride_ray.models.causal_lm import load_model
from stride_ray.operators.fit import fit
from stride_ray.runtime.actor_pool import map_actors
from stride_ray.runtime.config import digest, stage_keys
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, hide_gpus

# The query set's name in the run; the separator between question and answer.
NAME, SEPARATOR = "instructions", "\n"
TRAIN, QUERIES, HELD_OUT = "train.jsonl", "queries.jsonl", "heldout.jsonl"
# Query groups, also their id prefixes: with near copies in the training set, and without; and the chance baseline.
PLANTED, UNSEEN, CHANCE = "planted", "unseen", "chance"
# Near copies per planted query; cut-off for finding one; instructions printed per sign; blocks per tail-patch step.
COPIES, TOP, HELPING, HARMING, PATCH = 2, 10, 3, 1, 3
# Tokens per block: 95 % of GSM8K's examples fit. Blocks per training step.
BLOCK_TOKENS, BATCH = 320, 4
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Amounts of data, and training options.

    Attributes:
        examples: training instructions, not counting near copies of queries.
        queries: instructions to attribute; the first half are planted.
        held_out: further instructions, used only to measure the loss.
        epochs: of fine-tuning.
        learning_rate: peak.
    """

    examples: int = 200
    queries: int = 8
    held_out: int = 32
    epochs: int = 1
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class Outcome:
    """Results of a fine-tune and its attribution, by PLANTED and UNSEEN queries; intervals are 95 %.

    Attributes:
        instructions: size of the training set, including ``planted`` near copies, cut into ``blocks`` blocks.
        answer_tokens: number of the ``tokens`` tokens that carry loss.
        measured: number of answers whose loss was measured; the unseen ones are held out of training.
        loss: their mean "before" and "after" the fine-tune, and its "change", nats per token.
        lift: tail-patch by INFLUENCE and LEXICAL, see ``tailpatch.Lift``; groups without a lift are missing.
        found: share of planted queries with a near copy among the TOP instructions, by INFLUENCE, LEXICAL and CHANCE.
    """

    instructions: int
    planted: int
    blocks: int
    tokens: int
    answer_tokens: int
    measured: dict[str, int]
    loss: dict[str, dict[str, Interval]]
    lift: dict[str, dict[str, Interval]]
    found: dict[str, Interval]

    def as_table(self) -> str:
        """Format the results as Markdown."""
        lines = [
            f"{self.instructions} instructions ({self.planted} near copies of queries), {self.blocks} blocks; "
            f"{self.answer_tokens} of {self.tokens} tokens are answers and carry loss. Intervals: 95 %.\n",
            f"| answers | measured | {' | '.join(f'loss, {moment}' for moment in self.loss)} |\n|---|---|---|---|---|",
        ]
        for group, count in self.measured.items():
            lines.append(
                f"| {group} | {count} | {' | '.join(_shown(each.get(group)) for each in self.loss.values())} |"
            )
        lines.append(f"\n| queries | lift of {' | of '.join(self.lift)} |\n|---|---|---|")
        for group in self.measured:
            lines.append(f"| {group} | {' | '.join(_shown(each.get(group)) for each in self.lift.values())} |")
        lines.append(f"\nLift: one step on the {PATCH} top blocks over one on random ones; negative is good.")
        lines.append(f"\n| by | planted queries with a near copy in the top {TOP} |\n|---|---|")
        return "\n".join([*lines, *(f"| {method} | {_shown(figure)} |" for method, figure in self.found.items())])


def _shown(figure: Interval | None) -> str:
    if figure is None or figure.low == figure.high:
        return f"{figure.value:.4g}" if figure else ""
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"


def attribute_instructions(
    instructions: str, model: str, out: str, options: Options | None = None, changes: Mapping[str, Any] | None = None
) -> Outcome:
    """Fine-tune a model on instructions, and find the ones that taught it each query's answer.

    Prints tables as they become available; rerunning the command computes only what is missing. ``out`` gets the files
    of ``draw``; ``start/``, a GGUF model converted to a plain checkpoint; ``model/``, the fine-tuned one; ``run/``, a
    regular run directory in layout ``split``, attributed on the query set NAME; and ``outcome.json``.

    Args:
        instructions: any input of documents with a prompt and an answer (question, instruction, prompt, …).
        model: the model to start from, as for ``load_model``.
        out: a path or fsspec URL.
        options: amounts; None: the defaults.
        changes: options of the run, on top of ``settings``; ``seed`` also sets the sample and the fine-tune.

    Raises:
        StrideError: too few instructions, a folder made with other settings, or as the stages do.
    """
    options, store = options or Options(), Store(out)
    start = f"{store.url}/start" if model.endswith(".gguf") else model
    run = Run(f"{store.url}/run", changes={**settings(store.url, model, start, options), **(changes or {})})
    load_tokenizer(run.config.corpus.tokenizer)  # fails here with a clear error
    seed = run.config.seed
    files = sample_rows(instructions, options, seed)
    keys = {**stage_keys(run.config, "blocks"), **asdict(options), "batch": BATCH, "seed": seed, "model": model}
    keys["instructions"] = digest(files)
    stage = claim(store, "sft", keys)
    for name, rows in files.items():
        if not store.exists(name):  # shard would take a new modification time for changed input
            store.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    with connected(run.config.compute):
        shard(run)
        blocks = Blocks(run.stage("blocks").store)
        tokenizer = load_tokenizer(blocks.store.child("tokenizer").url)
        tables = {name: read_queries(f"{store.url}/{name}", tokenizer) for name in files}
        asked = pa.concat_tables([tables[QUERIES], tables[HELD_OUT]]).to_pylist()
        one = allocate_workers(run.config.compute, 1)
        given = (fine_tune, stage, blocks.store, _good(asked), options, start, seed, one.device)
        tune = partial(map_actors, partial, given, allocation=one)  # an actor exits; a task would keep its memory
        losses = run_missing(stage, {"model": model}, tune, "fine-tune", "models")[0]["losses"]
        if not run.config.attribute.exact:
            print(fit(run)["verdict"])
        summary = attribute(run, f"{store.url}/{QUERIES}", NAME, io.StringIO())
        print_taught(run, files[TRAIN])
        print(f"\nBlock by block: {summary['page']}\n")
        lifts = _lifts(run, stage)
    losses["change"] = {name: loss - losses["before"][name] for name, loss in losses["after"].items()}
    outcome = Outcome(
        instructions=len(files[TRAIN]),
        planted=sum(_is_copy(row["id"]) for row in files[TRAIN]),
        blocks=len(blocks),
        tokens=blocks.manifest["tokens"],
        answer_tokens=blocks.manifest["target_tokens"],
        measured={group: sum(_group(name) == group for name in losses["after"]) for group in (PLANTED, UNSEEN)},
        loss={moment: _by_group(values) for moment, values in losses.items()},
        lift={method: _by_group(values) for method, values in lifts.items()},
        found=near_copies_found(top_instructions(run), tables[TRAIN].to_pylist(), _good(tables[QUERIES].to_pylist())),
    )
    store.write_json("outcome.json", asdict(outcome))
    return outcome


def settings(url: str, model: str, start: str, options: Options) -> dict[str, Any]:
    """Build the run's options; all others keep their defaults."""
    return {
        "corpus.input": [f"{url}/{TRAIN}"],
        "corpus.columns": {"id": "id", "prompt": "question", "answer": "answer"},
        "corpus.tokenizer": model,
        "corpus.layout": "split",
        "corpus.block_tokens": BLOCK_TOKENS,
        "model.path": f"{url}/model",
        "model.start": start,
        "membership.subsets": min(1000, options.examples),  # not more than blocks
        "compute.batch_tokens": BLOCK_TOKENS,  # one block per pass: more are no faster on CPUs, and need memory
    }


def sample_rows(instructions: str, options: Options, seed: int) -> dict[str, list[dict[str, str]]]:
    """Draw the disjoint rows (id, question, answer) of TRAIN, QUERIES and HELD_OUT.

    Ids are the input positions from ``documents.read``. Queries have others: ``planted-0`` has near copies in TRAIN,
    ``planted-0-copy-0`` and so on, and ``unseen-0`` has none.

    Raises:
        StrideError: other columns than a prompt and an answer, or too few rows with both.
    """
    if min(options.examples, options.queries - 1, options.held_out, options.epochs) < 1:
        raise StrideError("There must be an example to train on, one held out, two queries and an epoch at least.")
    items = read_instructions(instructions)
    wanted = options.examples + options.queries + options.held_out
    if len(items) < wanted:
        raise StrideError(f"{instructions} has {len(items)} instructions with a prompt and an answer, not {wanted}.")
    rng = random.Random(seed)
    rows = [
        {"id": item.document_id, "question": (item.prompt or "") + SEPARATOR, "answer": item.answer or ""}
        for item in rng.sample(items, wanted)
    ]
    queries, train = rows[: options.queries], rows[options.queries + options.held_out :]
    half = options.queries // 2
    for index, query in enumerate(queries):
        query["id"] = f"{PLANTED}-{index}" if index < half else f"{UNSEEN}-{index - half}"
    for query in queries[:half]:
        for number in range(COPIES):
            question, answer = near_copy(query["question"], query["answer"], rng)
            train.append({"id": f"{query['id']}-copy-{number}", "question": question + SEPARATOR, "answer": answer})
    rng.shuffle(train)
    return {TRAIN: train, QUERIES: queries, HELD_OUT: rows[options.queries : options.queries + options.held_out]}


def near_copy(question: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """Paraphrase a question and its answer by the rules of ``planting.disguised``."""
    lines = disguised(question, answer, "paraphrase", rng).split("\n")
    at = max(1, len(question.splitlines()))
    return "\n".join(lines[:at]), "\n".join(lines[at:])


def _group(name: str) -> str:
    return PLANTED if name.startswith(f"{PLANTED}-") else UNSEEN


def _is_copy(document: str, query: str = PLANTED) -> bool:
    return document.startswith(f"{query}-") and "-copy-" in document


def _good(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] == "ok"]


def _by_group(values: Mapping[str, float]) -> dict[str, Interval]:
    """Means of finite values by query group."""
    groups: dict[str, list[float]] = {}
    for name in (name for name, value in values.items() if np.isfinite(value)):
        groups.setdefault(_group(name), []).append(values[name])
    return {group: mean_interval(np.array(each)) for group, each in groups.items()}


def fine_tune(
    stage: Stage, store: Store, answers: Rows, options: Options, start: str, seed: int, device: str, model: str
) -> dict[str, Any]:
    """Train on the blocks in a worker, measure answers before and after, publish the model, then mark with the losses.

    ``start`` is ``model`` as a checkpoint that transformers loads directly; it is written first if the two differ.
    """
    started = time.monotonic()
    hide_gpus(device)
    tokenizer = load_tokenizer(store.child("tokenizer").url)
    if start != model and "start" not in stage.done():
        publish(stage.store.child("start"), saveable_copy(load_model(model, device="cpu").model), tokenizer)
        stage.mark("start", started)
    benchmark = answers_only(Blocks(store), answers, start)
    recipe = FineTune(benchmark, epochs=options.epochs, batch=BATCH, learning_rate=options.learning_rate, device=device)
    measured = {"before": recipe.losses(load_model(start, device=device).model)}
    trained = recipe.train(np.arange(len(benchmark.blocks)), seed)
    measured["after"] = recipe.losses(trained)
    publish(stage.store.child("model"), trained, tokenizer)
    names = [row["query_id"] for row in answers]
    losses = {moment: dict(zip(names, found.tolist(), strict=True)) for moment, found in measured.items()}
    return stage.mark("model", started, losses=losses)


def answers_only(blocks: Blocks, answers: Rows, start: str) -> Benchmark:
    """All blocks, and the answers to measure, as the recipe's benchmark: prompts and padding masked."""
    fingerprint = blocks.manifest["fingerprint"]
    return unretrained_benchmark(blocks.store.url, pool_texts(blocks), answers, start, start, fingerprint)


def publish(store: Store, model: Any, tokenizer: Any) -> None:
    """Write a checkpoint with its tokenizer, file by file; it counts as complete only once a marker is written."""
    with tempfile.TemporaryDirectory(prefix="stride-sft-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        put_files(store, folder)


def top_instructions(run: Run) -> list[dict[str, Any]]:
    """Each query with the instructions that taught it: its row of the recovery table and ``documents``.

    ``documents`` holds its rows of the documents table, most helpful first, each with its ``share`` of the summed
    influence of the same sign.
    """
    found = {row["query_id"]: {**row, "documents": []} for row in read_influence(run, NAME, "recovery").to_pylist()}
    for row in read_influence(run, NAME, "documents").to_pylist():
        found[row["query_id"]]["documents"].append(row)
    for each in found.values():
        sums = {True: 0.0, False: 0.0}
        for row in each["documents"]:
            sums[row["influence"] > 0] += row["influence"]
        for row in each["documents"]:
            row["share"] = row["influence"] / (sums[row["influence"] > 0] or 1.0)
    return list(found.values())


def print_taught(run: Run, train: Rows) -> None:
    """Print each query with its HELPING most helpful and HARMING most harmful instructions, one per line."""
    texts = {row["id"]: row for row in train}
    tokenizer = load_tokenizer(run.store.child("blocks/tokenizer").url)
    asked = {row["query_id"]: row["token_ids"] for row in stored_queries(run, NAME).to_pylist()}
    for query in top_instructions(run):
        name, documents = query["query_id"], query["documents"]
        print(f"\n{name}: {_line(tokenizer.decode(asked[name]), 100)}")
        print(f"  failed: {query['error']}" if query["error"] else "  rank   influence   share")
        helping = [row for row in documents if row["influence"] > 0][:HELPING]
        for row in (*helping, *[row for row in documents if row["influence"] < 0][-HARMING:]):
            text = texts[row["document_id"]]
            question = ("near copy: " if _is_copy(row["document_id"], name) else "") + text["question"]
            numbers = f"{row['rank']:>6}  {row['influence']:+10.4g}  {row['share']:>6.1%}"
            print(f"{numbers}  {_line(question, 56)} -> {_line(text['answer'], 36)}")


def _line(text: str, width: int) -> str:
    return textwrap.shorten(" ".join(text.split()), width) or "(empty)"


def _lifts(run: Run, stage: Stage) -> dict[str, dict[str, float]]:
    """Tail-patch lifts by method and query, cached in a marker."""
    name = f"tailpatch-{mode_of(run)}"
    if name not in stage.done():
        started = time.monotonic()
        found = tail_patch(run, NAME, PATCH, seed=run.config.seed)
        lifts = {each.method: dict(zip(found.query_ids, each.values, strict=True)) for each in found.lifts}
        stage.mark(name, started, lifts=lifts)
    return stage.done()[name]["lifts"]


def near_copies_found(answers: Rows, train: Rows, queries: Rows) -> dict[str, Interval]:
    """Share of planted queries with a near copy among the TOP instructions, with Clopper–Pearson intervals.

    By INFLUENCE (from ``taught``), LEXICAL over whole texts including prompts (rows of queries.SCHEMA), and CHANCE.
    """
    planted = [row for row in queries if _group(row["query_id"]) == PLANTED]
    if not planted:
        return {}
    names = np.array([row["query_id"] for row in train])
    helping = {each["query_id"]: [row for row in each["documents"] if row["influence"] > 0] for each in answers}
    vectorizer = tfidf()
    X = vectorizer.fit_transform(words(row["token_ids"]) for row in train)
    similarity = (vectorizer.transform(words(row["token_ids"]) for row in planted) @ X.T).toarray()
    tops: dict[str, list[list[str]]] = {
        INFLUENCE: [[row["document_id"] for row in helping[query["query_id"]][:TOP]] for query in planted],
        LEXICAL: [names[np.lexsort((names, -row))[: min(TOP, (row > 0).sum())]].tolist() for row in similarity],
    }
    found = {}
    for method, top in tops.items():
        hits = sum(any(_is_copy(name, q["query_id"]) for name in best) for best, q in zip(top, planted, strict=True))
        span = binomtest(hits, len(planted)).proportion_ci()
        found[method] = Interval(hits / len(planted), float(span.low), float(span.high))
    chance = 1 - float(hypergeom(len(names), COPIES, TOP).pmf(0))
    return {**found, CHANCE: Interval(chance, chance, chance)}
