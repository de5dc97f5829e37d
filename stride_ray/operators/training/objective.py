"""The three losses of the paper's joint objective: fidelity, stability and linearity (paper 4.1; method.md, Objective).

Plain functions of tensors: no Ray, no storage, no pool. Each works on n pairs of a block and a subset, the block given
by its stream after the split layer (computed once, shared by all three) and the subset by its operator. Gradients
reach the operators and what they share, never the model. Logits exist a chunk of positions at a time and are computed
again in the backward pass (paper's Appendix F.4).
"""

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stride_ray.models.causal_lm import Shift, SplitModel, masked_mean
from stride_ray.operators.forms import Basis, features, steering
from stride_ray.operators.membership import Membership
from stride_ray.runtime.errors import StrideError

STABILITY_FORMS = ("kl", "logit_penalty", "hidden_norm")
# Blocks whose rows of the random projection are drawn together; part of the projection's identity.
PROJECTION_CHUNK = 1 << 16


def steered_states(model: SplitModel, basis: Basis, h_nTD: Tensor, A_n: Tensor) -> tuple[Tensor, Shift | None]:
    """What the head reads under each pair's operator, and what is added to the logits after it.

    Args:
        model: split at the basis's layer (after the last layer for the logit form).
        basis: on the model's device.
        h_nTD: stream of each pair's block.
        A_n: (n, *basis.shape) float32, each pair's operator.

    Returns:
        (n, T, D) states, and for the logit form the ``shift`` of ``SplitModel.token_losses``, else None.
    """
    u_nTr = features(basis, h_nTD)
    if basis.form != "logit":
        return model.states(h_nTD + steering(basis, u_nTr, A_n).to(h_nTD.dtype)), None
    moved_nTv = u_nTr @ A_n
    W_out = basis.W_out[: model.vocabulary]
    with torch.no_grad():
        z_nTD = model.states(h_nTD)
    return z_nTD, lambda row, position: moved_nTv[row, position] @ W_out.T


def steered_losses(
    model: SplitModel, basis: Basis, h_nTD: Tensor, ids_nT: Tensor, mask_nT: Tensor, A_n: Tensor
) -> Tensor:
    """Masked mean cross-entropy of each pair's block under its operator: fidelity's CE_k(x) (paper Eq. 8).

    Args:
        model: as in steered_states.
        basis: as in steered_states.
        h_nTD: as in steered_states.
        ids_nT: token ids, int64.
        mask_nT: bool (or weights ω), tokens that count as targets.
        A_n: as in steered_states.

    Returns:
        (n,) float32, nats per token; nan for a block without a target.
    """
    length = target_length(mask_nT)
    ids_nT, mask_nT = ids_nT[:, :length], mask_nT[:, :length]
    z_nTD, shift = steered_states(model, basis, h_nTD[:, :length], A_n)
    return masked_mean(model.token_losses(z_nTD, ids_nT, mask_nT, shift), mask_nT)


def stability_losses(
    model: SplitModel, basis: Basis, h_nTD: Tensor, mask_nT: Tensor, A_n: Tensor, top_m: int, form: str = "kl"
) -> Tensor:
    """How far each pair's operator moves the model on a block that is not its own (paper Eq. 9 and Eqs. 65–67).

    Args:
        model: as in steered_states.
        basis: as in steered_states.
        h_nTD: as in steered_states.
        mask_nT: bool, tokens that count as targets; the positions before them are compared.
        A_n: as in steered_states.
        top_m: how many of the base model's most likely tokens are compared.
        form: ``kl``: KL(p_0 ‖ p_k) on those tokens, both renormalised on them, nats; ``logit_penalty``: mean square
            of their logits' change, nats²; ``hidden_norm``: ``added_squares``.

    Returns:
        (n,) float32, the mean over positions; nan for a block without a target.

    Raises:
        StrideError: for an unknown form.
    """
    if form not in STABILITY_FORMS:
        raise StrideError(f"There is no stability form {form!r}; choose one of {', '.join(STABILITY_FORMS)}.")
    length = target_length(mask_nT)
    mask_nT, h_nTD = mask_nT[:, :length], h_nTD[:, :length]
    row, position = (mask_nT[:, 1:] != 0).nonzero(as_tuple=True)
    if form == "hidden_norm":
        found = added_squares(basis, h_nTD, A_n)[row, position]
    else:
        with torch.no_grad():
            z0_nTD = model.states(h_nTD)
        z_nTD, shift = steered_states(model, basis, h_nTD, A_n)
        compare = functools.partial(_compare, model, shift, min(top_m, model.vocabulary), form)
        run = functools.partial(checkpoint, compare, use_reentrant=False, preserve_rng_state=False)
        # Two sets of logits are alive at once, hence the half.
        step = max(1, model.logits_budget // (2 * model.vocabulary))
        picked = (z0_nTD[row, position], z_nTD[row, position], row, position)
        parts = zip(*(tensor.split(step) for tensor in picked), strict=True)
        found = torch.cat([run(*part) for part in parts])
    counts = torch.bincount(row, minlength=len(mask_nT))
    return torch.zeros(len(mask_nT), device=found.device).index_add(0, row, found) / counts


def _compare(
    model: SplitModel,
    shift: Shift | None,
    top_m: int,
    form: str,
    z0_pD: Tensor,
    z_pD: Tensor,
    row: Tensor,
    position: Tensor,
) -> Tensor:
    """The stability loss at p positions: (p,) float32."""
    with torch.no_grad():
        base_pV = model.logits(z0_pD).float()
        base_pm, top_pm = base_pV.topk(top_m, dim=-1)
    if shift is None:
        moved_pm = model.logits(z_pD).float().gather(1, top_pm)
    else:
        moved_pm = base_pm + shift(row, position).gather(1, top_pm)
    if form == "logit_penalty":
        return (moved_pm - base_pm).square().mean(1)
    log_p0 = base_pm.log_softmax(1)
    return (log_p0.exp() * (log_p0 - moved_pm.log_softmax(1))).sum(1)


def added_squares(basis: Basis, h_nTD: Tensor, A_n: Tensor) -> Tensor:
    """Mean square of what each pair's operator adds, as a share of the stream's at that position.

    For the logit form not a share: nats². Returns (n, T) float32.
    """
    u_nTr = features(basis, h_nTD)
    if basis.form != "logit":
        # Position by position: the first token of many models has a stream hundreds of times the others'.
        return steering(basis, u_nTr, A_n).square().mean(-1) / h_nTD.float().square().mean(-1)
    moved_nTv = u_nTr @ A_n
    # ‖W m‖² = mᵀ(WᵀW)m: never (n, T, V) at once.
    return ((moved_nTv @ (basis.W_out.T @ basis.W_out)) * moved_nTv).sum(-1) / len(basis.W_out)


def linearity_loss(y_qn: Tensor, Z_np: Tensor, ridge: float) -> Tensor:
    """min_v ‖y − Zv‖² + λ‖v‖², mean over the rows of ``y`` (paper Eq. 10); differentiable through ``y``.

    Args:
        y_qn: responses of q blocks to n subsets, nats.
        Z_np: those subsets' rows of M R (``projection``).
        ridge: λ > 0.

    Returns:
        A scalar, nats².

    Raises:
        StrideError: where n ≤ p, since the residual would then be zero whatever the operators do.
    """
    n, p = Z_np.shape
    if n <= p:
        raise StrideError(f"The linearity loss needs more subsets than columns of its projection; got {n} and {p}.")
    gram_pp = Z_np.T @ Z_np + ridge * torch.eye(p, device=Z_np.device, dtype=Z_np.dtype)
    v_qp = torch.linalg.solve(gram_pp, Z_np.T @ y_qn.T).T
    return ((y_qn - v_qp @ Z_np.T).square().sum(1) + ridge * v_qp.square().sum(1)).mean()


def projection(membership: Membership, n_blocks: int, columns: int, seed: int) -> Tensor:
    """Z = M R with R ∈ R^{N×p} standard normal, divided by √(N d / K) so that entries are about N(0, 1).

    M is streamed, and R is drawn from the seed and the ordinal's chunk, so nothing of size N is held.

    Args:
        membership: M.
        n_blocks: N.
        columns: p.
        seed: of R.

    Returns:
        (K, p) float32.
    """
    total = torch.zeros(membership.subsets, columns, dtype=torch.float64).numpy()
    for index, start in enumerate(range(0, n_blocks, PROJECTION_CHUNK)):
        stop = min(start + PROJECTION_CHUNK, n_blocks)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        R = torch.randn(PROJECTION_CHUNK, columns, generator=generator, dtype=torch.float64)[: stop - start]
        total += membership.matrix(start, stop) @ R.numpy()
    return torch.from_numpy(total / (n_blocks * membership.degree / membership.subsets) ** 0.5).float()


def target_length(mask_nT: Tensor) -> int:
    """Columns up to the last target of the batch, at least 2: what follows needs no suffix (paper F.4)."""
    columns = (mask_nT[:, 1:] != 0).any(0).nonzero()
    return int(columns.max()) + 2 if len(columns) else min(2, mask_nT.shape[1])
