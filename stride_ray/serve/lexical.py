"""Full-text search of the pool: BM25 over token ids, by SQLite's FTS5.

The index lies in a temporary file of SQLite's, about 300 bytes a block of 128 tokens, which ends with the connection.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.tokenization.decoding import unpadded

# Blocks read at once while the index is built.
ROWS = 4096
# A search looks for the rarest tokens of a text, as many as stand in at most this many blocks together, so that its
# time does not grow with the pool; but always for the rarest one.
POSTINGS = 200_000


class LexicalIndex:
    """Finds the blocks that have the rarest tokens in common with a text.

    Example: of the blocks "the sea" and "the mill", "the old mill" finds the second; "the" alone finds both.

    Args:
        blocks: the pool.
        stop: index the blocks before this ordinal.
    """

    def __init__(self, blocks: Blocks, stop: int) -> None:
        # An empty name is a temporary file. Another thread asks than the one that builds.
        self.database = sqlite3.connect("", check_same_thread=False)
        # Numbers as words: what is equal is decided by the tokenizer, for every language.
        self.database.execute("CREATE VIRTUAL TABLE blocks USING fts5(tokens, content = '', tokenize = 'ascii')")
        self.database.execute("CREATE VIRTUAL TABLE counts USING fts5vocab(blocks, 'row')")
        for start in range(0, stop, ROWS):
            ordinals = np.arange(start, min(start + ROWS, stop))
            rows = blocks.take(ordinals, ["token_ids", "spans"]).to_pylist()
            texts = ((int(i), _words(unpadded(row))) for i, row in zip(ordinals, rows, strict=True))
            self.database.executemany("INSERT INTO blocks (rowid, tokens) VALUES (?, ?)", texts)
        self.database.commit()

    def nearest(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Ordinals of at most ``count`` blocks, best first; ties by ordinal."""
        with closing(self.database.cursor()) as cursor:
            held = list[tuple[int, int]]()
            for token in set(token_ids):
                found = cursor.execute("SELECT doc FROM counts WHERE term = ?", (str(token),)).fetchone()
                held += [(found[0], token)] if found else []
            held.sort()
            postings = np.cumsum([blocks for blocks, _ in held])
            chosen = [token for _, token in held[: max(1, int((postings <= POSTINGS).sum()))]]
            if not chosen or not count:
                return []
            terms = " OR ".join(f'"{token}"' for token in chosen)
            order = "SELECT rowid FROM blocks WHERE blocks MATCH ? ORDER BY rank, rowid LIMIT ?"
            return [int(row) for (row,) in cursor.execute(order, (terms, count))]


def _words(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))
