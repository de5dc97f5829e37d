"""All options of a run, declared once with default, help text and allowed values."""

from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, text: str, choices: tuple[str, ...] = (), low: float | None = None) -> Any:
    metadata = {"help": text, "choices": choices, "low": low}
    if isinstance(default, (dict, tuple)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CorpusConfig:
    """Cutting documents into blocks."""

    input: tuple[str, ...] = _option(
        (), "files, folders, globs or fsspec URLs: JSON Lines (.gz, .zst), Parquet, text files, a saved HF dataset"
    )
    columns: dict[str, str] = _option(
        {},
        "role = column, or several joined by +; roles: text | prompt, answer | messages (tools, chat_template_kwargs) "
        "| token_ids (loss_mask, labels, attention_mask); id, source (empty: detected in each row)",
    )
    tokenizer: str = _option("", "Hugging Face tokenizer: path or hub id (empty: the model's own)")
    layout: str = _option(
        "pack", "pack: documents joined by end-of-text; split: each document cut alone, tail padded", ("pack", "split")
    )
    block_tokens: int = _option(512, "tokens in a block", low=2)
    shard_mb: float = _option(16.0, "input megabytes per work unit; each unit writes one Parquet file", low=0.001)


@dataclass(frozen=True)
class ModelConfig:
    """The model whose behaviour is attributed; it must have been trained on the pool."""

    path: str = _option("", "Hugging Face causal LM: folder, hub id, fsspec URL or .gguf file")
    start: str = _option(
        "",
        "the checkpoint that training on the pool started from; exact influence is more accurate if it is given; "
        "empty: random weights",
    )
    checkpoints: tuple[str, ...] = _option(
        (), "folders of checkpoints from this training, in order: when was it learnt (stride-ray timeline)?"
    )
    split: float = _option(
        0.62, "layer at which the operators act: a share of the depth (at most 1), or a layer number (from 2)"
    )
    dtype: str = _option("float32", "dtype of the weights", ("float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class MembershipConfig:
    """Assignment of blocks to subsets (membership matrix M)."""

    subsets: int = _option(1000, "K, number of subsets; more subsets give longer responses and recover more", low=2)
    degree: int = _option(10, "d, number of subsets that each block belongs to", low=1)
    form: str = _option(
        "regular", "regular: exactly d subsets per block; bernoulli: d on average", ("regular", "bernoulli")
    )


@dataclass(frozen=True)
class OperatorConfig:
    """The steering operators."""

    form: str = _option(
        "sites",
        "sites: at every layer, one bit per coordinate; the paper's: logit on the logits; matrix, gate at the split",
        ("sites", "logit", "matrix", "gate"),
    )
    rows: str = _option(
        "auto",
        "sites: one operator per block, or per subset (membership.subsets); auto: per block if the budget allows",
        ("auto", "blocks", "subsets"),
    )
    budget_gb: float = _option(2.0, "sites: GB that the operators may take on disk; more is more accurate", low=0.0)
    sites: str = _option(
        "outputs",
        "outputs: of attention and MLP, embedding, head; all: every linear map (slower; see solve.steps)",
        ("outputs", "all"),
    )
    layers: float = _option(
        0.0,
        "use the sites of this many last layers (fewer are faster); below 1: a share of the layers; 0: all",
        low=0.0,
    )
    rank: int = _option(64, "r, width of the activation basis (paper: 16)", low=1)
    sketch: int = _option(512, "v, output directions that the logit form keeps of the vocabulary", low=1)
    target: str = _option(
        "unigram",
        "logit form: the prediction compared with the next token: the pool's unigram distribution or the model's",
        ("unigram", "model"),
    )


@dataclass(frozen=True)
class FitConfig:
    """How operators are fitted; all keys but ``method`` configure the paper's training loop."""

    method: str = _option(
        "closed_form",
        "closed_form: one pass over the pool; train: the paper's loop on three losses",
        ("closed_form", "train"),
    )
    start: str = _option("random", "train: start from random operators or the closed form", ("random", "closed_form"))
    steps: int = _option(
        400,
        "train: optimiser steps; a step visits each subset 2 blocks_per_step / K times, and ten visits are enough",
        low=1,
    )
    learning_rate: float = _option(0.05, "train: peak rate, after warm-up and before linear decay", low=0.0)
    optimizer: str = _option(
        "muon", "train: Muon for the shared matrices and AdamW for the rest, or AdamW", ("muon", "adamw")
    )
    blocks_per_step: int = _option(
        16, "train: blocks per step; each is used for fidelity with two of its subsets", low=2
    )
    stability: float = _option(0.1, "train: weight of the stability loss (fidelity has 1)", low=0.0)
    stability_form: str = _option(
        "kl", "train: top-m KL (paper) or its ablations", ("kl", "logit_penalty", "hidden_norm")
    )
    top_m: int = _option(64, "train: number of the base model's most likely tokens that stability compares", low=2)
    linearity: float = _option(0.1, "train: weight of the linearity loss", low=0.0)


@dataclass(frozen=True)
class RespondConfig:
    """From queries to response vectors."""

    mode: str = _option(
        "auto",
        "exact: steered forward passes; linear: all K in one pass; auto: linear if closed_form or a sample agrees",
        ("auto", "exact", "linear"),
    )


@dataclass(frozen=True)
class RecoverConfig:
    """From response vectors to sparse influence (Lasso)."""

    penalty_ratio: float = _option(
        0.05, "Lasso penalty, as a share of the smallest one that leaves no influence at all"
    )
    nonnegative: bool = _option(True, "only helpful influence (w >= 0)")
    row_scaling: bool = _option(
        True, "divide the rows of M by the subset sizes, because operators are means over subsets"
    )


@dataclass(frozen=True)
class SolveConfig:
    """How a query's gradient becomes its direction: the solve with the Gauss–Newton matrix (docs/method.md)."""

    steps: int = _option(
        2, "products with the Gauss–Newton matrix per query; 0: EK-FAC's eigenvalues and the damping alone", low=0
    )
    tokens: int = _option(
        4096, "tokens of the pool, in whole blocks, that the Gauss–Newton matrix is computed from", low=1
    )
    damping: float = _option(
        2.0, "trace of the damping that stands for Adam's step sizes, over that of EK-FAC's curvature", low=1e-3
    )


@dataclass(frozen=True)
class AttributeConfig:
    """How the influence of blocks on queries is computed."""

    exact: bool = _option(
        False, "score every block exactly, with one pass over the pool per batch of queries; needs no operators"
    )
    candidates: int = _option(
        -1,
        "blocks of largest estimated influence that are then scored exactly; -1: at least 12, fewer the more bytes the "
        "operators have per block; 0: estimates only",
        low=-1,
    )
    top: int = _option(2000, "blocks kept per query: those with the largest influence, helpful or harmful", low=1)
    tokens: int = _option(
        3, "blocks of each query and sign, of the most influential, whose influence is split among their tokens", low=0
    )
    negative_scale: float = _option(
        0.5, "factor of negative influence, which is noisier in language models; 1 for classifiers", low=0.0
    )


@dataclass(frozen=True)
class SelectConfig:
    """Data selection by influence; part of a selection's identity, not of a stage's: a run may have many selections."""

    by: str = _option(
        "rank",
        "a document's score: rank: its best over the target queries (paper); mean: influence; share: queries helped",
        ("rank", "mean", "share"),
    )
    documents: float = _option(0.0, "documents to take, best first; below 1: a share of the pool; 0: no limit", low=0.0)
    tokens: float = _option(0.0, "tokens to take, best first; below 1: a share of the pool; 0: no limit", low=0.0)
    drop: str = _option(
        "none",
        "filter: drop documents with a score below drop_at, or the worst share drop_at of those that have a score",
        ("none", "below", "bottom"),
    )
    drop_at: float = _option(
        0.0, "a score (drop = below; with by = mean, 0 drops what harms) or a share (drop = bottom)"
    )
    temperature: float = _option(
        0.0, "Gumbel top-k: draw documents with odds rank^(-1/temperature); 0: strictly in order", low=0.0
    )
    quotas: dict[str, str] = _option({}, "source = largest share of the requested size; '*': every other source")
    near_duplicates: float = _option(
        0.0, "skip a document this similar to one already taken (Jaccard of token 5-grams); 0: off", low=0.0
    )
    earlier: tuple[str, ...] = _option((), "folders of earlier selections; their documents are not taken again")


@dataclass(frozen=True)
class ScanConfig:
    """Contamination scans; part of a scan's identity, not of a stage's."""

    words: int = _option(13, "n, words per n-gram; fields shorter than 2n use half of their words", low=2)
    shortest: int = _option(6, "minimum words of a field that is searched for on its own", low=2)
    overlap: float = _option(
        0.3, "share of a field's words, weighted by rarity, that a document must contain to count as a copy", low=0.0
    )
    boilerplate: int = _option(
        10, "an n-gram is ignored as boilerplate if this many documents (of 3 sources) contain it without the rest"
    )
    influence: bool = _option(
        True, "also test the run's model for influence of the run's blocks; needs --control items"
    )
    false_discovery: float = _option(
        0.05, "expected share of false suspicions among those of the influence channel", low=0.0
    )
    alarm: str = _option("any", "new findings that set exit status 2: all, or only copies", ("any", "lexical"))
    lease: float = _option(15.0, "minutes after which another scan may take over a lock that is not renewed", low=0.001)


@dataclass(frozen=True)
class ComputeConfig:
    """Where to run and with how many workers; changes results only within rounding, so not part of any identity."""

    address: str = _option("", "Ray address; empty: RAY_ADDRESS, else a local Ray started for this command")
    workers: int = _option(0, "parallel workers (0: one per CPU, or per GPU on cuda)", low=0)
    device: str = _option("auto", "auto: the GPUs that the Ray cluster has or can scale to", ("auto", "cpu", "cuda"))
    worker_gb: float = _option(4.0, "GB of memory per worker; batches are sized to fit", low=0.1)
    batch_tokens: int = _option(0, "tokens per forward pass; 0: as many as worker_gb allows, at most 8192", low=0)
    query_gb: float = _option(1.0, "GB of the queries' full gradients in memory at once", low=0.0)
