"""Random corruption of what people and disks hand us: an error is one sentence, and nothing is lost in silence.

A target has valid files. One of them is corrupted (bits flipped, pieces removed, repeated or exchanged, JSON values
replaced), and read as the pipeline reads it. A fault is an exception other than StrideError, an error of several lines,
more than LIMIT seconds, or a loss: rows that are neither documents nor rejects, stored numbers that differ unnoticed.

Example: the target "inputs" cuts the last 40 bytes off a.parquet. plan() and read() reject the file, naming it; that is
right. Fewer documents without a reject would be a fault, and the file is kept in the folder ``faults``.
"""

import gzip
import io
import json
import random
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from stride_ray.cli.status import status
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.documents import Document, read, resolve_columns
from stride_ray.corpus.queries import read_queries
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.splits import plan
from stride_ray.corpus.tokenization.encoding import encode
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer, load_tokenizer
from stride_ray.models.curvature.kfac import SITES, load_sites
from stride_ray.operators.row_store import RowStore
from stride_ray.runtime.config import dumps, loads
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

# Seconds after which a read counts as hanging; kept examples of one fault.
LIMIT, KEPT = 60, 3
ROWS = 40
# JSON values that real files hold where another was expected.
VALUES = (
    *("null", "true", "-1", "1e999", "NaN", "Infinity", "0.5", "99999999999999999999", '""', "[]", "{}", "[null]"),
    *('"\\ud800"', '"\\u0000"', '"\u0085"', '[{"role": null}]', "[[1, 2]]", '{"text": {}}', "[1, -100, 3.5]"),
)


class FaultError(Exception):
    """What should not have happened, in a sentence."""


@dataclass
class Findings:
    """Counts of one target: corrupted files read, accepted, refused or partly rejected; faults by what they are."""

    tried: int = 0
    refused: int = 0
    faults: dict[str, int] = field(default_factory=dict)


def fuzz(target: str, folder: str, seconds: float, seed: int = 0, run: str = "") -> Findings:
    """Corrupt and read for some time.

    Args:
        target: of TARGETS.
        folder: for scratch files and ``faults/``.
        seconds: how long.
        seed: of the corruption.
        run: for the targets "queries" and "store", a finished run directory with local influence.

    Returns:
        What was seen; equal seeds try equal files in equal order.
    """
    root = Path(folder)
    (root / "faults").mkdir(parents=True, exist_ok=True)
    originals, check = TARGETS[target](root, run)
    generator, findings = random.Random(seed), Findings()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        name = generator.choice(sorted(originals))
        data = corrupted(originals[name], originals[generator.choice(sorted(originals))], generator)
        findings.tried += 1
        try:
            with _limited(LIMIT):
                check(name, data)
        except StrideError as error:
            findings.refused += 1
            if "\n" in str(error).strip():
                _record(findings, root, name, data, f"an error of several lines: {str(error)[:60]!r}")
        except Exception as error:
            _record(findings, root, name, data, _described(error))
    return findings


def corrupted(data: bytes, other: bytes, generator: random.Random) -> bytes:
    """A copy with one to three changes; ``other`` lends pieces."""
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(data) + 1)
        stop = min(len(data), start + generator.choice((1, 2, 8, 64, 1024)))
        piece = data[start:stop]
        change = generator.choice(("flip", "cut", "remove", "repeat", "random", "exchange", "value", "value"))
        if change == "flip" and piece:
            piece = bytes([piece[0] ^ (1 << generator.randrange(8))]) + piece[1:]
        elif change == "cut":
            return data[:start]
        elif change == "remove":
            piece = b""
        elif change == "repeat":
            piece = piece * generator.choice((2, 3, 50))
        elif change == "random":
            piece = generator.randbytes(len(piece))
        elif change == "exchange" and other:
            begin = generator.randrange(len(other))
            piece = other[begin : begin + len(piece) + 1]
        elif change == "value" and (values := list(re.finditer(rb'(?<=[:=\[,] )("[^"]*"|[\w.+-]+)', data))):
            start, stop = generator.choice(values).span()
            piece = generator.choice(VALUES).encode()
        data = data[:start] + piece + data[stop:]
    return data


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise FaultError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _described(error: Exception) -> str:
    if isinstance(error, FaultError):
        return str(error)
    ours = [each for each in traceback.extract_tb(error.__traceback__) if "stride_ray" in each.filename]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{place}"


def _record(findings: Findings, root: Path, name: str, data: bytes, fault: str) -> None:
    seen = findings.faults[fault] = findings.faults.get(fault, 0) + 1
    if seen <= KEPT:
        label = re.sub(r"\W+", "-", fault)[:80]
        (root / "faults" / f"{label}-{seen}-{Path(name).name}").write_bytes(data)


Check = Callable[[str, bytes], None]


def _inputs(root: Path, run: str) -> tuple[dict[str, bytes], Check]:
    """Documents in every format: each row becomes a document or a reject."""
    scratch = root / "inputs"

    def check(name: str, data: bytes) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (scratch / name).write_bytes(data)
        units = plan([str(scratch)], shard_bytes=2**20)
        columns = resolve_columns(units)
        items = [item for unit in units for item in read(unit, columns, set())]
        rejects = [item for item in items if isinstance(item, Rejected)]
        for reject in rejects:
            if "\n" in reject.reason or len(reject.reason) > 500:
                raise FaultError(f"a reject of several lines or {len(reject.reason)} characters in {Path(name).suffix}")
        lines = sum(1 for line in re.split(rb"\n", data) if line.strip()) if name.endswith(".jsonl") else ROWS
        if name.endswith(".txt"):
            lines = 1 if data.strip() else 0
        if not rejects and len(items) < lines:
            raise FaultError(f"{'rows' if len(items) else 'all rows'} of a {Path(name).suffix} file lost in silence")
        if name.endswith(".jsonl") and len(items) < lines:
            raise FaultError("lines of a .jsonl file neither read nor rejected")

    return _documents(), check


def _documents() -> dict[str, bytes]:
    rows = [{"id": f"d{i}", "text": f"Document {i}: snow fell on {i * 37 % 11} roofs."} for i in range(ROWS)]
    chats = [
        {"messages": [{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": str(2 * i)}]}
        for i in range(ROWS)
    ]
    ids = [{"token_ids": list(range(i, i + 9)), "loss_mask": [n % 2 for n in range(9)]} for i in range(ROWS)]
    found = {}
    for label, table in (("text", rows), ("chat", chats), ("ids", ids)):
        lines = "".join(json.dumps(row) + "\n" for row in table).encode()
        found[f"{label}.jsonl"] = lines
        found[f"{label}.jsonl.gz"] = gzip.compress(lines, mtime=0)
        found[f"{label}.jsonl.zst"] = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
        columns = pa.Table.from_pylist(table)
        for ending, options in (
            (".parquet", {"row_group_size": 16}),
            (".checked.parquet", {"write_page_checksum": True}),
        ):
            buffer = io.BytesIO()
            pq.write_table(columns, buffer, **options)
            found[label + ending] = buffer.getvalue()
        for ending, writer in ((".stream.arrow", pa.ipc.new_stream), (".file.arrow", pa.ipc.new_file)):
            sink = pa.BufferOutputStream()
            with writer(sink, columns.schema) as stream:
                stream.write_table(columns, max_chunksize=16)
            found[label + ending] = sink.getvalue().to_pybytes()
    found["plain.txt"] = "\n".join(row["text"] for row in rows).encode()
    return found


def _queries(root: Path, run: str) -> tuple[dict[str, bytes], Check]:
    """Query files: each row becomes a query, good or failed, or the file is refused."""
    tokenizer = load_tokenizer(Blocks(Run(run).stage("blocks").store).store.child("tokenizer").url)

    def check(name: str, data: bytes) -> None:
        path = root / name
        path.write_bytes(data)
        table = read_queries(str(path), tokenizer)
        lines = sum(1 for line in data.split(b"\n") if line.strip())
        if name.endswith(".jsonl") and table.num_rows != lines:
            raise FaultError("queries lost in silence")
        if name.endswith(".checked.parquet") and table.num_rows < ROWS and "failed" not in table["status"].to_pylist():
            raise FaultError("queries of a Parquet file lost in silence")

    return {n: d for n, d in _documents().items() if n.endswith((".jsonl", ".parquet"))}, check


def _config(root: Path, run: str) -> tuple[dict[str, bytes], Check]:
    """run.toml: valid, and the same once written and read again; or refused."""

    def check(name: str, data: bytes) -> None:
        path = root / "run.toml"
        path.write_bytes(data)
        config = Run(str(root)).config
        if loads(dumps(config)) != config:
            raise FaultError("a configuration that reads differently once written")

    return {"run.toml": dumps(loads(""), comments=True).encode()}, check


def _store(root: Path, run: str) -> tuple[dict[str, bytes], Check]:
    """Files of a finished run: read as before, or refused."""
    copy = root / "run"
    if not copy.exists():
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.html"))
    names = [path for path in copy.rglob("*") if path.suffix in (".parquet", ".safetensors", ".json")]
    originals = {str(path.relative_to(copy)): path.read_bytes() for path in names if "_done" not in path.parts}
    before = _contents(str(copy))

    def check(name: str, data: bytes) -> None:
        (copy / name).write_bytes(data)
        try:
            after = _contents(str(copy))
            if after != before:
                raise FaultError(f"{Path(name).parts[0]}/*{Path(name).suffix} differs unnoticed")
        finally:
            (copy / name).write_bytes(originals[name])

    return originals, check


def _contents(url: str) -> list[Any]:
    """All that later stages and people read from a run."""
    run = Run(url)
    blocks = Blocks(run.stage("blocks").store)
    question = encode([Document("", "", text="a text")], load_saved_tokenizer(blocks.store))[0]
    found: list[Any] = [status(run), repr(question)]
    found += [a.tobytes() for batch in blocks.batches(0, len(blocks), 64) for a in batch]
    rows = RowStore(run.stage("operators").store)
    found += [
        array.tobytes() for part in rows.facts["parts"] for array in (rows.read(part).bits, rows.read(part).scales)
    ]
    load_sites(run.stage("curvature").store, SITES, "cpu")
    for path in sorted(Path(url).rglob("*.*")):
        name = str(path.relative_to(url))
        if path.suffix == ".json" and path.parent.name != "tokenizer":
            found.append(repr(run.store.read_json(name)))
        elif path.suffix == ".parquet":
            table = run.store.read_table(name).combine_chunks()
            found.append(
                pa.RecordBatch.from_struct_array(table.to_struct_array().combine_chunks()).serialize().to_pybytes()
            )
        elif path.suffix == ".safetensors":
            found.append({key: value.numpy().tobytes() for key, value in run.store.read_tensors(name).items()})
    return found


TARGETS: dict[str, Callable[[Path, str], tuple[dict[str, bytes], Check]]] = {
    "inputs": _inputs,
    "queries": _queries,
    "config": _config,
    "store": _store,
}
