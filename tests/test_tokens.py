"""Documents to token ids: exact ids, exact masks, every way to name a tokenizer."""

import json

import fsspec
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from stride_ray.corpus.documents import Document, TokenizedDocument
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.tokenization.encoding import encode, encode_stream, show_masked
from stride_ray.corpus.tokenization.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size
from stride_ray.runtime.errors import StrideError

LINES = ["the cat sat on the mat", "what is two and two", "the answer is four", "user assistant system"] * 20
# Marks turns as most templates do; the header's and the end's white space lie outside the answer.
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
)
# Forgets what earlier answers said, as templates of reasoning models do with thoughts.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = st.text(min_size=1, max_size=40).filter(str.strip)


def backend(special=("<|end|>", "<|start|>")):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(LINES, trainer)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="<|end|>"))


def chat(tokenizer, template, messages, document_id="d"):
    tokenizer.chat_template = template
    return encode([Document(document_id, "s", messages=messages)], tokenizer)[0]


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXT, min_size=1, max_size=10))
def test_text_is_encoded_alone_and_without_special_tokens(tokenizer, texts):
    results = encode([Document(str(i), "s", text=text) for i, text in enumerate(texts)], tokenizer)
    for i, (result, text) in enumerate(zip(results, texts, strict=True)):
        assert (result.document_id, result.source, result.mask) == (str(i), "s", None)
        assert result.ids.dtype == np.int32
        assert result.ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(result.ids) == text


class Sighing(PreTrainedTokenizerFast):
    """A tokenizer that encodes in a way of its own, as that of Code Llama does."""

    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus(["oh, " + each for each in text], *args, **kwargs)


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, Sighing])
@pytest.mark.parametrize("split", [False, True])
def test_texts_are_encoded_as_the_tokenizer_itself_does(kind, split):
    model = backend()
    model.post_processor = tokenizers.processors.TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", 1)])
    made = kind(tokenizer_object=model, eos_token="<|end|>", split_special_tokens=split)
    texts = ["the cat<|end|>sat", "what is two", "é<|start|>"]
    results = encode([Document(text, "s", text=text) for text in texts], load_tokenizer(made))
    expected = made(texts, add_special_tokens=False)["input_ids"]
    assert [result.ids.tolist() for result in results] == expected
    assert (0 in expected[0]) != split


@settings(deadline=None, max_examples=40)
@given(contents=st.lists(st.text("abc é\n", min_size=1, max_size=12), min_size=1, max_size=5), first=st.booleans())
@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["rendered", "marked"])
def test_the_assistants_turns_count_and_nothing_else(tokenizer, template, contents, first):
    messages = turns(*contents, first="assistant" if first else "user")
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    result = chat(tokenizer, template, messages)
    if not answers:
        assert "no turn of the assistant" in result.reason
        return
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert result.ids.tolist() == whole
    assert tokenizer.decode(result.ids[result.mask]) == "".join(answer + "<|end|>" for answer in answers)


def test_a_turn_without_a_marker_keeps_the_newline_that_ends_it(tokenizer):
    result = chat(tokenizer, PLAIN, turns("what is two", "four", "and", "the cat"))
    assert show_masked(result, tokenizer) == "user: what is two\nassistant:⟦ four\n⟧user: and\nassistant:⟦ the cat\n⟧"


def test_conversations_that_the_template_does_not_take(tokenizer):
    forgotten = chat(tokenizer, FORGETFUL, turns("a", "b", "c", "d"))
    assert "generation" in forgotten.reason
    assert isinstance(chat(tokenizer, FORGETFUL, turns("a", "b")), TokenizedDocument)
    broken = chat(tokenizer, "{{ raise_exception('only one turn, please') }}", turns("a", "b"), "d7")
    assert broken == Rejected("d7", None, "the chat template does not take it: only one turn, please")
    with pytest.raises(StrideError, match="no chat template"):
        chat(tokenizer, None, turns("a", "b"))


@pytest.mark.parametrize(
    ("message", "arguments", "why"),
    [
        ({"content": [{"type": "text", "text": "a\ud83d b"}]}, {}, "a lone surrogate"),
        ({"content": "b", "name": "half \udc00"}, {}, "a lone surrogate"),
        ({"content": "b", "tool_calls": [{"function": {"name": "f", "arguments": {"\ud800": 1}}}]}, {}, "surrogate"),
        ({"content": "b"}, {"tools": [{"function": {"name": "\ud800"}}]}, "a lone surrogate"),
        ({"content": "b", "refused": "half \ud800"}, {}, "does not take it: half ?"),
        ({"content": "b", "unprinted": "half \ud800"}, {}, None),
    ],
)
def test_a_lone_surrogate_that_would_be_encoded_costs_its_conversation_alone(tokenizer, message, arguments, why):
    tokenizer.chat_template = (
        "{{ tools | tojson if tools }}{% for m in messages %}"
        "{% if m.refused %}{{ raise_exception(m.refused) }}{% endif %}"
        "{{ m.role }}{{ m.name }}{{ m.tool_calls | tojson if m.tool_calls }}:"
        "{% generation %}{{ m.content if m.content is string else m.content[0].text }}{% endgeneration %}\n{% endfor %}"
    )
    fine = turns("what is two", "four")
    odd = [fine[0], {"role": "assistant", **message}]
    lists = ((odd, arguments), (fine, {}))
    documents = [Document(f"d{i}", "s", messages=m, template_arguments=a) for i, (m, a) in enumerate(lists)]
    result, other = encode(documents, tokenizer, set())
    assert isinstance(other, TokenizedDocument)
    assert isinstance(result, TokenizedDocument) if why is None else why in result.sentence().encode().decode()


def test_token_ids_pass_through_unless_outside_the_vocabulary(tokenizer):
    size = vocabulary_size(tokenizer)
    given_ids = [[0, size - 1], [size], [3, -1], [1, 2], [1, 2], [1 << 40]]
    masks = [None, None, None, [False, True], [False, False], None]
    documents = [
        Document(str(i), "s", token_ids=ids, loss_mask=mask)
        for i, (ids, mask) in enumerate(zip(given_ids, masks, strict=True))
    ]
    results = encode(documents, tokenizer)
    assert results[0].ids.tolist() == [0, size - 1]
    assert results[0].mask is None
    assert results[3].mask.tolist() == [False, True]
    for i, words in ((1, f"{size} is outside the vocabulary of {size}"), (2, "-1 is negative"), (4, "no token counts")):
        assert results[i].file == str(i)
        assert words in results[i].reason
    without = encode(documents, None)
    assert without[1].ids.tolist() == [size]
    assert "32 bits" in without[5].reason
    with pytest.raises(StrideError, match="tokenizer is needed"):
        encode([Document("d", "s", text="x")], None)


@pytest.mark.parametrize("mask", [[True, False, False], [False, False, False]])
def test_a_mask_that_leaves_nothing_to_predict_is_rejected(tokenizer, mask):
    (result,) = encode([Document("d", "s", token_ids=[5, 6, 7], loss_mask=mask)], tokenizer)
    assert isinstance(result, Rejected)
    assert result.reason.startswith("no token counts: its loss mask is ")


def test_the_stream_keeps_its_order_and_its_rejects(tokenizer, monkeypatch):
    monkeypatch.setattr("stride_ray.corpus.tokenization.encoding._BATCH_CHARACTERS", 30)
    items = [Rejected("f", i, "bad") if i % 3 == 0 else Document(str(i), "s", text="cat " * (i + 1)) for i in range(20)]
    results = list(encode_stream(items, tokenizer))
    assert len(results) == len(items)
    for item, result in zip(items, results, strict=True):
        assert result is item if isinstance(item, Rejected) else tokenizer.decode(result.ids) == item.text


def test_what_counts_is_shown(tokenizer):
    result = encode([Document("d", "s", prompt="what is two é", answer=" four")], tokenizer)[0]
    assert show_masked(result, tokenizer) == "what is two é⟦ four<|end|>⟧"
    assert show_masked(encode([Document("d", "s", text="cat")], tokenizer)[0], tokenizer) == "⟦cat⟧"


def test_the_end_of_text_must_be_known():
    assert end_of_text_id(PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="<|end|>")) == 0
    bare = load_tokenizer(backend())
    for work in (lambda: end_of_text_id(bare), lambda: encode([Document("d", "s", prompt="a", answer="b")], bare)):
        with pytest.raises(StrideError, match="eos_token"):
            work()


def test_the_vocabulary_ends_at_its_largest_id():
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 900, "?": 3}, unk_token="?"))
    tokenizer = load_tokenizer(model)
    assert vocabulary_size(tokenizer) == 901
    tokenizer.add_tokens(["c"])
    assert vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1


def test_every_way_to_name_a_tokenizer(tmp_path):
    model = backend()
    model.enable_truncation(4)
    model.enable_padding(length=8)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", model_max_length=4)
    wrapped.save_pretrained(tmp_path / "wrapped")
    (tmp_path / "plain").mkdir()
    model.save(str(tmp_path / "plain/tokenizer.json"))
    (tmp_path / "wrapped/model.safetensors").write_bytes(b"weights are not fetched")
    fsspec.filesystem("memory").put(str(tmp_path), "/tokenizers", recursive=True)
    text = "the cat sat on the mat and what is two"
    expected = backend().encode(text).ids
    assert len(expected) > 8
    for place in (
        tmp_path / "wrapped",
        str(tmp_path / "plain"),
        str(tmp_path / "plain/tokenizer.json"),
        "memory://tokenizers/wrapped",
        "memory://tokenizers/plain/tokenizer.json",
        model,
        wrapped,
    ):
        assert encode([Document("d", "s", text=text)], load_tokenizer(place))[0].ids.tolist() == expected
    assert end_of_text_id(load_tokenizer(tmp_path / "wrapped")) == 0


def test_a_missing_or_broken_tokenizer_is_told(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text(json.dumps({"version": 1}))
    (tmp_path / "broken.gguf").write_bytes(b"no GGUF")
    for place, words in (
        (str(tmp_path / "missing"), "no tokenizer at"),
        (str(tmp_path / "missing.gguf"), "no tokenizer at"),
        (str(tmp_path / "broken"), "No tokenizer can be loaded"),
        (str(tmp_path / "broken.gguf"), "No tokenizer can be loaded"),
        ("memory://key:secret@nowhere", "cannot be fetched"),
    ):
        with pytest.raises(StrideError, match=words) as told:
            load_tokenizer(place)
        assert "secret" not in str(told.value)


def test_an_answer_that_ends_with_end_of_text_gets_no_second_one(tokenizer):
    for answer in ("four", "four<|end|>"):
        result = encode([Document("d", "s", prompt="two and two", answer=answer)], tokenizer)[0]
        assert tokenizer.decode(result.ids[result.mask]) == "four<|end|>"


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["rendered", "marked"])
def test_turns_that_are_not_to_be_learned_do_not_count(tokenizer, template):
    tokenizer.chat_template = template
    messages = turns("hi", "bad", "hi", "good")
    for learned, counted in (([True, False, True, True], "good<|end|>"), (None, "bad<|end|>good<|end|>")):
        result = encode([Document("d", "s", messages=messages, learned=learned)], tokenizer)[0]
        assert tokenizer.decode(result.ids[result.mask]) == counted
    nothing = encode([Document("d", "s", messages=messages, learned=[True, False, True, False])], tokenizer)[0]
    assert nothing.reason == "every turn of the assistant is marked as not to be learned"


def test_a_template_that_marks_other_parts_than_turns_leaves_out_none(tokenizer):
    mixed = "{% generation %}{{ messages[0].content }}{% endgeneration %}" + MARKED
    messages = turns("hi", "bad", "hi", "good")
    assert not isinstance(chat(tokenizer, mixed, messages), Rejected)
    result = encode([Document("d", "s", messages=messages, learned=[True, False, True, True])], tokenizer)[0]
    assert "it marks 3 parts for 2 turns" in result.reason


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["rendered", "marked"])
def test_tools_and_arguments_are_given_to_the_template(tokenizer, template):
    tokenizer.chat_template = "{{ tools | tojson }}{{ tone }}" + template
    arguments = {"tools": [{"name": "add"}], "tone": "kind"}
    result = encode([Document("d", "s", messages=turns("hi", "yes"), template_arguments=arguments)], tokenizer)[0]
    assert tokenizer.decode(result.ids).startswith('[{"name": "add"}]kind<|start|>user\nhi')
    assert tokenizer.decode(result.ids[result.mask]) == "yes<|end|>"
