"""EK-FAC's eigenvalues against autograd of the true weights and dense algebra, and a run at every linear map."""

import numpy as np
import pytest
import torch
from test_exact import answered
from test_sites import B, D, F, V, llama, raw_sites, site_moments, texts, weight_gradient  # noqa: F401
from transformers.pytorch_utils import Conv1D

from stride_ray.attribution.attribute import read_influence
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.eigenvalues import (
    EIGENVALUE_DAMPING,
    add_squares,
    kronecker_eigenbasis,
    with_eigenvalues,
)
from stride_ray.models.curvature.moments import KroneckerFactors, kfac_site
from stride_ray.models.matrices import eigenbasis
from stride_ray.models.sites import EMBEDDING, HEAD, ORIGIN, find_sites, site_gradients
from stride_ray.models.vocabulary import TokenSide
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
    squares = {}
    for row in range(B):
        add_squares(squares, model, sites, bases, ids[row : row + 1], mask[row : row + 1])
    return (
        sites,
        {site.name: with_eigenvalues(bases[site.name], site, squares[site.name], B, count / B) for site in sites},
        count,
    )


def test_every_linear_map_is_a_site(model):
    maps = {name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    assert set(find_sites(model, every=True)) == maps - {"lm_head"} | {EMBEDDING, HEAD}
    assert len(maps) == 15
    assert {name.split(".")[2] for name in find_sites(model, 1, every=True) if "." in name} == {"1"}


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
            rotated = (each.Q_first.T @ G if len(each.Q_first) else G) @ each.Q_second
            total = total + rotated.double().square()
        values = total / B / (count / B)
        # The damping is the same for all weights of the matrix itself.
        factor = site.tokens.weights.double().square().unsqueeze(1) if site.name in (EMBEDDING, HEAD) else 1.0
        expected = 1 / (values + EIGENVALUE_DAMPING * (values / factor).mean() * factor)
        torch.testing.assert_close(each.inverse_eigenvalues.double(), expected, rtol=2e-3, atol=0)


def test_folded_coordinates_have_their_tokens_mean_squared_weight(monkeypatch):
    monkeypatch.setattr("stride_ray.models.vocabulary.MAX_BUCKETS", 2)
    side = TokenSide(torch.tensor([1.0, -2.0, 3.0, -1.0]), torch.tensor([0, 1, 0, 1]))
    assert side.squared_weights().tolist() == [5.0, 2.5]
    assert TokenSide(side.weights).squared_weights().tolist() == [1.0, 4.0, 9.0, 1.0]


def test_a_direction_passed_on_to_the_kronecker_factors_is_the_one_solved_for(model, texts, known):  # noqa: F811
    sites, found, _ = known
    for site, J in site_gradients(model, sites, *texts)[0]:
        each = found[site.name]
        solved = each.precondition(J)
        torch.testing.assert_close(
            site.precondition(each.kronecker_preimage(J)), solved, rtol=1e-3, atol=1e-4 * solved.abs().max()
        )
        back = each.rotate(solved) / each.inverse_eigenvalues
        torch.testing.assert_close(back, each.rotate(J), rtol=1e-3, atol=1e-5)


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
    # Without a product the answer is EK-FAC's own.
    unsolved, _, _ = answered(sharded("every map unsolved"), parts, operators__sites="all", solve__steps=0)
    assert read_influence(unsolved, "asked")["influence"].to_pylist() != found["influence"].to_pylist()
    assert not [name for name in Store(f"{run.url}/curvature").names() if name.startswith(("squares", "moments"))]
