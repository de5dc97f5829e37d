"""Unigram F1 of decoded answers, the paper's metric for instruction-data selection (docs/method.md, Metrics)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Maximum new tokens of an answer; the model's context is a further limit.
LONGEST = 128


def unigram_f1(said: str, wanted: str) -> float:
    """F1 of two texts' lower-cased, whitespace-split words, counted with multiplicity; 0 if no word is shared."""
    a, b = Counter(said.lower().split()), Counter(wanted.lower().split())
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values())) if shared else 0.0


def has_answers(queries: Sequence[dict[str, Any]]) -> bool:
    """Whether every query (queries.SCHEMA) starts with a prompt without loss and ends with an answer."""
    return all(not query["loss_mask"][0] and query["loss_mask"][-1] for query in queries)


@torch.no_grad()
def answer_f1(model: Any, tokenizer: Any, queries: Sequence[dict[str, Any]]) -> np.ndarray:
    """Continue each prompt greedily and compare with its answer, (Q,) float32.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: decodes its tokens and defines the end-of-text token.
        queries: with prompts, see ``has_answers``; only a conversation's first answer is generated.
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
