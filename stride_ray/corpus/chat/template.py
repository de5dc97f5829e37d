"""Conversations to text, with the ranges of characters that carry loss.

These are the assistant's answers, each up to and including the marker that ends its turn (``<|im_end|>``). White space
after the marker does not count, since the model never generates it; in a template without markers it is what ends the
turn, and counts. A template that marks its answers itself (``{% generation %}``) decides alone: what it marks counts.
"""

import re
from functools import cached_property
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from stride_ray.corpus.chat.clock import with_fixed_clock

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "stride-ray-probe"  # the answer in conversations that try a template out

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

    def render(self, messages: Messages, arguments: Arguments | None = None) -> tuple[str, Ranges]:
        """A conversation as text, and the ranges of characters (start, end) that carry loss.

        Args:
            messages: with role and content.
            arguments: further arguments of the template, such as tools.

        Raises:
            Exception: of any class, as a template is a program. ValueError: it renders a turn differently if others
                follow it, or does not take the form of a message's content.
        """
        messages = [{**message, **self._content(i, message)} for i, message in enumerate(messages)]
        marked = _GENERATION.search(self._source)
        return (self._marked if marked else self._answers)(messages, arguments or {})

    def _marked(self, messages: Messages, arguments: Arguments) -> tuple[str, Ranges]:
        """The text and what the template marks."""
        # The tokenizer's own mask is not used: if a marked range ends in white space that no token covers, it extends
        # to the end of the conversation.
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **arguments},
        )
        texts, spans = rendered
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _answers(self, messages: Messages, arguments: Arguments) -> tuple[str, Ranges]:
        """The text and, for each turn of the assistant, what follows its generation prompt."""
        text = self._text(messages, arguments)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            after = self._text(messages[: i + 1], arguments)
            if i:
                before = self._text(messages[:i], arguments, prompted=True) + self._header
            else:  # templates cannot render an empty conversation: take the generation prompt from another one
                prompt = self._prompts[1].removeprefix(self._prompts[0]) + self._header
                before = after[: after.find(prompt) + len(prompt)] if prompt in after else after + prompt
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(f"message {i} is rendered differently alone; mark the turns with {{% generation %}}")
            end = len(after.rstrip()) if self._ends_turns else len(after)
            spans.append((len(before), end))
        return text, spans

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
            return {"content": _parts(content) if _ANSWER in as_parts and _ANSWER not in as_text else content}
        if not isinstance(content, list):
            return {}
        # Columnar files pad every part with the keys of all others; templates ask whether a part has a key.
        parts = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
            for each in content
            for part in (_parts(each) if isinstance(each, str) else [each])
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
        for form in (str, _parts):
            turns = [{"role": "user", "content": form("-")}, {"role": "assistant", "content": form(_ANSWER)}]
            try:
                rendered.append(self._text(turns))
            except Exception:  # as render
                rendered.append("")
        return rendered[0], rendered[1]

    @cached_property
    def _prompts(self) -> tuple[str, str]:
        """A short conversation that waits for an answer, without and with the generation prompt."""
        asked: Messages = [{"role": "user", **self._content(0, {"content": "-"})}]
        return self._text(asked), self._text(asked, prompted=True)

    @cached_property
    def _header(self) -> str:
        """What begins a turn of the assistant, if the template has no generation prompt; "" if it has one."""
        try:
            asked, prompted = self._prompts
        except Exception:  # as render: it may not take so short a conversation
            return ""
        header = self._answered[0].removeprefix(asked) if asked == prompted else ""
        return header if header.strip() else ""  # white space alone is generated, as in Llama 2

    @cached_property
    def _ends_turns(self) -> bool:
        """Whether the template ends an answer with more than white space."""
        return bool(self._answered[1].strip())

    @cached_property
    def _answered(self) -> tuple[str, str]:
        """What stands before and after the answer in a probe; ("", "?") if the template does not show it."""
        shown = next((text for text in self._probes if _ANSWER in text), f"{_ANSWER}?")
        before, _, after = shown.rpartition(_ANSWER)
        return before, after


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
