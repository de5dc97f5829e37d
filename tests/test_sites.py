"""J at a model's sites against autograd of the true weights, and influence against the matrix algebra it stands for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stride_ray.attribution.tables import units
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.moments import (
    DAMPING,
    UNIGRAM_DAMPING,
    KroneckerFactors,
    add_moments,
    kfac_site,
    origin_weight,
)
from stride_ray.models.linear_algebra.matrices import inverse_root
from stride_ray.models.linear_algebra.vocabulary import MAX_BUCKETS, TokenSide, token_side
from stride_ray.models.sites import (
    EMBEDDING,
    HEAD,
    ORIGIN,
    Site,
    find_sites,
    forward_with_activations,
    influence,
    scale_negative,
    site_gradients,
)
from stride_ray.models.token_influence import token_influence
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import AttributeConfig

V, D, F, B, T = 60, 16, 24, 5, 9


def llama():
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, tie_word_embeddings=False, **sizes))


def gpt2():
    sizes = {"n_embd": D, "n_inner": F, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **sizes))


MAKES = {
    "llama": (llama, "model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": (gpt2, "transformer.h", "attn.c_proj", "mlp.c_proj"),
}


@pytest.fixture(params=list(MAKES))
def made(request):
    make, layers, attention, mlp = MAKES[request.param]
    names = (EMBEDDING, *(f"{layers}.{i}.{part}" for i in (0, 1) for part in (attention, mlp)), HEAD)
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return SplitModel(model, split=1), names


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.6
    mask[0] = True
    mask[1] = False  # nothing to predict
    mask[2, -3:] = False
    return ids, mask


def raw_sites(model, names):
    """Sites that whiten nothing."""
    none, tokens = torch.empty(0), TokenSide(torch.ones(V))
    ends = {
        EMBEDDING: Site(EMBEDDING, none, torch.eye(D), tokens),
        HEAD: Site(HEAD, torch.eye(D), none, tokens),
    }
    reads = {name: torch.eye(D if "attn" in name else F) for name in names}
    return tuple(ends.get(name) or Site(name, reads[name], torch.eye(D)) for name in names)


def site_moments(model, names, ids, mask):
    """Sums of a batch's moments by site, and positions."""
    totals = {}
    count, _ = add_moments(totals, model, names, ids, mask)
    return {name: KroneckerFactors.of(*both) for name, both in totals.items()}, count


def weight_gradient(model, name, ids, mask):
    """Autograd of one text's masked mean loss with respect to the weight, as (in, out)."""
    ends = {EMBEDDING: model.model.get_input_embeddings(), HEAD: model.model.get_output_embeddings()}
    module = ends.get(name) or model.model.get_submodule(name)
    as_read = name == EMBEDDING or type(module).__name__ == "Conv1D"
    weight = module.weight.requires_grad_(True)
    try:
        logits = model.model(input_ids=ids.unsqueeze(0)).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        if not mask[1:].any():
            return torch.zeros(weight.shape if as_read else weight.T.shape)
        (gradient,) = torch.autograd.grad(losses[mask[1:]].mean(), weight)
    finally:
        weight.requires_grad_(False)
    return gradient if as_read else gradient.T


def test_tables_state_the_factor_of_negative_scores():
    assert units(AttributeConfig().negative_scale)["negative"].startswith("multiplied by 0.5:")
    assert units(1.0)["negative"] == "multiplied by 1"


def test_sites_are_the_last_maps_into_the_stream_and_the_head(made):
    model, names = made
    found = find_sites(model)
    assert found == names


def test_a_model_whose_layers_end_in_nothing_linear_has_no_sites(made):
    model, _ = made
    model.width += 1  # no map is as wide as the stream
    with pytest.raises(StrideError, match="no layer ends in a linear map"):
        find_sites(model)


@pytest.mark.parametrize(("wanted", "first"), [(1, 3), (0.5, 3), (0.1, 3), (0.51, 1), (2, 1)])
def test_sites_of_the_last_layers_alone_have_the_same_gradients(made, texts, wanted, first):
    model, names = made
    assert find_sites(model, wanted) == names[first:]
    whole, losses = site_gradients(model, raw_sites(model, names), *texts)
    expected = {site.name: J for site, J in whole}
    some, again = site_gradients(model, raw_sites(model, names[first:]), *texts)
    found = {site.name: J for site, J in some}
    assert tuple(found) == names[first:]
    for name, J in found.items():
        torch.testing.assert_close(J, expected[name])
    torch.testing.assert_close(losses, again, equal_nan=True)
    with torch.no_grad():
        z, _, wrote = forward_with_activations(model, names[first:], texts[0])
    assert all(each.requires_grad for each in (z, *wrote.values()))
    assert wrote[names[first]].is_leaf  # nothing goes back further


def test_more_layers_than_there_are_is_told(made):
    with pytest.raises(StrideError, match=r"operators.layers is 3, but the model has 2 layers; use at most that, or 0"):
        find_sites(made[0], 3)


@pytest.mark.parametrize("budget", [1, 3 * V, 2 * V * T, 10**6])  # positions, or sequences, at a time
def test_j_is_the_gradient_of_the_weight(made, texts, budget):
    model, names = made
    model.logits_budget = budget
    ids, mask = texts
    each, losses = site_gradients(model, raw_sites(model, names), ids, mask)
    for site, J in each:
        for row in range(B):
            true = weight_gradient(model, site.name, ids[row], mask[row])
            torch.testing.assert_close(J[row], true.T if site.name == HEAD else true, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(losses, model.losses(model.trunk(ids), ids, mask), equal_nan=True)


def test_padding_has_no_say(made, texts):
    model, names = made
    ids, mask = texts[0][:1], texts[1][:1]
    more = torch.cat([ids, torch.full((1, 4), 7)], 1), torch.cat([mask, torch.zeros(1, 4, dtype=torch.bool)], 1)
    (one, _), (two, _) = (site_gradients(model, raw_sites(model, names), *given) for given in ((ids, mask), more))
    for (_, J), (_, padded) in zip(one, two, strict=True):
        torch.testing.assert_close(J, padded)
    (sums, count), (padded_sums, padded_count) = (site_moments(model, names, *given) for given in ((ids, mask), more))
    assert count == padded_count == T - 1
    for name in names:
        for side in ("read", "written"):
            one, two = (getattr(each[name], side) for each in (sums, padded_sums))
            np.testing.assert_allclose(one, two, atol=1e-3, rtol=1e-4)


def test_influence_is_the_preconditioned_inner_product(made, texts):
    model, names = made
    ids, mask = texts
    sums, count = site_moments(model, names, ids, mask)
    counts = torch.bincount(ids.flatten(), minlength=V)
    sites = tuple(replace(kfac_site(name, m / count, counts, 0), scale=2.0) for name, m in sums.items())
    assert [site.name for site in sites] == list(names)
    solved = {site.name: site.precondition(J[:1]).flatten(1) for site, J in site_gradients(model, sites, ids, mask)[0]}
    asked = {name: torch.cat([J, -J]) for name, J in solved.items()}  # the second is harmed by what helps
    found = influence(asked, site_gradients(model, sites, ids, mask)[0])
    total = torch.zeros(2, B)
    for site in sites:
        per_token = torch.diag(site.tokens.weights) if site.name == EMBEDDING else site.W_in
        H_in = torch.linalg.inv(per_token @ per_token.T)
        for q, sign in enumerate((1, -1)):
            G = sign * weight_gradient(model, site.name, ids[0], mask[0])
            out = site.tokens.weights.square() if site.name == HEAD else site.W_out @ site.W_out.T
            right = G * out if site.name == HEAD else G @ out
            solved = torch.linalg.solve(H_in, right)
            for i in range(B):
                other = weight_gradient(model, site.name, ids[i], mask[i])
                total[q, i] += (solved * other).sum() / 2.0
    torch.testing.assert_close(found, total, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(scale_negative(total, 0.5), total.clamp(min=0) + 0.5 * total.clamp(max=0))
    assert (total[0] > 0).any()
    assert (total < 0).any()


def test_damping_bounds_the_inverse():
    A = np.random.default_rng(0).normal(size=(6, 6))
    moment = A @ A.T
    W = inverse_root(moment, 0.1).double().numpy()
    damped = moment + 0.1 * np.linalg.eigvalsh(moment).mean() * np.eye(6)
    np.testing.assert_allclose(W @ damped @ W, np.eye(6), atol=1e-4)
    assert inverse_root(np.zeros((3, 3)), 0.1).isfinite().all()


def test_a_large_vocabulary_is_folded(monkeypatch):
    monkeypatch.setattr("stride_ray.models.linear_algebra.vocabulary.MAX_BUCKETS", 8)
    counts = torch.arange(V)
    moments = KroneckerFactors(np.eye(D), np.eye(1))
    one, two, three = (kfac_site(HEAD, moments, counts, seed).tokens for seed in (0, 0, 1))
    embedding = kfac_site(EMBEDDING, KroneckerFactors(np.empty((0, 0)), np.eye(D)), counts, 0).tokens
    for part in ("weights", "buckets"):
        assert torch.equal(getattr(embedding, part), getattr(one, part))
        assert torch.equal(getattr(one, part), getattr(two, part))
        assert not torch.equal(getattr(one, part), getattr(three, part))
    assert len(one) == 8
    assert torch.bincount(one.buckets).tolist() == [8] * 4 + [7] * 4  # dealt out evenly
    assert one.weights[0].abs() > one.weights[-1].abs()  # rare tokens count more


def test_folds_keep_inner_products():
    generator = torch.Generator().manual_seed(0)
    many, errors = 3 * MAX_BUCKETS, []
    x, y = torch.randn(2, 20, many, generator=generator)
    y = y + x
    for seed in range(5):
        side = token_side(torch.ones(many), seed)
        found = (side.of(x.clone()) * side.of(y.clone())).sum(1)
        errors.append(found / (x * y).sum(1) - 1)
    errors = torch.cat(errors)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 10
    assert float(errors.std()) < 3 / MAX_BUCKETS**0.5


@pytest.mark.parametrize("folded", [False, True])
def test_sums_over_tokens_are_products_with_one_hot_rows(folded, texts, monkeypatch):
    monkeypatch.setattr("stride_ray.models.linear_algebra.vocabulary.MAX_BUCKETS", 8 if folded else V)
    ids, generator = texts[0], torch.Generator().manual_seed(1)
    side = token_side(torch.rand(V, generator=generator), 0)
    x = torch.randn(*ids.shape, D, generator=generator)
    one_hot = side.of(torch.nn.functional.one_hot(ids, V).float())
    assert one_hot.shape[-1] == len(side)
    expected = one_hot.transpose(1, 2) @ x
    torch.testing.assert_close(side.sum_outer_products(ids, x), expected)
    torch.testing.assert_close(side.sum_outer_products(ids, x, torch.ones_like(expected)), expected + 1)


def test_the_origin_is_the_head_with_unigrams_for_predictions(made, texts):
    model, _ = made
    ids, mask = texts
    counts = torch.bincount(ids.flatten(), minlength=V)
    origin = kfac_site(ORIGIN, KroneckerFactors(np.eye(D), np.eye(1) / 4), counts, 0)
    ((_, J),), _ = site_gradients(model, (origin,), ids, mask)
    z = model.read(ids)
    pi = (counts + 1) / (counts + 1).sum()
    for row in range(B):
        weights = mask[row, 1:] / mask[row, 1:].sum().clamp(min=1)
        g = (pi - torch.nn.functional.one_hot(ids[row, 1:], V)) * (pi + UNIGRAM_DAMPING).rsqrt() * 2  # 1 / √¼
        expected = g.T @ (z[row, :-1] * weights[:, None] / (1 + DAMPING) ** 0.5)
        torch.testing.assert_close(origin.whiten(J)[row], expected, atol=1e-5, rtol=1e-4)


def test_the_origin_weighs_less_the_more_the_model_knows():
    unigram = torch.full((V,), 1 / V)
    entropy = float(np.log(V))
    assert origin_weight(4, entropy / 2, unigram) == pytest.approx(2)
    assert origin_weight(4, 2 * entropy, unigram) == 4
    assert origin_weight(4, 0.0, unigram) == pytest.approx(4e-6)  # scales are divided by it


def test_a_folded_embedding_gives_the_fold_of_its_gradient(made, texts, monkeypatch):
    model, _ = made
    ids, mask = texts
    monkeypatch.setattr("stride_ray.models.linear_algebra.vocabulary.MAX_BUCKETS", 8)
    site = kfac_site(EMBEDDING, KroneckerFactors(np.empty((0, 0)), np.eye(D)), torch.ones(V), 0)
    whole = Site(EMBEDDING, torch.empty(0), torch.eye(D), TokenSide(torch.ones(V)))
    ((_, J),), _ = site_gradients(model, (site,), ids, mask)
    ((_, plain),), _ = site_gradients(model, (whole,), ids, mask)
    expected = site.tokens.of(plain.transpose(1, 2).clone()).transpose(1, 2) @ site.W_out
    torch.testing.assert_close(site.whiten(J), expected, atol=1e-5, rtol=1e-4)


def token_sites(model, names, ids, mask, buckets, monkeypatch):
    """All sites and the origin, whitened, with a vocabulary that is folded or not."""
    monkeypatch.setattr("stride_ray.models.linear_algebra.vocabulary.MAX_BUCKETS", buckets)
    sums, count = site_moments(model, names, ids, mask)
    counts = torch.bincount(ids.flatten(), minlength=V)
    sites = [replace(kfac_site(name, m / count, counts, 0), scale=2.0) for name, m in sums.items()]
    origin = kfac_site(ORIGIN, sums[HEAD] / count, counts, 0)
    return (*sites, replace(origin, scale=3.0))


@pytest.mark.parametrize("budget", [2**24, 4 * V, 1])
@pytest.mark.parametrize("buckets", [V, 8])
def test_the_tokens_influence_adds_up_to_the_blocks(made, texts, buckets, budget, monkeypatch):
    model, names = made
    ids, mask = texts
    sites = token_sites(model, names, ids, mask, buckets, monkeypatch)
    gradients, signs = site_gradients(model, sites, ids, mask)[0], torch.tensor([1.0, -1.0]).view(2, 1, 1)
    queries = {site.name: site.precondition(signs * J[[0, 3]]).flatten(1) for site, J in gradients}
    model.logits_budget = budget
    found = token_influence(model, sites, queries, ids, mask)
    assert found.shape == (2, B, T)
    expected = influence(queries, site_gradients(model, sites, ids, mask)[0])
    torch.testing.assert_close(found.sum(2), expected, atol=1e-3, rtol=1e-3)
    assert not found[:, 1].any()  # a block without targets
    last = int(mask[2].nonzero().max())
    assert not found[:, 2, last:].any()  # the last target predicts nothing, and what follows affects no loss
    assert found[0, 0].sum() > 0 > found[1, 3].sum()  # a block on itself


def test_a_tokens_influence_is_what_an_operator_there_does(made, texts, monkeypatch):
    model, names = made
    ids, mask = texts[0][:1], texts[1][:1]
    sites = token_sites(model, names, *texts, V, monkeypatch)
    (site,) = (site for site in sites if site.name == names[2])
    queries = {site.name: torch.randn(1, len(site.W_in) * D, generator=torch.Generator().manual_seed(2))}
    X = queries[site.name].view(len(site.W_in), D)
    steps = torch.zeros(T, requires_grad=True)

    def steer(module, given, output):
        return output + steps[:, None] * (given[0] @ X)

    handle = model.model.get_submodule(site.name).register_forward_hook(steer)
    try:
        logits = model.model(input_ids=ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        (expected,) = torch.autograd.grad(losses[mask[0, 1:]].mean(), steps)
    finally:
        handle.remove()
    found = token_influence(model, (site,), queries, ids, mask)[0, 0]
    torch.testing.assert_close(found, expected / site.scale, atol=1e-4, rtol=1e-3)
