"""EK-FAC's eigenvalues against autograd of the true weights and dense algebra, and a run at every linear map."""

import numpy as np
import pytest
import torch
from test_exact import answered
from test_sites import B, D, F, V, llama, raw_sites, site_moments, texts, weight_gradient  # noqa: F401
from transformers.pytorch_utils import Conv1D

from stride_ray.attribution.attribute import read_influence
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.conjugate_gradients import solve
from stride_ray.models.curvature.damping import LEAST_SIDE, optimiser_damping
from stride_ray.models.curvature.eigenvalues import (
    DampedSite,
    EKFACSite,
    Squares,
    add_squares,
    complete_sites,
    kronecker_eigenbasis,
)
from stride_ray.models.curvature.moments import KroneckerFactors, kfac_site
from stride_ray.models.linear_algebra.matrices import eigenbasis
from stride_ray.models.linear_algebra.vocabulary import TokenSide, token_side
from stride_ray.models.sites import EMBEDDING, HEAD, ORIGIN, Site, find_sites, site_gradients
from stride_ray.runtime.storage import Store


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = llama()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return SplitModel(made, split=1)


@pytest.fixture
def known(model, texts):  # noqa: F811
    """The sites of all maps with their eigenvalues, both measured on the texts."""
    ids, mask = texts
    names = find_sites(model, every=True)
    moments, count = site_moments(model, names, ids, mask)
    counts = torch.bincount(ids.flatten(), minlength=V)
    sites = tuple(kfac_site(name, each / count, counts, 0) for name, each in moments.items())
    bases = {name: kronecker_eigenbasis(name, each / count) for name, each in moments.items()}
    sums = {}
    for row in range(B):
        add_squares(sums, model, sites, bases, ids[row : row + 1], mask[row : row + 1])
    by_name = {site.name: site for site in sites}
    means = {name: Squares(*(x / B for x in each)) for name, each in sums.items()}
    found = complete_sites(list(bases.values()), by_name, means, count / B)
    return sites, {each.name: each for each in found}, count


def test_every_linear_map_is_a_site(model):
    maps = {name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    assert set(find_sites(model, every=True)) == maps - {"lm_head"} | {EMBEDDING, HEAD}
    assert len(maps) == 15
    assert {name.split(".")[2] for name in find_sites(model, 1, every=True) if "." in name} == {"1"}


def squared_gradients(model, name, texts):  # noqa: F811
    """The mean over blocks of the weights' squared gradients, laid out as J."""
    total = 0.0
    for ids, mask in zip(*texts, strict=True):
        G = weight_gradient(model, name, ids, mask)
        total = total + (G.T if name == HEAD else G).double().square()
    return total / B


def test_eigenvalues_are_mean_squares_of_gradients_in_the_basis(model, texts, known):  # noqa: F811
    ids, mask = texts
    sites, found, count = known
    for site in sites:
        each, total = found[site.name], 0.0
        for row in range(B):
            G = weight_gradient(model, site.name, ids[row], mask[row])
            if site.name == HEAD:
                G = G.T * site.tokens.weights.unsqueeze(1)
            if site.name == EMBEDDING:
                G = G * site.tokens.weights.unsqueeze(1)
            total = total + each.rotate(G).double().square()
        torch.testing.assert_close(each.eigenvalues.double(), total / count, rtol=2e-3, atol=1e-10)


def test_the_damping_is_the_root_of_rows_and_columns_and_as_large_as_the_curvature(model, texts, known):  # noqa: F811
    """In the weights themselves; tokens are damped by their frequency, which is one over their factors' squares."""
    sites, found, count = known
    roots, traces = {}, {}
    for site in sites:
        squares = squared_gradients(model, site.name, texts)
        rows, columns = squares.sum(1), squares.sum(0)
        if site.name in (EMBEDDING, HEAD):
            frequency = 1 / site.tokens.weights.double().square()
            rows = squares.sum() * frequency / frequency.sum()
        sides = [side.clamp(min=LEAST_SIDE * side.mean()) for side in (rows.sqrt(), columns.sqrt())]
        roots[site.name] = sides[0].unsqueeze(1) * sides[1] / squares.sum().sqrt()
        traces[site.name] = squares.sum() / (count / B)
    scale = sum(traces.values()) / sum(each.sum() for each in roots.values())
    for site in sites:
        each = found[site.name]
        M = each.damping_first.double().unsqueeze(1) * each.damping_second.double()
        if site.name in (EMBEDDING, HEAD):
            M = M / site.tokens.weights.double().square().unsqueeze(1)
        torch.testing.assert_close(M, scale * roots[site.name], rtol=2e-3, atol=0)


def test_rows_and_columns_give_back_squares_that_are_their_product():
    v = torch.tensor([1.0, 4.0, 9.0]).double().unsqueeze(1) * torch.tensor([1.0, 16.0]).double()
    other = torch.tensor([[25.0]]).double()
    squares = {"one": v, "two": other}
    found = optimiser_damping({k: x.sum(1) for k, x in squares.items()}, {k: x.sum(0) for k, x in squares.items()}, 70)
    M = {name: first.unsqueeze(1) * second for name, (first, second) in found.items()}
    for name, each in squares.items():  # √v sums to 35
        torch.testing.assert_close(M[name], 2 * each.sqrt())


def test_a_side_without_gradients_is_damped_a_little():
    rows, columns = torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0]).double()
    ((first, _),) = optimiser_damping({"one": rows}, {"one": columns}, 1.0).values()
    assert first[0] / first[1] == pytest.approx(LEAST_SIDE / 2)


def test_a_bucket_s_factor_is_that_of_its_usual_tokens(monkeypatch):
    monkeypatch.setattr("stride_ray.models.linear_algebra.vocabulary.MAX_BUCKETS", 2)
    side = TokenSide(torch.tensor([1.0, -2.0, 3.0, -1.0]), torch.tensor([0, 1, 0, 1]))
    assert side.mean_squared_weights.tolist() == pytest.approx([2 / (1 + 1 / 9), 2 / (1 + 1 / 4)])
    assert side.fold(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [4.0, 6.0]
    assert TokenSide(side.weights).mean_squared_weights.tolist() == pytest.approx([1.0, 4.0, 9.0, 1.0])


def test_buckets_are_damped_as_their_tokens_are(monkeypatch):
    """A step along a bucket moves all of its tokens, each by its factor: their dampings add up."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.rand(4096, generator=generator).double() ** 8 + 1e-4
    weights, width = frequency.rsqrt().float(), 3
    gradients = torch.randn(200, 4096, width, generator=generator) * frequency.sqrt().float().unsqueeze(1)
    none = torch.empty(0)
    found = []
    for buckets in (4096, 64):
        monkeypatch.setattr("stride_ray.models.linear_algebra.vocabulary.MAX_BUCKETS", buckets)
        side = token_side(weights, 0)
        J = (gradients * side.weights.unsqueeze(1)).square().mean(0)
        if buckets == 64:
            folded = gradients.new_zeros(200, 64, width).index_add_(
                1, side.buckets, gradients * side.weights.unsqueeze(1)
            )
            J = folded.square().mean(0)
        squares = J / side.mean_squared_weights.unsqueeze(1)
        basis = EKFACSite(HEAD, none, torch.eye(width), none, torch.ones(width))
        means = {HEAD: Squares(J, squares.sum(1), squares.sum(0))}
        (site,) = complete_sites([basis], {HEAD: Site(HEAD, torch.eye(width), none, side)}, means, 1.0)
        found.append((side, DampedSite(site, 1.0)))
    (tokens, exact), (_, bucketed) = found
    direction = torch.randn(64, width, generator=generator)
    spread = direction[found[1][0].buckets] * found[1][0].weights.unsqueeze(1) / tokens.weights.unsqueeze(1)
    both = [float((d * site.damp(d)).sum()) for d, site in ((direction, bucketed), (spread, exact))]
    assert both[0] == pytest.approx(both[1], rel=0.02)


class Half:
    """Half of the identity as the curvature."""

    def products(self, vs):
        return [{name: x * 0.5 for name, x in v.items()} for v in vs]

    def quadratic_forms(self, vs):
        return [0.5 * sum(float(x.square().sum()) for x in v.values()) for v in vs]


def test_a_site_without_gradients_does_not_stop_the_others():
    sizes = {"live": (512, 8), "dead": (512, 2048)}
    rows = {"live": torch.full((512,), 1e-6).double(), "dead": torch.zeros(512).double()}
    columns = {"live": torch.full((8,), 64e-6).double(), "dead": torch.zeros(2048).double()}
    sides = optimiser_damping(rows, columns, 1.0)
    none = torch.empty(0)
    sites = []
    for name, (F_, D_) in sizes.items():
        first, second = (side.float() for side in sides[name])
        sites.append(
            DampedSite(
                EKFACSite(name, torch.eye(F_), torch.eye(D_), none, none, torch.zeros(F_, D_), first, second), 0.1
            )
        )
    asked = {"live": torch.ones(512, 8), "dead": torch.zeros(512, 2048)}
    (found,) = solve([asked], sites, Half(), 2)
    assert found.steps == 2
    assert all(x.isfinite().all() for x in found.direction.values())
    assert not found.direction["dead"].any()


def test_a_direction_passed_on_is_what_the_kronecker_factors_invert(model, texts, known):  # noqa: F811
    sites, found, _ = known
    for site, J in site_gradients(model, sites, *texts)[0]:
        torch.testing.assert_close(
            site.precondition(found[site.name].kfac(J)), J, rtol=1e-3, atol=1e-3 * float(J.abs().max())
        )


def test_the_preconditioner_has_the_damping_s_diagonal_in_the_basis(known):
    sites, found, _ = known
    for site in sites:
        each = found[site.name]
        damped = DampedSite(each, 5.0)
        rows, columns = each.eigenvalues.shape
        M = (each.damping_first.unsqueeze(1) * each.damping_second).double()
        Q = [(Q if len(Q) else torch.eye(rows)).double() for Q in (each.Q_first, each.Q_second)]
        for i, j in ((0, 0), (rows - 1, 1), (rows // 2, columns - 1)):
            unit = Q[0][:, i].unsqueeze(1) * Q[1][:, j]  # an eigenvector
            expected = 1 / (float(each.eigenvalues[i, j]) + 5 * float((M * unit.square()).sum()))
            torch.testing.assert_close(
                damped.precondition(unit.float()).double(), expected * unit, rtol=1e-3, atol=1e-4 * expected
            )
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(damped.damp(x).double(), 5 * M * x, rtol=1e-4, atol=0)


def test_a_factor_is_decomposed_once(monkeypatch):
    decomposed = []
    monkeypatch.setattr(
        "stride_ray.models.curvature.moments.eigenbasis", lambda each: decomposed.append(len(each)) or eigenbasis(each)
    )
    of_layer, of_head = (KroneckerFactors(np.eye(4), np.eye(size)) for size in (3, 1))
    for name, moments in (("layer", of_layer), (HEAD, of_head), (ORIGIN, of_head)):
        kfac_site(name, moments, torch.ones(V), 0)
    kronecker_eigenbasis("layer", of_layer)
    kronecker_eigenbasis(HEAD, of_head)
    assert decomposed == [4, 3, 4]


def test_a_run_at_every_map_answers_in_the_same_form(exactly, parts, sharded, plain):
    run, summary, _ = answered(sharded("every map"), parts, operators__sites="all")
    assert len(run.stage("curvature").manifest()["sites"]) == 2 * 7 + 3
    assert (summary["unsolved"], summary["failed"]) == (0, 2)
    found, other = (read_influence(each, "asked") for each in (run, exactly.run))
    assert found.schema.equals(other.schema)
    both = [{(r["query_id"], r["ordinal"]): r["influence"] for r in table.to_pylist()} for table in (found, other)]
    same = sorted(both[0].keys() & both[1].keys())
    assert 0.5 < np.corrcoef([[each[key] for key in same] for each in both])[0, 1] < 0.9999
    assert not [name for name in Store(f"{run.url}/curvature").names() if name.startswith(("squares", "moments"))]
