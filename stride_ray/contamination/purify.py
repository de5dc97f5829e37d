"""Write the corpus without lexical findings: each input file in its own format, without leaked spans or documents.

Lines and files without a finding keep their bytes, and lines with one all but the cleaned strings; a Parquet or Arrow
file keeps its schema, its row groups or batches, and all columns but the cleaned one. Only findings of the lexical
channel are removed. A document of which nothing remains is left out.
"""

import contextlib
import copy
import gzip
import json
import operator
import os
import shutil
import tempfile
import time
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from stride_ray.contamination.lexical.copies import COPY
from stride_ray.contamination.nightly import corpus_of
from stride_ray.contamination.reviews import FALSE
from stride_ray.contamination.schemas.texts import strings
from stride_ray.corpus.files import END, SourceFile, compression, is_corrupt
from stride_ray.corpus.readers import inflated, is_array, raw_lines
from stride_ray.corpus.rows.json_strings import with_strings
from stride_ray.corpus.rows.json_values import decoded, encoded, stored_as
from stride_ray.corpus.rows.roles import OPENED, Roles, closed, opened, possible_columns, roles_of, text_places
from stride_ray.corpus.rows.row import reason
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, claim, refuse_inside
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import filesystem, redact_url

# Hidden folder in the target with stage.json and the done markers; readers of the target skip it.
RECORD = ".purified"
# Spans of one document: part name to (start, stop) pairs.
Spans = dict[str, list[tuple[int, int]]]


def purify(run: Run, scans: str, night: str, target: str, whole: bool = False) -> dict[str, Any]:
    """Write the scanned input without a night's lexical findings.

    Args:
        run: the scanned run.
        scans: the scan's folder.
        night: name of the night.
        target: an empty folder for the cleaned files, which keep their names in the input. Running again with the same
            folder does only what is missing.
        whole: remove whole documents that contain a finding, not just the spans.

    Returns:
        Counts: ``files`` written, ``documents`` changed or left out, of these ``left_out``; ``spans`` and
        ``characters`` removed.

    Raises:
        StrideError: the input has changed since the scan, spans would have to be cut from token ids, or the folder is
            not empty.
    """
    store = Store(scans)
    matches = store.read_table(f"nights/{night}/matches.parquet")
    found: dict[str, dict[int, Spans]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    verdicts = store.read_table(f"nights/{night}/verdicts.parquet")
    false_alarms = verdicts.filter(pc.equal(verdicts["review"], FALSE))["key"]
    copies = matches.filter(
        pc.and_(pc.equal(matches["kind"], COPY), pc.invert(pc.is_in(matches["key"], false_alarms.combine_chunks())))
    )
    rows = copies.select(["file", "place", "part", "start", "stop"]).to_pylist()
    for row in rows:
        found[row["file"]][row["place"]][row["part"]].append((row["start"], row["stop"]))
    corpus = corpus_of(run, store.child("state"))
    if corpus.state != store.read_json(f"nights/{night}/manifest.json")["corpus"]["state"]:
        raise StrideError(f"The input has changed since night {night}; scan it again and purify by the new night.")
    if not whole and any(row["part"] == "token_ids" for row in rows):
        raise StrideError(
            "Spans cannot be cut from documents of token ids; leave out whole documents (--purify-documents)."
        )
    results = Store(target)
    refuse_inside(results, run.config.corpus.input, "The cleaned corpus")
    if results.names() and not results.exists(f"{RECORD}/stage.json"):
        raise StrideError(f"{results.display_url('')} is not empty; give a new folder for the cleaned corpus.")
    # Keyed by the findings, not the night's name: repeating the scan to resume makes a new night.
    keys = {"run": redact_url(run.url), "whole": whole, "input": corpus.state, "findings": digest(rows)}
    stage = claim(results.child(RECORD), "purify", keys)
    files = sorted((file.name, unit) for unit in corpus.units for file in unit.files)
    files = list(dict(files).items())  # one unit per file is enough: files are written whole
    done = stage.done()
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, unit) in enumerate(files):
            if f"{number:07d}" in done:
                continue
            started, counts = time.monotonic(), Counter[str]()
            file = next(each for each in unit.files if each.name == name)
            leaks = found.get(name, {})
            path = os.path.join(folder, "file")
            if leaks:
                columns = {"text": "text"} if unit.kind == "text" else corpus.columns
                try:
                    _WRITERS[unit.kind](unit, file, path, _Cleaner(columns, dict(leaks), whole, counts))
                except Exception as error:
                    if not is_corrupt(error):
                        raise
                    raise StrideError(
                        f"{redact_url(file.url)} has findings and cannot be read to its end ({reason(error)}); "
                        "restore it, or move it out of the input."
                    ) from None
            else:
                _copy(file, path)
            if os.path.exists(path):
                results.put(name, path)
                counts["files"] += 1
                with contextlib.suppress(FileNotFoundError):  # a local store moves it
                    os.remove(path)
            stage.mark(f"{number:07d}", started, counts=counts)
    total = sum((Counter(marker["counts"]) for marker in stage.done().values()), Counter[str]())
    return {what: total[what] for what in ("files", "documents", "left_out", "spans", "characters")}


class _Cleaner:
    """Removes leaked spans or documents from the rows of a file."""

    def __init__(self, columns: dict[str, str], leaks: dict[int, Spans], whole: bool, counts: Counter[str]) -> None:
        self.columns, self.leaks, self.whole, self.counts = columns, leaks, whole, counts
        self.read = possible_columns(columns)

    def cleaned(self, place: int, values: dict[str, Any]) -> dict[str, Any] | None:
        """Return a row's cleaned values (the same object if it has no finding), or None to leave it out.

        Args:
            place: the row's position, as in the findings.
            values: at least the columns that are mapped to a role.
        """
        spans = self.leaks.get(place)
        if not spans:
            return values
        self.counts["documents"] += 1
        roles, _ = roles_of(values, self.columns)
        # Conversations, tools and arguments of templates may be kept as JSON.
        held = {**values, **{name: opened(values[name]) for role in OPENED for name in roles.get(role, ())}}
        cleaned = copy.deepcopy(held)
        # Find all places before cutting: a row with a cut text may be read as another kind of document.
        places = {part: text_places(part, held, self.columns) for part in spans if not self.whole}
        for part, found in places.items():
            self.counts["spans"] += len(spans[part])
            for (*keys, last), offset in found:
                holder: Any = reduce(operator.getitem, keys, cleaned)
                holder[last] = self.cut(holder[last], [(start - offset, stop - offset) for start, stop in spans[part]])
        if self.whole or _is_blank(cleaned, roles):
            self.counts["left_out"] += 1
            return None
        return {name: closed(values[name], held[name], cleaned[name]) for name in values}

    def cut(self, text: str, spans: list[tuple[int, int]]) -> str:
        """Remove spans, which may overlap or lie outside, from a text."""
        kept, end = [], 0
        for start, stop in sorted((max(0, start), min(stop, len(text))) for start, stop in spans):
            if start >= stop:
                continue
            kept.append(text[end : max(start, end)])
            self.counts["characters"] += max(0, stop - max(start, end))
            end = max(end, stop)
        return "".join([*kept, text[end:]])


def _is_blank(values: dict[str, Any], roles: Roles) -> bool:
    """Whether nothing is left to train on: a blank text or answer, or only blank turns."""
    names = roles.get("messages") or roles.get("answer") or roles["text"]
    held = [found for name in names for found in strings("", values[name])]
    return not any(text.strip() for path, text in held if path.rpartition(".")[2] not in ("role", "from", "type"))


def _copy(file: SourceFile, path: str) -> None:
    fs, place = filesystem(file.url)
    with fs.open(place, "rb") as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)


def _write_text(unit: InputSplit, file: SourceFile, path: str, cleaner: _Cleaner) -> None:
    fs, place = filesystem(file.url)
    packing = compression(file.name)
    with fs.open(place, "rb") as source:
        data = b"".join(inflated([source.read()], packing))
    number = [each.name for each in unit.files].index(file.name)
    cleaned = cleaner.cleaned(number, {"text": data.decode("utf-8-sig")})
    if cleaned is not None:
        mark = BOM_UTF8 if data.startswith(BOM_UTF8) else b""
        with open(path, "wb") as target:
            _write_compressed(packing, target, iter([mark, cleaned["text"].encode()]))


def _write_lines(unit: InputSplit, file: SourceFile, path: str, cleaner: _Cleaner) -> None:
    def lines() -> Iterator[bytes]:
        for offset, line in raw_lines(InputSplit(unit.key, "jsonl", (file,), 0, END), whole=True):
            if offset == 0 and line.startswith(BOM_UTF8):  # belongs to the file, even if its first line is left out
                yield BOM_UTF8
                line = line.removeprefix(BOM_UTF8)
            if offset not in cleaner.leaks:
                yield line
                continue
            values = json.loads(line.decode())
            cleaned = cleaner.cleaned(offset, values)
            if cleaned is not None:
                # A lone surrogate in the remaining text can only be written as an escape.
                yield with_strings(line.decode(), values, cleaned).encode("utf-8", "backslashreplace")

    def array() -> Iterator[bytes]:
        begin, end = _outside(file)
        mark = begin + b"["
        for line in filter(bytes.strip, lines()):
            yield mark + b"\n" + line
            mark = b","
        yield (b"\n]" if mark == b"," else mark + b"]") + end

    with open(path, "wb") as target:
        pieces = array() if is_array(file) else lines()
        _write_compressed(compression(file.name), target, pieces)


def _outside(file: SourceFile) -> tuple[bytes, bytes]:
    """Return what stands around a file's one JSON array: its byte-order mark, and the white space at its end."""
    fs, place = filesystem(file.url)
    first, last = b"", b""
    with fs.open(place, "rb") as source:
        for chunk in inflated(iter(partial(source.read, 1 << 20), b""), compression(file.name)):
            first, last = first or chunk[: len(BOM_UTF8)], (last + chunk)[-1024:]
    return BOM_UTF8 if first == BOM_UTF8 else b"", last[len(last.rstrip()) :]


def _write_parquet(unit: InputSplit, file: SourceFile, path: str, cleaner: _Cleaner) -> None:
    fs, place = filesystem(file.url)
    with fs.open(place, "rb") as source:
        table = pq.ParquetFile(source, page_checksum_verification=True)
        # Read a row first: it raises for a corrupt footer, where asking for its columns would crash the process.
        next(table.iter_batches(1, row_groups=[0], use_threads=False), None)
        with pq.ParquetWriter(path, table.schema_arrow, compression=_codecs(table.metadata)) as target:
            first = 0
            for group in range(table.num_row_groups):
                held = table.read_row_group(group)
                target.write_table(_cleaned_table(held, first, cleaner))
                first += held.num_rows


def _codecs(metadata: pq.FileMetaData) -> str | dict[str, str]:
    """Return a Parquet file's codec, or the codecs by column if they differ, under the writer's names."""
    group = metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    codecs = {each.path_in_schema: each.compression.replace("UNCOMPRESSED", "NONE") for each in columns}
    one = set(codecs.values())
    return one.pop() if len(one) == 1 else codecs


def _write_arrow(unit: InputSplit, file: SourceFile, path: str, cleaner: _Cleaner) -> None:
    fs, place = filesystem(file.url)
    with fs.open(place, "rb") as source:
        framed = source.read(6) == b"ARROW1"
        source.seek(0)
        opened: Any = pa.ipc.open_file(source) if framed else pa.ipc.open_stream(source)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if framed else opened
        cleaned = _cleaned_batches(batches, cleaner)
        if framed and any(pa.types.is_dictionary(field.type) for field in opened.schema):
            # The file format allows only one dictionary for all batches.
            tables = [pa.Table.from_batches([], opened.schema), *cleaned]
            cleaned = iter([pa.concat_tables(tables).unify_dictionaries()])
        make: Any = pa.ipc.new_file if framed else pa.ipc.new_stream
        with make(path, opened.schema) as target:
            for table in cleaned:
                target.write_table(table)


def _cleaned_batches(batches: Iterable[pa.RecordBatch], cleaner: _Cleaner) -> Iterator[pa.Table]:
    first = 0
    for batch in batches:
        yield _cleaned_table(pa.Table.from_batches([batch]), first, cleaner)
        first += batch.num_rows


def _cleaned_table(table: pa.Table, first: int, cleaner: _Cleaner) -> pa.Table:
    """Clean a table whose first row is row ``first`` of its file."""
    touched = sorted(place - first for place in cleaner.leaks if first <= place < first + table.num_rows)
    if not touched:
        return table
    # Convert only these columns: others may hold values that Python cannot (invalid UTF-8, dates out of range).
    names = [name for name in table.schema.names if name in cleaner.read]
    pieces, last = [table.slice(0, 0)], 0
    for n in touched:
        row = table.slice(n, 1)
        # As the readers do, because a place is a path of keys.
        (stored,) = row.select(names).to_pylist(maps_as_pydicts="strict")
        values = {name: _decoded(table.schema.field(name).type, stored[name]) for name in names}
        cleaned = cleaner.cleaned(first + n, values)
        pieces.append(table.slice(last, n - last))
        last = n + 1
        if cleaned is not None:
            for name in (name for name in names if cleaned[name] != values[name]):
                field = table.schema.field(name)
                changed = encoded(field.type, stored[name], values[name], cleaned[name])
                column = pa.array([changed], stored_as(field.type)).cast(field.type)
                row = row.set_column(table.schema.get_field_index(name), field, column)
            pieces.append(row)
    return pa.concat_tables([*pieces, table.slice(last)]).unify_dictionaries().combine_chunks()


def _decoded(of: pa.DataType, stored: Any) -> Any:
    try:
        return decoded(of, stored)
    except ValueError:  # no document is made of this column
        return stored


def _write_compressed(packing: str, target: IO[bytes], pieces: Iterator[bytes]) -> None:
    """Write pieces with the given compression, without a timestamp or file name, so bytes are reproducible."""
    if packing == ".gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=target, mtime=0) as packed:
            for piece in pieces:
                packed.write(piece)
    elif packing == ".zst":
        with zstandard.ZstdCompressor().stream_writer(target, closefd=False) as packed:
            for piece in pieces:
                packed.write(piece)
    else:
        for piece in pieces:
            target.write(piece)


_WRITERS: dict[str, Callable[[InputSplit, SourceFile, str, _Cleaner], None]] = {
    "text": _write_text,
    "jsonl": _write_lines,
    "parquet": _write_parquet,
    "arrow": _write_arrow,
}
