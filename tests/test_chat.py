"""Conversations: the same targets whatever the form of the content, and the same text whenever they are rendered."""

import datetime
import io
import json
from types import SimpleNamespace

import pytest
import transformers
from conftest import documents, save_tokenizer, write_lines
from test_tokens import CHAT, MARKED, PLAIN, backend, chat, turns
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.queries import read_queries
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization import clock
from stride_ray.corpus.tokenization.clock import FIXED, fix_clock, fixed_time, with_fixed_clock
from stride_ray.corpus.tokenization.encoding import show_masked
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

# How templates take a content: as a string alone, in either form, as a list of parts alone.
JOINED = CHAT.replace("{{ m.role }}\n{{ m.content }}<|end|>\n", "{{ m.role + '\n' + m.content + '<|end|>\n' }}")
EITHER = CHAT.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if 'image' in p %}<image>{% endif %}{{ p.text }}{% endfor %}{% endif %}",
)
PARTS = CHAT.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
TOOLS = CHAT.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.name }}</call>{% endfor %}"
)
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = 'never' %}{%- endif %}"
    "{%- endif %}Today Date: {{ date_string }}"
)
MISTRAL = (
    "{%- set today = strftime_now('%Y-%m-%d') %}{%- set day = today.split('-') %}{{ today }} {{ day[1] | int - 1 }}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="<|end|>"))


def forms(text):
    """A content as it comes: a string, parts, parts padded by a columnar file, strings, several parts."""
    half = len(text) // 2
    part = {"type": "text", "text": text}
    pieces = [{"type": "text", "text": piece} for piece in (text[:half], text[half:])]
    return [text, [part], [{**part, "image": None}], [text], pieces]


@pytest.mark.parametrize(
    "template", [CHAT, JOINED, EITHER, PARTS, MARKED], ids=["print", "join", "either", "parts", "marked"]
)
def test_the_form_of_the_content_changes_nothing(tokenizer, template):
    expected = "<|start|>user\nwhat is two<|end|>\n<|start|>assistant\n⟦four<|end|>⟧\n"
    if template == MARKED:  # Jinja drops the newline after a block
        expected = expected.replace("<|end|>\n", "<|end|>").replace("⟧\n", "⟧")
    for question, answer in zip(forms("what is two"), forms("four"), strict=True):
        assert show_masked(chat(tokenizer, template, turns(question, answer)), tokenizer) == expected
    assert "⟧" + "\n" * (template != MARKED) + "<|start|>user" in show_masked(
        chat(tokenizer, template, turns("a", ["b"], "c", "d")), tokenizer
    )


def test_a_turn_without_a_marker_ends_with_its_white_space_in_every_form(tokenizer):
    for answer in forms("four"):
        assert show_masked(chat(tokenizer, PLAIN, turns("two", answer)), tokenizer) == "user: two\nassistant:⟦ four\n⟧"


def test_white_space_after_the_end_of_a_tool_call_does_not_count(tokenizer):
    messages = [*turns("what is two"), {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]
    assert show_masked(chat(tokenizer, TOOLS, messages), tokenizer).endswith("⟦<call>add</call><|end|>⟧\n")


def test_the_header_of_a_turn_does_not_count_without_a_generation_prompt(tokenizer):
    template = CHAT.partition("{% if add_generation_prompt %}")[0]
    expected = "<|start|>user\ntwo<|end|>\n<|start|>assistant\n⟦four<|end|>⟧\n"
    for answer in forms("four"):
        assert show_masked(chat(tokenizer, template, turns("two", answer, "two", answer)), tokenizer) == expected * 2
    first = show_masked(chat(tokenizer, template, turns("four", first="assistant")), tokenizer)
    assert first == "<|start|>assistant\n⟦four<|end|>⟧\n"
    # Llama 2 has neither header nor prompt: the model generates the space.
    llama = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    llama += " {{ m.content }}<|end|>{% endif %}{% endfor %}"
    assert show_masked(chat(tokenizer, llama, turns("two", "four")), tokenizer) == "[INST] two [/INST]⟦ four<|end|>⟧"


def test_named_templates_without_a_default(tokenizer):
    assert show_masked(chat(tokenizer, {"default": CHAT, "rag": PLAIN}, turns("a", "b")), tokenizer).endswith(
        "⟦b<|end|>⟧\n"
    )
    with pytest.raises(StrideError, match="the chat templates rag, tool, and none is named default"):
        chat(tokenizer, {"rag": PLAIN, "tool": PLAIN}, turns("a", "b"))


def test_a_part_that_is_not_text(tokenizer):
    image = [{"type": "text", "text": "what"}, {"type": "image", "image": "a.png"}]
    assert chat(tokenizer, CHAT, turns(image, "a cat")).reason == (
        "the chat template does not take it: message 0 has a part that is not text"
    )
    assert "what<image>" in show_masked(chat(tokenizer, EITHER, turns(image, "a cat")), tokenizer)


def test_a_tokenizer_without_offsets_finds_the_turns(tokenizer):
    slow = load_tokenizer(ByT5Tokenizer())
    template = CHAT.replace("<|end|>", "</s>").replace("<|start|>", "@")
    asked = turns("what é", "日本", "two", " four")
    # The tokenizer drops white space after special tokens.
    expected = "@user\nwhat é</s>@assistant\n⟦日本</s>⟧@user\ntwo</s>@assistant\n⟦ four</s>⟧"
    assert show_masked(chat(slow, template, asked), slow) == expected
    assert show_masked(chat(slow, template, turns("four", first="assistant")), slow) == "@assistant\n⟦four</s>⟧"


class _Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now(format='%H:%M:%S %-d %%d 100%') }}", "00:00:00 26 %d 100%"),
        ("{% set form = '%B' ~ ' %Y' %}{% set now = strftime_now %}{{ now(form) }}", "July 2024"),
        ("{% for m in messages %}{{ strftime_now('%j') }}{% endfor %}", "208208"),
        ("{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ day() }}", "Friday"),
        (LLAMA, "Today Date: 26 Jul 2024"),
        (MISTRAL, "2024-07-26 6"),
    ],
)
def test_a_template_that_reads_the_clock_gets_a_fixed_time(tokenizer, template, text, monkeypatch):
    tail = "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    first = chat(tokenizer, template + tail, turns("a", "b"))
    assert show_masked(first, tokenizer) == f"{text}⟦b⟧"
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", _Tomorrow)
    assert chat(tokenizer, template + tail, turns("a", "b")).ids.tolist() == first.ids.tolist()


def test_the_fixed_time_is_written_as_python_writes_it():
    directives = [*"aAbBcCdDeFgGhHIjmMnpSuUVwWxXyYzZ%", "-d", "-m", "-I"]
    form = "on " + ", ".join(f"{each}=%{each}" for each in directives) + "%%d %"
    template = with_fixed_clock(f"{{{{ strftime_now({json.dumps(form)}) }}}}")
    assert render_jinja_template([[]], chat_template=template)[0] == [FIXED.strftime(form)]


@pytest.mark.parametrize("start", ["", "\n", "\n\n", "  ", "  {% set a = 1 %}", "\t{#- a #}\n", "{%- set a = 1 %}\n"])
def test_the_clock_changes_nothing_else(start):
    template = start + " {% if false %}{{ strftime_now('%d') }}{% endif %}\n x\n"
    plain, fixed = (render_jinja_template([[]], chat_template=t)[0] for t in (template, with_fixed_clock(template)))
    assert plain == fixed
    assert with_fixed_clock(CHAT) == CHAT


def test_the_time_stays_with_the_saved_tokenizer(tokenizer, tmp_path, monkeypatch):
    tokenizer.chat_template = {"default": LLAMA, "tool_use": CHAT}
    assert fixed_time(tokenizer) == "2024-07-26T00:00:00"
    fix_clock(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(clock, "FIXED", datetime.datetime(2030, 1, 1))
    clock._macro.cache_clear()
    again = load_tokenizer(tmp_path)
    assert fixed_time(again) == "2024-07-26T00:00:00"
    assert "26 Jul 2024" in again.apply_chat_template(turns("a"), tokenize=False)
    assert fixed_time(SimpleNamespace(chat_template=LLAMA)) == "2030-01-01T00:00:00"
    clock._macro.cache_clear()
    assert fixed_time(SimpleNamespace(chat_template=CHAT)) is None
    assert fixed_time(SimpleNamespace(chat_template=None)) is None


def test_a_run_keeps_its_date(tmp_path, plain, monkeypatch):
    """Sharded on two days, with more input and queries on the second: the same bytes, the same date."""
    saved = save_tokenizer(tmp_path / "tokenizer", documents(8))
    saved.chat_template = LLAMA + saved.chat_template
    saved.save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": turns(text, text.upper())} for text in documents(4)]
    rows[1] |= {"tools": [{"name": "add"}]}
    rows[2]["messages"][1]["tool_calls"] = [{"name": "add"}]
    changes = {"corpus.tokenizer": str(tmp_path / "tokenizer"), "corpus.block_tokens": 64, "corpus.layout": "split"}
    changes["corpus.input"] = [write_lines(tmp_path / "a.jsonl", rows)]
    one, other = (Run(str(tmp_path / name), changes=changes) for name in "xy")
    out = io.StringIO()
    before = shard(one, out)
    assert before["chat_time"] == "2024-07-26T00:00:00"
    assert before["unrendered"] == ["tool_calls of assistant", "tools"]
    assert "Today Date: 26 Jul 2024<|user|>" in out.getvalue()
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", _Tomorrow)
    assert shard(other, out)["fingerprint"] == before["fingerprint"]
    # The constant of a later version does not count in an old run.
    monkeypatch.setattr(clock, "FIXED", datetime.datetime(2030, 1, 1))
    clock._macro.cache_clear()
    more = write_lines(tmp_path / "b.jsonl", rows[:1])
    after = shard(Run(str(tmp_path / "x"), changes={"corpus.input": [str(tmp_path / "a.jsonl"), more]}), out)
    clock._macro.cache_clear()
    assert after["chat_time"] == before["chat_time"]
    tokenizer = load_tokenizer(tmp_path / "x/blocks/tokenizer")
    added = Blocks(one.stage("blocks").store).batch([before["blocks"]]).ids[0].tolist()
    query = read_queries(more, tokenizer)["token_ids"].to_pylist()[0]
    assert query[:64] == added
    assert tokenizer.decode(query).startswith("Today Date: 26 Jul 2024<|user|>")
