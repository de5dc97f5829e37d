"""Which columns of a row make its document: given by role, or found row by row under the names that trainers use.

A merged data set has the columns of all its parts, and each row fills those of its own, so the choice is made for each
row: the first of the known sets of columns that all hold something. For {"messages": None, "text": "a", "url": "b"} it
is {"text": ("text",)}.
"""

import contextlib
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from stride_ray.corpus.rows.json_strings import with_strings
from stride_ray.corpus.rows.row import escaped, has_content, parsed
from stride_ray.corpus.rows.turns import content_key
from stride_ray.runtime.errors import StrideError

# Role to its columns; the values of several are joined by line ends, or masks combined.
Roles = dict[str, tuple[str, ...]]

# The sets of roles that can form a document, each with the roles that may accompany it.
_CONTENTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text",): (),
    ("prompt", "answer"): ("tools", "chat_template_kwargs"),
    ("messages",): ("tools", "chat_template_kwargs"),
    ("token_ids",): ("loss_mask", "labels", "attention_mask"),
}
_COMPANIONS = {role: content for content, roles in _CONTENTS.items() for role in roles}
ROLES = (*(role for content in _CONTENTS for role in content), *_COMPANIONS, "id", "source")
# Roles whose values may be JSON in strings.
OPENED = ("messages", "tools", "chat_template_kwargs")
_NULL, _BLANK, _FILLED, _LIST = range(4)
# JSON that holds nothing, in columns whose values may be JSON in strings.
_EMPTY_JSON = frozenset(("[]", "{}", "null", '""'))
# Roles that may be given several columns, as in prompt=instruction+input.
_JOINED = ("text", "prompt", "answer", "loss_mask")


class _Known(NamedTuple):
    """Columns that make a document in public data sets.

    Attributes:
        content: role to column; all must be there with content, but a prompt may be blank.
        joined: columns of which the first with content joins the prompt.
        beside: role to columns; all with content are used.
    """

    content: dict[str, str]
    joined: tuple[str, ...] = ()
    beside: Mapping[str, tuple[str, ...]] = MappingProxyType({})


_TEMPLATE = {"tools": ("tools",), "chat_template_kwargs": ("chat_template_kwargs",)}
_MASKS = {
    "loss_mask": ("loss_mask", "assistant_masks", "completion_mask"),
    "labels": ("labels",),
    "attention_mask": ("attention_mask",),
}
# Most specific first.
_KNOWN: tuple[_Known, ...] = (
    *(_Known({"messages": name}, beside=_TEMPLATE) for name in ("messages", "conversations", "conversation")),
    *(_Known({"prompt": "prompt", "answer": name}, beside=_TEMPLATE) for name in ("completion", "answer", "response")),
    *(_Known({"prompt": "question", "answer": name}) for name in ("answer", "response")),
    _Known({"prompt": "instruction", "answer": "output"}, ("input", "context")),
    _Known({"prompt": "instruction", "answer": "response"}, ("input", "context")),
    *(_Known({"token_ids": name}, beside=_MASKS) for name in ("token_ids", "input_ids")),
    *(_Known({"text": name}) for name in ("text", "content")),
)
_JSON_COLUMNS = ("messages", "conversations", "conversation", *_TEMPLATE)
KNOWN_COLUMNS = frozenset(
    column
    for known in _KNOWN
    for column in (*known.content.values(), *known.joined, *(name for names in known.beside.values() for name in names))
)


def roles_given(columns: Mapping[str, str]) -> tuple[str, ...]:
    """The content roles of a mapping; empty if none is mapped, so that they are found in each row.

    Raises:
        StrideError: unknown or incompatible roles, or a role that takes one column has several.
    """
    unknown = [role for role in columns if role not in ROLES]
    if unknown:
        raise StrideError(f"{unknown[0]!r} is no role of a column; the roles are {', '.join(ROLES)}.")
    mapped = tuple(role for role in columns if role not in ("id", "source") and role not in _COMPANIONS)
    content = next((roles for roles in _CONTENTS if set(roles) == set(mapped)), ())
    if mapped and not content:
        raise StrideError(
            f"Columns for {' and '.join(mapped)} do not make a document; map text, or prompt and answer, "
            "or messages, or token_ids."
        )
    for role in columns:
        if content and role in _COMPANIONS and role not in _CONTENTS[content]:
            with_ = " and ".join(_COMPANIONS[role])
            raise StrideError(f"A {role} column goes with {with_} only; map {with_} too, or drop {role}.")
    for role, column in columns.items():
        if not column or not all(column.split("+")):
            raise StrideError(f"The role {role} is given no column; say which, as in --columns {role}=body.")
    return content


def possible_columns(columns: Mapping[str, str]) -> set[str]:
    """All columns that rows may be made of under a mapping of roles."""
    names = {name for column in columns.values() for name in (column, *column.split("+"))}
    return names if roles_given(columns) else names | KNOWN_COLUMNS


def roles_of(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Roles, frozenset[str]]:
    """The columns of a row by role, and those with content that have none.

    Roles of content are missing if the row has none of the known columns.

    Args:
        values: the row.
        columns: the mapping.
    """
    return _roles_of(tuple([(name, _state(name, value)) for name, value in values.items()]), tuple(columns.items()))


def _state(name: str, value: Any) -> int:
    """What roles depend on: _NULL, _BLANK, _FILLED, or _LIST for a list with content."""
    if name in _JSON_COLUMNS and isinstance(value, str) and value.strip() in _EMPTY_JSON:
        return _BLANK
    if has_content(value):
        return _LIST if isinstance(value, list) else _FILLED
    return _NULL if value is None or isinstance(value, float) else _BLANK


@lru_cache(maxsize=1024)  # rows of a file have the same few states
def _roles_of(row: tuple[tuple[str, int], ...], columns: tuple[tuple[str, str], ...]) -> tuple[Roles, frozenset[str]]:
    states = dict(row)
    roles = {role: _several(role, column, states) for role, column in columns}
    if not roles_given(dict(columns)):
        roles = {**_detected(states), **roles}
    used = {name for names in roles.values() for name in names}
    return roles, frozenset(name for name, state in row if state >= _FILLED and name not in used)


def _several(role: str, column: str, states: Mapping[str, int]) -> tuple[str, ...]:
    if "+" not in column or column in states or role not in _JOINED:
        return (column,)
    return tuple(column.split("+"))


def _detected(states: Mapping[str, int]) -> Roles:
    known = next((known for known in _KNOWN if _fills(known, states)), None)
    # A row without content is rejected for what it has of the first set of columns that are all there.
    known = known or next((known for known in _KNOWN if all(name in states for name in known.content.values())), None)
    if known is None:
        return {}
    roles: Roles = {role: (name,) for role, name in known.content.items()}
    joined = next((name for name in known.joined if states.get(name, _NULL) >= _FILLED), None)
    if joined is not None:
        roles["prompt"] = (*roles["prompt"], joined)
    plain = "prompt" in roles and states[roles["prompt"][0]] != _LIST  # not a conversation, which a template renders
    for role, names in known.beside.items() if not plain else ():
        held = tuple(name for name in names if states.get(name, _NULL) >= _FILLED)
        if held:
            roles[role] = held
    return roles


def _fills(known: _Known, states: Mapping[str, int]) -> bool:
    return all(
        states.get(name, _NULL) >= (_BLANK if role == "prompt" else _FILLED) for role, name in known.content.items()
    )


def text_places(part: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[list[Any], int]]:
    """Where a row keeps a text of its document: keys from the row down to strings, and their offsets in the text.

    Args:
        part: "text", "prompt", "answer", "messages.3" for the content of a turn, "messages.3.content.1.text" for
            another string in it, or "template.tools.0.name" for one in an argument of the chat template.
        values: the row, its conversations, tools and arguments of templates opened.
        columns: the mapping that the document was read with.
    """
    roles, _ = roles_of(values, columns)
    role, *path = part.split(".")
    if role == "template":
        tools = [name for name in roles.get("tools", ()) if path[0] == "tools" and has_content(values[name])]
        if tools:
            return [([tools[-1], *_keys_along(values[tools[-1]], path[1:])], 0)]
        name = roles["chat_template_kwargs"][-1]
        return [([name, *_keys_along(values[name], path)], 0)]
    if path:  # a conversation may be cut in two, prompt and answer
        names = roles.get("messages") or (*roles["prompt"], *roles["answer"])
        keys = [(name, i) for name in names for i in range(len(values[name]))]
        name, i = keys[int(path[0])]
        turn = values[name][i]
        inside = path[1:] or ["content"]
        if inside[0] == "content":
            inside[0] = content_key(turn)
        return [([name, i, *_keys_along(turn, inside)], 0)]
    places, offset = list[tuple[list[Any], int]](), 0
    for name in roles[role]:
        if len(roles[role]) == 1 or has_content(values.get(name)):
            places.append(([name], offset))
            offset += len(values[name]) + 1
    return places


def opened(value: Any) -> Any:
    """A value as it is used where it may be JSON in a string, or a list with such strings; in a turn, its calls."""
    with contextlib.suppress(ValueError):
        value = parsed(value)
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), str | list):
        return {**value, "tool_calls": opened(value["tool_calls"])}
    return [opened(part) for part in value] if isinstance(value, list) else value


def closed(value: Any, before: Any, after: Any) -> Any:
    """A value as changed from ``before``, which is ``opened(value)``, to ``after``, in strings only."""
    if before == after:
        return value
    if isinstance(value, str) and not isinstance(before, str):
        return with_strings(value, parsed(value), closed(parsed(value), before, after))
    if isinstance(value, dict):
        return {key: closed(part, before[key], after[key]) for key, part in value.items()}
    if isinstance(value, list):
        return [closed(*parts) for parts in zip(value, before, after, strict=True)]
    return after


def _keys_along(value: Any, path: list[str]) -> list[Any]:
    """The keys that a path of names follows; a key may contain dots, at which the path was split."""
    keys: list[Any] = []
    while path:
        size, named = 1, {}
        if isinstance(value, dict):
            named = {escaped(key): key for key in value}  # as the scan names them
            size = next(size for size in range(1, len(path) + 1) if ".".join(path[:size]) in named)
        keys.append(int(path[0]) if isinstance(value, list) else named[".".join(path[:size])])
        value, path = value[keys[-1]], path[size:]
    return keys


def half_known(values: Collection[str]) -> str:
    """A hint for columns of which one half of a known pair is there: " 'prompt' stands without 'completion'."."""
    pairs = [sorted(known.content.values(), key=values.__contains__) for known in _KNOWN if len(known.content) == 2]
    return next((f" {there!r} stands without {missing!r}." for missing, there in pairs if there in values), "")


def is_known(values: Collection[str]) -> bool:
    """Whether some known set of columns is there."""
    return any(all(name in values for name in known.content.values()) for known in _KNOWN)
