"""The pool as selection sees it: one row per document, with the place of its row in the input and its length.

A part of the blocks holds the documents of one unit of the input, in the order of reading, each from the span that
starts at its token 0 to the next such span. So a part tells the documents and their tokens, and its unit their places.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stride_ray.corpus.blocks import fixed_lists
from stride_ray.corpus.documents import Document, read_placed
from stride_ray.corpus.files import current
from stride_ray.corpus.packing import block_id
from stride_ray.corpus.readers import unfetched
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage, part_name
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redacted
from stride_ray.selection.duplicates import SIGNATURE, signature

POOL = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("signature", SIGNATURE),
    ]
)


class Reading(NamedTuple):
    """How the documents of a run are looked up.

    Attributes:
        blocks: the run's ``blocks/`` folder.
        columns: role to column of its input.
        block_tokens: tokens in a block.
        packed: whether a block may hold several documents.
        as_blocks: whether a document's place is its number in its part (rather than its row's in the input).
    """

    blocks: Store
    columns: dict[str, str]
    block_tokens: int
    packed: bool
    as_blocks: bool


class Piece(NamedTuple):
    """One document of a part.

    Attributes:
        document_id: its id.
        source: of the block that it starts in, which in packed blocks may be a neighbour's.
        first_block: that block's id where the document is the first in it, else None.
        ids: its tokens (int32), end-of-text included; mask: which of them count (bool). Empty where not asked for.
        tokens: how many there are.
    """

    document_id: str
    source: str
    first_block: int | None
    ids: np.ndarray
    mask: np.ndarray
    tokens: int


def reading(run: Run, as_blocks: bool) -> tuple[Reading, list[InputSplit]]:
    """How to read a sharded run's documents, and the units of its input, one per part of the blocks."""
    store = run.stage("blocks").store
    plan, manifest = store.read_json("plan.json"), store.read_json("manifest.json")
    units = [InputSplit.from_dict(unit) for unit in plan["units"]][: len(manifest["parts"])]
    how = Reading(store, plan["columns"], manifest["block_tokens"], manifest["layout"] == "pack", as_blocks)
    return how, units


def list_part(how: Reading, stage: Stage, signed: bool, work: tuple[int, InputSplit]) -> dict[str, Any]:
    """Publish the documents of one part (POOL) as ``_pool/part-*.parquet``; returns the marker.

    Args:
        how: see ``reading``.
        stage: the selection's folder.
        signed: with MinHash signatures.
        work: the part's number, and its unit of the input.

    Raises:
        StrideError: where the input is needed and is not what was sharded.
    """
    started = time.monotonic()
    part, unit = work
    rows: list[dict[str, Any]] = []
    placed = _placed(how, unit) if _needs_input(how, unit) else None
    for number, piece in enumerate(pieces(how, part, tokens=signed)):
        source, place = piece.source, number
        if placed is not None:
            document, found = _row_of(piece, placed, unit)
            source, place = document.source, number if how.as_blocks else found
        elif how.packed and unit.kind == "text":
            source = piece.document_id  # a text file is its own source
        signed_as = signature(piece.ids) if signed else None
        row = {"document_id": piece.document_id, "source": source, "part": part, "place": place}
        rows.append({**row, "tokens": piece.tokens, "signature": signed_as})
    table = pa.Table.from_pylist(rows, POOL)
    content = stage.store.write_table(f"_pool/{part_name(part)}.parquet", table)
    tokens = sum(row["tokens"] for row in rows)
    return stage.mark(f"pool-{part:05d}", started, documents=len(rows), tokens=tokens, sha256=content)


def pieces(how: Reading, part: int, tokens: bool) -> Iterator[Piece]:
    """The documents of a part in order, with their tokens where asked for."""
    columns = ["block_id", "source", "spans", *(["token_ids", "loss_mask"] if tokens else [])]
    open_piece: Piece | None = None
    held: list[tuple[np.ndarray, np.ndarray]] = []
    with how.blocks.open_parquet(f"{part_name(part)}.parquet") as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            ids = fixed_lists(table["token_ids"], how.block_tokens, 0) if tokens else None
            mask = fixed_lists(table["loss_mask"], how.block_tokens, True) if tokens else None
            names, sources = table["block_id"].to_pylist(), table["source"].to_pylist()
            for row, spans in enumerate(table["spans"].to_pylist()):
                offset = 0
                for index, span in enumerate(spans):
                    if span["start"] == 0:
                        if open_piece is not None:
                            yield _closed(open_piece, held)
                        first = names[row] if index == 0 else None
                        nothing = np.zeros(0, np.int32)
                        open_piece = Piece(span["document_id"], sources[row], first, nothing, nothing > 0, 0)
                        held = []
                    assert open_piece is not None  # packing never crosses a unit: the first span starts a document
                    end = offset + span["length"]
                    if ids is not None and mask is not None:
                        held.append((ids[row, offset:end], mask[row, offset:end]))
                    open_piece = open_piece._replace(tokens=open_piece.tokens + span["length"])
                    offset = end
    if open_piece is not None:
        yield _closed(open_piece, held)


def _closed(piece: Piece, held: list[tuple[np.ndarray, np.ndarray]]) -> Piece:
    if not held:
        return piece
    ids, masks = zip(*held, strict=True)
    return piece._replace(ids=np.concatenate(ids).astype(np.int32), mask=np.concatenate(masks).astype(bool))


def _needs_input(how: Reading, unit: InputSplit) -> bool:
    """Whether the blocks do not tell all: rows are to be copied, or a packed block's source is that of most of it."""
    return not how.as_blocks or (how.packed and "source" in how.columns and unit.kind != "text")


def refuse_changed(unit: InputSplit) -> None:
    """Raise StrideError where a unit's files are not those that were sharded, or cannot be looked at."""
    for file in unit.files:
        try:
            now = current(file)
        except StrideError:
            raise
        except Exception as error:  # every remote file system raises classes of its own
            raise unfetched(file, error) from None
        if now.content != file.content:
            raise StrideError(
                f"{redacted(file.url)} was changed since it was sharded: its size or its time is another; restore "
                "both, or select blocks (--blocks), which need no input."
            )


def _placed(how: Reading, unit: InputSplit) -> Iterator[tuple[int, Document]]:
    refuse_changed(unit)
    for place, item in read_placed(unit, how.columns):
        if isinstance(item, Document):
            yield place, item


def _row_of(piece: Piece, placed: Iterator[tuple[int, Document]], unit: InputSplit) -> tuple[Document, int]:
    """The row of the input that became a document of the blocks; rows before it were rejected by the tokenizer."""
    for place, document in placed:
        stem, _, copy = piece.document_id.rpartition("~")
        same = document.document_id == piece.document_id
        same = same or (copy.isdigit() and document.document_id == stem)
        # A block's id holds its first document's source: a cheap proof that this is the row.
        if same and piece.first_block in (None, block_id(document.source, piece.document_id, 0)):
            return document, place
    names = json.dumps([file.name for file in unit.files[:2]])
    raise StrideError(
        f"The document {piece.document_id!r} is no longer where it was sharded from (input {names}); restore "
        "the input, or select blocks (--blocks), which are in the run directory."
    )
