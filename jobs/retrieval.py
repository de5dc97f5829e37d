"""Job: source retrieval on Python's standard library, printed as a table.

The documents are its modules of 1 to 8 kB, without tests and encoding tables, cut into blocks of 128 tokens; small
documents keep the chance level low. 100 blocks are held out, a model is trained on the rest, and operators of subsets
are fitted to it. Then 100 blocks of the pool (verbatim) and the 100 held-out blocks (unseen, from documents whose other
blocks are in the pool) are attributed. The last line is one JSON object.

    python jobs/retrieval.py FOLDER [--queries 100]
"""

import argparse
import dataclasses
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stride_ray.cli.quickstart import BLOCK_TOKENS, EPOCHS
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.retrieval import as_table, source_retrieval
from stride_ray.models.builtin.toy import train_model, train_tokenizer
from stride_ray.operators.fit import fit
from stride_ray.runtime.run import Run
from stride_ray.runtime.tasks import connected

# Minimum number of blocks of a document that stay in the pool.
REMAINING = 3
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def main() -> int:
    """Build the pool, train, fit, attribute and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where everything is made; a rerun goes on there")
    parser.add_argument("--queries", type=int, default=100, help="queries of each kind (default: 100)")
    parsed = parser.parse_args()
    root = Path(parsed.folder)
    files = documents()
    root.mkdir(parents=True, exist_ok=True)
    train_tokenizer((path.read_text("utf-8") for path in files), root / "tokenizer")
    unseen, unseen_sources = write_pool(root, files, parsed.queries)
    settings = {
        "corpus.input": [str(root / "pool.parquet")],
        "corpus.columns": {"token_ids": "token_ids", "source": "document"},
        "corpus.layout": "split",
        "corpus.tokenizer": str(root / "tokenizer"),
        "corpus.block_tokens": BLOCK_TOKENS,
        "model.path": str(root / "model"),
        "operators.rows": "subsets",
    }
    run = Run(str(root / "run"), changes=settings)
    with connected(run.config.compute):
        shard(run)
        pool = Blocks(run.stage("blocks").store)
        train_model(pool, root / "tokenizer", root / "model", EPOCHS)
        print(fit(run)["verdict"])
        rng = np.random.default_rng(1)
        full = np.flatnonzero(pool.batch(np.arange(len(pool))).mask.all(1))
        verbatim = np.sort(rng.choice(full, parsed.queries, replace=False))
        ids = np.concatenate([pool.batch(verbatim).ids, unseen])
        sources = pool.take(verbatim, ["source"])["source"].to_pylist() + unseen_sources
        kinds = ["verbatim"] * len(verbatim) + ["unseen"] * len(unseen)
        found = source_retrieval(run, ids.astype(np.int32), sources, kinds)
    print(f"\n{len(pool)} blocks of {len(files)} documents, K={run.config.membership.subsets}:\n")
    print(as_table(found))
    print(json.dumps([dataclasses.asdict(each) for each in found]).replace("NaN", "null"))
    return 0


def documents() -> list[Path]:
    """The standard library's small modules, sorted."""
    left_out = {"site-packages", "encodings", "idle_test", "test", "tests"}
    return sorted(
        path
        for path in LIBRARY.rglob("*.py")
        if 1_000 < path.stat().st_size <= 8_000 and not left_out & set(path.relative_to(LIBRARY).parts)
    )


def write_pool(root: Path, files: list[Path], queries: int) -> tuple[np.ndarray, list[str]]:
    """Cut the documents, hold out full blocks and write the rest to pool.parquet.

    Returns:
        The held-out blocks, token ids [queries, BLOCK_TOKENS], and their documents.
    """
    tokenizer = load_tokenizer(str(root / "tokenizer"))
    pieces: list[tuple[str, list[int]]] = []
    for path in files:
        ids = tokenizer(path.read_text("utf-8"), add_special_tokens=False)["input_ids"]
        name = str(path.relative_to(LIBRARY))
        pieces += [(name, ids[start : start + BLOCK_TOKENS]) for start in range(0, len(ids), BLOCK_TOKENS)]
    rng = np.random.default_rng(0)
    left = {name: sum(each == name for each, _ in pieces) for name, _ in pieces}
    out: list[int] = []
    for index in rng.permutation(len(pieces)):
        name, ids = pieces[index]
        if len(out) < queries and len(ids) == BLOCK_TOKENS and left[name] > REMAINING:
            out.append(int(index))
            left[name] -= 1
    kept = [piece for index, piece in enumerate(pieces) if index not in set(out)]
    if not (root / "pool.parquet").exists():
        columns = {"document": [name for name, _ in kept], "token_ids": [ids for _, ids in kept]}
        pq.write_table(pa.table(columns), root / ".pool.parquet")
        (root / ".pool.parquet").replace(root / "pool.parquet")
    return np.array([pieces[index][1] for index in out]), [pieces[index][0] for index in out]


if __name__ == "__main__":
    sys.exit(main())
