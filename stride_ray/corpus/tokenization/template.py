"""Conversations to text, with the ranges of characters that carry loss.

These are the assistant's answers with thoughts and calls of tools, each from the end of its header up to and including
the marker that ends its turn (``<|im_end|>``). White space after the marker does not count, since the model never
generates it; in a template without markers it is what ends the turn, and counts. A template that marks its answers
itself (``{% generation %}``) decides alone: what it marks counts.
"""

import contextlib
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import compress
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from stride_ray.corpus.tokenization.clock import with_fixed_clock
from stride_ray.corpus.tokenization.contents import (
    arguments_of,
    has_text,
    renamed,
    replaced,
    reworded_content,
    role_and_keys,
    says,
    tags_of,
    text_parts,
    type_of,
    whole_form,
    with_other_arguments,
)
from stride_ray.corpus.tokenization.differences import common, common_end, markers, repeated

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What is said in conversations that try a template out. The first and last characters are for private use, so that
# texts that begin or end alike are told apart.
_ANSWER = "\ue0a7stride-ray-answer\ue0a8"
_QUESTION = "\ue0a7stride-ray-question\ue0a8"
_CONTEXT = 64  # characters before an answer by which its header is recognised
# The rest of a tag that begins as another does, such as "<|end|>" and "<|call|>".
_REST_OF_TAG = re.compile(r"[^<>\s]{1,30}>")
_SAID = ("role", "content", "name", "tool_calls", "tool_call_id")
_FORMS = 1000  # forms of conversations for which it is known what the template leaves out

Messages = list[dict[str, Any]]
Ranges = list[tuple[int, int]]
Arguments = dict[str, Any]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        tools: for conversations with tools; some tokenizers have a template of their own for these.
    """

    def __init__(self, tokenizer: Any, tools: bool = False) -> None:
        self._tokenizer = tokenizer
        self._source = with_fixed_clock(tokenizer.get_chat_template(tools=[] if tools else None))
        self._tags = tags_of(self._source)
        self._left_out: dict[tuple[Any, ...], frozenset[str]] = {}

    def render(
        self, messages: Messages, arguments: Arguments | None = None, learned: Sequence[bool] | None = None
    ) -> tuple[str, Ranges]:
        """A conversation as text, and the ranges of characters (start, end) that carry loss.

        Args:
            messages: with role and content.
            arguments: further arguments of the template, such as tools.
            learned: whether each of the assistant's turns carries loss; None: all.

        Raises:
            Exception: of any class, as a template is a program. ValueError: an answer is not found in the
                text, or the template does not take the form of a message's content.
        """
        messages = [{**message, **self._content(i, message)} for i, message in enumerate(messages)]
        marked = _GENERATION.search(self._source)
        text, turns = (self._marked if marked else self._answers)(messages, arguments or {})
        if learned is not None and len(turns) != len(learned):
            raise ValueError(f"it marks {len(turns)} parts for {len(learned)} turns, so that none can be left out")
        return text, [span for turn in compress(turns, learned or [True] * len(turns)) for span in turn]

    def left_out(self, messages: Messages, arguments: Arguments | None = None) -> frozenset[str]:
        """What a conversation holds and its text does not: "tool_calls of assistant", "content of tool", "tools".

        It follows from which turns have which keys, parts and tags, so each such form is rendered once, with other
        words in it. Thoughts in tags within a content are "thoughts of assistant", other parts go by their type;
        what calls of tools are given is "arguments of tool_calls of assistant".
        """
        given = {name: value for name, value in (arguments or {}).items() if isinstance(value, str | list | dict)}
        form = (*(whole_form(message, self._tags) for message in messages), *sorted(given))
        if all(part in (("user", "content"), ("assistant", "content")) for part in form):
            return frozenset()  # the answers are looked for anyway, and without a question there is no conversation
        if form not in self._left_out and len(self._left_out) < _FORMS:
            self._left_out[form] = self._lost(messages, given, arguments or {})
        return self._left_out.get(form, frozenset())

    def _lost(self, messages: Messages, given: Arguments, arguments: Arguments) -> frozenset[str]:
        words: dict[str, str] = {}
        try:
            others = [{**message, **self._reworded(i, message, words)} for i, message in enumerate(messages)]
            text = self._text(others, arguments)
        except Exception:  # as render: it takes no other words
            return frozenset()
        lost = {said for word, said in words.items() if word not in text}
        lost |= self._lost_parts(others, text, arguments)
        lost |= self._lost_arguments(others, text, arguments, lost)
        for name in given:
            rest = {key: value for key, value in arguments.items() if key != name}
            with contextlib.suppress(Exception):  # as render: it may need what is left out
                lost |= {name} if self._text(others, rest) == text else set()
        return frozenset(lost)

    def _reworded(self, i: int, message: dict[str, Any], words: dict[str, str]) -> dict[str, Any]:
        """The keys of a turn with other words, each of which is added to ``words`` with what it stands for."""
        changed: dict[str, Any] = {}
        for key in role_and_keys(message)[1:]:
            word = f"word{i}{''.join(filter(str.isalnum, key))}word"
            if not has_text(message[key]):  # a number or a flag, which tells a template what to do, by its name
                words |= (
                    {} if re.search(rf"\b{re.escape(key)}\b", self._source) else {word: f"{key} of {message['role']}"}
                )
                continue
            if key == "content":
                changed |= self._content(i, {"content": reworded_content(i, message, self._tags, words)})
                continue
            if key == "tool_calls":
                changed[key] = [renamed(call, f"{word}{n}.") for n, call in enumerate(message[key])]
                words |= {f"{word}{n}.": f"{key} of {message['role']}" for n in range(len(message[key]))}
                continue
            words[word] = f"{key} of {message['role']}"
            changed[key] = replaced(message[key], word)
        return changed

    def _lost_parts(self, messages: Messages, text: str, arguments: Arguments) -> set[str]:
        """The parts, other than text, of reworded contents that the text is the same without."""
        lost = set[str]()
        for i, message in enumerate(messages):
            parts: list[Any] = message["content"] if isinstance(message.get("content"), list) else []
            for n, part in enumerate(parts):
                said = f"{type_of(part)} of {message['role']}"
                if type_of(part) == "text" or said in lost or f"word{i}part{n}word" in text:
                    continue
                without = {**message, "content": [*parts[:n], *parts[n + 1 :]]}
                with contextlib.suppress(Exception):  # as render: it may need the part
                    same = self._text([*messages[:i], without, *messages[i + 1 :]], arguments) == text
                    lost |= {said} if same else set()
        return lost

    def _lost_arguments(self, messages: Messages, text: str, arguments: Arguments, lost: set[str]) -> set[str]:
        """The arguments of printed calls, if the text is the same with others."""
        found = set[str]()
        for i, message in enumerate(messages):
            said = f"tool_calls of {message['role']}"
            calls: list[Any] = [] if said in lost else message.get("tool_calls") or []
            for n, call in enumerate(calls):
                if not arguments_of(call):
                    continue
                other = {**message, "tool_calls": [*calls[:n], with_other_arguments(call, "word"), *calls[n + 1 :]]}
                with contextlib.suppress(Exception):  # as render: it may need arguments that the tool has
                    same = self._text([*messages[:i], other, *messages[i + 1 :]], arguments) == text
                    found |= {f"arguments of {said}"} if same else set()
        return found

    def _marked(self, messages: Messages, arguments: Arguments) -> tuple[str, list[Ranges]]:
        """The text and each part that the template marks."""
        # The tokenizer's own mask is not used: if a marked range ends in white space that no token covers, it extends
        # to the end of the conversation.
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **arguments},
        )
        texts, spans = rendered
        return texts[0], [[(int(start), int(end))] for start, end in spans[0]]

    def _answers(self, messages: Messages, arguments: Arguments) -> tuple[str, list[Ranges]]:
        """The text and, for each turn of the assistant, what is generated: thoughts, content, calls, end marker."""
        text = self._text(messages, arguments)
        turns: list[Ranges] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                found = self._located(text, turns[-1][-1][1] if turns else 0, messages, i, arguments)
                turns.append(self._without_results(text, found, messages, i, arguments))
        return text, turns

    def _without_results(
        self, text: str, turn: tuple[int, int], messages: Messages, i: int, arguments: Arguments
    ) -> Ranges:
        """Where a turn stands, without the results of its calls: some templates print these within it or depend on it.

        Results follow the call that they name (gpt-oss), or stand between the calls and the content (Gemma 4).
        """
        ranges = [turn]
        for j in range(i + 1, len(messages)) if messages[i].get("tool_calls") else ():
            if messages[j]["role"] in ("assistant", "user", "system"):
                break
            result = {**messages[j], **self._content(j, {"content": _QUESTION})}
            before, rest = messages[:j], messages[j + 1 :]
            try:
                other = self._text([*before, result, *rest], arguments)
            except Exception:  # as render: it may not take another result
                continue
            place = common(text, other)
            if not any(start <= place < end for start, end in ranges):
                continue
            block = repeated(other, self._text([*before, result, result, *rest], arguments), place)
            first, stop = (block[0], block[1] + len(text) - len(other)) if block else turn
            pieces = [piece for start, end in ranges for piece in ((start, min(end, first)), (max(start, stop), end))]
            ranges = [(start, end) for start, end in pieces if text[start:end].strip()]
            if not ranges:
                raise ValueError(f"message {i} is not found, since message {j} stands within it")
        return ranges

    def _located(self, text: str, done: int, messages: Messages, i: int, arguments: Arguments) -> tuple[int, int]:
        """Where a turn stands in the text, of which the first ``done`` characters belong to earlier turns.

        Its content and calls are what differs if the turn says something else. Nothing is assumed of other turns.
        """
        reason = "the template leaves out what it says"
        for probe, whole in self._others(i, messages[i]):
            try:
                other = self._text([*messages[:i], probe, *messages[i + 1 :]], arguments)
            except Exception:  # as render: many a template takes the result of a tool only after its call
                continue
            if _ANSWER not in other:
                continue
            before, after = other.index(_ANSWER), len(other) - other.rindex(_ANSWER) - len(_ANSWER)
            header = self._header(other[done:before], messages, i, arguments)
            start = common(text, other[:before])
            kept = common_end(text[start:], other[len(other) - after :])
            if (whole and other.count(_ANSWER) > 1) or start < done + header[0]:
                reason = "what it says stands in more than one place, or changes what stands before it"
            elif after - kept > max(map(len, self._endings)):
                reason = "what it says changes what stands after it"
            elif not text[start : len(text) - kept].strip() and says(messages[i]):
                reason = "the template leaves out what it says"
            else:
                end = len(text) - kept
                opened = text.rfind("<", start, end) > text.rfind(">", start, end)
                if opened and (rest := _REST_OF_TAG.match(text, end)):
                    end = rest.end()
                return min(start, done + header[1]), self._closed(text, end, whole, last=i + 1 == len(messages))
        raise ValueError(f"message {i} is not found, since {reason}; mark the turns with {{% generation %}}")

    def _others(self, i: int, message: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
        """The turn with another content, and whether all that it says is replaced: calls can be renamed alone."""
        content = self._content(i, {"content": _ANSWER})
        plain = {key: value for key, value in message.items() if key != "tool_calls"} | content
        calls = message.get("tool_calls")
        if not calls:
            return [(plain, True)]
        called = {"tool_calls": [renamed(call, _ANSWER) for call in calls]}
        return [
            (plain, True),
            ({**message, **content, **called}, False),
            ({**message, **called}, False),  # gpt-oss takes no content beside thoughts and a call
        ]

    def _closed(self, text: str, end: int, whole: bool, last: bool) -> int:
        """The end of a turn with its marker, for content (and calls, if ``whole``) that end at ``end``."""
        marker = self._endings[last].rstrip() or self._endings[last]  # without marker, white space ends the turn
        if not whole and marker.strip():
            end = max(end, text.find(marker, end))
        return end + len(markers(marker, text[end:]))

    def _header(self, before: str, messages: Messages, i: int, arguments: Arguments) -> tuple[int, int]:
        """Where the header of a turn begins and ends in the text between the turn before and its content."""
        asked, header, lead = self._prompt(messages, i, {}, arguments)
        found = _ends_of_header(before, asked, header)
        thoughts = {key: value for key, value in messages[i].items() if key not in _SAID}
        if not found and thoughts:
            # A prompt may end with empty thoughts (Qwen 3.5): where the turn has others, the header ends before these.
            found = _ends_of_header(before, *self._prompt(messages, i, thoughts, arguments)[:2])
        if found:
            return found
        # Thoughts that the header begins are left out of earlier turns.
        part = next((n for n in range(len(header), 0, -1) if before.endswith(header[:n])), 0)
        end = len(before) - (len(lead) if not part and before.endswith(lead) else 0)
        return end - part, end

    def _prompt(self, messages: Messages, i: int, beside: dict[str, Any], arguments: Arguments) -> tuple[str, str, str]:
        """What stands before a turn: all with the header, the header alone, and what is generated before the content.

        The header is the generation prompt, as far as the answered conversation has it too. ``beside`` is what the turn
        has but for its content.
        """
        named = {key: messages[i][key] for key in ("name",) if key in messages[i]}
        asked: Messages = [{"role": "user", **self._content(0, {"content": "-"})}]
        for given in [messages[:i], asked] if i else [asked]:  # templates cannot render an empty conversation
            try:
                return self._split(given, beside, named, arguments)
            except Exception:  # as render: it may not take so short a conversation
                continue
        return "", "", ""

    def _split(
        self, messages: Messages, beside: dict[str, Any], named: dict[str, Any], arguments: Arguments
    ) -> tuple[str, str, str]:
        """``_prompt`` for a turn after these messages."""
        asked, prompted = self._text(messages, arguments), self._text(messages, arguments, prompted=True)
        answer = {"role": "assistant", **self._content(0, {"content": _ANSWER}), **beside}
        answered = self._text([*messages, answer], arguments).rpartition(_ANSWER)[0]
        kept, end = common(asked, prompted), common(prompted, answered)
        prompt, first = prompted[kept:], min(kept, end)
        if asked == prompted:  # no generation prompt: all is header, but for white space alone, as in Llama 2
            end = len(answered) if answered[end:].strip() else end
        elif prompt.strip():
            # What ends a conversation may stand before the prompt, so that the answered one does not begin with it.
            found = answered.rfind(prompt, max(0, common(asked, answered) - len(prompt)))
            part = next((n for n in range(len(prompt), 0, -1) if answered.endswith(prompt[:n])), 0)
            if found >= 0:
                first, end = found, found + len(prompt)
            elif part:
                first, end = len(answered) - part, len(answered)
        lead = answered[end:]
        if named:  # a header with a name ends as the one without does
            other = self._text([*messages, {**answer, **named}], arguments).rpartition(_ANSWER)[0]
            first, answered = min(first, common(answered, other)), other
            end = len(answered) - len(lead)
        return answered[:end], answered[first:end], lead

    def _text(self, messages: Messages, arguments: Arguments | None = None, prompted: bool = False) -> str:
        given = {"chat_template": self._source, **(arguments or {})}
        return str(
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted, **given)
        )

    def _content(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        """A message's content in a form that the template takes: a string, or a list of parts."""
        content = message.get("content")
        as_text, as_parts = self._probes
        if isinstance(content, str):
            return {"content": text_parts(content) if _ANSWER in as_parts and _ANSWER not in as_text else content}
        if not isinstance(content, list):
            return {}
        # Columnar files pad every part with the keys of all others; templates ask whether a part has a key.
        parts = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
            for each in content
            for part in (text_parts(each) if isinstance(each, str) else [each])
        ]
        if _ANSWER not in as_text or as_parts == as_text:
            return {"content": parts}
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if None in texts:
            raise ValueError(f"message {i} has a part that is not text")
        return {"content": "".join(map(str, texts))}

    @cached_property
    def _probes(self) -> tuple[str, str]:
        """A short conversation with its contents as strings and as lists of parts; empty if that cannot be rendered.

        Many templates print a list of parts as Python would, or an answer that is a string not at all.
        """
        rendered = []
        for form in (str, text_parts):
            turns = [{"role": "user", "content": form("-")}, {"role": "assistant", "content": form(_ANSWER)}]
            try:
                rendered.append(self._text(turns))
            except Exception:  # as render
                rendered.append("")
        return rendered[0], rendered[1]

    @cached_property
    def _endings(self) -> tuple[str, str]:
        """What the template puts after an answer that others follow, and after the last one."""
        shown = next((text for text in self._probes if _ANSWER in text), "")
        last = shown.rpartition(_ANSWER)[2]
        question, answer = (self._content(0, {"content": text}) for text in (_QUESTION, _ANSWER))
        turns = [{"role": "user", **question}, {"role": "assistant", **answer}, {"role": "user", **question}]
        try:
            asked = self._text(turns[:1]).partition(_QUESTION)[2]
            between, found, _ = self._text(turns).partition(_ANSWER)[2].partition(_QUESTION)
        except Exception:  # as render
            return last, last
        ending = markers(last, between)
        if not found or ending.strip():  # what only ends the conversation does not count
            return (ending, ending) if found else (last, last)
        other = markers(asked, between)  # the last answer may have a marker of its own
        return other if other.strip() else ending, last


def _ends_of_header(before: str, asked: str, header: str) -> tuple[int, int] | None:
    """Where the last header stands, recognised by as much as possible of what was asked before it."""
    length = min(len(asked), _CONTEXT)
    while length and length >= len(header):  # what was asked helps to tell headers from contents
        found = before.rfind(asked[-length:])
        if found >= 0:
            return found + length - len(header), found + length
        length = max(length // 2, len(header)) if length > len(header) else 0
    return None
