"""The pool as a table of documents, with each one's length and the place of its row in the input.

A part of the blocks holds the documents of one input split in reading order; a document runs from the span that starts
at its token 0 to the next such span, which also says where its row is in the input split. The split is read only to see
that the row is still there.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stride_ray.corpus.blocks import fixed_lists
from stride_ray.corpus.documents import Document, read
from stride_ray.corpus.files import refreshed
from stride_ray.corpus.readers import unfetched
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage, part_name
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url
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
    """How to read the documents of a run.

    Attributes:
        blocks: the run's ``blocks/`` folder.
        columns: role to column of its input.
        block_tokens: tokens per block.
        packed: whether a block may hold several documents.
        as_blocks: whether a document's place is its index in its part rather than the place of its input row.
    """

    blocks: Store
    columns: dict[str, str]
    block_tokens: int
    packed: bool
    as_blocks: bool


class Piece(NamedTuple):
    """One document of a part.

    Attributes:
        document_id, source: its name.
        place: where its row is in the input split (documents.Document).
        ids: its tokens (int32), including end-of-text; empty if not requested.
        mask: its loss mask (bool); empty if not requested.
        tokens: number of tokens.
    """

    document_id: str
    source: str
    place: int
    ids: np.ndarray
    mask: np.ndarray
    tokens: int


def reading(run: Run, as_blocks: bool) -> tuple[Reading, list[InputSplit]]:
    """Return how to read a sharded run's documents, and its input splits, one per part of the blocks."""
    store = run.stage("blocks").store
    plan, manifest = store.read_json("plan.json"), store.read_json("manifest.json")
    units = [InputSplit.from_dict(unit, run.config.corpus.input) for unit in plan["units"]][: len(manifest["parts"])]
    how = Reading(store, plan["columns"], manifest["block_tokens"], manifest["layout"] == "pack", as_blocks)
    return how, units


def list_part(how: Reading, stage: Stage, signed: bool, work: tuple[int, InputSplit]) -> dict[str, Any]:
    """Write the documents of one part (POOL) to ``_pool/part-*.parquet``; returns the done marker.

    Args:
        how: see ``reading``.
        stage: the selection's folder.
        signed: whether to compute MinHash signatures.
        work: the part's index, and its input split.

    Raises:
        StrideError: the input is needed and was changed since it was sharded.
    """
    started = time.monotonic()
    part, unit = work
    rows: list[dict[str, Any]] = []
    placed = None if how.as_blocks else _documents(how, unit)
    for number, piece in enumerate(pieces(how, part, tokens=signed)):
        if placed is not None:
            _check_row(piece, placed, unit)
        place = number if how.as_blocks else piece.place
        signed_as = signature(piece.ids) if signed else None
        row = {"document_id": piece.document_id, "source": piece.source, "part": part, "place": place}
        rows.append({**row, "tokens": piece.tokens, "signature": signed_as})
    table = pa.Table.from_pylist(rows, POOL)
    content = stage.store.write_table(f"_pool/{part_name(part)}.parquet", table)
    tokens = sum(row["tokens"] for row in rows)
    return stage.mark(f"pool-{part:05d}", started, documents=len(rows), tokens=tokens, sha256=content)


def pieces(how: Reading, part: int, tokens: bool) -> Iterator[Piece]:
    """Yield the documents of a part in order, with their token ids and loss mask if ``tokens``."""
    columns = ["spans", *(["token_ids", "loss_mask"] if tokens else [])]
    open_piece: Piece | None = None
    held: list[tuple[np.ndarray, np.ndarray]] = []
    with how.blocks.open_parquet(f"{part_name(part)}.parquet") as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            ids = fixed_lists(table["token_ids"], how.block_tokens, 0) if tokens else None
            mask = fixed_lists(table["loss_mask"], how.block_tokens, True) if tokens else None
            for row, spans in enumerate(table["spans"].to_pylist()):
                offset = 0
                for span in spans:
                    if span["start"] == 0:
                        if open_piece is not None:
                            yield _closed(open_piece, held)
                        nothing, name = np.zeros(0, np.int32), (span["document_id"], span["source"])
                        open_piece = Piece(*name, span["place"], nothing, nothing > 0, 0)
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


def refuse_changed(unit: InputSplit) -> None:
    """Raise StrideError if a file of an input split has changed since it was sharded, or cannot be accessed."""
    for file in unit.files:
        try:
            now = refreshed(file)
        except StrideError:
            raise
        except Exception as error:  # remote file systems raise their own classes
            raise unfetched(file, error) from None
        if now.content != file.content:
            raise StrideError(
                f"{redact_url(file.url)} was changed since it was sharded: its size or modification time differs; "
                "restore both, or select blocks (--blocks), which need no input."
            )


def _documents(how: Reading, unit: InputSplit) -> Iterator[Document]:
    refuse_changed(unit)
    return (item for item in read(unit, how.columns) if isinstance(item, Document))


def _check_row(piece: Piece, documents: Iterator[Document], unit: InputSplit) -> None:
    """Advance to the input row that a document of the blocks came from; raise StrideError if it is another one now."""
    document = next((each for each in documents if each.place >= piece.place), None)
    if (
        document is None
        or (document.place, document.source) != (piece.place, piece.source)
        # Sharding adds its place to an id that its source has already (numbering.with_distinct_ids).
        or not f"{piece.document_id}~".startswith(f"{document.document_id}~")
    ):
        names = json.dumps([file.name for file in unit.files[:2]])
        raise StrideError(
            f"The document {piece.document_id!r} is no longer where it was sharded from (input {names}); restore "
            "the input, or select blocks (--blocks), which are in the run directory."
        )
