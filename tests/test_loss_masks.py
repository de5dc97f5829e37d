"""Prompts with answers, over families of tokenizers: one text, in which the answer counts and nothing else."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stride_ray.corpus.documents import Document
from stride_ray.corpus.tokenization.encoding import encode, show_masked
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer

LINES = ["the cat sat on the mat", "is two and two four", "2+2=4", "def loads(s): return", "a\nb é 日本"] * 20
ALPHABET = "the catis2+=4\né日"
LINES += [*ALPHABET, "tthecatis24é"]  # each letter alone and within a word
LETTERS = st.text(ALPHABET, max_size=12)
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _byte_level(prefix):
    letters = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        decoder=decoders.ByteLevel(),
    )


def _trimmed():
    """As that of RoBERTa, whose offsets leave out spaces."""
    tokenizer = _byte_level(False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _sentence_pieces(first_space=True, **parts):
    """BPE with byte fallback, as converted from SentencePiece."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL + BYTES, show_progress=False),
        decoder=decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if first_space else steps),
        **parts,
    )


def _metaspace(scheme, split=True):
    part = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return _sentence_pieces(first_space=scheme != "never", pre_tokenizer=part)


def _prepended():
    """As the first conversions of Llama 2 had it."""
    return _sentence_pieces(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def _unigram():
    return _trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def _word_pieces():
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False),
        normalizer=normalizers.BertNormalizer(strip_accents=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


FAMILIES = {
    "byte-level": lambda: _byte_level(False),
    "byte-level, first space": lambda: _byte_level(True),
    "byte-level, trimmed offsets": _trimmed,
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "metaspace first, unsplit": lambda: _metaspace("first", split=False),
    "prepended": _prepended,
    "unigram": _unigram,
    "word pieces": _word_pieces,
}


class Own(PreTrainedTokenizerFast):
    """Encodes in a way of its own, as that of Code Llama does: its offsets are not relied on."""

    def _encode_plus(self, *args, **kwargs):
        return super()._encode_plus(*args, **kwargs)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A family's name with two tokenizers: one with offsets, one without."""
    # Read back, as the trainers number their tokens anew every time.
    text, kinds = FAMILIES[request.param]().to_str(), (PreTrainedTokenizerFast, Own)
    both = (kind(tokenizer_object=Tokenizer.from_str(text), eos_token="</s>") for kind in kinds)
    return request.param, *map(load_tokenizer, both)


def pair(tokenizer, prompt, answer):
    return encode([Document("d", "s", prompt=prompt, answer=answer)], tokenizer)[0]


def seen(name, text):
    """As much of a text as a family keeps."""
    return "".join(text.split()) if name == "word pieces" else text.lstrip(" ")


@settings(deadline=None, max_examples=60)
@given(prompt=LETTERS, answer=LETTERS.filter(str.strip))
def test_the_answer_counts_and_nothing_else(family, prompt, answer):
    name, tokenizer, without_offsets = family
    found = pair(tokenizer, prompt, answer)
    ids, mask = found.ids.tolist(), found.mask.tolist()
    assert ids == [*tokenizer(prompt + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert seen(name, tokenizer.decode(ids[:-1])) == seen(name, prompt + answer)
    # The first token that counts is the one that goes beyond the prompt.
    first = mask.index(True)
    assert all(mask[first:])
    before, through = (len(seen(name, tokenizer.decode(ids[:end]))) for end in (first, first + 1))
    if len(seen(name, prompt)):
        assert before <= len(seen(name, prompt)) < through or first == len(ids) - 1
    else:
        assert not before
    # Without offsets, a prompt that is cut otherwise before an answer counts from there.
    other = pair(without_offsets, prompt, answer)
    assert other.ids.tolist() == ids
    assert all(other.mask[found.mask])
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if ids[: len(alone)] == alone:
        assert other.mask.tolist() == mask


def test_no_space_comes_between_prompt_and_answer(family):
    name, tokenizer, without_offsets = family
    for kind in (tokenizer, without_offsets):
        for prompt, answer in (("def loads(s):", "return"), ("", "four"), ("2+2=", "4"), ("is two", " and two")):
            decoded = tokenizer.decode(pair(kind, prompt, answer).ids[:-1])
            assert seen(name, decoded) == seen(name, prompt + answer)
        shown = seen(name, show_masked(pair(kind, "def loads(s):", "return"), kind))
        assert shown == seen(name, "def loads(s):⟦return</s>⟧")


def test_a_token_of_both_prompt_and_answer_counts(family):
    _, tokenizer, without_offsets = family
    for kind in (tokenizer, without_offsets):
        found = pair(kind, "the c", "at")
        assert "at" in tokenizer.decode(found.ids[found.mask])
        assert "the" not in tokenizer.decode(found.ids[found.mask])


def test_a_tokenizer_written_in_python():
    tokenizer = load_tokenizer(ByT5Tokenizer())
    for prompt, answer in (("é is ", "日本"), ("", "a"), ("a\n", " b")):
        found = pair(tokenizer, prompt, answer)
        before = len(prompt.encode())
        assert tokenizer.decode(found.ids) == f"{prompt}{answer}</s>"
        assert found.mask.tolist() == [False] * before + [True] * (len(answer.encode()) + 1)


def test_a_character_of_prompt_and_answer_together():
    tokenizer = load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=_byte_level(False), eos_token="</s>"))
    accent = unicodedata.normalize("NFD", "é")
    found = pair(tokenizer, accent[0], accent[1])
    assert np.flatnonzero(found.mask)[0] == 1
    assert tokenizer.decode(found.ids[:-1]) == accent


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKC()], ids=["NFC", "NFKC"])
@pytest.mark.parametrize("whole", ["é", "ệ", "한"])
def test_a_character_that_a_normalizer_composes_of_prompt_and_answer(normalizer, whole):
    """The tokenizer's offsets have the first part of it alone, which belongs to the prompt."""
    text = f"2+2{whole}"
    fast = _trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=40, special_tokens=SPECIAL, initial_alphabet=list(text), show_progress=False),
        normalizer=normalizer,
        decoder=decoders.Fuse(),
    )
    tokenizer = load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>"))
    parts = unicodedata.normalize("NFD", text)
    for cut in range(4, len(parts)):
        found = pair(tokenizer, parts[:cut], f"{parts[cut:]}4")
        assert tokenizer.decode(found.ids[found.mask]) == f"{whole}4</s>"
    # An accent that is taken away belongs to no token.
    fast.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    stripped = load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>"))
    found = pair(stripped, "2+2e", "\u03014")
    assert stripped.decode(found.ids[found.mask]) == "4</s>"
