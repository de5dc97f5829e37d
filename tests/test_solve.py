"""The solve of a query's direction: against dense linear algebra, and in the pipeline."""

import numpy as np
import pytest
import torch
from conftest import answered, run_plainly

from stride_ray.attribution import directions
from stride_ray.attribution.attribute import read_influence
from stride_ray.models.curvature.conjugate_gradients import curvature_scale, solve
from stride_ray.models.curvature.gauss_newton import Linearised
from stride_ray.models.sites import ORIGIN

F, D = 3, 4


def symmetric(n, generator):
    """A positive definite matrix."""
    A = torch.randn(n, n, generator=generator)
    return A @ A.T / n + torch.eye(n)


class Given:
    """A site with a diagonal damping, as Adam's, and a preconditioner that is some other matrix."""

    def __init__(self, name, seed):
        generator = torch.Generator().manual_seed(seed)
        self.name = name
        self.M = torch.rand(F, D, generator=generator) + 0.1
        self.sides = [torch.linalg.inv(symmetric(n, generator)) for n in (F, D)]

    def damp(self, x):
        return self.M * x

    def precondition(self, J):
        return self.sides[0] @ J @ self.sides[1]


SITES = (Given("one", 0), Given("two", 1))


def flat(x):
    return torch.cat([x[site.name].flatten() for site in SITES]).double()


def shaped(v):
    return {site.name: part.reshape(F, D).float() for site, part in zip(SITES, v.split(F * D), strict=True)}


def damping():
    """M as a matrix."""
    return torch.diag(flat({site.name: site.M for site in SITES}))


def curvature(seed=2):
    A = torch.randn(2 * F * D, 2 * F * D, generator=torch.Generator().manual_seed(seed)).double()
    return A @ A.T / len(A)


def queries(count=3):
    generator = torch.Generator().manual_seed(4)
    return [shaped(torch.randn(2 * F * D, generator=generator).double()) for _ in range(count)]


class Times:
    """A matrix as the curvature; ``spoilt`` multiplies what comes of the first of three queries."""

    def __init__(self, G, spoilt=1.0):
        self.G, self.spoilt = G, spoilt

    def factor(self, vs):
        return self.spoilt if len(vs) == 3 else 1.0

    def products(self, vs):
        found = [shaped(self.G @ flat(v)) for v in vs]
        return [{name: x * self.factor(vs) for name, x in found[0].items()}, *found[1:]]

    def quadratic_forms(self, vs):
        found = [float(flat(v) @ self.G @ flat(v)) for v in vs]
        return [found[0] * self.factor(vs), *found[1:]]


def solved(asked, *given):
    """Results for copies of the queries, whose gradients a solve takes."""
    return solve([dict(query) for query in asked], *given)


def test_many_steps_are_the_solution():
    G, asked = curvature(), queries()
    before = [flat(query) for query in asked]
    for query, was, each in zip(asked, before, solved(asked, SITES, Times(G), 60), strict=True):
        torch.testing.assert_close(flat(each.direction), torch.linalg.solve(G + damping(), was), rtol=2e-3, atol=2e-3)
        assert torch.equal(flat(query), was)


def test_each_step_comes_nearer_and_is_the_same_alone():
    G, asked = curvature(), queries()
    A = G + damping()
    before = None
    for steps in (1, 2, 4, 8):
        together = solved(asked, SITES, Times(G), steps)
        (alone,) = solved(asked[1:2], SITES, Times(G), steps)
        assert all(torch.equal(alone.direction[name], together[1].direction[name]) for name in alone.direction)
        assert alone.steps == steps
        error = flat(alone.direction) - torch.linalg.solve(A, flat(asked[1]))
        error = float(error @ A @ error)
        assert before is None or error < before
        before = error


def test_the_first_step_only_rescales():
    (query,) = queries(1)
    (found,) = solved([query], SITES, Times(curvature()), 1)
    (expected,) = solved([query], SITES, Times(curvature()), 0)
    ratio = flat(found.direction) / flat(expected.direction)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
    assert abs(float(ratio[0]) - 1) > 0.1
    torch.testing.assert_close(expected.direction, {site.name: site.precondition(query[site.name]) for site in SITES})


def test_the_origin_is_left_out_and_the_rest_taken():
    asked = [{**queries(1)[0], ORIGIN: torch.ones(F, D)}]
    (found,) = solve(asked, SITES, Times(curvature()), 3)
    assert list(found.direction) == ["one", "two"]
    assert list(asked[0]) == [ORIGIN]


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -1e9])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_solve_that_comes_to_nothing_is_the_preconditioned_gradient(spoilt, steps):
    asked = queries()
    first, second, _ = solved(asked, SITES, Times(curvature(), spoilt), steps)
    assert first.steps == 0
    assert torch.equal(flat(first.direction), flat({s.name: s.precondition(asked[0][s.name]) for s in SITES}))
    assert second.steps == steps


def test_whole_blocks_are_scaled_by_their_length_squared():
    mask = torch.ones(3, 9, dtype=torch.bool)
    assert curvature_scale([mask]) == pytest.approx(1 / 64)
    half = mask.clone()
    half[:, :5] = False  # a prompt: eight positions, four targets
    assert curvature_scale([half]) == pytest.approx(0.25 / 8)
    empty = torch.zeros(1, 9, dtype=torch.bool)
    assert curvature_scale([mask, empty]) == curvature_scale([mask])


@pytest.fixture(scope="module")
def unsolved(parts, sharded):
    """An exact answer by the Kronecker factors alone; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        return answered(sharded("unsolved"), parts, solve__steps=0)[0]


def test_a_solved_run_answers_otherwise_and_about_the_same_one_query_at_a_time(
    unsolved, parts, sharded, plain, monkeypatch
):
    options = {"solve__steps": 2, "solve__tokens": 12 * 16}
    one, summary, _ = answered(sharded("solved"), parts, **options)
    steps = read_influence(one, "asked", "recovery")["steps"].to_pylist()
    assert [each for each in steps if each is not None] == [2, 2, 2]
    assert summary["unsolved"] == 0
    assert set(read_influence(unsolved, "asked", "recovery")["steps"].to_pylist()) == {None}
    before, after = (
        {(row["query_id"], row["ordinal"]): row["influence"] for row in read_influence(run, "asked").to_pylist()}
        for run in (unsolved, one)
    )
    same = sorted(before.keys() & after.keys())
    both = np.array([[each[key] for key in same] for each in (before, after)])
    assert 0.5 < np.corrcoef(both)[0, 1] < 0.9999
    monkeypatch.setattr(directions, "MAX_QUERIES_PER_UNIT", 1)
    two, _, _ = answered(sharded("solved one by one"), parts, **options)
    again = {(row["query_id"], row["ordinal"]): row["influence"] for row in read_influence(two, "asked").to_pylist()}
    assert again == pytest.approx(after, rel=1e-3, abs=1e-4)


def test_two_workers_and_a_plain_loop_solve_to_the_same_bytes(parts, sharded, one_ray, monkeypatch):
    options = {"solve__steps": 2, "solve__tokens": 12 * 16}
    folders = sharded("solved on Ray"), sharded("solved plainly")
    answered(folders[0], parts, **options)
    run_plainly(monkeypatch)
    answered(folders[1], parts, **options)
    one, two = (
        {path.name: path.read_bytes() for path in (folder / "exact/asked").glob("*.parquet")} for folder in folders
    )
    assert one == two
    assert len(one) > 3


def test_directions_beyond_the_range_of_float16_are_solved_for(parts, sharded, plain):
    """With float16 the products of every query overflowed, and none was solved for."""
    half, whole = (answered(sharded(dtype), parts, model__dtype=dtype) for dtype in ("float16", "float32"))
    assert (half[1]["unsolved"], half[1]["failed"]) == (0, 2)
    one, two = (
        {(row["query_id"], row["ordinal"]): row["influence"] for row in read_influence(each[0], "asked").to_pylist()}
        for each in (half, whole)
    )
    assert one.keys() == two.keys()
    assert np.corrcoef([[each[key] for key in two] for each in (one, two)])[0, 1] > 0.9999


def test_a_solve_that_spoils_a_query_is_told(unsolved, parts, sharded, plain, monkeypatch):
    folder = sharded("spoilt")
    product = Linearised.product
    monkeypatch.setattr(Linearised, "product", lambda self, v: [(name, x * torch.nan) for name, x in product(self, v)])
    run, summary, out = answered(folder, parts, solve__steps=2, solve__tokens=12 * 16)
    assert summary["unsolved"] == 3
    assert "3 whose solve took no step" in out
    same = [read_influence(each, "asked")["influence"].to_pylist() for each in (run, unsolved)]
    assert same[0] == pytest.approx(same[1], rel=1e-6)
