"""Token ids to text: the pieces of a text's tokens, joined, are the text."""

import pytest
from conftest import documents, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stride_ray.corpus.tokenization.decoding import token_texts

TEXTS = [*documents(8), "naïve café 東京 🙂🙃 a\u0301", "a  b\n\n c"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("bytes"), TEXTS)


@pytest.fixture(scope="module")
def metaspace():
    """As Llama 2's: a token that is decoded alone loses its space."""
    model = Tokenizer(models.BPE(byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    model.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=every_byte, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_joined_pieces_are_the_text(request, kind):
    tokenizer = request.getfixturevalue(kind)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=24))
    def check(ids):
        pieces = token_texts(ids, tokenizer)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids)

    check()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)


def test_words_keep_their_space_and_a_character_belongs_to_its_last_token(metaspace, byte_level):
    ids = metaspace("the tide", add_special_tokens=False)["input_ids"]
    pieces = token_texts(ids, metaspace)
    assert " " in "".join(pieces)
    assert sum(bool(piece) for piece in pieces) > 1
    ids = byte_level("🙂", add_special_tokens=False)["input_ids"]
    assert token_texts(ids, byte_level) == [*[""] * (len(ids) - 1), "🙂"]
