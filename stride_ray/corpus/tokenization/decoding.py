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
    """The text of each token; a character that several tokens share belongs to the last of them."""
    pieces = tokenizer.batch_decode([[token] for token in ids])
    if "".join(pieces) == tokenizer.decode(ids):
        return list(pieces)
    # Some tokens are parts of characters, or their text depends on those before.
    pieces, said = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        pieces.append(text[len(said) :] if text.startswith(said) else "")
        said = text if text.startswith(said) else said
    return pieces
