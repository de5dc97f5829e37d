"""Speed of responses and passes over the pool, on random weights of a given shape: CPU or GPU, any dtype.

Speed depends on shapes, not on the weights' values. Every figure is compared with a bound: responses with plain matrix
products of the suffix's shapes and a loop through the whole model, a pass over the pool with one forward pass.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stride_ray.models.batch_size import linearised_at_once
from stride_ray.models.causal_lm import DTYPES, SplitModel, device_of, masked_mean
from stride_ray.models.curvature.gauss_newton import Linearised
from stride_ray.models.linear_algebra.vocabulary import token_side
from stride_ray.models.sites import EMBEDDING, HEAD, Site, find_sites, influence, site_gradients
from stride_ray.operators.closed_form import add_to_subsets
from stride_ray.operators.forms import Operators, features, gradients, random_basis, steering_vectors
from stride_ray.operators.membership import Membership
from stride_ray.runtime.config import Config
from stride_ray.runtime.memory import peak_bytes, restart_peak

RUNS = 3
ENOUGH = 30.0  # seconds of measured runs, after which no further one starts


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. ``split``: ℓ of L layers; ``inner``: the MLP's width; ``shared``: key–value heads."""

    layers: int
    split: int
    width: int
    inner: int
    heads: int
    shared: int
    vocabulary: int


SHAPES = {
    # Small enough for the tests and a laptop.
    "small": Shape(6, 4, 256, 768, 4, 2, 4096),
    # SmolLM2-135M's.
    "135m": Shape(30, 19, 576, 1536, 9, 3, 49152),
    # Size and depth of the paper's smallest model, ℓ=8 of 12.
    "286m": Shape(12, 8, 1024, 3584, 16, 16, 50304),
    # Qwen2.5-0.5B's, untied.
    "600m": Shape(24, 15, 896, 4864, 14, 2, 151936),
}


@dataclass(frozen=True)
class Setting:
    """A configuration to measure.

    Attributes:
        shape: a name in SHAPES.
        device: auto, cpu or cuda.
        dtype: of weights and the residual stream.
        form: gate or matrix operators. ``rank``: r. ``subsets``: K.
        tokens: T of queries and blocks. ``queries`` and ``blocks``: how many.
        batch_tokens: tokens in one forward pass.
    """

    shape: str = "small"
    device: str = "auto"
    dtype: str = "float32"
    form: str = "gate"
    rank: int = 16
    subsets: int = 64
    tokens: int = 128
    queries: int = 4
    blocks: int = 64
    batch_tokens: int = 16384


def random_model(shape: Shape, device: str, dtype: str) -> SplitModel:
    """Make a Llama of this shape with random weights, split after its ℓ-th layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    place = device_of(device)
    with place:
        model: Any = LlamaForCausalLM(config)
    return SplitModel(model.to(place, DTYPES[dtype]), split=shape.split, name="random weights")


def measure_respond(setting: Setting) -> dict[str, Any]:
    """Time exact and linear responses of random operators that steer noticeably (2 % of the loss).

    Returns:
        ``seconds_exact`` and ``seconds_linear`` per query, their ratio ``ratio_linear``; ``response_correlation``
        between the two; ``ratio_loop``: time of a loop through the whole model in equal batches over exact mode's,
        beside ``ratio_flops``, the ratio expected from starting at the split; ``share_of_floor``: time of the suffix's
        plain matrix products over exact mode's; peak bytes.
    """
    shape = SHAPES[setting.shape]
    model = random_model(shape, setting.device, setting.dtype)
    ids = _tokens(shape, setting.queries, setting.tokens, model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    basis = random_basis(setting.form, model.width, model.vocabulary, setting.rank, 0, 0, "linear").to(model.device)
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(setting.subsets, *basis.shape, generator=generator).to(model.device)
    everyone = torch.arange(setting.subsets, device=model.device)
    scale = _noticeable(model, Operators(basis, A), ids[0], mask[0], everyone[:16], setting.batch_tokens)
    operators = Operators(basis, A * scale)

    def exact() -> Tensor:
        found = [operators.exact(model, ids[i], mask[i], everyone, setting.batch_tokens)[1] for i in range(len(ids))]
        return torch.stack(found)

    def linear() -> Tensor:
        rows = max(1, setting.batch_tokens // setting.tokens)
        parts = zip(ids.split(rows), mask.split(rows), strict=True)
        return torch.cat([operators.linear(model, *part) for part in parts])

    few = everyone[: max(1, min(setting.subsets, setting.batch_tokens // setting.tokens))]
    restart_peak(model.device)
    steered, seconds_exact = timed(exact, model.device)
    peak = peak_bytes(model.device)
    slope, seconds_linear = timed(linear, model.device)
    _, seconds_loop = timed(lambda: whole_model_losses(model, operators, ids[0], mask[0], few), model.device)
    floor = _suffix_products(model, shape, len(few) * setting.tokens)
    per_query = seconds_exact / len(ids)
    in_layers, in_head = _layer_numbers(shape), shape.width * shape.vocabulary
    above = (shape.layers - shape.split) * in_layers + in_head
    return {
        **_about(setting, model),
        "seconds_exact": per_query,
        "seconds_linear": seconds_linear / len(ids),
        "ratio_linear": seconds_exact / seconds_linear,
        "response_correlation": float(np.corrcoef(steered.flatten().cpu(), slope.flatten().cpu())[0, 1]),
        "ratio_loop": seconds_loop * setting.subsets / len(few) / per_query,
        "ratio_flops": (shape.layers * in_layers + in_head) / above,
        "share_of_floor": floor * setting.subsets / len(few) / per_query,
        "tflops": 2 * above * setting.tokens * setting.subsets / per_query / 1e12,
        "peak_bytes": peak,
    }


def measure_passes(setting: Setting) -> dict[str, Any]:
    """Time passes over blocks: the closed form of each form of operators, and scoring every block against queries.

    Scoring is measured twice: at all sites (``exact``), and at those of the last layers (``exact_last_quarter``).

    Returns:
        Blocks per second of a plain forward with loss (``forward``) and of each pass, ratios of seconds to the
        forward's (``ratio_gate``…), and peak bytes of each.
    """
    shape = SHAPES[setting.shape]
    model = random_model(shape, setting.device, setting.dtype)
    ids = _tokens(shape, setting.blocks, setting.tokens, model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = max(1, setting.batch_tokens // setting.tokens)
    membership = Membership(setting.subsets, min(10, setting.subsets), 0)
    columns = membership.columns(0, setting.blocks)
    batches = [slice(at, at + rows) for at in range(0, setting.blocks, rows)]

    def forward() -> None:
        for at in batches:
            with torch.no_grad():
                masked_mean(model.token_losses(model.read(ids[at]), ids[at], mask[at]), mask[at])

    found: dict[str, Any] = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        restart_peak(model.device)
        _, seconds = timed(work, model.device)
        found[name] = {"blocks_per_second": setting.blocks / seconds, "peak_bytes": peak_bytes(model.device)}

    note("forward", forward)
    for form in ("gate", "matrix", "logit"):
        basis = random_basis(form, model.width, model.vocabulary, setting.rank, 256, 0, "linear").to(model.device)

        def closed_form(basis: Any = basis) -> None:
            sums = torch.zeros(setting.subsets + 1, int(np.prod(basis.shape)), device=model.device)
            for at in batches:
                add_to_subsets(sums, gradients(basis, model, ids[at], mask[at]).flatten(1), columns[at])

        note(form, closed_form)
    some = (ids[: setting.queries], mask[: setting.queries])
    # All layers last: ``bytes_per_query`` is computed from the last iteration's sites.
    for name, layers in (("exact_last_quarter", 0.25), ("exact", 0.0)):
        sites = _plain_sites(model, layers)
        asked = {site.name: site.precondition(J).flatten(1) for site, J in site_gradients(model, sites, *some)[0]}

        def exact(sites: Any = sites, asked: Any = asked) -> None:
            for at in batches:
                influence(asked, site_gradients(model, sites, ids[at], mask[at])[0])

        note(name, exact)
    speed = {name: each["blocks_per_second"] for name, each in found.items()}
    ratios = {f"ratio_{name}": speed["forward"] / each for name, each in speed.items() if name != "forward"}
    numbers = sum(J.shape[1] for J in asked.values())
    return {**_about(setting, model), "passes": found, **ratios, "bytes_per_query": 4 * numbers}


def measure_solve(setting: Setting) -> dict[str, Any]:
    """Time a query's solve over ``blocks`` of the pool, beside a forward pass with loss over the same blocks.

    Returns:
        Seconds of the forward pass (``seconds_forward``), of linearising the model on the blocks, which several queries
        share (``seconds_linearise``), and of one query's product with the Gauss–Newton matrix (``seconds_product``);
        the latter two over the forward's (``ratio_linearise``, ``ratio_product``), and peak bytes.
    """
    shape = SHAPES[setting.shape]
    model = random_model(shape, setting.device, setting.dtype)
    ids = _tokens(shape, setting.blocks, setting.tokens, model.device)
    mask, sites = torch.ones_like(ids, dtype=torch.bool), _plain_sites(model, 0.0)
    config = Config().updated({"compute.batch_tokens": setting.batch_tokens})
    rows, _ = linearised_at_once(config, model, setting.tokens)
    batches = [slice(at, at + rows) for at in range(0, setting.blocks, rows)]
    v = {site.name: J[0] for site, J in site_gradients(model, sites, ids[:1], mask[:1])[0]}

    @torch.no_grad()
    def forward() -> None:
        for at in batches:
            masked_mean(model.token_losses(model.read(ids[at]), ids[at], mask[at]), mask[at])

    def linearise(products: int) -> None:
        for at in batches:
            linearised = Linearised(model, sites, ids[at], mask[at], finite_difference=False)
            for _ in range(products):
                dict(linearised.product(v))

    restart_peak(model.device)
    alone, one, three = (timed(work, model.device)[1] for work in (forward, lambda: linearise(1), lambda: linearise(3)))
    product = (three - one) / 2
    return {
        **_about(setting, model),
        "seconds_forward": alone,
        "seconds_linearise": one - product,
        "seconds_product": product,
        "ratio_linearise": (one - product) / alone,
        "ratio_product": product / alone,
        "peak_bytes": peak_bytes(model.device),
    }


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return the result of ``work`` and the median seconds of up to three runs, after one warm-up run."""
    work()
    _wait(device)
    seconds: list[float] = []
    while len(seconds) < RUNS and sum(seconds) < ENOUGH:
        began = time.perf_counter()
        result = work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return result, float(np.median(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _about(setting: Setting, model: SplitModel) -> dict[str, Any]:
    cuda = model.device.type == "cuda"
    return {
        **vars(setting),
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "device": torch.cuda.get_device_name(model.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


def _tokens(shape: Shape, rows: int, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, shape.vocabulary, (rows, tokens), generator=generator).to(device)


def _noticeable(
    model: SplitModel, operators: Operators, ids: Tensor, mask: Tensor, subsets: Tensor, batch_tokens: int
) -> float:
    """Smallest power of two that scales the operators to a mean |response| of at least 2 % of the loss."""
    for power in range(-12, 24):
        louder = Operators(operators.basis, operators.A * 2.0**power)
        base, found = louder.exact(model, ids, mask, subsets, batch_tokens)
        if float(found.abs().mean()) >= 0.02 * base:
            return 2.0**power
    return 2.0**24


@torch.no_grad()
def whole_model_losses(model: SplitModel, operators: Operators, ids: Tensor, mask: Tensor, subsets: Tensor) -> Tensor:
    """Losses under several operators with a forward through all layers for each, in one batch."""

    def steer(module: Any, given: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        moved = h + steering_vectors(operators.basis, features(operators.basis, h), operators.A[subsets]).to(h.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = model.layers[model.split_layer - 1].register_forward_hook(steer)
    try:
        many, counts = ids.expand(len(subsets), -1), mask.expand(len(subsets), -1)
        return masked_mean(model.token_losses(model.read(many), many, counts), counts)
    finally:
        handle.remove()


@torch.no_grad()
def _suffix_products(model: SplitModel, shape: Shape, rows: int) -> float:
    """Seconds of the plain matrix products that ``rows`` tokens need from layer ℓ+1 to the logits."""
    layer = [module.weight for module in model.layers[-1].modules() if isinstance(module, torch.nn.Linear)]
    weights = [*layer * (shape.layers - shape.split)]
    given = {w.shape[1]: torch.randn(rows, w.shape[1], device=model.device, dtype=model.dtype) for w in layer}
    head = model.model.get_output_embeddings().weight
    step = max(1, model.logits_budget // shape.vocabulary)
    states = torch.randn(rows, shape.width, device=model.device, dtype=model.dtype).split(step)

    def products() -> None:
        for w in weights:
            torch.mm(given[w.shape[1]], w.T)
        for z in states:
            torch.mm(z, head.T)

    return timed(products, model.device)[1]


def _layer_numbers(shape: Shape) -> int:
    keys = shape.width * shape.shared // shape.heads
    return 2 * shape.width * (shape.width + keys) + 3 * shape.width * shape.inner


def _plain_sites(model: SplitModel, layers: float) -> tuple[Site, ...]:
    """Sites with preconditioners of the right shapes; their values do not affect speed."""
    D, tokens = model.width, token_side(torch.ones(model.vocabulary), 3)
    sites = []
    for name in find_sites(model, layers):
        if name == EMBEDDING:
            site = Site(name, torch.empty(0), torch.eye(D), tokens)
        elif name == HEAD:
            site = Site(name, torch.eye(D), torch.empty(0), tokens)
        else:
            written, read = model.model.get_submodule(name).weight.shape
            site = Site(name, torch.eye(read), torch.eye(written))
        sites.append(site.to(model.device))
    return tuple(sites)
