"""Documents of a unit: mapping input columns to roles, and converting rows into documents or rejects.

A document is text, a prompt with its answer, a conversation or token ids. Its source and id identify it together, since
ids often start again in every file; they do not depend on the machine that read it, and both are part of block ids and
of all results. An id is text: the number 1 and the string "1" are the same id.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from stride_ray.corpus.readers import Rejected, Row, rows
from stride_ray.corpus.rows.roles import Roles, half_known, is_known, possible_columns, roles_given, roles_of
from stride_ray.corpus.rows.row import (
    LONE_SURROGATE,
    Unreadable,
    has_content,
    kind_of_type,
    kind_of_value,
    named,
    parsed,
    without_nulls,
)
from stride_ray.corpus.rows.turns import tools_of, turn_of
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError

# Hugging Face's label of a token whose loss does not count.
_IGNORED = -100
# Roles that a row may have only beside another.
_COMPANY = {
    **dict.fromkeys(("loss_mask", "labels", "attention_mask"), "token_ids"),
    **dict.fromkeys(("tools", "chat_template_kwargs"), "messages"),
}
# A mapped column must occur at least once in this many rows, or the mapping is rejected.
_PROBE_ROWS = 100
_ADVICE = "Say which one does, as in --columns text=body or --columns prompt=query,answer=reply."


@dataclass(frozen=True)
class Document:
    """One document; exactly one of text, prompt with answer, messages and token_ids is set.

    Attributes:
        document_id: value of the id column; without one, ``name`` for a text file, ``name#<byte offset>`` for a line
            of JSON Lines (in the decompressed file), ``name#<row of the file>`` for Parquet and Arrow.
        source: value of the source column, else the file's name.
        place: where its row is in the unit: the byte offset of a line (in the decompressed file), the number of a row
            of the file (Parquet, Arrow), or the index of a text file among the unit's.
        text: plain text, not blank.
        prompt: text before the answer; may be empty.
        answer: the completion that carries the loss, not blank.
        messages: turns with "role" and "content", in the form that chat templates take, without nulls.
        learned: with messages: whether each may carry loss, same length; None: all. Only the assistant's turns do.
        template_arguments: with messages: further arguments of the chat template, such as tools.
        token_ids: token ids, at least one.
        loss_mask: with token_ids: whether each carries loss, same length.
    """

    document_id: str
    source: str
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: list[dict[str, Any]] | None = None
    learned: list[bool] | None = None
    template_arguments: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    loss_mask: list[bool] | None = None
    place: int = 0


def read(unit: InputSplit, columns: Mapping[str, str], unused: set[str] | None = None) -> Iterator[Document | Rejected]:
    """The documents of a unit in file order, with a reject for each invalid row.

    Args:
        unit: from ``plan``.
        columns: mapping of roles to columns (see ``resolve_columns``); ignored for text files.
        unused: takes the names of columns that held something in a row and did not become part of its document.

    Raises:
        StrideError: the mapping is inconsistent, or a file cannot be fetched. Bad content never raises.
    """
    return (document for _, document in read_with_rows(unit, columns, unused))


def read_with_rows(
    unit: InputSplit, columns: Mapping[str, str], unused: set[str] | None = None, beside: Collection[str] = ()
) -> Iterator[tuple[Row | Rejected, Document | Rejected]]:
    """As ``read``, each after its row, which also has the columns ``beside``."""
    if unit.kind == "text":
        columns = {"text": "text"}
    roles_given(columns)  # raises if they do not fit together
    files = {file.name: number for number, file in enumerate(unit.files)}
    for row in rows(unit, {*possible_columns(columns), *beside}, filled=unused is not None):
        if isinstance(row, Rejected):
            yield row, row
            continue
        roles, others = roles_of(row.values, columns)
        if unused is not None:
            unused |= row.unread
            unused |= others
        place = files[row.file] if unit.kind == "text" else int(row.document_id.rpartition("#")[2])
        yield row, document_of(row, roles, place)


def resolve_columns(
    units: Sequence[InputSplit], columns: Mapping[str, str] | None = None, advice: str = _ADVICE
) -> dict[str, str]:
    """Validate a mapping of roles to columns against the first rows; columns with content may be left to detection.

    Known names, in this order: messages or conversations; prompt with completion, answer or response; question with
    answer or response; instruction (and input or context) with output or response; token_ids or input_ids (and their
    masks and labels); text; content. A row takes the first that it fills.

    Args:
        units: the input.
        columns: role to column, or to several, as in "instruction+input".
        advice: last sentence of the error message if no known name is found.

    Returns:
        The mapping, for ``read``.

    Raises:
        StrideError: unknown role, incompatible roles, no row can be read, a mapped column missing from all of the first
            rows, or no known column names in them.
    """
    mapping = dict(columns or {})
    given = roles_given(mapping)
    if all(unit.kind == "text" for unit in units):
        return mapping
    missing = {role: column for role, column in mapping.items() if given or role not in ("id", "source")}
    rejects: list[Rejected] = []
    first: Row | None = None
    names = set[str]()
    known = bool(given)
    for row, _ in zip(_readable_rows(units, possible_columns(mapping), rejects), range(_PROBE_ROWS), strict=False):
        first = first or row
        here = {*row.values, *row.unread}
        names |= here
        known = known or is_known(here)
        missing = {r: c for r, c in missing.items() if c not in names and not set(c.split("+")) <= names}
        if known and not missing:
            return mapping
    if first is None:
        if given:
            return mapping  # reading will report each fault as a reject
        why = f"; the first fault: {rejects[0].sentence()}" if rejects else ""
        raise StrideError(f"No row of the input can be read{why}. Mend or replace what is at fault.")
    if not known:
        raise StrideError(
            f"None of the columns of {first.file} is known to hold a text; found: {_listed(names)}."
            f"{half_known(names)} {advice}"
        )
    role, name = next(iter(missing.items()))
    name = next(part for part in name.split("+") if part not in names)
    raise StrideError(
        f"There is no column {name!r} to take as {role}; the columns found are {_listed(names)}. "
        f"Say which one it is, as in --columns {role}={sorted(names)[0]}."
    )


def _readable_rows(units: Sequence[InputSplit], columns: set[str], rejects: list[Rejected]) -> Iterator[Row]:
    for unit in units:
        for row in rows(unit, columns) if unit.kind != "text" else ():
            if isinstance(row, Row):
                yield row
            elif not rejects:
                rejects.append(row)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def shown_name(source: str, document_id: str) -> str:
    """A document's name for display: its id, after its source if the id does not begin with that.

    Example:
        >>> shown_name("b.jsonl", "7"), shown_name("b.jsonl", "b.jsonl#1024")
        ('b.jsonl: 7', 'b.jsonl#1024')
    """
    whole = not source or document_id == source or document_id.startswith(f"{source}#")
    return document_id if whole else f"{source}: {document_id}"


class InvalidRowError(Exception):
    """A row is not a valid document; becomes a reject."""


def document_of(row: Row, roles: Roles, place: int) -> Document | Rejected:
    """The document that the columns with roles make of a row, or why they make none."""
    identity: dict[str, str] = {}
    try:
        for role in ("id", "source"):
            if role in roles:
                identity[role] = _name(row, roles[role][0])
        content = _content(row, roles)
    except InvalidRowError as error:
        return Rejected(row.file, row.number(), str(error), identity.get("id", ""))
    except RecursionError:
        return Rejected(row.file, row.number(), "nested too deeply", identity.get("id", ""))
    return Document(identity.get("id", row.document_id), identity.get("source", row.file), place=place, **content)


def _content(row: Row, roles: Roles) -> dict[str, Any]:
    """The fields of a row's document."""
    content: dict[str, Any]
    if "text" in roles:
        content = {"text": _full_text(*_joined(row, roles["text"]))}
    elif "answer" in roles:
        prompt, answer = _joined(row, roles["prompt"]), _joined(row, roles["answer"])
        if isinstance(answer[0], list) and not isinstance(prompt[0], list):
            why = f"{answer[1]!r} is a list and {prompt[1]!r} is {kind_of_value(prompt[0])}"
            raise InvalidRowError(f"{why}; give two texts, or messages in both")
        if isinstance(prompt[0], list):  # a conversation that the last turns complete
            before, after = _turns(*prompt), _turns(*answer)
            learned = [False] * len(before) + [learned for _, learned in after]
            content = {"messages": [turn for turn, _ in (*before, *after)], "learned": learned}
        else:
            content = {"prompt": _checked_text(*prompt), "answer": _full_text(*answer)}
    elif "messages" in roles:
        (column,) = roles["messages"]
        value = _value(row, column)
        with contextlib.suppress(ValueError):
            value = parsed(value)
        turns = _turns(value, column)
        learned = [learned for _, learned in turns]
        content = {"messages": [turn for turn, _ in turns], "learned": None if all(learned) else learned}
    elif "token_ids" in roles:
        content = _token_ids(row, roles)
    else:
        raise InvalidRowError(f"none of its columns is known to hold a text; found: {_listed(row.values)}")
    for role, allowed in _COMPANY.items():
        if role in roles and allowed not in content and has_content(row.values.get(roles[role][0])):
            raise InvalidRowError(f"{roles[role][0]!r} goes with {allowed} only")
    arguments = _template_arguments(row, roles) if "messages" in content else {}
    return {**content, **({"template_arguments": arguments} if arguments else {})}


def _joined(row: Row, columns: Sequence[str]) -> tuple[Any, str]:
    """The value of a role and what to call it: of several columns, those with content, joined by line ends."""
    if len(columns) == 1:
        return _value(row, columns[0]), columns[0]
    values = [(_value(row, name), name) for name in columns if has_content(row.values.get(name))]
    if len(values) < 2:
        return values[0] if values else ("", columns[0])
    return "\n".join(_checked_text(value, name) for value, name in values), "+".join(columns)


def _template_arguments(row: Row, roles: Roles) -> dict[str, Any]:
    """Arguments of the chat template beside the messages: tools, and those that the row names."""
    arguments: dict[str, Any] = {}
    for role in ("chat_template_kwargs", "tools"):
        for column in roles.get(role, ()):
            value = _value(row, column)
            if not has_content(value):
                continue
            try:
                value = parsed(value)
                if value is None:  # the string "null"
                    continue
                if role == "tools":
                    arguments["tools"] = tools_of(list(map(parsed, value)) if isinstance(value, list) else value)
                elif isinstance(value, dict):
                    arguments |= without_nulls(value)
                else:
                    raise ValueError("is not an object")
            except json.JSONDecodeError:
                raise InvalidRowError(f"{column!r} is a string that is not JSON") from None
            except ValueError as error:
                raise InvalidRowError(f"{column!r} {error}") from None
    return {name: value for name, value in arguments.items() if value != []}


def _token_ids(row: Row, roles: Roles) -> dict[str, Any]:
    """Token ids and their loss mask: what all masks and labels let count; padding by the attention mask is dropped."""
    (column,) = roles["token_ids"]
    ids = _integers(_value(row, column), column)

    def beside(name: str, values: list[Any]) -> list[Any]:
        if len(values) != len(ids):
            raise InvalidRowError(f"{len(values)} values in {name!r} for {len(ids)} in {column!r}")
        return values

    masks = [beside(name, _flags(_value(row, name), name)) for name in roles.get("loss_mask", ())]
    attended = [
        beside(name, _integers(_value(row, name), name, booleans=True)) for name in roles.get("attention_mask", ())
    ]
    for name in roles.get("labels", ()):
        labels = beside(name, _integers(_value(row, name), name))
        places = zip(labels, ids, attended[0] if attended else [1] * len(ids), strict=True)
        odd = next(
            (i for i, (label, token, kept) in enumerate(places) if label not in (token, _IGNORED) and kept), None
        )
        if odd is not None:
            raise InvalidRowError(
                f"{name!r} has {labels[odd]} at position {odd}, where {column!r} has {ids[odd]}; a label is the token "
                f"id at its own position, not the next one, or {_IGNORED} where the loss does not count"
            )
        masks.append([label != _IGNORED for label in labels])
    mask = list(map(all, zip(*masks, strict=True))) if masks else None
    for kept in attended:
        if not any(kept):
            raise InvalidRowError(f"{roles['attention_mask'][0]!r} is 0 throughout")
        ids, mask = list(compress(ids, kept)), None if mask is None else list(compress(mask, kept))
    return {"token_ids": ids, "loss_mask": mask}


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise InvalidRowError(f"no column {column!r}")
    value = row.values[column]
    if isinstance(value, Unreadable):
        raise InvalidRowError(f"{column!r} is unreadable: {value.reason}")
    return value


def _name(row: Row, column: str) -> str:
    """An id or source as a string."""
    value = named(_value(row, column))
    if not _checked_text(value, column):
        raise InvalidRowError(f"{column!r} is empty")
    return str(value)


def _checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InvalidRowError(f"{column!r} is {kind_of_value(value)}, not a string")
    if LONE_SURROGATE.search(value):
        raise InvalidRowError(f"{column!r} contains an invalid character (a lone surrogate)")
    return value


def _full_text(value: Any, column: str) -> str:
    if not _checked_text(value, column).strip():
        raise InvalidRowError(f"{column!r} is empty")
    return value


def _turns(value: Any, column: str) -> list[tuple[dict[str, Any], bool]]:
    """The turns of a conversation, and whether each is to be learned."""
    if not isinstance(value, list):
        raise InvalidRowError(f"{column!r} is {kind_of_value(value)}, not a list of messages")
    if not value:
        raise InvalidRowError(f"{column!r} is empty")
    try:
        turns = list(map(turn_of, value))
    except ValueError as error:
        raise InvalidRowError(f"{column!r} holds a message {error}") from None
    for turn, _ in turns:
        if isinstance(turn.get("content"), str):
            _checked_text(turn["content"], column)
    return turns


def _integers(value: Any, column: str, booleans: bool = False) -> list[int]:
    if not isinstance(value, list):
        raise InvalidRowError(f"{column!r} is {kind_of_value(value)}, not a list of whole numbers")
    if not value:
        raise InvalidRowError(f"{column!r} is empty")
    # A set of types is built at C speed and, unlike isinstance, distinguishes bool from int.
    odd = next(iter(set(map(type, value)) - ({int, bool} if booleans else {int})), None)
    if odd is not None:
        raise InvalidRowError(f"{column!r} holds {kind_of_type(odd)} among its numbers")
    return value


def _flags(value: Any, column: str) -> list[bool]:
    if not isinstance(value, list) or not set(map(type, value)) <= {bool, int, float} or not set(value) <= {0, 1}:
        raise InvalidRowError(f"{column!r} is not a list of true and false (or 1 and 0)")
    return list(map(bool, value))


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A tokenised document.

    Attributes:
        document_id: as in Document.
        source: as in Document.
        ids: token ids, int32 [tokens], at least one.
        mask: which tokens carry loss, bool [tokens], at least one True; None: all.
        place: as in Document.
    """

    document_id: str
    source: str
    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_] | None = None
    place: int = 0
