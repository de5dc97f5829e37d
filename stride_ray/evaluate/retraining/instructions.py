"""Benchmarks of instruction tuning: a model fine-tuned on instructions whose answers alone carry loss, and queries.

The folder is like any other benchmark, with ``loss_mask`` columns, so retraining, LDS and every method run on it. A
column with the instruction's task, as FLAN mixtures have it, becomes the domain, for selection by task.
"""

import copy
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.corpus.documents import Document, TokenizedDocument, read, resolve_columns
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.splits import plan
from stride_ray.corpus.tokenization.encoding import encode
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.retraining.benchmark import Benchmark, put_files, read_benchmark
from stride_ray.evaluate.retraining.finetune import check_hyperparameters, fine_tune
from stride_ray.evaluate.retraining.lds import DEVELOPMENT, REPORT
from stride_ray.models.causal_lm import load_model
from stride_ray.models.download import model_fingerprint
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import claim
from stride_ray.runtime.storage import Store


def read_instructions(path: str, conversations: bool = False, task: str = "") -> list[Document]:
    """The rows of any document input that have a prompt and an answer, or are ``conversations``.

    Args:
        path: the input.
        conversations: whether these are instructions too.
        task: the column that becomes their source; empty: the file's name does.

    Raises:
        StrideError: if there are rows, and none can be read or is an instruction.
    """
    units = plan([path], 2**26)
    columns = resolve_columns(units, {"source": task} if task else None)
    rows = [row for unit in units for row in read(unit, columns)]
    items = [row for row in rows if isinstance(row, Document)]
    if rejects := [row for row in rows if isinstance(row, Rejected)]:
        told = f"{len(rejects)} of {len(rows)} rows of {path} are left out; the first: {rejects[0].sentence()}"
        if not items:
            raise StrideError(told)
        print(told, file=sys.stderr)
    kept = [item for item in items if item.answer is not None or (conversations and item.messages is not None)]
    if items and not kept:
        chats = ", and no conversations" if conversations else ""
        raise StrideError(f"{path} has no prompts with answers{chats}; instructions need both.")
    return kept


def write_instruction_benchmark(
    instructions: str,
    model: str,
    folder: str,
    examples: int = 800,
    queries: int = 50,
    max_tokens: int = 320,
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    task: str = "",
) -> Benchmark:
    """Draw instructions and queries, fine-tune a model on the instructions, and write all as a benchmark.

    Args:
        instructions: any input of documents with a prompt and an answer, or of conversations.
        model: the checkpoint to start from: a folder or hub id with its tokenizer.
        folder: a path or fsspec URL, created; a finished one is read.
        examples: how many to train on.
        queries: how many to hold out. The first half of them, as drawn, are the development part.
        max_tokens: longer examples are left out of the draw.
        hyperparameters: of finetune.FineTune, in place of its defaults.
        seed: of the draw and of the order of training.
        device: auto, cpu or cuda; the model is trained in this process.
        task: the column with an instruction's task, which becomes its domain; empty: the file's name does.

    Raises:
        StrideError: for fewer usable instructions than wanted, more tokens than the model takes, a folder made with
            other arguments, or losses that are not finite after training.
    """
    if examples < 1 or queries < 2:
        raise StrideError(f"{examples} examples and {queries} queries are too few; there must be 1 and 2 at least.")
    recipe_changes = dict(hyperparameters or {})
    check_hyperparameters(recipe_changes)
    tokenizer, items = load_tokenizer(model), read_instructions(instructions, True, task)
    usable = [each for each in encode(items, tokenizer) if _fits(each, max_tokens)]
    if len(usable) < examples + queries:
        raise StrideError(
            f"{instructions} has {len(usable)} instructions of at most {max_tokens} tokens, of {len(items)} with an "
            f"answer; {examples} examples and {queries} queries need {examples + queries}."
        )
    drawn = [usable[i] for i in np.random.default_rng(seed).permutation(len(usable))[: examples + queries]]
    content = digest([(each.document_id, each.ids.tolist()) for each in drawn])
    keys = {"instructions": content, "model": model_fingerprint(model), "queries": queries, "seed": seed, "task": task}
    store = claim(Store(folder), "instruction benchmark", {**keys, **recipe_changes}).store
    if store.exists("pool.parquet"):
        return read_benchmark(folder)
    start = saveable_copy(load_model(model, device="cpu").model)
    context = getattr(start.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and max_tokens > context:
        raise StrideError(f"{model} takes {context} tokens, fewer than the {max_tokens} of --tokens; lower it.")
    parts = [DEVELOPMENT if number < queries // 2 else REPORT for number in range(queries)]
    with tempfile.TemporaryDirectory() as scratch:
        made = Store(f"{scratch}/made")
        made.write_json("recipe.json", recipe_changes)
        made.write_table("queries.parquet", _table(drawn[:queries]).append_column("part", pa.array(parts)))
        made.write_table("pool.parquet", _table(drawn[queries:]))
        start.save_pretrained(f"{scratch}/made/start")
        start.config.save_pretrained(f"{scratch}/made/model")  # a benchmark needs it; the weights follow
        for name in ("start", "model"):
            tokenizer.save_pretrained(f"{scratch}/made/{name}")
        recipe = fine_tune(read_benchmark(made.url), device=device)
        trained = recipe.train(np.arange(examples), seed)
        if not np.isfinite(recipe.losses(trained)).all():
            raise StrideError("After training, the queries' losses are not finite; lower learning_rate.")
        trained.save_pretrained(f"{scratch}/made/model")
        for name in ("start", "model"):
            put_files(store.child(name), f"{scratch}/made/{name}")
        for name in ("recipe.json", "queries.parquet", "pool.parquet"):  # a folder with the last is finished
            store.put(name, f"{scratch}/made/{name}")
    return read_benchmark(folder)


def saveable_copy(model: Any) -> Any:
    """Copy a model to float32 so that it can be saved, which a model loaded from GGUF does not allow."""
    from transformers import AutoModelForCausalLM  # seconds to import

    config: Any = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)  # otherwise models loaded from the copy could not be saved either
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    return fresh


def _fits(item: Any, max_tokens: int) -> bool:
    """Whether an encoded instruction can be a block and a query: short enough, with a token to predict."""
    if not isinstance(item, TokenizedDocument) or not 2 <= len(item.ids) <= max_tokens:
        return False
    return item.mask is None or bool(item.mask[1:].any())


def _table(items: list[TokenizedDocument]) -> pa.Table:
    masks = [np.ones(len(each.ids), bool) if each.mask is None else each.mask for each in items]
    columns = {
        "document": pa.array([each.document_id for each in items]),
        "position": pa.array([0] * len(items), pa.int64()),
        "domain": pa.array([each.source for each in items]),
        "token_ids": pa.array([each.ids for each in items], pa.list_(pa.int32())),
        "loss_mask": pa.array([each.tolist() for each in masks], pa.list_(pa.bool_())),
    }
    return pa.table(columns)
