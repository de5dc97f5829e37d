"""Numbering, the second pass of shard: ordinals of blocks, and names for documents whose id their source has already.

A document is its source and its id. Ids are the input's: they may start again in every file of a source, or be given
twice in one file. The first document with an id keeps it; a later one of the same source gets the place of its row
after it, as ``7~b.jsonl#1024`` (with more ``~`` if that is the id of another), so that sums never mix two rows and each
can be found. Names of numbered parts stay when input is added.

A module of its own because tokenizer libraries take longer to import than a part takes to number.
"""

import hashlib
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from stride_ray.corpus.packing import block_id
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Stage, part_name
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url

# Temporary files are Arrow: as Parquet a part would take six times as long to write and read.
_SCAFFOLD = pa.ipc.IpcWriteOptions(compression="lz4")


def write_staged(store: Store, name: str, table: pa.Table) -> None:
    """Store a part's blocks until they get their ordinals: a checksum of 16 bytes, and an Arrow file."""
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, table.schema, options=_SCAFFOLD) as file:
        file.write_table(table)
    data = memoryview(buffer.getvalue())
    store.write(f"{name}.arrow", b"".join([xxhash.xxh3_128_digest(data), data]))


def read_staged(store: Store, name: str) -> pa.Table:
    """A part's blocks, as stored by ``write_staged``."""
    data = memoryview(store.read(f"{name}.arrow"))
    if xxhash.xxh3_128_digest(data[16:]) != data[:16]:
        place = store.display_url(f"{name}.arrow")
        raise StrideError(
            f"{place} was damaged or changed: its checksum differs; delete its folder {redact_url(store.url)} and run "
            "the same command again."
        )
    return pa.ipc.open_file(pa.py_buffer(data[16:])).read_all()


def with_ordinals(table: pa.Table, first: int) -> pa.Table:
    """The table with an ordinal column: ``first``, ``first + 1``, … in row order."""
    ordinals = pa.array(np.arange(first, first + table.num_rows, dtype=np.int64))
    return table.add_column(1, pa.field("ordinal", pa.int64(), nullable=False), ordinals)


def document_hashes(stage: Stage, staged: Stage, work: tuple[int, bool]) -> dict[str, Any]:
    """Hashes of a part's documents in order, uint64 (documents, 2): of source and id together, and of the id alone.

    Args:
        stage: with the numbered parts.
        staged: with those that are not numbered yet.
        work: the part's index, and whether it is numbered.

    Returns:
        ``part``, ``hashes``, and ``marked``: those of source and id together whose id has a "~", as renamed ones do.
    """
    index, numbered = work
    name = part_name(index)
    table = stage.store.read_table(f"{name}.parquet", ["spans"]) if numbered else read_staged(staged.store, name)
    spans = table["spans"].combine_chunks().flatten()
    first = spans.filter(pa.array(spans.field("start").to_numpy() == 0))
    ids, sources = (first.field(column).to_pylist() for column in ("document_id", "source"))
    names = (block_id(source, name, 0) for source, name in zip(sources, ids, strict=True))
    alone = (int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") for name in ids)
    hashes = np.array([np.fromiter(each, np.uint64, len(ids)) for each in (names, alone)]).T
    marked = [number for number, name in enumerate(ids) if "~" in name]
    return {"part": index, "hashes": hashes, "marked": hashes[marked, 0]}


def repeats(hashes: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Find the documents whose source and id an earlier one has; holds 40 bytes a document.

    Args:
        hashes: per part, in order, from ``document_hashes``.

    Returns:
        Per part the indices of these documents, and the number of ids that occur in several sources.
    """
    names, ids = np.concatenate(hashes).T
    order = np.argsort(names, kind="stable")
    repeated = np.zeros(len(names), bool)
    repeated[order[1:]] = names[order[1:]] == names[order[:-1]]
    shared = int((np.unique(ids[~repeated], return_counts=True)[1] > 1).sum())
    edges = np.cumsum([len(each) for each in hashes])[:-1]
    return [np.flatnonzero(each) for each in np.split(repeated, edges)], shared


def with_distinct_ids(
    table: pa.Table, unit: InputSplit, repeated: np.ndarray, taken: Collection[int] = ()
) -> tuple[pa.Table, list[str]]:
    """Rename the documents of a part with these indices, and with them the ids of the blocks that they begin.

    Args:
        table: the part.
        unit: what it was read from.
        repeated: the indices.
        taken: hashes of source and id of documents that may have such a name already (``document_hashes``).

    Returns:
        The table, and source and new id of the first of these documents; empty if there are none.
    """
    if not len(repeated):
        return table, []
    spans = table["spans"].combine_chunks()
    flat = spans.flatten()
    columns = {field.name: flat.field(field.name) for field in flat.type}
    ids, sources, places, starts = (columns[name].to_pylist() for name in ("document_id", "source", "place", "start"))
    renamed = np.isin(np.cumsum(np.array(starts) == 0) - 1, repeated)
    for i in np.flatnonzero(renamed).tolist():
        file = unit.files[places[i] if unit.kind == "text" else 0].name
        ids[i] += f"~{file}" if unit.kind == "text" else f"~{file}#{places[i]}"
        while block_id(sources[i], ids[i], 0) in taken:
            ids[i] += "~"
    first_span = np.cumsum([0, *spans.value_lengths().to_pylist()])
    block_ids = table["block_id"].to_pylist()
    for row, i in enumerate(first_span[:-1].tolist()):
        if renamed[i]:
            block_ids[row] = block_id(sources[i], ids[i], starts[i])
    columns["document_id"] = pa.array(ids, pa.string())
    members = pa.StructArray.from_arrays(list(columns.values()), fields=list(flat.type))
    lists = pa.ListArray.from_arrays(pa.array(first_span, pa.int32()), members, type=spans.type)
    for name, values in (("block_id", pa.array(block_ids, pa.uint64())), ("spans", lists)):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    example = int(np.argmax(renamed))
    return table, [sources[example], ids[example]]


def number_part(
    stage: Stage, staged: Stage, work: tuple[int, int, InputSplit, np.ndarray, frozenset[int]]
) -> dict[str, Any]:
    """Assign ordinals to a part's blocks and publish the part.

    Args:
        stage: where the part goes.
        staged: where it is.
        work: its index, its first ordinal, its input split, the indices of the documents to rename, and the names that
            are taken (``with_distinct_ids``).
    """
    started = time.monotonic()
    index, first, unit, repeated, taken = work
    name = part_name(index)
    marker = staged.store.read_json(f"_done/{name}.json")
    table, renamed = with_distinct_ids(read_staged(staged.store, name), unit, repeated, taken)
    content = stage.store.write_table(f"{name}.parquet", with_ordinals(table, first))
    counts = {**marker["counts"], "repeated": len(repeated)}
    facts = {"counts": counts, "renamed": renamed, "max_token_id": marker["max_token_id"], "first_ordinal": first}
    return stage.mark(name, started, **facts, sha256=content)
