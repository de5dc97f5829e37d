"""A toy BPE tokenizer and a toy Llama, trained on the fly for the quickstart and the benchmarks."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stride_ray.corpus.blocks import Blocks

VOCABULARY, BATCH = 2048, 16


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train a byte-level BPE tokenizer with an end-of-text token into a Hugging Face folder, unless it exists."""
    if (folder / "tokenizer_config.json").exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Write elsewhere and rename: save_pretrained writes file by file and may be interrupted.
    partial = folder.with_name(f".{folder.name}.partial")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def train_model(
    blocks: Blocks,
    tokenizer: Path,
    folder: Path,
    epochs: int,
    seed: int = 0,
    orders: Sequence[np.ndarray] | None = None,
) -> None:
    """Train a 1-million-parameter Llama on all blocks and save it as a Hugging Face checkpoint with its tokenizer.

    Args:
        blocks: training data.
        tokenizer: folder of the tokenizer that produced the blocks.
        folder: of the checkpoint; an existing one is kept.
        epochs: passes over the blocks.
        seed: of the initial weights and the data order.
        orders: ordinals of the blocks that each epoch reads, in order; then each epoch also leaves a checkpoint, in
            ``folder-epochs/0`` and so on. None: all blocks in random order, and no checkpoints.
    """
    if (folder / "config.json").exists():
        return
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    n = len(blocks)
    everything = blocks.batch(np.arange(n))
    ids = torch.from_numpy(everything.ids)
    labels = ids.masked_fill(~torch.from_numpy(np.ascontiguousarray(everything.mask)), -100)
    if orders is None:
        order, ends = torch.cat([torch.randperm(n) for _ in range(epochs + 1)]), [epochs * (n // BATCH)]
    else:
        order = torch.from_numpy(np.concatenate(orders))
        ends = (np.cumsum([len(each) for each in orders]) // BATCH).tolist()
    steps = ends[-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, max(0.05, 1 - i / steps)))
    bar = tqdm(range(steps), desc="train", unit=" steps", mininterval=2.0)
    for step in bar:
        rows = order[step * BATCH : (step + 1) * BATCH]
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
        if orders is not None and step + 1 in ends:
            _save(model, tokenizer, folder.with_name(f"{folder.name}-epochs") / str(ends.index(step + 1)))
    _save(model, tokenizer, folder)


def _save(model: LlamaForCausalLM, tokenizer: Path, folder: Path) -> None:
    """Save a checkpoint with its tokenizer, in place of what an interrupted training left."""
    partial = folder.with_name(f".{folder.name}")
    model.save_pretrained(partial)
    for path in tokenizer.iterdir():
        shutil.copy(path, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
