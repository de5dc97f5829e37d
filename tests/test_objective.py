"""The three losses against plain dense formulas, and where their gradients go."""

import numpy as np
import pytest
import torch
import transformers as hf

from stride_ray.models.causal_lm import SplitModel
from stride_ray.operators.forms import features, random_basis, steering_vectors
from stride_ray.operators.membership import Membership
from stride_ray.operators.training.objective import linearity_loss, projection, stability_losses, steered_losses
from stride_ray.runtime.errors import StrideError

V, D, T, n, M = 50, 16, 12, 3, 7
FORMS = ("gate", "matrix", "logit")


def split_model(form):
    """Two layers, split after the first, or after the last for the logit form."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=V, max_position_embeddings=32, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    return SplitModel(model, split=2 if form == "logit" else 1)


@pytest.fixture(params=FORMS)
def case(request):
    """A model, a basis, operators, and blocks of which one has few targets and one ends in padding."""
    form = request.param
    model = split_model(form)
    basis = random_basis(form, D, V, 4, 6, seed=1)
    generator = torch.Generator().manual_seed(2)
    A = 0.3 * torch.randn(n, *basis.shape, generator=generator)
    ids = torch.randint(0, V, (n, T), generator=generator)
    mask = torch.ones(n, T, dtype=torch.bool)
    mask[0, :6] = False
    mask[1, 9:] = False
    return model, basis, A, ids, mask, model.trunk(ids)


def dense_logits(model, basis, A, h):
    """Base and steered logits (n, T, V), all at once."""
    added = steering_vectors(basis, features(basis, h), A)
    if basis.form == "logit":
        return model.suffix(h), model.suffix(h) + added
    return model.suffix(h), model.suffix(h + added)


def mean_over_targets(values, mask):
    return (values[:, :-1] * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def test_fidelity_is_the_steered_masked_cross_entropy(case):
    model, basis, A, ids, mask, h = case
    _, steered = dense_logits(model, basis, A, h)
    losses = -steered.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    wanted = (losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
    torch.testing.assert_close(steered_losses(model, basis, h, ids, mask, A), wanted, atol=1e-5, rtol=1e-5)


def test_stability_is_the_divergence_on_the_top_tokens(case):
    model, basis, A, _, mask, h = case
    base, steered = dense_logits(model, basis, A, h)
    top = base.topk(M, -1).indices
    p0, pk = (logits.softmax(-1).gather(2, top) for logits in (base, steered))
    p0, pk = p0 / p0.sum(-1, keepdim=True), pk / pk.sum(-1, keepdim=True)
    wanted = mean_over_targets((p0 * (p0 / pk).log()).sum(-1), mask)
    for budget in (2 * V * 3, 2**20):  # in chunks of three positions, and whole
        model.logits_budget = budget
        found = stability_losses(model, basis, h, mask, A, M)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    penalty = mean_over_targets((steered - base).gather(2, top).square().mean(-1), mask)
    found = stability_losses(model, basis, h, mask, A, M, "logit_penalty")
    torch.testing.assert_close(found, penalty, atol=1e-5, rtol=1e-4)


def test_hidden_norm_is_the_size_of_what_is_added(case):
    model, basis, A, _, mask, h = case
    added = steering_vectors(basis, features(basis, h), A).square().mean(-1)
    wanted = mean_over_targets(added if basis.form == "logit" else added / h.square().mean(-1), mask)
    found = stability_losses(model, basis, h, mask, A, M, "hidden_norm")
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    with pytest.raises(StrideError, match="choose one of kl"):
        stability_losses(model, basis, h, mask, A, M, "other")


def test_no_steering_is_stable_and_changes_no_loss(case):
    model, basis, A, ids, mask, h = case
    nothing = torch.zeros_like(A)
    torch.testing.assert_close(steered_losses(model, basis, h, ids, mask, nothing), model.losses(h, ids, mask))
    for form in ("kl", "logit_penalty", "hidden_norm"):
        assert stability_losses(model, basis, h, mask, nothing, M, form).abs().max() < 1e-6


def test_gradients_reach_what_is_trained_and_not_the_model(case):
    model, basis, A, ids, mask, h = case
    A.requires_grad_(True)
    basis.W_in.requires_grad_(True)
    basis.W_out.requires_grad_(True)
    for loss in (
        steered_losses(model, basis, h, ids, mask, A).sum(),
        stability_losses(model, basis, h, mask, A, M).sum(),
        stability_losses(model, basis, h, mask, A, M, "hidden_norm").sum(),
    ):
        gradients = torch.autograd.grad(loss, [A, basis.W_in, basis.W_out])
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


def test_linearity_is_the_ridge_residual():
    rng = np.random.default_rng(0)
    y, Z, ridge = rng.normal(size=(2, 20)), rng.normal(size=(20, 3)), 0.7
    stacked = np.concatenate([Z, np.sqrt(ridge) * np.eye(3)])  # ridge as least squares
    residuals = [np.linalg.lstsq(stacked, np.append(row, np.zeros(3)), rcond=None)[1][0] for row in y]
    y_qn = torch.tensor(y, requires_grad=True)
    loss = linearity_loss(y_qn, torch.tensor(Z), ridge)
    assert loss.item() == pytest.approx(np.mean(residuals))
    assert torch.autograd.gradcheck(lambda x: linearity_loss(x, torch.tensor(Z), ridge), y_qn)
    exactly = torch.tensor(Z @ rng.normal(size=3))[None]
    assert linearity_loss(exactly, torch.tensor(Z), 1e-9).item() < 1e-6
    with pytest.raises(StrideError, match="more subsets than columns"):
        linearity_loss(y_qn[:, :3], torch.tensor(Z[:3]), ridge)


def test_projection_is_m_times_a_fixed_random_matrix(monkeypatch):
    membership = Membership(12, 3, seed=5)
    Z = projection(membership, 500, 4, seed=9)
    assert Z.shape == (12, 4)
    assert torch.equal(Z, projection(membership, 500, 4, seed=9))
    assert not torch.equal(Z, projection(membership, 500, 4, seed=10))
    assert 0.5 < Z.square().mean().sqrt() < 1.6
    # Linear in M: blocks added at the end add their own rows of R, and nothing else changes.
    alone = projection(membership, 499, 4, seed=9) * (499 * 3 / 12) ** 0.5
    last = (Z * (500 * 3 / 12) ** 0.5 - alone).norm(dim=1) > 1e-3
    assert sorted(last.nonzero().flatten().tolist()) == sorted(membership.columns(499, 500)[0].tolist())
    monkeypatch.setattr("stride_ray.operators.training.objective.PROJECTION_CHUNK", 64)
    assert projection(membership, 500, 4, seed=9).isfinite().all()
