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
        "| token_ids (loss_mask, labels, attention_mask); id, source (empty: found in each row)",
    )
    tokenizer: str = _option("", "Hugging Face tokenizer: path or hub id (empty: the model's own)")
    layout: str = _option(
        "pack", "pack: documents joined by end-of-text; split: each document cut alone, tail padded", ("pack", "split")
    )
    block_tokens: int = _option(512, "tokens in a block", low=2)
    shard_mb: float = _option(16.0, "input megabytes in one unit of work, one Parquet file each", low=0.001)


@dataclass(frozen=True)
class ModelConfig:
    """The model whose behaviour is attributed; it must have been trained on the pool."""

    path: str = _option("", "Hugging Face causal LM: folder, hub id, fsspec URL or .gguf file")
    start: str = _option(
        "",
        "the checkpoint that training on the pool began from; exact answers are more accurate when they know it; "
        "empty: random weights",
    )
    split: float = _option(
        0.62, "layer where the operators act: a share of the depth (at most 1), or a number of layers (from 2)"
    )
    dtype: str = _option("float32", "dtype of the weights", ("float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class MembershipConfig:
    """Assignment of blocks to subsets (membership matrix M)."""

    subsets: int = _option(1000, "K, number of subsets; the longer a response, the more can be recovered", low=2)
    degree: int = _option(10, "d, number of subsets that each block belongs to", low=1)
    form: str = _option(
        "regular", "regular: exactly d subsets a block; bernoulli: d on average", ("regular", "bernoulli")
    )


@dataclass(frozen=True)
class OperatorConfig:
    """The steering operators."""

    form: str = _option(
        "sites",
        "sites: at every layer, one bit a coordinate; the paper's: logit, on predictions; matrix, gate: at the split",
        ("sites", "logit", "matrix", "gate"),
    )
    rows: str = _option(
        "auto",
        "sites: an operator a block, or a subset (membership.subsets); auto: blocks, if the budget has room for them",
        ("auto", "blocks", "subsets"),
    )
    budget_gb: float = _option(2.0, "sites: GB that the operators may take on disk; more: more accurate", low=0.0)
    sites: str = _option(
        "outputs",
        "outputs: of attention and MLP, embedding, head; all: every linear map, by EK-FAC: more accurate, dearer",
        ("outputs", "all"),
    )
    layers: float = _option(
        0.0, "sites of so many of the last layers, fewer are faster; below 1: a share; 0: all", low=0.0
    )
    rank: int = _option(64, "r, width of the activation basis (paper: 16)", low=1)
    sketch: int = _option(512, "v, output directions kept of the vocabulary by the logit form", low=1)
    target: str = _option(
        "unigram",
        "logit form: the prediction that the next token is compared with: the pool's unigrams or the model's own",
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
    start: str = _option("random", "train: begin from random operators or the closed form", ("random", "closed_form"))
    steps: int = _option(
        400, "train: optimiser steps; each subset is visited 2 blocks_per_step / K times a step; ten visits do", low=1
    )
    learning_rate: float = _option(0.05, "train: peak rate, after warm-up and before linear decay", low=0.0)
    optimizer: str = _option(
        "muon", "train: Muon for the shared matrices and AdamW for the rest, or AdamW", ("muon", "adamw")
    )
    blocks_per_step: int = _option(16, "train: blocks in a step; each serves fidelity for two of its subsets", low=2)
    stability: float = _option(0.1, "train: weight of the stability loss (fidelity has 1)", low=0.0)
    stability_form: str = _option(
        "kl", "train: top-m KL (paper) or its ablations", ("kl", "logit_penalty", "hidden_norm")
    )
    top_m: int = _option(64, "train: the base model's most likely tokens that stability compares", low=2)
    linearity: float = _option(0.1, "train: weight of the linearity loss", low=0.0)


@dataclass(frozen=True)
class RespondConfig:
    """From queries to response vectors."""

    mode: str = _option(
        "auto",
        "exact: steered forwards; linear: all K from one forward; auto: linear for closed_form or if a sample agrees",
        ("auto", "exact", "linear"),
    )


@dataclass(frozen=True)
class RecoverConfig:
    """From response vectors to sparse influence (Lasso)."""

    penalty_ratio: float = _option(0.05, "Lasso penalty as a share of the smallest that gives no influence at all")
    nonnegative: bool = _option(True, "only helpful influence (w >= 0)")
    row_scaling: bool = _option(True, "divide M's rows by their subset's size: operators are means over subsets")


@dataclass(frozen=True)
class SolveConfig:
    """Preconditioning query gradients with the Gauss–Newton matrix instead of its Kronecker factors (K-FAC) alone."""

    steps: int = _option(
        1, "products with the Gauss–Newton matrix for each query; 0: the Kronecker factors alone", low=0
    )
    tokens: int = _option(
        4096, "tokens of the pool, in whole blocks, that the Gauss–Newton matrix is taken over", low=1
    )
    damping: float = _option(50.0, "times the damped Kronecker factors, added to the Gauss–Newton matrix", low=1e-3)


@dataclass(frozen=True)
class AttributeConfig:
    """How the influence of blocks on queries is computed."""

    exact: bool = _option(
        False, "score every block exactly, in a pass over the pool for each batch of queries; needs no operators"
    )
    candidates: int = _option(
        -1,
        "blocks of largest estimated influence whose influence is then computed exactly; -1: the fewer the more bytes "
        "operators have a block, from 10 on; 0: estimates alone",
        low=-1,
    )
    top: int = _option(2000, "blocks kept per query, those of largest influence, helpful or harmful", low=1)


@dataclass(frozen=True)
class SelectConfig:
    """Data selection by influence; part of a selection's identity, not of a stage's: one run serves many selections."""

    by: str = _option(
        "rank",
        "a document's score: rank, its best over the target queries (paper); mean influence; share of queries helped",
        ("rank", "mean", "share"),
    )
    documents: float = _option(0.0, "documents to take, best first; below 1: a share of the pool; 0: no limit", low=0.0)
    tokens: float = _option(0.0, "tokens to take, best first; below 1: a share of the pool; 0: no limit", low=0.0)
    drop: str = _option(
        "none",
        "filter: drop documents whose score is below drop_at, or the share drop_at of those that have one, worst first",
        ("none", "below", "bottom"),
    )
    drop_at: float = _option(0.0, "a score (drop = below; 0: what harms by mean) or a share (drop = bottom)")
    temperature: float = _option(
        0.0, "Gumbel top-k: draw documents with odds place^(-1/temperature); 0: strictly in order", low=0.0
    )
    quotas: dict[str, str] = _option({}, "source = largest share of the size asked for; '*': every other source")
    near_duplicates: float = _option(
        0.0, "leave out what a document taken before resembles this much (Jaccard of token 5-grams); 0: off", low=0.0
    )
    earlier: tuple[str, ...] = _option((), "folders of earlier selections, whose documents are not taken again")


@dataclass(frozen=True)
class ScanConfig:
    """Contamination scans; part of a scan's identity, not of a stage's."""

    words: int = _option(
        13, "n, words in an n-gram of texts compared; of shorter fields than 2n, half the words", low=2
    )
    shortest: int = _option(6, "fewest words of a field that is searched for by itself", low=2)
    overlap: float = _option(
        0.3, "share of a field's words, weighted by rarity, that a document must hold to be called a copy", low=0.0
    )
    boilerplate: int = _option(10, "documents (of 3 sources) that an n-gram must be in without the rest to be left out")
    influence: bool = _option(True, "whether to ask the run's model too, on the run's blocks; needs --control items")
    false_discovery: float = _option(0.05, "expected share of false ones among the suspicions of influence", low=0.0)
    alarm: str = _option("any", "new findings that end with status 2: all, or those with a copy", ("any", "lexical"))
    lease: float = _option(15.0, "minutes after which a scan's lock that is not renewed may be taken over", low=0.001)


@dataclass(frozen=True)
class ComputeConfig:
    """Where to run and with how many workers; changes results only within rounding, so not part of any identity."""

    address: str = _option("", "Ray address; empty: RAY_ADDRESS, else a local Ray started for this command")
    workers: int = _option(0, "parallel workers (0: one per CPU, or per GPU on cuda)", low=0)
    device: str = _option("auto", "auto: the GPUs that the Ray cluster has or can scale to", ("auto", "cpu", "cuda"))
    worker_gb: float = _option(4.0, "GB of memory that a worker may take, for which batches are sized", low=0.1)
    batch_tokens: int = _option(0, "tokens in one forward pass; 0: what worker_gb has room for, 8192 at most", low=0)
    query_gb: float = _option(1.0, "GB of queries' whole gradients that are held at once", low=0.0)
