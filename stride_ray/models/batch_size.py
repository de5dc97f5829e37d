"""How many texts go through a model at once, so that a worker stays within ``compute.worker_gb``.

The answer follows from the model, the length of the texts and the options alone, not from what memory happens to be
free: batches decide the last digits of floating-point sums, and these must be the same on every worker and in every
rerun.
"""

import weakref

import torch

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.sites import EMBEDDING, forward_with_activations
from stride_ray.runtime.config import Config

# Tokens in a batch that more of them would not make faster.
MOST = 8192
# What a process takes before it has a model (torch, Ray, numba), bytes.
LIBRARIES = 2**30
# A model's weights, and what goes with them: the preconditioner, about as large.
WEIGHTS = 2.0
# Memory in a pass over what its forward keeps for its backward: gradients under way, inputs of sites.
PASS = 1.3
# Share of a GPU's memory that may be planned with.
GPU = 0.7
_kept: weakref.WeakKeyDictionary[SplitModel, dict[int, int]] = weakref.WeakKeyDictionary()


def rows_at_once(config: Config, model: SplitModel, tokens: int) -> int:
    """How many texts of so many tokens go through the model at once: one at least.

    Example: SmolLM2-135M keeps 215 MiB for the backward pass of 256 tokens. Of 4 GiB a worker's libraries take 1,
    weights and preconditioner 1, ``compute.query_gb`` 1; the rest holds three texts.
    """
    options = config.compute
    if options.batch_tokens:
        return max(1, options.batch_tokens // tokens)
    weights = WEIGHTS * sum(p.numel() * p.element_size() for p in model.model.parameters())
    if model.device.type == "cuda":
        room = GPU * torch.cuda.get_device_properties(model.device).total_memory
    else:
        room = options.worker_gb * 2**30 - LIBRARIES
    room -= weights + options.query_gb * 2**30
    return max(1, min(MOST // tokens, int(room / (PASS * kept_bytes(model, tokens)))))


def kept_bytes(model: SplitModel, tokens: int) -> int:
    """Bytes that a forward pass keeps of one text of so many tokens until the backward pass, counted once per model."""
    known = _kept.setdefault(model, {})
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
