"""Batch size of a forward pass, chosen so that a worker stays within ``compute.worker_gb``.

It depends only on the model, the sequence length and the options, not on the memory that is free at the moment: batch
composition changes the last digits of floating-point sums, and these must be identical on every worker and in every
rerun.
"""

import weakref

import torch

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.sites import EMBEDDING, forward_with_activations
from stride_ray.runtime.config import Config

# Maximum tokens per batch; larger batches are no faster.
MAX_BATCH_TOKENS = 8192
# Bytes that a process uses before it loads a model (torch, Ray, numba).
LIBRARY_BYTES = 2**30
# Factor on the weights' bytes: the preconditioner is about as large as the model.
WEIGHT_MEMORY_FACTOR = 2.0
# Peak memory of a pass over the activations saved for backward; the rest are gradients and the sites' inputs.
PASS_MEMORY_FACTOR = 1.3
# Peak memory of a text that is linearised (gauss_newton.py) over the activations saved for backward: the backward pass
# is differentiated too, and its graph is kept (1.2 GiB over 107 MiB, measured with 128 tokens of SmolLM2-135M).
LINEARISED_MEMORY_FACTOR = 11.0
# Usable share of a GPU's memory.
GPU_MEMORY_SHARE = 0.7
_activation_bytes: weakref.WeakKeyDictionary[SplitModel, dict[int, int]] = weakref.WeakKeyDictionary()


def rows_at_once(config: Config, model: SplitModel, tokens: int) -> int:
    """The number of texts of ``tokens`` tokens per forward pass, at least one.

    Example: SmolLM2-135M saves 215 MiB for the backward pass of 256 tokens. Of a worker's 4 GiB, libraries take 1,
    weights and preconditioner 1, ``compute.query_gb`` 1; the remaining 1 GiB holds three texts.
    """
    if config.compute.batch_tokens:
        return max(1, config.compute.batch_tokens // tokens)
    fitting = _free_bytes(config, model) / (PASS_MEMORY_FACTOR * saved_activation_bytes(model, tokens))
    return max(1, min(MAX_BATCH_TOKENS // tokens, int(fitting)))


def linearised_at_once(config: Config, model: SplitModel, tokens: int) -> tuple[int, int]:
    """The number of texts of ``tokens`` tokens that are linearised at once, and how many tokens of each.

    Texts too long to be linearised one by one are cut in halves until they fit, down to 64 tokens.

    Example: SmolLM2-135M saves 107 MiB for 128 tokens, eleven times of which is more than the 1 GiB of the example
    above: blocks of 512 tokens are linearised one by one, in pieces of 64.
    """
    rows = int(rows_at_once(config, model, tokens) * PASS_MEMORY_FACTOR / LINEARISED_MEMORY_FACTOR)
    rows = max(1, min(rows, model.logits_rows(tokens)))
    while tokens >= 128 and LINEARISED_MEMORY_FACTOR * saved_activation_bytes(model, tokens) > _free_bytes(
        config, model
    ):
        tokens = -(-tokens // 2)
    return rows, tokens


def linearised_kept(config: Config, model: SplitModel, rows: int, tokens: int) -> int:
    """The number of batches of ``linearised_at_once`` that can stay linearised besides one that is being used.

    Example: with the quickstart's model, 7 blocks of 128 tokens save 27 MiB, eleven times of which fit into 2 GiB six
    times: five stay, the whole sample of 4,096 tokens.
    """
    one = LINEARISED_MEMORY_FACTOR * rows * saved_activation_bytes(model, tokens)
    return max(0, int(_free_bytes(config, model) / one) - 1)


def _free_bytes(config: Config, model: SplitModel) -> float:
    """A worker's memory besides libraries, weights, preconditioner and query gradients."""
    options = config.compute
    weights = WEIGHT_MEMORY_FACTOR * sum(p.numel() * p.element_size() for p in model.model.parameters())
    if model.device.type == "cuda":
        room = GPU_MEMORY_SHARE * torch.cuda.get_device_properties(model.device).total_memory
    else:
        room = options.worker_gb * 2**30 - LIBRARY_BYTES
    return room - weights - options.query_gb * 2**30


def saved_activation_bytes(model: SplitModel, tokens: int) -> int:
    """Bytes that a forward pass over one text saves for its backward pass; measured once per model and length."""
    known = _activation_bytes.setdefault(model, {})
    if tokens not in known:
        weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            kept = forward_with_activations(model, [EMBEDDING], ids)
        known[tokens] = max(1, sum(storages.values()))
        del kept
    return known[tokens]
