"""Token ids to text: of whole blocks, and of each token."""

from typing import Any


def unpadded(block: dict[str, Any]) -> list[int]:
    """A block's token ids without padding, which no span covers.

    Args:
        block: row of the pool with ``token_ids`` and ``spans``.
    """
    ids: list[int] = block["token_ids"]
    return ids[: sum(span["length"] for span in block["spans"])]


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
