"""Gauss–Newton products against the definition, with weights really moved, and stepped ones against differentiated."""

# ruff: noqa: F811 -- the fixtures made and texts

import copy
from dataclasses import replace

import pytest
import torch
from test_sites import V, llama, made, raw_sites, texts  # noqa: F401

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.gauss_newton import GaussNewton, Linearised, cut_texts
from stride_ray.models.linear_algebra.vocabulary import token_side
from stride_ray.models.sites import EMBEDDING, HEAD, find_sites, site_gradients


def directions(model, sites, texts, count=2):
    """Random directions of J's shape."""
    generator = torch.Generator().manual_seed(2)
    shapes = {site.name: J.shape[1:] for site, J in site_gradients(model, sites, *texts)[0]}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def inner(x, y):
    return float(sum((x[name].double() * y[name].double()).sum() for name in x))


def moved_logits(model, v, step):
    """Logits of the model in float64 with its weights moved a step along v."""
    moved = copy.deepcopy(model.model).double()
    for name, direction in v.items():
        ends = {EMBEDDING: moved.get_input_embeddings(), HEAD: moved.get_output_embeddings()}
        module = ends.get(name) or moved.get_submodule(name)
        as_read = name in (EMBEDDING, HEAD) or type(module).__name__ == "Conv1D"
        module.weight.data += step * (direction if as_read else direction.T).double()
    return lambda ids: moved(ids).logits


def curvature(model, u, v, ids, mask):
    """uᵀ G v by the definition, with what the weights do to the logits from steps of its weights."""
    changes = [
        (moved_logits(model, each, 1e-5)(ids) - moved_logits(model, each, -1e-5)(ids))[:, :-1] / 2e-5 for each in (u, v)
    ]
    p = model.model.double()(ids).logits[:, :-1].softmax(-1)
    model.model.float()
    a, b = changes
    each = (p * a * b).sum(-1) - (p * a).sum(-1) * (p * b).sum(-1)
    weights = mask[:, 1:].double() / mask[:, 1:].sum(1, keepdim=True).clamp(min=1)
    return float((each * weights).sum())


@pytest.mark.parametrize("budget", [1, 10**6])  # one sequence's logits at a time, all
def test_products_are_those_of_the_definition(made, texts, budget):
    model, names = made
    model.logits_budget = budget
    sites = raw_sites(model, names)
    u, v = directions(model, sites, texts)
    linearised = Linearised(model, sites, *texts)
    assert not linearised.finite_difference
    Gu, Gv = dict(linearised.product(u)), dict(linearised.product(v))
    assert {name: x.shape for name, x in Gu.items()} == {name: x.shape for name, x in u.items()}
    with torch.no_grad():
        for one, two, product in ((u, u, Gu), (v, v, Gv), (u, v, Gv), (v, u, Gu)):
            assert inner(one, product) == pytest.approx(curvature(model, one, two, *texts), rel=2e-3)


class Refused(torch.autograd.Function):
    """A module of somebody's own, whose backward pass may not be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g.clone()


class Silent(Refused):
    """One whose backward pass is no graph, as that of a kernel, without a word."""

    @staticmethod
    def backward(ctx, g):
        return g.detach().clone()


@pytest.mark.parametrize("own", [Refused, Silent])
def test_a_model_that_has_no_second_derivative_is_stepped_along(own, made, texts):
    model, names = made
    sites = raw_sites(model, names)
    (v,) = directions(model, sites, texts, 1)
    expected = dict(Linearised(model, sites, *texts).product(v))
    handle = model.layers[0].register_forward_hook(
        lambda _, __, out: (own.apply(out[0]), *out[1:]) if isinstance(out, tuple) else own.apply(out)
    )
    linearised = Linearised(model, sites, *texts)
    found = dict(linearised.product(v))
    handle.remove()
    assert linearised.finite_difference
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=5e-3, atol=5e-3 * float(x.abs().max()))


def test_a_folded_vocabulary_has_the_folded_product(made, texts, monkeypatch):
    monkeypatch.setattr("stride_ray.models.linear_algebra.vocabulary.MAX_BUCKETS", 8)
    model, names = made
    whole = raw_sites(model, names)
    side = token_side(torch.rand(V, generator=torch.Generator().manual_seed(3)) + 0.5, 0)
    folded = tuple(replace(site, tokens=side) if site.name in (EMBEDDING, HEAD) else site for site in whole)
    (v,) = directions(model, folded, texts, 1)
    found = dict(Linearised(model, folded, *texts).product(v))
    one_hot = torch.zeros(V, 8)
    one_hot[torch.arange(V), side.buckets] = side.weights
    ends = (EMBEDDING, HEAD)
    expected = dict(
        Linearised(model, whole, *texts).product({n: one_hot @ x if n in ends else x for n, x in v.items()})
    )
    for name, x in expected.items():
        torch.testing.assert_close(found[name], one_hot.T @ x if name in ends else x, rtol=1e-3, atol=1e-4)


def test_some_layers_alone_have_the_product_of_their_own_sites(made, texts):
    model, names = made
    sites = raw_sites(model, names)
    (v,) = directions(model, sites, texts, 1)
    few = sites[3:]
    found = dict(Linearised(model, few, *texts).product({site.name: v[site.name] for site in few}))
    alone = {name: x if name in found else torch.zeros_like(x) for name, x in v.items()}
    expected = dict(Linearised(model, sites, *texts).product(alone))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-4)


def test_bfloat16_gives_about_the_same(texts):
    torch.manual_seed(0)
    whole = SplitModel(llama(), split=1)
    names = find_sites(whole)
    half = SplitModel(copy.deepcopy(whole.model).bfloat16(), split=1)
    (v,) = directions(whole, raw_sites(whole, names), texts, 1)
    products = [dict(Linearised(model, raw_sites(model, names), *texts).product(v)) for model in (whole, half)]
    one, two = (torch.cat([x.flatten() for x in each.values()]) for each in products)
    assert two.dtype == torch.float32
    assert torch.cosine_similarity(one, two, dim=0) > 0.995


def test_blocks_cut_into_pieces_give_the_curvature_of_the_pieces(made, texts):
    model, names = made
    sites = raw_sites(model, names)
    ids, mask = texts
    u, v = directions(model, sites, texts)
    half = -(-ids.shape[1] // 2)
    pieces = cut_texts(ids, mask, half)
    assert all(piece.shape[1] <= half and mask[:, 1:].any(1).all() for piece, mask in pieces)
    found = GaussNewton(model, sites, pieces, 3.0).products([v])[0]
    parts = [(a[row : row + 1], b[row : row + 1]) for a, b in pieces for row in range(len(a))]
    expected = 3.0 * sum(curvature(model, u, v, *part) for part in parts) / len(parts)
    assert inner(u, found) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_kept_linearisations_give_the_same_bits_and_the_form_is_that_of_the_product(made, texts, keep):
    model, names = made
    sites = raw_sites(model, names)
    u, v = directions(model, sites, texts)
    sample = [(each[:1], mask[:1]) for each, mask in (texts, [x.flip(0) for x in texts])]
    matrix = GaussNewton(model, sites, sample, 3.0, keep)
    matrix.prepare()
    first, forms, again = matrix.products([u, v]), matrix.quadratic_forms([u, v]), matrix.products([u, v])
    assert len(matrix.kept) == keep
    plain = GaussNewton(model, sites, sample, 3.0)
    for one, two, three in zip(first, again, plain.products([u, v]), strict=True):
        assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)
    assert forms == plain.quadratic_forms([u, v])
    assert forms == pytest.approx([inner(x, product) for x, product in zip((u, v), first, strict=True)], rel=1e-3)


def test_blocks_that_fit_are_not_cut(texts):
    ((ids, mask),) = cut_texts(*texts, texts[0].shape[1])
    assert torch.equal(ids, texts[0])
    assert torch.equal(mask, texts[1])
