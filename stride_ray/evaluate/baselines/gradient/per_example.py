"""Per-example gradients of each weight matrix, from one forward and one backward pass per batch.

A linear layer's gradient is a sum of outer products over positions, G = Σ_t g_t a_tᵀ, of the layer's input a and the
loss's gradient g at its output; hooks collect both. Methods that project (LoGRA, Choe et al. 2024) never form G itself.
An embedding is the same sum with one-hot vectors, so a head tied to it adds to the same matrix.

Biases, norms and learned positions are left out: about a per cent of a small model's weights, less of a large one's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.linear_algebra.vocabulary import next_tokens
from stride_ray.runtime.errors import StrideError

LOGITS_BUDGET = 2**25  # elements of a batch's logits: 128 MiB in float32, a few times that with their gradients
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer on B sequences: the gradient of sequence b is left_bᵀ right_b, laid out as in nn.Linear.

    Attributes:
        module: the layer's name.
        weight: its matrix's name; tied layers share it.
        left: (B, T, rows), or (B, T) int64 ids representing one-hot rows (an embedding).
        right: (B, T, columns).
        rows: outputs of a linear layer, vocabulary of an embedding.
    """

    module: str
    weight: str
    left: Tensor
    right: Tensor
    rows: int

    def full(self) -> Tensor:
        """Form the gradients, (B, rows, columns)."""
        if self.left.dim() == 3:
            return self.left.transpose(1, 2) @ self.right
        B, columns = len(self.left), self.right.shape[-1]
        flat = (self.left + torch.arange(B, device=self.left.device).unsqueeze(1) * self.rows).flatten()
        zeros = self.right.new_zeros(B * self.rows, columns)
        return zeros.index_add_(0, flat, self.right.flatten(0, 1)).view(B, self.rows, columns)

    def project(self, P_rows: Tensor, P_columns: Tensor) -> Tensor:
        """P_rowsᵀ G P_columns without forming G: (rows, r) and (columns, c) give (B, r, c)."""
        left = P_rows[self.left] if self.left.dim() == 2 else self.left @ P_rows
        return left.transpose(1, 2) @ (self.right @ P_columns)


def layers(model: SplitModel, embedding: bool) -> dict[str, nn.Module]:
    """Find the layers with a weight matrix: every nn.Linear and Conv1D, including the head, and the token embedding.

    Args:
        model: any causal model.
        embedding: whether to include the token embedding, if it is trained.

    Returns:
        Layers by name, in the model's order.
    """
    tokens = model.model.get_input_embeddings()
    return {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or (embedding and module is tokens and model.embedding_is_trained)
    }


def matrix(module: nn.Module) -> Tensor:
    """A layer's weight laid out as in nn.Linear: (rows, columns) = (outputs, inputs), or (V, D) for an embedding."""
    weight = cast("Tensor", module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def weight_names(model: SplitModel, chosen: dict[str, nn.Module]) -> dict[str, str]:
    """Map layer names to matrix names; tied layers share the first name under which the model lists the matrix."""
    names = {id(parameter): name for name, parameter in model.model.named_parameters()}
    return {name: names[id(module.weight)] for name, module in chosen.items()}


def weight_shapes(model: SplitModel, embedding: bool) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each weight matrix by name, tied ones once."""
    chosen = layers(model, embedding)
    names = weight_names(model, chosen)
    return {names[name]: (matrix(module).shape[0], matrix(module).shape[1]) for name, module in chosen.items()}


def tensors(texts: Texts) -> tuple[Tensor, Tensor]:
    """Ids (n, T) int64 and mask (n, T) bool, without trailing columns that are masked in every row."""
    length = max(1, int(np.nonzero(texts.mask)[1].max(initial=0)) + 1)
    return torch.from_numpy(texts.ids[:, :length].astype(np.int64)), torch.from_numpy(texts.mask[:, :length].copy())


def backward_batches(
    model: SplitModel,
    texts: Texts,
    batch_tokens: int,
    objective: Objective | None = None,
    embedding: bool = True,
    most: int | None = None,
) -> Iterator[tuple[slice, list[LayerCall]]]:
    """Run all texts through the model, forward and backward.

    Args:
        model: in float32; its parameters stay frozen and accumulate no gradients.
        texts: n sequences; columns after a batch's last target are dropped.
        batch_tokens: tokens in one pass; fewer if the vocabulary is large.
        objective: logits (B, T, V), ids (B, T) int64 and targets (B, T) bool to one number per sequence, (B,);
            default: ``mean_losses``.
        embedding: whether to record the token embedding.
        most: maximum sequences in one pass.

    Yields:
        The rows of a batch and its layers' uses, on the model's device, float32.

    Raises:
        StrideError: an id is outside the vocabulary, a text is longer than the context, or a layer (of a mixture of
            experts) does not see every position.
    """
    chosen = layers(model, embedding)
    names = weight_names(model, chosen)
    ids, mask = tensors(texts)
    model.check_ids(ids)
    if model.context is not None and model.context < ids.shape[1]:
        raise StrideError(f"{model.name}: {ids.shape[1]} tokens are more than the context of {model.context}")
    tokens = max(1, min(batch_tokens, LOGITS_BUDGET // model.vocabulary))
    step = max(1, min(tokens // ids.shape[1], most or len(ids)))
    for start in range(0, len(ids), step):
        rows = slice(start, min(start + step, len(ids)))
        targets = mask[rows, 1:].any(0).nonzero()
        length = int(targets.max()) + 2 if len(targets) else min(2, ids.shape[1])
        batch = (ids[rows, :length].to(model.device), mask[rows, :length].to(model.device))
        yield rows, _uses(model, chosen, names, *batch, objective or mean_losses)


def _uses(
    model: SplitModel,
    chosen: dict[str, nn.Module],
    names: dict[str, str],
    ids_BT: Tensor,
    mask_BT: Tensor,
    objective: Objective,
) -> list[LayerCall]:
    """Compute one batch's uses."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    tokens = model.model.get_input_embeddings()

    def root(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # All parameters are frozen, so the graph must begin at the embedding's output.
        return output.detach().requires_grad_(True)

    def keep(name: str) -> Callable:
        return lambda module, args, output: calls.append((name, module, args[0].detach(), output))

    handles = [tokens.register_forward_hook(root)]
    handles += [module.register_forward_hook(keep(name)) for name, module in chosen.items()]
    try:
        with torch.enable_grad():
            logits = model.model(input_ids=ids_BT, use_cache=False, return_dict=True).logits.float()
            total = objective(logits, ids_BT, mask_BT).sum()
            found = torch.autograd.grad(total, [output for *_, output in calls], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [
        _use(name, names[name], module, given, gradient, ids_BT.shape)
        for (name, module, given, _), gradient in zip(calls, found, strict=True)
        if gradient is not None
    ]


def _use(name: str, weight: str, module: nn.Module, given: Tensor, gradient: Tensor, batch: torch.Size) -> LayerCall:
    rows = len(matrix(module))
    if isinstance(module, nn.Embedding):
        return LayerCall(name, weight, given, gradient.float(), rows)
    if given.shape[:-1].numel() != batch.numel():
        raise StrideError(f"layer {name} does not see every token; gradient baselines need a model without experts")
    return LayerCall(name, weight, gradient.float().reshape(*batch, -1), given.float().reshape(*batch, -1), rows)


def mean_losses(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Each sequence's masked mean next-token loss in nats, (B,); 0 without targets."""
    return masked_means(token_losses(logits_BTV, next_tokens(ids_BT, logits_BTV.shape[-1])), mask_BT)


def token_losses(logits_BTV: Tensor, targets_BT1: Tensor) -> Tensor:
    """Cross-entropy of each of the T−1 next tokens in nats, (B, T−1)."""
    logits = logits_BTV[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets_BT1, reduction="none")


def masked_means(values_BT1: Tensor, mask_BT: Tensor) -> Tensor:
    """Means over the targets of each sequence, (B,); 0 without targets."""
    weights = mask_BT[:, 1:].to(values_BT1)
    return (values_BT1 * weights).sum(1) / weights.sum(1).clamp(min=1)
