"""Unigram F1 of decoded answers, the paper's metric for selection from instruction data (method: metrics)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# New tokens at most: of an answer, and never beyond the model's context.
LONGEST = 128


def unigram_f1(said: str, wanted: str) -> float:
    """F1 of the words of two texts, lower-cased and split at white space, counted with multiplicity; 0 for no words."""
    a, b = Counter(said.lower().split()), Counter(wanted.lower().split())
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values())) if shared else 0.0


def has_answers(queries: Sequence[dict[str, Any]]) -> bool:
    """Whether every query (queries.SCHEMA) is a prompt without loss and then an answer."""
    return all(not query["loss_mask"][0] and query["loss_mask"][-1] for query in queries)


@torch.no_grad()
def answer_f1(model: Any, tokenizer: Any, queries: Sequence[dict[str, Any]]) -> np.ndarray:
    """(Q,) float32: each prompt is continued greedily, and compared with its answer.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: decodes its tokens and names the one that ends a text.
        queries: with prompts, see ``has_answers``; a conversation is asked for its first answer.
    """
    model.eval()
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 10**9
    found = []
    for query in queries:
        mask = np.array(query["loss_mask"])
        start = int(mask.argmax())
        stop = start + int(np.append(~mask[start:], True).argmax())
        ids = torch.tensor([query["token_ids"][:start]], device=model.device)
        room = min(LONGEST, context - start)
        wanted = tokenizer.decode(query["token_ids"][start:stop], skip_special_tokens=True)
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, room),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[0, start:]
        found.append(unigram_f1(tokenizer.decode(said, skip_special_tokens=True), wanted))
    return np.array(found, dtype=np.float32)
