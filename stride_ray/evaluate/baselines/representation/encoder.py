"""Sentence encoders: mean-pooled last-layer states of a BERT-like model, through AirRep's projection if it has one.

Token ids are decoded with the attributed model's tokenizer and re-tokenized with the encoder's own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import first_line

LONGEST = 512  # encoder tokens; BERT-like encoders support no more
AIRREP = "airrep"  # the model type of AirRep's checkpoints, not registered in transformers


class SentenceEncoder(torch.nn.Module):
    """A sentence encoder with its tokenizer, in float32 and without dropout.

    Attributes:
        tokenizer: the encoder's own.
        model: the transformer.
        projector: a linear map of the mean states (AirRep), or the identity.
    """

    def __init__(self, path: str) -> None:
        """Load an encoder.

        Args:
            path: a folder or hub id, of a model for AutoModel or of an AirRep checkpoint.

        Raises:
            StrideError: if it cannot be loaded.
        """
        super().__init__()
        self.tokenizer = load_tokenizer(path)
        try:
            self.model, self.projector = _load(path)
        except Exception as error:  # the libraries raise many exception types for invalid folders
            raise StrideError(f"encoder {path} could not be loaded: {first_line(error)}") from error
        self.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings of texts, (n, d) float32, not normalised."""
        device = next(self.model.parameters()).device
        given = self.tokenizer(
            [text or " " for text in texts], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(device)
        states = self.model(**given).last_hidden_state.float()
        weights = given["attention_mask"].unsqueeze(2).float()
        return self.projector((states * weights).sum(1) / weights.sum(1).clamp(min=1))

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch: int = 32) -> torch.Tensor:
        """Embeddings of any number of texts, (n, d) float32 on the CPU, ``batch`` at a time."""
        rows: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        # Texts of similar length share a batch, because padding costs as much as text.
        order = np.argsort([len(text) for text in texts], kind="stable").tolist()
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for row, vector in zip(chosen, self([texts[row] for row in chosen]).cpu(), strict=True):
                rows[row] = vector
        return torch.stack(rows)


def decoded(problem: Problem) -> tuple[list[str], list[str]]:
    """The texts of queries and blocks, by the attributed model's tokenizer."""
    tokenizer = load_tokenizer(problem.model)

    def texts(given: Texts) -> list[str]:
        return [tokenizer.decode(given.tokens(row), skip_special_tokens=True) for row in range(len(given))]

    return texts(problem.queries), texts(problem.blocks)


def _load(path: str) -> tuple[Any, torch.nn.Module]:
    """The transformer and the projection after its mean states."""
    from transformers import AutoModel, BertConfig, BertModel, PretrainedConfig  # seconds to import
    from transformers.utils import cached_file

    settings, _ = PretrainedConfig.get_config_dict(path)
    if settings.get("model_type") != AIRREP:
        return AutoModel.from_pretrained(path, dtype=torch.float32), torch.nn.Identity()
    config = BertConfig.from_dict({**settings, "model_type": "bert"})
    weights = load_file(str(cached_file(path, "model.safetensors")))
    model = BertModel(config, add_pooling_layer=False)
    projector = torch.nn.Linear(config.hidden_size, config.hidden_size)
    for module, prefix in ((model, "bert."), (projector, "projector.")):
        own = {name.removeprefix(prefix): each.float() for name, each in weights.items() if name.startswith(prefix)}
        # Checkpoints may have more, such as an unused pooling layer, but not less.
        if missing := module.load_state_dict(own, strict=False).missing_keys:
            raise StrideError(f"model.safetensors has no {prefix}{missing[0]}")
    return model, projector
