"""Sentence embeddings: plain AutoModel with mean pooling.

Token ids are decoded with the attributed model's tokenizer and re-tokenized with the encoder's own.
"""

from typing import Any

import numpy as np
import torch

from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import first_line

LONGEST = 512  # encoder tokens; BERT-like encoders support no more


def embedded(problem: Problem, path: str, batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Embed queries and blocks as unit vectors.

    Args:
        problem: what to embed; its model's tokenizer decodes the ids.
        path: the encoder, a folder or hub id.
        batch: texts in one forward pass.

    Returns:
        (Q, d) and (N, d) float32.

    Raises:
        StrideError: if the encoder cannot be loaded.
    """
    from transformers import AutoModel  # seconds to import

    tokenizer = load_tokenizer(problem.model)
    own = load_tokenizer(path)
    try:
        model = AutoModel.from_pretrained(path).eval()
    except Exception as error:  # the libraries raise many exception types for invalid folders
        raise StrideError(f"encoder {path} could not be loaded: {first_line(error)}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def of(texts: Texts) -> np.ndarray:
        read = [tokenizer.decode(texts.tokens(row), skip_special_tokens=True) for row in range(len(texts))]
        return _encode(model, own, read, batch)

    return of(problem.queries), of(problem.blocks)


@torch.no_grad()
def _encode(model: torch.nn.Module, tokenizer: Any, texts: list[str], batch: int) -> np.ndarray:
    """Mean of the last layer's states over real tokens, normalised; (n, d) float32."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    # Texts of similar length share a batch, because padding costs as much as text.
    order = np.argsort([len(text) for text in texts], kind="stable").tolist()
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        given = tokenizer(
            [texts[row] or " " for row in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(device)
        states = model(**given).last_hidden_state.float()
        weights = given["attention_mask"].unsqueeze(2).float()
        means = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        for row, vector in zip(rows, torch.nn.functional.normalize(means, dim=1).cpu(), strict=True):
            found[row] = vector
    return torch.stack(found).numpy()
