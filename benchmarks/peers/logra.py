"""LoGRA by dattri, run by ``peers`` in the peers' environment: scores of every pool row for every query, as .npy.

    python logra.py MODEL POOL QUERIES SCORES

The method's defaults: 64×64 projections of every linear layer's gradient, inverse empirical Fisher.
"""

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

ROWS, PAD, IGNORED = 16, 0, -100


def loader(folder: str) -> DataLoader:
    """Load a dataset's rows in order as padded ids and labels, ROWS at a time."""
    rows = [torch.tensor(row) for row in datasets.load_from_disk(folder)["input_ids"]]
    ids, labels = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (PAD, IGNORED))
    pairs: Any = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]
    return DataLoader(pairs, batch_size=ROWS)


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    """Sum over rows of each row's mean token loss."""
    ids, labels = (batch[name].to(device) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return (each.sum(1) / (labels[:, 1:] != IGNORED).sum(1)).sum()


def main(model_folder: str, pool: str, queries: str, out: str) -> None:
    """Cache the pool's projected gradients, attribute every query, write (Q, N) float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = LoGraAttributor(task, cache_dir=str(Path(out).parent))
    blocks = loader(pool)
    attributor.cache(blocks)
    np.save(out, attributor.attribute(blocks, loader(queries)).T.cpu().numpy().astype(np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
