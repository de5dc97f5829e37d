"""Stage shard: documents to numbered blocks in Parquet.

Two passes over the units. The first (Ray Data) tokenises a unit's documents and cuts them into blocks. Once all block
counts are known, the second (Ray tasks) assigns dense ordinals, renames documents whose source has their id already,
and publishes the final parts. New input continues the numbering, so existing blocks keep their ordinals and thereby
their subsets.

Example: ``a.jsonl`` gives 7 blocks and ``b.jsonl`` 5. The first pass writes ``_tokenised/part-00000.arrow`` and
``part-00001.arrow``; the second ``part-00000.parquet`` with the ordinals 0 to 6 and ``part-00001.parquet`` with 7 to
11. If ``c.jsonl`` is added later, its blocks are 12 and up.
"""

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from xxhash import xxh3_128_hexdigest

from stride_ray.corpus.blocks import fixed_lists
from stride_ray.corpus.documents import TokenizedDocument, read, resolve_columns
from stride_ray.corpus.files import SourceFile
from stride_ray.corpus.numbering import document_hashes, number_part, repeats, write_staged
from stride_ray.corpus.packing import KEPT_UNUSED, PADDING, Counts, make_blocks
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.splits import InputSplit, plan
from stride_ray.corpus.tokenization.clock import fix_clock, fixed_time
from stride_ray.corpus.tokenization.encoding import encode_stream, show_masked
from stride_ray.corpus.tokenization.tokenizer import (
    TOKENIZER_CHECKSUMS,
    end_of_text_id,
    load_saved_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from stride_ray.runtime.config import digest
from stride_ray.runtime.costs import record_stage_costs
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import CorpusConfig
from stride_ray.runtime.progress import progress, run_missing
from stride_ray.runtime.run import Run, Stage, part_name, refuse_inside
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, map_dataset, map_tasks
from stride_ray.runtime.urls import first_line, redact_url


def shard(run: Run, out: TextIO | None = None) -> dict[str, Any]:
    """Cut the run's corpus into blocks, or add new input to existing blocks.

    Example:
        >>> from stride_ray import Run, shard
        >>> options = {"corpus.input": "corpus.jsonl", "model.path": "model", "corpus.block_tokens": 16}
        >>> manifest = shard(Run("mine", changes=options))
        >>> manifest["documents"], manifest["rejected"], manifest["blocks"] > 60
        (60, 0, True)

    Args:
        run: its configuration names input and tokenizer.
        out: where a masked example is printed, for data with a loss mask; None: standard output.

    Returns:
        ``blocks/manifest.json``:

        * counts of documents, blocks, tokens, target tokens and rejects, and the first rejects with file, row and
          reason;
        * what was not used: columns, what the chat template leaves out, and files (``left_out``);
        * ``repeated``, the number of documents renamed because an earlier one of their source has their id, and
          ``first_repeated``, source and new id of the first of them;
        * ``shared_ids``, the number of ids that occur in several sources;
        * the parts with their content hashes, and the corpus fingerprint.

    Raises:
        StrideError: missing or empty input, or input that changed since it was sharded; no tokenizer; settings that
            differ from the directory's; more resources than the cluster can provide.
    """
    config = run.config.corpus
    if not config.input:
        raise StrideError("No corpus is given; name files, folders or URLs with --input (corpus.input).")
    if not config.tokenizer:
        raise StrideError("No tokenizer is given; name one with --tokenizer, or the model with --model.")
    refuse_inside(run.store, config.input, "The run directory")
    blocks = run.stage("blocks").store
    while True:
        before = _manifest_bytes(blocks)
        try:
            return _shard(run, out or sys.stdout)
        except StrideError:
            # If the same command runs twice, the faster one deletes temporary files that the slower one still needs;
            # trying again finds the work done.
            if _manifest_bytes(blocks) == before:
                raise


def _manifest_bytes(blocks: Store) -> bytes:
    return blocks.read("manifest.json") if blocks.exists("manifest.json") else b""


def _shard(run: Run, out: TextIO) -> dict[str, Any]:
    """Make one attempt at ``shard``."""
    config = run.config.corpus
    # Plan the units, those of earlier commands first.
    tokenizer = load_tokenizer(config.tokenizer)
    left_out: list[str] = []
    units = plan(config.input, int(config.shard_mb * 1e6), left_out=left_out)
    if not run.stage("blocks").store.exists("plan.json"):
        resolve_columns(units, config.columns)  # report a wrong mapping before claiming the directory with it
    stage = run.begin("blocks", tokenizer=tokenizer_fingerprint(tokenizer))
    staged = Stage(stage.store.child("_tokenised"), stage.identity)
    numbered = stage.done()
    units, columns = _record_units(stage, config, units, bool(staged.done() or numbered))
    _save_tokenizer(stage, tokenizer)
    if len(numbered) == len(units) and stage.is_finished():
        stage.store.remove("_tokenised")
        return stage.manifest()
    names = [part_name(i) for i in range(len(units))]
    with connected(run.config.compute), record_stage_costs(stage):
        # First pass: tokenise the units that have no numbered part yet.
        # The saved tokenizer, as in later stages: the original may change or disappear.
        worker_arguments = (replace(config, tokenizer=stage.store.child("tokenizer").url), columns, staged)

        def tokenise(missing: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            return map_dataset(Tokenise, worker_arguments, missing, allocate_workers(run.config.compute, len(missing)))

        unnumbered = {
            name: {"index": i, "unit": units[i].to_dict()} for i, name in enumerate(names) if name not in numbered
        }
        _show_example(run_missing(staged, unnumbered, tokenise, "shard", "units"), out)
        markers_by_part = {**staged.done(), **numbered}
        counts = [markers_by_part[name]["counts"]["blocks"] for name in names]
        if not sum(counts):
            run.roll_back(stage)  # else the stored plan and options would reject the corrected command
            raise StrideError(_no_blocks_message(config, markers_by_part))

        # Second pass: number the blocks and rename documents.
        first_ordinals = np.concatenate([[0], np.cumsum(counts)]).tolist()
        repeated, shared_ids, taken = _find_repeated_documents(
            run, (stage, staged), [name in numbered for name in names], columns
        )
        parts = {name: (i, first_ordinals[i], units[i], repeated[i], taken) for i, name in enumerate(names)}
        workers = allocate_workers(run.config.compute, len(unnumbered))
        number = partial(map_tasks, number_part, (stage, staged), allocation=workers)
        run_missing(stage, parts, number, "number", "parts")
    saved_tokenizer = load_saved_tokenizer(stage.store)
    manifest = {**_manifest(stage, config, saved_tokenizer, names), "left_out": left_out, "shared_ids": shared_ids}
    stage.finish(manifest)
    stage.store.remove("_tokenised")
    run.save()
    return manifest


def _record_units(
    stage: Stage, config: CorpusConfig, units: list[InputSplit], begun: bool
) -> tuple[list[InputSplit], dict[str, str]]:
    """Record the units and columns in plan.json; returns all units in the order of their parts, and the columns.

    New units follow the recorded ones. Until the first unit is done (``begun``), the plan is replaced, so that the
    input may still be corrected.
    """
    if not begun or not stage.store.exists("plan.json"):
        columns = resolve_columns(units, config.columns)
        stage.store.write_json("plan.json", {"columns": columns, "units": [unit.to_record() for unit in units]})
        return units, columns
    record = stage.store.read_json("plan.json")
    recorded = [InputSplit.from_dict(unit, config.input) for unit in record["units"]]
    files = {file.name: file for unit in recorded for file in unit.files}
    for unit in units:
        for file in unit.files:
            if file.name in files:
                _check_unchanged(file, files[file.name])
    new = plan(config.input, int(config.shard_mb * 1e6), skip=set(files))
    if new:
        recorded += new
        stage.store.write_json("plan.json", {**record, "units": [unit.to_record() for unit in recorded]})
    return recorded, record["columns"]


def _check_unchanged(file: SourceFile, before: SourceFile) -> None:
    """Raise StrideError if a file is not the one of its name that was sharded."""
    if file.content == before.content:
        return
    if file.url != before.url:
        raise StrideError(
            f"{redact_url(file.url)} is not the {file.name!r} that was sharded, {redact_url(before.url)}: "
            "its size or modification time differs; give it another name or shard into a new run directory "
            "(there, one input, their common parent folder, takes both)."
        )
    raise StrideError(
        f"{file.name} was changed since it was sharded; put new text into new files, or shard into a new run directory."
    )


def _save_tokenizer(stage: Stage, tokenizer: Any) -> None:
    """Save the tokenizer beside the blocks, so that later stages can encode and decode text without the original.

    Its chat template has a fixed clock: queries and input added later are rendered with the same date.
    """
    if stage.store.exists("tokenizer/tokenizer_config.json"):
        return
    fix_clock(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the library raises its own classes, even for a full disk
            raise StrideError(f"The tokenizer cannot be written to {folder}: {first_line(error)}.") from None
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        content = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    stage.store.write_json(TOKENIZER_CHECKSUMS, {name: xxh3_128_hexdigest(data) for name, data in content.items()})
    # Written last: its presence means that all files are complete.
    for name in sorted(content, key=lambda name: name == "tokenizer_config.json"):
        stage.store.write(f"tokenizer/{name}", content[name])


class Tokenise:
    """Worker of the first pass: turns an input unit into one Arrow file of blocks without ordinals."""

    def __init__(self, config: CorpusConfig, columns: dict[str, str], staged: Stage) -> None:
        self.config, self.columns, self.staged = config, columns, staged
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.end_of_text = end_of_text_id(self.tokenizer) if config.layout == "pack" else -1
        self.example: TokenizedDocument | None = None

    def __call__(self, work: dict[str, Any]) -> dict[str, Any]:
        """Process one unit; returns its done marker with a masked example (may be empty)."""
        started = time.monotonic()
        unused, unrendered = set[str](), set[str]()
        documents = read(InputSplit.from_dict(work["unit"]), self.columns, unused)
        encoded = self._keep_example(encode_stream(documents, self.tokenizer, unrendered))
        layout, tokens = self.config.layout, self.config.block_tokens
        table, counts = make_blocks(encoded, layout, tokens, self.end_of_text, PADDING)
        counts.unused, counts.unrendered = (sorted(names)[:KEPT_UNUSED] for names in (unused, unrendered))
        name = part_name(work["index"])
        write_staged(self.staged.store, name, table)
        ids = fixed_lists(table["token_ids"], tokens, 0)
        facts = {"counts": counts.to_dict(), "max_token_id": int(ids.max(initial=0))}
        marker = self.staged.mark(name, started, **facts)
        example = show_masked(self.example, self.tokenizer) if self.example is not None else ""
        self.example = None
        return {**marker, "example": example}

    def _keep_example(self, items: Iterable[TokenizedDocument | Rejected]) -> Iterator[TokenizedDocument | Rejected]:
        """Pass the items through and keep the first document with a mask as the example."""
        for item in items:
            if self.example is None and isinstance(item, TokenizedDocument) and item.mask is not None:
                self.example = item
            yield item


def _show_example(markers: list[dict[str, Any]], out: TextIO) -> None:
    for marker in markers:  # those of earlier commands were read back and have no example
        if marker.get("example"):
            print(f"One example, its loss on the marked tokens only:\n{marker['example']}\n", file=out)
            return


def _no_blocks_message(config: CorpusConfig, markers: dict[str, dict[str, Any]]) -> str:
    rejects = [reject for marker in markers.values() for reject in marker["counts"]["rejects"]]
    count = sum(marker["counts"]["rejected"] for marker in markers.values())
    why = f"; {count} rejected, the first: {Rejected(**rejects[0]).sentence()}" if rejects else ""
    given = ", ".join(map(redact_url, config.input))
    return f"The corpus {given} produced no blocks{why}. Check the input and the columns."


def _find_repeated_documents(
    run: Run, stages: tuple[Stage, Stage], numbered: list[bool], columns: dict[str, str]
) -> tuple[list[np.ndarray], int, frozenset[int]]:
    """Find the documents to rename, over all parts.

    Without an id column there are none, since ids made of file and row are unique.

    Args:
        run: for its compute options.
        stages: the numbered and the staged parts.
        numbered: per part, whether it is numbered.
        columns: the resolved columns.

    Returns:
        Per part the indices of these documents, the number of ids in several sources (both from ``numbering.repeats``),
        and the hashes of names that are taken (``numbering.with_distinct_ids``; empty if there is nothing to rename).
    """
    if "id" not in columns:
        return [np.zeros(0, np.int64)] * len(numbered), 0, frozenset()
    work = list(enumerate(numbered))
    results = map_tasks(document_hashes, stages, work, allocate_workers(run.config.compute, len(work)))
    parts = sorted(progress(results, "compare", len(work), "parts"), key=lambda part: part["part"])
    repeated, shared_ids = repeats([part["hashes"] for part in parts])
    taken = (name for part in parts for name in part["marked"].tolist())
    return repeated, shared_ids, frozenset(taken if any(map(len, repeated)) else ())


def _manifest(stage: Stage, config: CorpusConfig, tokenizer: Any, names: list[str]) -> dict[str, Any]:
    done = stage.done()
    markers = [done[name] for name in names]
    counts = sum((Counts.from_dict(marker["counts"]) for marker in markers), Counts())
    parts = [
        {"name": f"{name}.parquet", "blocks": marker["counts"]["blocks"], "sha256": marker["sha256"]}
        for name, marker in zip(names, markers, strict=True)
    ]
    return {
        **counts.to_dict(),
        "first_repeated": next((marker["renamed"] for marker in markers if marker["renamed"]), []),
        "layout": config.layout,
        "block_tokens": config.block_tokens,
        "max_token_id": max(marker["max_token_id"] for marker in markers),
        "vocabulary": vocabulary_size(tokenizer),
        "chat_time": fixed_time(tokenizer),
        "fingerprint": digest([part["sha256"] for part in parts]),
        "parts": parts,
    }
