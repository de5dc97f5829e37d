"""Documents to token ids and loss masks, with any Hugging Face tokenizer.

The mask selects the tokens that the model was trained to predict: all of a text, the answer after a prompt, the
assistant's turns of a conversation. Influence is measured on these tokens only, so the mask has to be exact;
``show_masked`` displays it for inspection.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from stride_ray.corpus.documents import Document, TokenizedDocument
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.rows.row import LONE_SURROGATE, reason
from stride_ray.corpus.tokenization.template import ChatTemplate, Ranges
from stride_ray.corpus.tokenization.tokenizer import end_of_text_id, vocabulary_size
from stride_ray.runtime.errors import StrideError

# Characters per tokenizer call; bounds memory, since a tokenizer's record of a token takes a hundred bytes.
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 512
_CALL = {"add_special_tokens": False, "padding": False, "truncation": False}
_COMBINING = "\u0300"  # the first combining character
_COMPOSED = 4  # characters at most that are composed to one
_SHOWN_COUNTED = ("⟦", "⟧")


def encode_stream(
    items: Iterable[Document | Rejected], tokenizer: Any | None, left_out: set[str] | None = None
) -> Iterator[TokenizedDocument | Rejected]:
    """``encode`` over a stream, in order, in batches of about a million characters; rejects pass through."""
    for batch in _batched(items):
        encoded = iter(encode([item for item in batch if isinstance(item, Document)], tokenizer, left_out))
        for item in batch:
            yield item if isinstance(item, Rejected) else next(encoded)


def encode(
    documents: Sequence[Document], tokenizer: Any | None, left_out: set[str] | None = None
) -> list[TokenizedDocument | Rejected]:
    """Tokenise documents; returns one result per document, in order.

    A prompt and its answer are tokenised as one text, as trainers do: apart, Metaspace tokenizers (Llama 2, Mistral,
    Gemma) would put a space between them. A token with characters of both carries loss, since the answer cannot be
    generated without it. Conversations are treated alike, see ``ChatTemplate``.

    Args:
        documents: the documents. Text gets no special tokens. A prompt is followed by its answer and end-of-text
            (unless the answer ends with it), both of which carry loss. Messages are rendered with the chat template;
            the assistant's turns that are to be learned carry loss, including the marker that ends each. Token ids are
            used as they are.
        tokenizer: from ``load_tokenizer``; may be None if all documents are token ids.
        left_out: takes what conversations hold and the chat template does not print (``ChatTemplate.left_out``).

    Raises:
        StrideError: a tokenizer is needed but missing, or it lacks an end-of-text token or chat template.
    """
    results: list[TokenizedDocument | Rejected] = []
    for batch in _batched(documents):
        results += _encode_batch([item for item in batch if isinstance(item, Document)], tokenizer, left_out)
    return results


def _batched(items: Iterable[Document | Rejected]) -> Iterator[list[Document | Rejected]]:
    batch: list[Document | Rejected] = []
    room = _BATCH_CHARACTERS
    for item in items:
        batch.append(item)
        if isinstance(item, Document):
            room -= sum(map(len, (item.text or "", item.prompt or "", item.answer or "", item.token_ids or ())))
            room -= sum(len(str(message.get("content", ""))) for message in item.messages or ())
        if room <= 0 or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, room = [], _BATCH_CHARACTERS
    if batch:
        yield batch


class _Passage(NamedTuple):
    """A document's text, the ranges of its characters that carry loss (None: all), and whether end-of-text follows."""

    text: str
    targets: Ranges | None = None
    ended: bool = False


def _encode_batch(
    documents: list[Document], tokenizer: Any | None, left_out: set[str] | None
) -> list[TokenizedDocument | Rejected]:
    if tokenizer is None and any(document.token_ids is None for document in documents):
        raise StrideError("A tokenizer is needed to read text; name one, or the model that it belongs to.")
    passages = _passages(documents, tokenizer, left_out)
    # All texts of the batch in one call, which fast tokenizers process in parallel.
    plain = iter(_text_ids([p.text for p in passages if isinstance(p, _Passage) and p.targets is None], tokenizer))
    masked = iter(_masked_ids([p for p in passages if isinstance(p, _Passage) and p.targets is not None], tokenizer))
    results: list[TokenizedDocument | Rejected] = []
    for document, passage in zip(documents, passages, strict=True):
        if passage is None:
            result = _given_ids(document, None if tokenizer is None else vocabulary_size(tokenizer))
        elif isinstance(passage, Rejected):
            result = passage
        elif passage.targets is None:
            result = _checked(document, next(plain), None)
        else:
            ids, mask = next(masked)
            end = [end_of_text_id(tokenizer)] if passage.ended else []
            end = [] if ids[-1:] == end else end
            result = _checked(document, [*ids, *end], [*mask, *(True for _ in end)])
        results.append(result)
    return results


def _passages(documents: list[Document], tokenizer: Any, left_out: set[str] | None) -> list[_Passage | Rejected | None]:
    """Each document as a passage; None for token ids."""
    templates = dict[bool, ChatTemplate]()
    passages: list[_Passage | Rejected | None] = []
    for document in documents:
        if document.text is not None:
            passages.append(_Passage(document.text))
        elif document.answer is not None:
            prompt = document.prompt or ""
            text = prompt + document.answer
            passages.append(_Passage(text, [(len(prompt), len(text))], ended=True))
        elif document.messages is not None:
            tools = "tools" in (document.template_arguments or {})  # for which a tokenizer may have another template
            if tools not in templates:
                templates[tools] = _chat_template(tokenizer, tools)
            passages.append(_conversation(document, templates[tools]))
            if left_out is not None and isinstance(passages[-1], _Passage):
                left_out |= templates[tools].left_out(document.messages, document.template_arguments)
        else:
            passages.append(None)
    return passages


def _text_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    if not _has_offsets(tokenizer):
        return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **_CALL)["input_ids"]
    # Same as a transformers call, but without token offsets, which take nearly as long as the tokens. The empty call
    # configures the backend: no truncation, no padding, the tokenizer's treatment of special tokens.
    tokenizer("", **_CALL)
    return [each.ids for each in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _masked_ids(passages: list[_Passage], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """The ids of passages with targets, and which carry loss: those with a character of a target."""
    if not passages:
        return []
    texts = [passage.text for passage in passages]
    if not _has_offsets(tokenizer):
        return [
            (ids, _mask_by_prefixes(ids, passage, tokenizer))
            for ids, passage in zip(_text_ids(texts, tokenizer), passages, strict=True)
        ]
    tokenizer("", **_CALL)  # as in _text_ids
    backend = tokenizer.backend_tokenizer
    # Without special tokens, all that remains to it is to trim the spaces from offsets (RoBERTa), which belong to them.
    kept, backend.post_processor = backend.post_processor, None
    try:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    finally:
        backend.post_processor = kept
    return [
        (each.ids, _mask_by_offsets(each.offsets, passage, backend.normalizer))
        for each, passage in zip(encodings, passages, strict=True)
    ]


def _has_offsets(tokenizer: Any) -> bool:
    """Whether the tokenizer says which characters a token stands for: a fast one that encodes in the usual way."""
    return getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus


def _mask_by_offsets(offsets: list[tuple[int, int]], passage: _Passage, normalizer: Any) -> list[bool]:
    """Which tokens carry loss, from the characters (start, end) that each stands for."""
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), np.bool_)
    for start, end in passage.targets or []:
        covered = passage.text[start : start + 1] < _COMBINING or np.any((starts <= start) & (start < ends))
        start -= 0 if covered or normalizer is None else _composed_before(passage.text, start, normalizer)
        # A token of no characters, such as the space that some tokenizers put before a text, goes with the next one.
        mask |= np.maximum(starts, start) < np.minimum(np.maximum(ends, starts + 1), end)
    return mask.tolist()


def _composed_before(text: str, place: int, normalizer: Any) -> int:
    """How many characters before a place the normalizer makes one with that at it (an accent, the end of a syllable).

    Of characters that it composes (NFC in Qwen's tokenizers), the offsets have the first alone.
    """
    for n in range(1, min(_COMPOSED, place + 1)):
        before, through = (normalizer.normalize_str(text[place - n : end]) for end in (place, place + 1))
        if before != through and len(before) == len(through):
            return n
    return 0


def _mask_by_prefixes(ids: list[int], passage: _Passage, tokenizer: Any) -> list[bool]:
    """``_mask_by_offsets`` for tokenizers written in Python, which have no offsets.

    A target begins at the first token that the text before it, tokenised alone, does not begin with.
    """
    mask = np.zeros(len(ids), np.bool_)
    for start, end in passage.targets or []:
        before, through = _text_ids([passage.text[:start], passage.text[:end]], tokenizer)
        first, last = _common_length(ids, before), _common_length(ids, through)
        mask[first : last + (last < len(through))] = True
    return mask.tolist()


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _checked(document: Document, ids: Sequence[int], mask: Sequence[bool] | None) -> TokenizedDocument | Rejected:
    if not len(ids):
        return Rejected(document.document_id, None, "no tokens")
    if mask is None:
        return TokenizedDocument(
            document.document_id, document.source, np.fromiter(ids, np.int32, len(ids)), place=document.place
        )
    if not any(mask):
        return Rejected(document.document_id, None, "no token counts: its loss mask is false throughout")
    if len(mask) > 1 and not any(mask[1:]):  # trainers shift labels by one
        why = "no token counts: its loss mask is true for the first token only, which is predicted from none"
        return Rejected(document.document_id, None, why)
    return TokenizedDocument(
        document.document_id, document.source, np.asarray(ids, np.int32), np.asarray(mask, np.bool_), document.place
    )


def _given_ids(document: Document, limit: int | None) -> TokenizedDocument | Rejected:
    ids = document.token_ids or []
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0:
        return Rejected(document.document_id, None, f"token id {lowest} is negative")
    if highest >= (limit or 1 << 31):
        beyond = f"the vocabulary of {limit}" if limit else "32 bits"
        return Rejected(document.document_id, None, f"token id {highest} is outside {beyond}")
    return _checked(document, ids, document.loss_mask)


def _chat_template(tokenizer: Any, tools: bool) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise StrideError(
            "The tokenizer has no chat template, which messages need; use the tokenizer of a chat model, add "
            "chat_template.jinja beside it, or map prompt and answer instead of messages."
        )
    try:
        return ChatTemplate(tokenizer, tools)
    except ValueError:  # several templates by name, none of which is the default
        raise StrideError(
            f"The tokenizer has the chat templates {', '.join(tokenizer.chat_template)}, and none is named default; "
            "name one so in its tokenizer_config.json."
        ) from None


def _conversation(document: Document, template: ChatTemplate) -> _Passage | Rejected:
    messages = document.messages or []
    if not any(message["role"] == "assistant" for message in messages):
        return Rejected(document.document_id, None, "no turn of the assistant")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [document.learned is None or document.learned[i] for i in turns]
    if not any(learned):
        return Rejected(document.document_id, None, "every turn of the assistant is marked as not to be learned")
    try:
        text, ranges = template.render(messages, document.template_arguments, None if all(learned) else learned)
    except Exception as error:  # a template is a program and may raise anything
        return Rejected(document.document_id, None, f"the chat template does not take it: {reason(error)}")
    if LONE_SURROGATE.search(text):  # of what the template does not print, nothing is encoded
        why = "its messages or tools contain an invalid character (a lone surrogate)"
        return Rejected(document.document_id, None, why)
    return _Passage(text, ranges)


def show_masked(encoded: TokenizedDocument, tokenizer: Any) -> str:
    """The document as text, with the tokens that carry loss between ⟦ and ⟧."""
    ids = encoded.ids.tolist()
    flags = [True] * len(ids) if encoded.mask is None else encoded.mask.tolist()
    shown_text, before, position = "", "", 0
    for counted, run in groupby(flags):
        start, position = position, position + len(list(run))
        # Decode from the beginning each time: decoded alone, a run would lose the space before its first word.
        whole = tokenizer.decode(ids[:position], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:position])
        shown_text += f"{_SHOWN_COUNTED[0]}{piece}{_SHOWN_COUNTED[1]}" if counted else piece
        before = whole
    return shown_text
