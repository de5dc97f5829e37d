"""Conversations as trainers write them, in the one form that chat templates take: role, content and the tools' parts.

Read are OpenAI's turns (role, content), ShareGPT's (from, value), and the marks of turns that are not to be learned:
OpenAI's, Mistral's and ShareGPT's ``weight``, axolotl's ``train`` and ``training``, the ``loss`` of ms-swift and slime,
verl's ``loss_mask``, slime's ``step_loss_mask``. A turn may be JSON in a string, and so may its calls or each of them.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from stride_ray.corpus.rows.row import has_content, kind_of_value, parsed, without_nulls

_SPEAKERS = {
    **{name: name for name in ("system", "user", "assistant", "tool", "function", "developer")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{"model": "assistant", "function_call": "assistant", "tool_call": "assistant", "observation": "tool"},
}
_MARKS = ("weight", "train", "training", "loss", "trainable", "loss_mask", "step_loss_mask")
_PARTIAL_MARKS = ("train_detail", "training_detail")


def turn_of(value: Any) -> tuple[dict[str, Any], bool]:
    """One turn for a chat template, and whether it is to be learned (which counts for the assistant's turns).

    Example:
        >>> turn_of({"from": "gpt", "value": "Hi.", "weight": 0, "name": None})
        ({'role': 'assistant', 'content': 'Hi.'}, False)

    Raises:
        ValueError: the turn is not valid; the message continues "… holds a message ".
    """
    with contextlib.suppress(ValueError):
        value = parsed(value)
    value = without_nulls(value)
    if not isinstance(value, dict):
        raise ValueError("that is not an object with a role")
    # NaN, as pandas writes for null, is no name or mark; as a content it would be printed.
    value = {key: part for key, part in value.items() if key == "content" or part == part}
    turn = {key: part for key, part in value.items() if key not in (*_MARKS, *_PARTIAL_MARKS)}
    if "role" not in turn and isinstance(turn.get("from"), str):
        speaker = turn.pop("from")
        if speaker.lower() not in _SPEAKERS:
            raise ValueError(f"from {speaker!r}, who is none of {', '.join(_SPEAKERS)}; write role and content")
        if has_content(turn.get("value")) and has_content(turn.get("content")):
            raise ValueError("with a value and a content; keep one of them")
        key = content_key(turn)
        said = {"content": turn[key]} if key in turn else {}
        turn = {"role": speaker, **{key: part for key, part in turn.items() if key != "value"}, **said}
    if isinstance(turn.get("role"), str):  # one that is not known is left to the template
        turn["role"] = _SPEAKERS.get(turn["role"].lower(), turn["role"])
    else:
        raise ValueError("without a role")
    _check_content(turn.get("content"))
    try:
        calls = parsed(turn.get("tool_calls"))
        calls = without_nulls(list(map(parsed, calls)) if isinstance(calls, list) else calls)
    except ValueError:
        raise ValueError("whose tool_calls are a string that is not JSON") from None
    if has_content(calls):
        if not isinstance(calls, list):
            raise ValueError(f"whose tool_calls are {kind_of_value(calls)}, not a list")
        turn["tool_calls"] = calls
    else:  # templates ask whether there are any, and leave out the content then
        turn.pop("tool_calls", None)
    if "content" not in turn and "tool_calls" not in turn:
        raise ValueError("without content")
    partial = next((key for key in _PARTIAL_MARKS if has_content(value.get(key))), None)
    if partial:
        raise ValueError(f"with {partial}; parts of a message cannot be marked, mark whole ones with train")
    marks = [(key, value[key]) for key in _MARKS if key in value]
    odd = next(((key, mark) for key, mark in marks if mark not in (0, 1)), None)  # True and 1.0 are equal to 1
    if odd:
        raise ValueError(f"whose {odd[0]} is {odd[1]!r}; only 0 and 1 (or false and true) are read")
    return turn, all(mark for _, mark in marks)


def _check_content(content: Any) -> None:
    """Raise ValueError if a content is not one that templates print as it is: a string or a list of parts, or none."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError(f"whose content is {kind_of_value(content)}, neither a string nor a list of parts")
    for part in content:
        if not isinstance(part, str | dict):
            raise ValueError(f"with a part of its content that is {kind_of_value(part)}, not a string or an object")
        text = part.get("text") if isinstance(part, dict) else None
        if text is not None and not isinstance(text, str):
            raise ValueError(f"with a part of its content whose text is {kind_of_value(text)}, not a string")


def content_key(turn: dict[str, Any]) -> str:
    """The key under which a turn of the input keeps its content: of value and content the one that is filled."""
    if turn.get("role") is not None or ("value" not in turn and "content" in turn):
        return "content"
    return "content" if has_content(turn.get("content")) and not has_content(turn.get("value")) else "value"


def tools_of(value: Any) -> Sequence[dict[str, Any]]:
    """Tool definitions for a chat template; ``value`` is a list of objects, already parsed.

    Raises:
        ValueError: it is not.
    """
    tools = without_nulls(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("is not a list of objects")
    return tools
