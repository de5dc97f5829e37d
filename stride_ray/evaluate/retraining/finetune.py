"""The benchmarks' own training recipe, and checkpoints of one training on the whole pool.

Three epochs of AdamW over the given blocks, from ``start/`` or from random weights, in an order set by the seed.
Methods that use several checkpoints (TracIn and similar) get them from here, together with the optimiser's second
moments.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.models.builtin.classifier import Classifier, auto_model
from stride_ray.models.download import local_model
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line, redact_url

IGNORE_INDEX = -100


@dataclass(frozen=True)
class FineTune:
    """A ``Recipe``: AdamW on next-token loss over the given blocks, padding masked.

    Attributes:
        benchmark: pool, queries and the model that training begins from.
        epochs: passes over the blocks, each in a new order.
        batch: blocks per step.
        learning_rate: peak; None: 1e-3 from a checkpoint, 2e-3 from random weights.
        beta1, beta2, weight_decay: for AdamW.
        warmup_steps: of linear warm-up, followed by linear decay.
        final_share: the lowest learning rate, as a share of the peak.
        clip: maximum gradient norm.
        bfloat16: autocast the matrix products of training to bfloat16; weights and query losses stay float32.
        device: auto (a GPU if torch sees one), cpu or cuda.
    """

    benchmark: Benchmark
    epochs: int = 3
    batch: int = 16
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    warmup_steps: int = 20
    final_share: float = 0.05
    clip: float = 1.0
    bfloat16: bool = True
    device: str = "auto"

    def train(self, rows: np.ndarray, seed: int, weights: np.ndarray | None = None) -> Any:
        """Train on these pool rows, optionally with a loss weight per row; returns the model.

        Raises:
            StrideError: for an empty set of rows, or tokens that the model does not support.
        """
        return self.run(rows, seed, lambda epoch, model, optimizer: None, weights)

    @torch.no_grad()
    def losses(self, trained: Any) -> np.ndarray:
        """Return the mean next-token loss of each query, (Q,) float32, in nats."""
        trained.eval()
        queries, found = self.benchmark.queries, []
        for start in range(0, len(queries), self.batch):
            ids, labels = _batch(queries, np.arange(start, min(start + self.batch, len(queries))), trained.device)
            loss = _token_losses(trained, ids, labels)
            found.append(loss.sum(1) / (labels[:, 1:] != IGNORE_INDEX).sum(1))
        return torch.cat(found).cpu().numpy()

    def run(
        self,
        rows: np.ndarray,
        seed: int,
        at_epoch: Callable[[int, Any, torch.optim.AdamW], None],
        weights: np.ndarray | None = None,
    ) -> Any:
        """Train as ``train`` does, calling ``at_epoch(epoch from 1, model, optimizer)`` at the end of each epoch."""
        if not len(rows):
            raise StrideError("There is no block to train on; use a larger fraction of the pool.")
        blocks, steps_each = self.benchmark.blocks, -(-len(rows) // self.batch)
        rates = self.rates(len(rows))
        # The caller's random state is preserved; dropout, if the model has any, follows the seed too.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._initial_model()
            order = torch.Generator().manual_seed(seed)
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=rates[0], betas=(self.beta1, self.beta2), weight_decay=self.weight_decay
            )
            model.train()
            for epoch in range(self.epochs):
                shuffled = torch.randperm(len(rows), generator=order).numpy()
                for number in range(steps_each):
                    optimizer.param_groups[0]["lr"] = rates[epoch * steps_each + number]
                    chosen = shuffled[number * self.batch : (number + 1) * self.batch]
                    weight = None if weights is None else torch.from_numpy(weights[chosen]).to(model.device).float()
                    self._step(model, optimizer, *_batch(blocks, np.asarray(rows)[chosen], model.device), weight)
                at_epoch(epoch + 1, model, optimizer)
        return model

    def initial_model(self, seed: int) -> Any:
        """The model that training with this seed begins from."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self._initial_model()

    def rates(self, n_blocks: int) -> list[float]:
        """Return the learning rate of every step of a training on ``n_blocks`` blocks."""
        peak = self.learning_rate or (1e-3 if self.benchmark.start else 2e-3)
        steps = self.epochs * -(-n_blocks // self.batch)
        rising = [(step + 1) / max(1, self.warmup_steps) for step in range(steps)]
        falling = [max(self.final_share, 1 - step / steps) for step in range(steps)]
        return [peak * min(up, down) for up, down in zip(rising, falling, strict=True)]

    def _step(
        self,
        model: Any,
        optimizer: torch.optim.AdamW,
        ids: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bfloat16):
            losses = _token_losses(model, ids, labels)
        losses = losses if weight is None else losses * weight.unsqueeze(1)
        loss = losses.sum() / (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()

    def _initial_model(self) -> Any:
        """Load or initialise the model to train, in float32 on its device."""
        import transformers  # seconds to import

        # Otherwise every model prints its own bar into the stage's progress output.
        transformers.utils.logging.disable_progress_bar()
        auto = auto_model()
        folder = local_model(self.benchmark.start or self.benchmark.model)
        try:
            if self.benchmark.start:
                model = auto.from_pretrained(folder, dtype=torch.float32)
            else:
                model = auto.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32)
                if isinstance(model, Classifier):
                    model.model.features = auto.from_pretrained(folder, dtype=torch.float32).model.features
        except (OSError, ValueError, ImportError) as error:
            raise StrideError(f"model {folder} could not be loaded: {first_line(error)}") from error
        self.check_texts(model)
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(device)

    def check_texts(self, model: Any) -> None:
        """Reject token ids and texts too large for the model: an obscure index error, or worse on a GPU."""
        vocabulary = model.get_input_embeddings().weight.shape[0]
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for name, texts in (("pool.parquet", self.benchmark.blocks), ("queries.parquet", self.benchmark.queries)):
            if texts.ids.max() >= vocabulary:
                row = int(texts.ids.max(1).argmax())
                raise StrideError(
                    f"{name}, row {row}, has token id {texts.ids.max()}, and the model knows {vocabulary} ids; the "
                    "texts must be tokenised with the model's own tokenizer."
                )
            if context is not None and texts.ids.shape[1] > context:
                row = int((texts.mask.sum(1) if texts.lengths is None else texts.lengths).argmax())
                raise StrideError(
                    f"{name}, row {row}, has {texts.ids.shape[1]} tokens, and the model takes {context}; cut the texts."
                )


HYPERPARAMETERS = tuple(each.name for each in fields(FineTune) if each.name != "benchmark")


def _within(low: float, high: float = 1e308) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


# What the value of each hyperparameter has to be, in words and as a test.
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("epochs", "batch"), ("a whole number of at least 1", lambda value: type(value) is int and value >= 1)
    ),
    "warmup_steps": ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0),
    "learning_rate": (
        "a number above 0 (null: the default)",
        lambda value: value is None or (_within(0)(value) and value > 0),
    ),
    **dict.fromkeys(
        ("beta1", "beta2"), ("a number from 0 to below 1", lambda value: _within(0, 1)(value) and value < 1)
    ),
    "weight_decay": ("a number, 0 or more", _within(0)),
    "final_share": ("a number from 0 to 1", _within(0, 1)),
    "clip": ("a number above 0", lambda value: _within(0, float("inf"))(value) and value > 0),
    "bfloat16": ("true or false", lambda value: type(value) is bool),
    "device": ("auto, cpu or cuda", lambda value: value in ("auto", "cpu", "cuda")),
}


def check_hyperparameters(given: Mapping[str, Any], where: str = "") -> None:
    """Raise StrideError for an unknown hyperparameter of FineTune or a value that it cannot have; ``where`` is told."""
    place = f"{where}: " if where else ""
    for name, value in given.items():
        if name not in _VALUES:
            raise StrideError(f"{place}{name!r} is not a hyperparameter of FineTune; it has {', '.join(_VALUES)}.")
        words, fits = _VALUES[name]
        if not fits(value):
            raise StrideError(f"{place}{name} is {value!r}; it must be {words}.")


def fine_tune(benchmark: Benchmark, **hyperparameters: Any) -> FineTune:
    """The built-in recipe with the benchmark's hyperparameters, and others in their place.

    Raises:
        StrideError: for unknown hyperparameters and values that they cannot have.
    """
    check_hyperparameters(benchmark.hyperparameters, f"{redact_url(benchmark.url)}/recipe.json")
    check_hyperparameters(hyperparameters)
    return FineTune(benchmark, **{**benchmark.hyperparameters, **hyperparameters})


def checkpoints(
    benchmark: Benchmark, out_folder: str, seed: int = 0, hyperparameters: Mapping[str, Any] | None = None
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Train once on the whole pool and save the model after each epoch, skipping existing checkpoints.

    Args:
        benchmark: what to train on.
        out_folder: a local folder, one for each benchmark, seed and choice of hyperparameters.
        seed: for the order, and for the weights if there is no ``start/``.
        hyperparameters: as in fine_tune.

    Returns:
        Per epoch, a Hugging Face folder ``epoch-1`` … that also holds ``optimizer.safetensors`` (AdamW's
        ``exp_avg_sq`` under each parameter's name, a tied one once), and the mean learning rate of its steps. Folders
        are written atomically.

    Raises:
        StrideError: for unknown hyperparameters, or a folder made with other settings.
    """
    if "://" in out_folder:
        raise StrideError(f"Checkpoints need a local folder, not {out_folder}.")
    recipe = fine_tune(benchmark, **(hyperparameters or {}))
    root, n = Path(out_folder), len(benchmark.blocks)
    # The device does not count as a setting; all other fields affect the weights.
    settings = {name: getattr(recipe, name) for name in HYPERPARAMETERS if name != "device"}
    claim(Store(out_folder), "checkpoints", {"benchmark": benchmark.fingerprint, "seed": seed, **settings})
    folders = [root / f"epoch-{epoch}" for epoch in range(1, recipe.epochs + 1)]
    if not all(folder.exists() for folder in folders):

        def keep(epoch: int, model: Any, optimizer: torch.optim.AdamW) -> None:
            if not folders[epoch - 1].exists():
                _save(folders[epoch - 1], model, optimizer)

        recipe.run(np.arange(n), seed, keep)
    rates = np.array(recipe.rates(n)).reshape(recipe.epochs, -1).mean(1)
    return tuple(map(str, folders)), tuple(rates.tolist())


def _save(folder: Path, model: Any, optimizer: torch.optim.AdamW) -> None:
    """Write a checkpoint next to its final path, then rename it into place."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        model.save_pretrained(partial)
        # named_parameters yields a tied parameter once.
        moments = {
            name: optimizer.state[parameter]["exp_avg_sq"].detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
        }
        save_file(moments, partial / "optimizer.safetensors")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batch(texts: Texts, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (n, T) int64, trimmed to the longest of these rows, with masked tokens ignored in the labels.

    Besides padding, prompts may be masked: the model reads them, but they carry no loss.
    """
    mask = texts.mask[rows]
    length = max(2, int(np.flatnonzero(mask.any(0)).max(initial=0)) + 1)
    ids = torch.from_numpy(texts.ids[rows, :length].astype(np.int64))
    return ids.to(device), ids.masked_fill(~torch.from_numpy(mask[:, :length]), IGNORE_INDEX).to(device)


def _token_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token, (n, T − 1) float32, 0 where masked.

    Padding is on the right, so a causal model's tokens never attend to it and no attention mask is needed.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none")
