"""Tokenised documents to blocks of equal length, the units of attribution.

There are two layouts. "pack", as in pre-training: documents are joined by end-of-text and the stream is cut every
``block_tokens`` tokens, so a block may hold parts of several documents. "split": each document is cut separately and
its tail padded. Neither drops tokens: the spans of a document add up to the document. Packing restarts with each unit,
so units are independent of each other. Choose pack as in pre-training, split to keep documents apart at the price of
padding.

Example with blocks of four tokens: documents a = 1 2 3, b = 4 5 E and c = 6 (E end-of-text, · padding) become

    pack    [1 2 3 E]  [4 5 E 6]  [E · · ·]
    split   [1 2 3 ·]  [4 5 E ·]  [6 · · ·]
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stride_ray.corpus.documents import TokenizedDocument
from stride_ray.corpus.readers import Rejected
from stride_ray.runtime.errors import StrideError

LAYOUTS = ("pack", "split")

# Id of padding. Padding is masked, so any id will do that every model has; the model may not know a tokenizer's own
# padding token, which is often added later.
PADDING = 0

# Rejects kept for inspection; all are counted.
KEPT_REJECTS = 20
# Names of unused columns kept; objects may have a key of their own in every row.
KEPT_UNUSED = 100

# Blocks per batch of ``iter_blocks``; bounds its memory.
_BATCH_BLOCKS = 1024

SPAN_TYPE = pa.struct(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
    ]
)


@dataclass
class Counts:
    """Document statistics of a unit. Counts of several units add up with ``+``.

    Attributes:
        documents: documents in the blocks.
        blocks: number of blocks.
        tokens: tokens of documents, including end-of-text but not padding.
        target_tokens: tokens that carry loss.
        rejected: rejected rows, those of unreadable parts of files included; a whole file counts as one.
        repeated: documents renamed because an earlier one of their source has the same id (numbering.repeats).
        rejects: the first KEPT_REJECTS rejects.
        unused: columns that held something and became no part of a document; the first KEPT_UNUSED by name.
        unrendered: what conversations hold and the chat template leaves out (ChatTemplate.left_out); likewise.
    """

    documents: int = 0
    blocks: int = 0
    tokens: int = 0
    target_tokens: int = 0
    rejected: int = 0
    repeated: int = 0
    rejects: list[Rejected] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unrendered: list[str] = field(default_factory=list)

    def __add__(self, other: "Counts") -> "Counts":
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        names = {name: sorted(set(values[name]))[:KEPT_UNUSED] for name in ("unused", "unrendered")}
        return Counts(**{**values, "rejects": values["rejects"][:KEPT_REJECTS], **names})

    def reject(self, item: Rejected) -> None:
        """Count a reject's rows, and keep it if it is one of the first KEPT_REJECTS."""
        self.rejected += item.rows
        if len(self.rejects) < KEPT_REJECTS:
            self.rejects.append(item)

    def to_dict(self) -> dict[str, Any]:
        """The counts as a JSON-serialisable dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Counts":
        """The inverse of ``to_dict``."""
        return cls(**{**value, "rejects": [Rejected(**reject) for reject in value["rejects"]]})


def block_schema(block_tokens: int, ordinals: bool = True) -> pa.Schema:
    """Columns of a table of blocks.

    ``block_id`` uint64; ``ordinal`` int64, the block's number in the corpus; ``source`` string, that of the longest
    span; ``spans`` list of (document_id, source, place, start, length): the block is the concatenation of these spans,
    each ``length`` tokens of a document from its token ``start`` on, followed by padding, and ``place`` is where the
    document's row is in its unit (documents.Document); ``token_ids`` int32 [block_tokens]; ``loss_mask`` bool
    [block_tokens], which tokens carry loss, null: all.

    Args:
        block_tokens: tokens in a block.
        ordinals: whether to include the ordinal column, which tables from ``make_blocks`` lack.
    """
    columns = [
        pa.field("block_id", pa.uint64(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("spans", pa.list_(SPAN_TYPE), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32(), block_tokens), nullable=False),
        # Not a fixed-size list: most Parquet readers fail on nulls among those.
        pa.field("loss_mask", pa.list_(pa.bool_())),
    ]
    return pa.schema([column for column in columns if ordinals or column.name != "ordinal"])


def make_blocks(
    items: Iterable[TokenizedDocument | Rejected], layout: str, block_tokens: int, end_of_text: int, pad: int
) -> tuple[pa.Table, Counts]:
    """All blocks of a unit as one table without ordinals, and the counts.

    Args:
        items: the documents and rejects of a unit, in reading order.
        layout: "pack" or "split".
        block_tokens: B, tokens in a block.
        end_of_text: id appended to each document that does not end with it ("pack"). It belongs to the document's last
            span, and carries loss unless the document has a mask.
        pad: padding id; never carries loss.

    Returns:
        A table with ``block_schema(block_tokens, ordinals=False)``, in document order, and the counts.

    Raises:
        StrideError: unknown layout, or ``block_tokens`` below 1.
    """
    counts = Counts()
    batches = list(iter_blocks(items, layout, block_tokens, end_of_text, pad, counts))
    return pa.Table.from_batches(batches, block_schema(block_tokens, ordinals=False)), counts


def block_id(source: str, document_id: str, start: int) -> int:
    """A block's id, from the source, the document id and the start token of its first span.

    An 8-byte BLAKE2b hash as a big-endian unsigned integer; the same on every machine.
    """
    name = f"{_document_name(source, document_id)}, {start}]".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


@lru_cache(maxsize=4 * _BATCH_BLOCKS)
def _document_name(source: str, document_id: str) -> str:
    """The beginning of the JSON list [source, document_id, start], cached because a document may have many blocks."""
    # JSON, because with a plain separator two different triples could collide. Dumping the strings alone is faster.
    return f"[{json.dumps(source)}, {json.dumps(document_id)}"


class _Span(NamedTuple):
    document_id: str
    source: str
    place: int
    start: int
    length: int


def iter_blocks(
    items: Iterable[TokenizedDocument | Rejected],
    layout: str,
    block_tokens: int,
    end_of_text: int,
    pad: int,
    counts: Counts,
) -> Iterator[pa.RecordBatch]:
    """``make_blocks`` in batches of at most 1,024 blocks, for units that exceed memory; updates ``counts``."""
    if layout not in LAYOUTS:
        raise StrideError(f"There is no layout {layout!r}; choose pack or split.")
    if block_tokens < 1:
        raise StrideError(f"Blocks of {block_tokens} tokens cannot be made; give block_tokens = 1 or more.")
    buffer = _TokenBuffer(block_tokens, pad)
    end, no_loss = np.array([end_of_text], np.int32), np.zeros(1, np.bool_)
    for document in items:
        if isinstance(document, Rejected):
            counts.reject(document)
            continue
        ids, mask = document.ids, document.mask
        if layout == "pack" and ids[-1] != end_of_text:
            ids = np.concatenate([ids, end])
            mask = None if mask is None else np.concatenate([mask, no_loss])
        counts.documents += 1
        counts.tokens += len(ids)
        counts.target_tokens += len(ids) if mask is None else int(mask.sum())
        buffer.add(document, ids, mask)
        if layout == "split":
            buffer.pad_to_block()
        while buffer.length >= _BATCH_BLOCKS * block_tokens:
            batch = buffer.pop_blocks(_BATCH_BLOCKS)
            counts.blocks += batch.num_rows
            yield batch
    buffer.pad_to_block()
    if buffer.length:
        batch = buffer.pop_blocks(buffer.length // block_tokens)
        counts.blocks += batch.num_rows
        yield batch


class _TokenBuffer:
    """Buffer of tokens and spans, cut every ``block_tokens``; its first token is always the first of a block."""

    def __init__(self, block_tokens: int, pad: int) -> None:
        self.block_tokens = block_tokens
        self.pad = pad
        self.length = 0  # tokens held, padding included
        self._ids: list[npt.NDArray[np.int32]] = []
        self._masks: list[npt.NDArray[np.bool_]] = []
        self._spans: list[list[_Span]] = []  # per block, including a partial one

    def add(self, document: TokenizedDocument, ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_] | None) -> None:
        """Append a document's tokens ([tokens]), which may extend over several blocks."""
        start = 0
        while start < len(ids):
            filled = (self.length + start) % self.block_tokens
            if not filled:
                self._spans.append([])
            length = min(self.block_tokens - filled, len(ids) - start)
            self._spans[-1].append(_Span(document.document_id, document.source, document.place, start, length))
            start += length
        self._append(ids, np.ones(len(ids), np.bool_) if mask is None else mask)

    def pad_to_block(self) -> None:
        """Pad the last block."""
        missing = -self.length % self.block_tokens
        if missing:
            self._append(np.full(missing, self.pad, np.int32), np.zeros(missing, np.bool_))

    def _append(self, ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]) -> None:
        self._ids.append(ids)
        self._masks.append(mask)
        self.length += len(ids)

    def pop_blocks(self, count: int) -> pa.RecordBatch:
        """Remove the first ``count`` blocks, which must be full, and return them as rows."""
        size = count * self.block_tokens
        ids, mask = np.concatenate(self._ids), np.concatenate(self._masks)
        spans = self._spans[:count]
        rest = len(ids) - size
        self.length, self._spans = rest, self._spans[count:]
        self._ids, self._masks = ([ids[size:]], [mask[size:]]) if rest else ([], [])
        return _record_batch(spans, ids[:size], mask[:size].reshape(count, self.block_tokens))


def _record_batch(
    spans: Sequence[Sequence[_Span]], ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]
) -> pa.RecordBatch:
    """Blocks as rows, from the spans of each block, ids int32 [blocks × B] and mask bool [blocks, B]."""
    schema = block_schema(mask.shape[1], ordinals=False)
    flat = [span for block in spans for span in block]
    offsets = np.cumsum([0, *map(len, spans)])
    members = pa.StructArray.from_arrays(
        [
            pa.array([span.document_id for span in flat], pa.string()),
            pa.array([span.source for span in flat], pa.string()),
            pa.array([span.place for span in flat], pa.int64()),
            pa.array([span.start for span in flat], pa.int32()),
            pa.array([span.length for span in flat], pa.int32()),
        ],
        fields=list(SPAN_TYPE),
    )
    unmasked = mask.all(axis=1)
    columns = {
        "block_id": pa.array([block_id(b[0].source, b[0].document_id, b[0].start) for b in spans], pa.uint64()),
        "source": pa.array([max(block, key=lambda span: span.length).source for block in spans], pa.string()),
        "spans": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), members, type=schema.field("spans").type),
        "token_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), type=schema.field("token_ids").type),
        "loss_mask": pa.ListArray.from_arrays(
            pa.array(np.cumsum([0, *np.where(unmasked, 0, mask.shape[1])]), pa.int32()),
            pa.array(mask[~unmasked].ravel()),
            type=schema.field("loss_mask").type,
            mask=pa.array(unmasked),
        ),
    }
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)
