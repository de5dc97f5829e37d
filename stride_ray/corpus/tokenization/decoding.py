"""Token ids to text: of whole blocks, and of each token."""

from typing import Any

from stride_ray.corpus.blocks import Blocks


def block_texts(pool: Blocks, ordinals: list[int], tokenizer: Any) -> list[str]:
    """Return the decoded text of each block, without padding, in the order of ``ordinals``."""
    return [tokenizer.decode(ids) for ids in _token_ids(pool, ordinals)]


def block_pieces(pool: Blocks, ordinals: list[int], tokenizer: Any) -> list[list[str]]:
    """The text of each block's tokens, without padding, which joined are the block's text."""
    return [token_texts(ids, tokenizer) for ids in _token_ids(pool, ordinals)]


def _token_ids(pool: Blocks, ordinals: list[int]) -> list[list[int]]:
    """The token ids of each block without padding, which no span covers."""
    if not ordinals:
        return []
    table = pool.take(ordinals, ["token_ids", "spans"])
    lengths = [sum(span["length"] for span in spans) for spans in table["spans"].to_pylist()]
    return [ids[:length] for ids, length in zip(table["token_ids"].to_pylist(), lengths, strict=True)]


def token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """The text of each token; joined, they are the text of all.

    A character that several tokens share belongs to the last of them. Each token is decoded after some of those before
    it, since many tokenizers drop the space before a token that is decoded alone.
    """
    whole = tokenizer.decode(ids)
    pieces = tokenizer.batch_decode([[token] for token in ids])
    if "".join(pieces) == whole:
        return list(pieces)
    # ids[before:clean] have been shown and are decoded again as context for ids[clean:].
    pieces, before, clean = [], 0, 0
    for end in range(1, len(ids) + 1):
        context, text = tokenizer.decode(ids[before:clean]), tokenizer.decode(ids[before:end])
        is_complete = len(text) > len(context) and not text.endswith("\ufffd")
        pieces.append(text[len(context) :] if is_complete else "")
        if is_complete:
            before, clean = clean, end
    joined = "".join(pieces)
    if not whole.startswith(joined):  # the text of a token depends on more than the tokens just before it
        return [whole, *[""] * (len(ids) - 1)]
    return [*pieces[:-1], pieces[-1] + whole[len(joined) :]]
