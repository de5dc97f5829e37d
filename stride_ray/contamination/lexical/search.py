"""The lexical channel's search: every document of the corpus against the index of items, on Ray and incremental.

Each pair of a corpus unit (a file or a part of one, with its size and version) and an item batch (items first seen on
the same night) is searched once. A new unit is read once for all items, an old unit only for new items. Results are
stored per pair, so a night without new files or items reads nothing.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical.ngrams import NEAR, Index, Run, fields_of, numbering, short_answer
from stride_ray.contamination.lexical.words import passages
from stride_ray.contamination.schemas.texts import strings
from stride_ray.corpus.documents import Document, read
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.rows.row import LONE_SURROGATE, escaped
from stride_ray.corpus.splits import InputSplit
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.runtime.actor_pool import map_actors
from stride_ray.runtime.config import digest
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.progress import progress
from stride_ray.runtime.run import Stage
from stride_ray.runtime.tasks import allocate_workers, connected

RAW = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("field", pa.string(), nullable=False),
        pa.field("first_word", pa.int32(), nullable=False),
        pa.field("stop_word", pa.int32(), nullable=False),
        pa.field("near", pa.bool_(), nullable=False),  # the item's short answer stands near the run
        pa.field("item_start", pa.int32(), nullable=False),
        pa.field("item_stop", pa.int32(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("excerpt", pa.string(), nullable=False),  # the text around the run, for display; or empty (MOST)
        pa.field("excerpt_start", pa.int64(), nullable=False),
    ]
)
# A text's runs, each with whether the answer is near, by passage.
Found = list[list[tuple[Run, bool]]]
WORDS = pa.schema([pa.field("word", pa.string()), pa.field("documents", pa.int64())])
# Documents per unit whose matches with one field have an excerpt; matches of further documents have none.
MOST = 1000
# Characters of an excerpt on either side of a run, and in total.
AROUND, LONGEST = 80, 600


class Corpus(NamedTuple):
    """The scanned corpus.

    Attributes:
        units: input splits, as from ``plan``.
        columns: role to column.
        tokenizer: for documents that are token ids; otherwise may be empty.
    """

    units: tuple[InputSplit, ...]
    columns: dict[str, str]
    tokenizer: str

    @property
    def state(self) -> str:
        """Digest (16 hexadecimal digits) of its files, their content and the columns."""
        return digest(sorted(input_split_key(unit, self.columns) for unit in self.units))


def input_split_key(unit: InputSplit, columns: dict[str, str]) -> str:
    """Return a unit's name in the state, a digest of its range, its files' names and content, and the columns."""
    return f"{unit.kind}-{digest([unit.to_dict() | {'files': [[*f[:1], *f[2:]] for f in unit.files]}, columns])}"


def search(
    stage: Stage, corpus: Corpus, items: Sequence[Item], words: int, shortest: int, compute: ComputeConfig
) -> dict[str, int]:
    """Search every unit for every item, leaving out pairs that are already in the state.

    Args:
        stage: the state's folder; its identity covers ``words`` and ``shortest``.
        corpus: the corpus to search.
        items: the items to search for.
        words: n of the n-grams.
        shortest: minimum number of words of a field.
        compute: resources.

    Returns:
        Counts of ``units`` and ``items`` searched in this call.
    """
    met = finished_searches(stage)
    batches: dict[frozenset[str], list[InputSplit]] = {}
    for unit in corpus.units:
        before = frozenset(marker["batch"] for marker in met.get(input_split_key(unit, corpus.columns), {}).values())
        batches.setdefault(before, []).append(unit)
    missing: dict[tuple[str, ...], list[InputSplit]] = {}
    for before, units in batches.items():
        seen = {key for batch in before for key in stage.store.read_json(f"{batch}.json")["keys"]}
        left = tuple(item.key for item in items if item.key not in seen)
        if left:
            missing.setdefault(left, []).extend(units)
    searched = {"units": 0, "items": 0}
    by_key = {item.key: item for item in items}
    if not missing:
        return searched
    with connected(compute):
        for left, units in sorted(missing.items()):
            fields = [field for key in left for field in fields_of(by_key[key], words, shortest)]
            index = Index(fields, {key: short_answer(by_key[key], shortest) for key in left})
            batch = f"items-{digest(list(left))}"
            stage.store.write_json(f"{batch}.json", {"keys": left})
            given = (index, batch, corpus, stage)
            results = map_actors(Searcher, given, units, allocate_workers(compute, len(units)))
            stage.remember(progress(results, "search", len(units), "units"))
            searched = {"units": searched["units"] + len(units), "items": max(searched["items"], len(left))}
    return searched


def finished_searches(stage: Stage) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the done markers of finished searches: unit name to search name (unit and batch) to marker."""
    met: dict[str, dict[str, dict[str, Any]]] = {}
    for name, marker in stage.done().items():
        met.setdefault(marker["of"], {})[name] = marker
    return met


class Searcher:
    """Reads a unit once; writes its matches, its document frequencies by word, and a done marker."""

    def __init__(self, index: Index, batch: str, corpus: Corpus, stage: Stage) -> None:
        self.index, self.batch, self.corpus, self.stage = index, batch, corpus, stage
        self.numbering = numbering(index)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.corpus.tokenizer)

    def __call__(self, unit: InputSplit) -> dict[str, Any]:
        """Process one unit; returns its done marker."""
        started = time.monotonic()
        name = input_split_key(unit, self.corpus.columns)
        search_name = f"{name}-{self.batch}"
        rows: dict[str, list[Any]] = {column: [] for column in RAW.names}
        holding = np.zeros(len(self.index.vocabulary) + 1, np.int64)
        documents: Counter[str] = Counter()
        kept: Counter[int] = Counter()
        rejected: list[str] = []
        for item in read(unit, self.corpus.columns):
            if isinstance(item, Rejected):
                documents["rejected"] += item.rows
                rejected = [*rejected, item.sentence()][:5]
                continue
            documents["read"] += 1
            file = unit.files[item.place if unit.kind == "text" else 0].name
            held: set[int] = set()
            met: list[tuple[str, str, Found]] = []
            parts = texts(item, self._tokenizer if item.token_ids is not None else None)
            numbered = [self.numbering.numbers(text) for _, text in parts]
            for at, ((part, text), numbers) in enumerate(zip(parts, numbered, strict=True)):
                held.update(np.unique(np.concatenate(numbers)).tolist())
                found = [self.index.find(each) for each in numbers]
                if any(found):
                    beside = _beside(numbered, at)
                    runs = [
                        [(run, self.index.has_answer(run, each, *beside)) for run in runs]
                        for each, runs in zip(numbers, found, strict=True)
                    ]
                    met.append((part, text, runs))
            kept.update({run.field for _, _, found in met for runs in found for run, _ in runs})
            for row in self._matches(item, {"file": file, "place": item.place}, met, kept):
                documents["beyond"] += not row["excerpt"]
                for column, value in row.items():
                    rows[column].append(value)
            holding[list(held)] += 1
        self.stage.store.write_table(f"{search_name}.parquet", pa.Table.from_pydict(rows, RAW))
        held_words = [(word, int(holding[i])) for word, i in self.index.vocabulary.items() if holding[i]]
        counts = pa.table([[w for w, _ in held_words], [c for _, c in held_words]], schema=WORDS)
        self.stage.store.write_table(f"{search_name}-words.parquet", counts)
        return self.stage.mark(
            search_name,
            started,
            of=name,
            batch=self.batch,
            documents=documents["read"],
            rejected=documents["rejected"],
            rejects=rejected,
            beyond=documents["beyond"],
            rows=len(rows["key"]),
            common=self.index.common,
        )

    def _matches(
        self, document: Document, where: dict[str, Any], met: list[tuple[str, str, Found]], kept: Counter[int]
    ) -> Iterator[dict[str, Any]]:
        """Yield rows of RAW for the runs in a document's parts, (name, text, runs by passage) each."""
        for part, text, by_passage in met:
            read = passages(text, self.numbering.is_word)
            for (run, near), words in (
                (run, words) for runs, words in zip(by_passage, read, strict=True) for run in runs
            ):
                field = self.index.fields[run.field]
                start = int(words.spans[run.place, 0])
                stop = int(words.spans[run.place + run.stop - run.first - 1, 1])
                before = max(0, start - AROUND)
                shown = kept[run.field] <= MOST
                excerpt = LONE_SURROGATE.sub("\ufffd", text[before : min(stop + AROUND, before + LONGEST)])
                yield {
                    "key": field.key,
                    "field": field.name,
                    "first_word": run.first,
                    "stop_word": run.stop,
                    "near": near,
                    "item_start": int(field.words.spans[run.first : run.stop, 0].min()),
                    "item_stop": int(field.words.spans[run.first : run.stop, 1].max()),
                    "document_id": document.document_id,
                    "source": document.source,
                    **where,
                    "part": escaped(part),
                    "start": start,
                    "stop": stop,
                    "excerpt": excerpt if shown else "",
                    "excerpt_start": before,
                }


def _beside(numbered: Sequence[list[np.ndarray]], at: int) -> tuple[np.ndarray, np.ndarray]:
    """The last words of the parts before one, and the first of those after it, ngrams.NEAR each."""
    none = [np.zeros(0, np.int32)]
    before = np.concatenate(none + [numbers[0] for numbers in numbered[:at]])
    after = np.concatenate(none + [numbers[0] for numbers in numbered[at + 1 :]])
    return before[-NEAR:], after[:NEAR]


def texts(document: Document, tokenizer: Any) -> list[tuple[str, str]]:
    """Return a document's texts, each with the name of the part that offsets refer to.

    Parts are ``text``; ``prompt`` and ``answer``; ``token_ids``, decoded with the tokenizer, which no other document
    needs; of messages ``messages.0`` …, the contents, and with its path any other string of a turn
    (``messages.0.content.1.text``) or of the chat template's arguments (``template.tools.0.function.description``), but
    for roles and types.
    """
    if document.text is not None:
        return [("text", document.text)]
    if document.token_ids is not None:
        return [("token_ids", tokenizer.decode(document.token_ids))]
    if document.messages is not None:
        found: list[tuple[str, str]] = []
        for i, turn in enumerate(document.messages):
            for path, text in strings(f"messages.{i}", turn):
                found.append((f"messages.{i}" if path == f"messages.{i}.content" else path, text))
        found += strings("template", document.template_arguments or {})
        return [(path, text) for path, text in found if path.rpartition(".")[2] not in ("role", "type")]
    return [("prompt", document.prompt or ""), ("answer", document.answer or "")]
