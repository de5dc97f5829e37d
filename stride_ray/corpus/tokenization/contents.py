"""What turns of a conversation say: the form that it has, the parts of contents, and the same form with other words."""

import re
from collections.abc import Collection
from typing import Any

from stride_ray.corpus.rows.row import has_content

# Tags by which templates tell thoughts from the rest of a content, as far as a template knows them.
_TAG = re.compile(r"</?[a-z_]+>|\[/?[A-Z_]+\]|<\|[a-z_]+\|>")
# Those of Harmony (gpt-oss): a header, with a channel such as "analysis", ends with <|message|>.
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_HARMONY = frozenset((_CHANNEL, _MESSAGE, "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"))


def tags_of(source: str) -> frozenset[str]:
    """The tags that a template knows."""
    tags = frozenset(_TAG.findall(source))
    return tags | _HARMONY if _CHANNEL in tags else tags


def whole_form(message: dict[str, Any], tags: Collection[str]) -> tuple[Any, ...]:
    """A turn's form with, if there are any, its calls but for the first, the types of its parts and its tags."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else [content] if content else []
    types = tuple(map(type_of, parts))
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    cut = [_outline(_pieces(text, tags)) for text in texts if isinstance(text, str)]
    tagged = tuple(map(tuple, cut)) if any(len(each) > 1 for each in cut) else ()
    several = len(calls) if isinstance(calls, list) and len(calls) > 1 else 0
    given = tuple(bool(arguments_of(call)) for call in calls) if isinstance(calls, list) else ()
    whole = (several, types if types not in ((), ("text",)) else (), tagged, given if any(given) else ())
    return (*role_and_keys(message), *((whole,) if any(whole) else ()))


def reworded_content(i: int, message: dict[str, Any], tags: Collection[str], words: dict[str, str]) -> Any:
    """A content with other words between its tags and in each of its parts; the types of parts stay."""
    content, role = message["content"], message["role"]

    def reworded(n: int, text: str) -> str:
        pieces = _pieces(text, tags)
        channel = ""
        for k, piece in enumerate(pieces[::2]):
            if _is_header(pieces, 2 * k):
                channel = piece.strip()
            elif piece.strip():
                word = pieces[2 * k] = f"word{i}content{n}piece{k}word"
                closing = pieces[2 * k + 1 : 2 * k + 2] and "/" in pieces[2 * k + 1]
                words[word] = f"{'thoughts' if closing or channel == 'analysis' else 'content'} of {role}"
        return "".join(pieces)

    if isinstance(content, str):
        return reworded(0, content)
    changed: list[Any] = []
    for n, part in enumerate(content):
        if isinstance(part, str):
            changed.append(reworded(n, part))
        elif isinstance(part, dict) and type_of(part) == "text" and isinstance(part.get("text"), str):
            changed.append({**part, "text": reworded(n, part["text"])})
        else:
            changed.append(replaced(part, f"word{i}part{n}word"))
    return changed


def _pieces(text: str, tags: Collection[str]) -> list[str]:
    """A text cut at the tags that the template knows: text, tag, text, tag, …, text."""
    known = [tag for tag in tags if tag in text]
    return re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]


def _outline(pieces: list[str]) -> list[tuple[bool, str]]:
    """Which of the pieces between tags hold something, the tags, and the names of channels."""
    return [(bool(piece.strip()), piece * (k % 2 or _is_header(pieces, k))) for k, piece in enumerate(pieces)]


def _is_header(pieces: list[str], k: int) -> bool:
    """Whether a piece between tags is the role or the channel of a message in Harmony's form."""
    return pieces[k + 1 : k + 2] in ([_CHANNEL], [_MESSAGE]) and pieces[max(0, k - 1)] in _HARMONY


def arguments_of(call: Any) -> Any:
    """The arguments of a tool call; None if it has none."""
    function = call.get("function") if isinstance(call, dict) else None
    given = (function if isinstance(function, dict) else call).get("arguments") if isinstance(call, dict) else None
    return None if given in ({}, "{}", "") else given


def with_other_arguments(call: dict[str, Any], word: str) -> dict[str, Any]:
    """A tool call, of those that have arguments, with others."""
    other = {word: word} if not isinstance(arguments_of(call), str) else f'{{"{word}": "{word}"}}'
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "arguments": other}}
    return {**call, "arguments": other}


def says(message: dict[str, Any]) -> bool:
    """Whether a turn calls a tool or has a content of more than white space."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return bool(message.get("tool_calls")) or any(map(_part_says, parts))


def _part_says(part: Any) -> bool:
    if not isinstance(part, dict) or type_of(part) == "text":
        return has_content(part.get("text") if isinstance(part, dict) else part)
    others = [value for key, value in part.items() if key != "type"]
    return not others or any(map(has_content, others))


def type_of(part: Any) -> str:
    """The type of a part of a content; of strings and parts without one "text"."""
    return str(part.get("type") or "text") if isinstance(part, dict) else "text"


def role_and_keys(message: dict[str, Any]) -> tuple[str, ...]:
    """A turn's role and the keys that hold something."""
    held = (key for key, value in message.items() if key not in ("role", "tool_call_id") and has_content(value))
    return (message["role"], *sorted(held))


def has_text(value: Any) -> bool:
    """Whether a nested value holds a string."""
    if isinstance(value, dict | list):
        return any(map(has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


def replaced(value: Any, word: str) -> Any:
    """A value with the same word for every string but for types."""
    if isinstance(value, dict):
        return {key: part if key == "type" else replaced(part, word) for key, part in value.items()}
    if isinstance(value, list):
        return [replaced(part, word) for part in value]
    return word if isinstance(value, str) else value


def renamed(call: Any, name: str) -> Any:
    """A tool call of another name."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def text_parts(text: str) -> list[dict[str, str]]:
    """A text as a list of parts."""
    return [{"type": "text", "text": text}]
