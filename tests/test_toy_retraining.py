"""Correct by construction: where retraining is one small step of known form, what assumes that step foretells it.

The toy "retrains" a tiny Llama on a subset by one step along the subset's summed gradient, taken by autograd on the
weights themselves: preconditioned at the sites for exact influence, plain on every matrix for GradDot.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from stride_ray.evaluate.baselines import METHODS
from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.evaluate.retraining.lds import evaluate, subset_sums
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.moments import KroneckerFactors, add_moments, kfac_site
from stride_ray.models.sites import EMBEDDING, HEAD, find_sites, influence, scale_negative, site_gradients

V, T, N, Q, S = 50, 12, 60, 8, 40


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A tiny model folder, blocks, queries and random halves."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=T, tie_word_embeddings=False, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    folder = tmp_path_factory.mktemp("toy") / "model"
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (N + Q, T))
    subsets = tuple(np.sort(rng.permutation(N)[: N // 2]) for _ in range(S))
    return folder, torch.from_numpy(ids[:N]), torch.from_numpy(ids[N:]), subsets


def losses_of(model, ids):
    """(B,) mean next-token loss of each text."""
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def truth_of(model, toy, step, size):
    """Losses of queries after a step on each subset; ``step`` maps weights' names and gradients to their changes."""
    _, blocks, queries, subsets = toy
    model.requires_grad_(True)
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    found = []
    for subset in subsets:
        gradients = torch.autograd.grad(
            losses_of(model, blocks[subset]).sum(), list(weights.values()), allow_unused=True
        )
        changes = step(dict(zip(weights, gradients, strict=True)))
        with torch.no_grad():
            for name, change in changes.items():
                weights[name] -= size * change
            found.append(losses_of(model, queries))
            for name, change in changes.items():
                weights[name] += size * change
    return RetrainingResults(subsets, torch.stack(found).numpy()[None], ("toy",))


def lds(truth, scores):
    kinds = ["toy"] * Q
    found = evaluate({"it": subset_sums(scores, truth.subsets)}, truth, kinds, kinds)
    return found.figure("it").lds


def test_exact_influence_foretells_preconditioned_steps(toy):
    folder, blocks, queries, _ = toy
    model = SplitModel(LlamaForCausalLM.from_pretrained(folder), split=1)
    names, mask = find_sites(model), torch.ones_like(blocks, dtype=torch.bool)
    totals = {}
    positions, _ = add_moments(totals, model, names, blocks, mask)
    sums = {name: KroneckerFactors.of(*both) for name, both in totals.items()}
    counts = torch.bincount(blocks.flatten(), minlength=V)
    sites = {name: kfac_site(name, sums[name] / positions, counts, 0) for name in names}

    def step(gradients):
        changes = {}
        for name, site in sites.items():
            ends = {HEAD: "lm_head.weight", EMBEDDING: "model.embed_tokens.weight"}
            weight = ends.get(name, f"{name}.weight")
            if name == EMBEDDING:
                changes[weight] = (
                    site.tokens.weights.square().unsqueeze(1) * gradients[weight] @ site.W_out @ site.W_out.T
                )
                continue
            read = gradients[weight] @ site.W_in @ site.W_in.T
            left = site.tokens.weights.square().unsqueeze(1) if name == HEAD else site.W_out @ site.W_out.T
            changes[weight] = left * read if name == HEAD else left @ read
        return changes

    each = site_gradients(model, tuple(sites.values()), queries, mask[:Q])[0]
    asked = {site.name: site.precondition(J).flatten(1) for site, J in each}
    scores = influence(asked, site_gradients(model, tuple(sites.values()), blocks, mask)[0])
    truth = truth_of(model.model, toy, step, 1e-8)
    assert lds(truth, scores.numpy()).value > 0.99
    halved = scale_negative(scores, 0.5).numpy()
    assert lds(truth, halved).value > 0.95  # harm counts half, whatever the truth
    scores = scores.numpy()
    assert lds(truth, -scores).value < -0.99
    shuffled = scores[:, np.random.default_rng(0).permutation(N)]
    assert lds(truth, shuffled).low < 0 < lds(truth, shuffled).high


def test_graddot_foretells_plain_steps_and_words_do_not(toy):
    folder, blocks, queries, _ = toy
    blocks, queries = (Texts(x.numpy().astype(np.int32), np.ones(x.shape, dtype=bool)) for x in (blocks, queries))
    problem = Problem(blocks, queries, str(folder))
    truth = truth_of(LlamaForCausalLM.from_pretrained(folder), toy, lambda gradients: gradients, 1e-4)
    graddot = lds(truth, METHODS["graddot"].run(problem))
    assert graddot.value > 0.99
    for name in ("random", "tfidf"):
        assert lds(truth, METHODS[name].run(problem)).value < graddot.value - 0.3
