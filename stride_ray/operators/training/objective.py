"""The three losses of the paper's joint objective: fidelity, stability and linearity (paper 4.1; docs/method.md).

Plain functions of tensors, independent of Ray, storage and the pool. Each takes n (block, subset) pairs; a block is
given by its stream after the split layer (computed once for all three losses), a subset by its operator. Gradients
reach the operators and the shared basis, never the model. Logits are computed for one chunk of positions at a time and
not stored for the backward pass (paper's Appendix F.4).
"""

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stride_ray.corpus.failures import finite_losses, finite_rows
from stride_ray.models.causal_lm import Shift, SplitModel, masked_mean
from stride_ray.operators.forms import Basis, features, steering_vectors, stream_gradients
from stride_ray.operators.membership import Membership
from stride_ray.runtime.errors import StrideError

STABILITY_FORMS = ("kl", "logit_penalty", "hidden_norm")
# Blocks per draw of the random projection; changing it changes the projection.
PROJECTION_CHUNK = 1 << 16


def steered_states(model: SplitModel, basis: Basis, h_nTD: Tensor, A_n: Tensor) -> tuple[Tensor, Shift | None]:
    """Steer each pair: the head's input and, for the logit form, the shift of the logits.

    Args:
        model: split at the basis's layer (after the last layer for the logit form).
        basis: on the model's device.
        h_nTD: stream of each pair's block after the split layer.
        A_n: (n, *basis.shape) float32, each pair's operator.

    Returns:
        (n, T, D) states, and for the logit form the ``shift`` of ``SplitModel.token_losses``, else None.
    """
    u_nTr = features(basis, h_nTD)
    if basis.form != "logit":
        return model.states(h_nTD + steering_vectors(basis, u_nTr, A_n).to(h_nTD.dtype)), None
    moved_nTv = u_nTr @ A_n
    W_out = basis.W_out[: model.vocabulary]
    with torch.no_grad():
        z_nTD = model.states(h_nTD)
    return z_nTD, lambda row, position: moved_nTv[row, position] @ W_out.T


def steered_losses(
    model: SplitModel, basis: Basis, h_nTD: Tensor, ids_nT: Tensor, mask_nT: Tensor, A_n: Tensor
) -> Tensor:
    """Masked mean cross-entropy of each pair's steered block: CE_k(x) of the fidelity loss (paper Eq. 8).

    Args:
        model: as in steered_states.
        basis: as in steered_states.
        h_nTD: as in steered_states.
        ids_nT: token ids, int64.
        mask_nT: bool (or weights ω), targets.
        A_n: as in steered_states.

    Returns:
        (n,) float32, nats per token; nan for a block without a target.
    """
    length = target_length(mask_nT)
    ids_nT, mask_nT = ids_nT[:, :length], mask_nT[:, :length]
    z_nTD, shift = steered_states(model, basis, h_nTD[:, :length], A_n)
    return masked_mean(model.token_losses(z_nTD, ids_nT, mask_nT, shift), mask_nT)


def finite_blocks(model: SplitModel, ids_BT: Tensor, mask_BT: Tensor, at_once: int) -> Tensor:
    """Return which blocks have a finite unsteered stream, loss and gradient: (B,) bool; ``at_once`` blocks per pass."""
    found = []
    for ids, mask in zip(ids_BT.split(at_once), mask_BT.split(at_once), strict=True):
        h = model.trunk(ids)
        good = finite_rows([h.float(), stream_gradients(model, h, ids, mask)])
        with torch.no_grad():
            found.append(good & finite_losses(model.losses(h, ids, mask), mask))
    return torch.cat(found)


def stability_losses(
    model: SplitModel, basis: Basis, h_nTD: Tensor, mask_nT: Tensor, A_n: Tensor, top_m: int, form: str = "kl"
) -> Tensor:
    """Change of the model's predictions by each pair's operator, on non-member blocks (paper Eq. 9, Eqs. 65–67).

    Args:
        model: as in steered_states.
        basis: as in steered_states.
        h_nTD: as in steered_states.
        mask_nT: bool, targets; the positions that predict them are compared.
        A_n: as in steered_states.
        top_m: number of the base model's most likely tokens to compare.
        form: ``kl``: KL(p_0 ‖ p_k) with both renormalised on those tokens, nats; ``logit_penalty``: mean squared
            change of their logits, nats²; ``hidden_norm``: ``mean_square_steering``.

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
        found = mean_square_steering(basis, h_nTD, A_n)[row, position]
    else:
        with torch.no_grad():
            z0_nTD = model.states(h_nTD)
        z_nTD, shift = steered_states(model, basis, h_nTD, A_n)
        compare = functools.partial(_position_losses, model, shift, min(top_m, model.vocabulary), form)
        run = functools.partial(checkpoint, compare, use_reentrant=False, preserve_rng_state=False)
        # Half of the budget, because two sets of logits are in memory at once.
        step = max(1, model.logits_budget // (2 * model.vocabulary))
        picked = (z0_nTD[row, position], z_nTD[row, position], row, position)
        parts = zip(*(tensor.split(step) for tensor in picked), strict=True)
        found = torch.cat([run(*part) for part in parts])
    counts = torch.bincount(row, minlength=len(mask_nT))
    return torch.zeros(len(mask_nT), device=found.device).index_add(0, row, found) / counts


def _position_losses(
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


def mean_square_steering(basis: Basis, h_nTD: Tensor, A_n: Tensor) -> Tensor:
    """Mean square of each pair's steering, relative to that of the stream at the same position: (n, T) float32.

    For the logit form it is absolute, in nats².
    """
    u_nTr = features(basis, h_nTD)
    if basis.form != "logit":
        # Per position: in many models the first token's stream is hundreds of times larger than the others'.
        return steering_vectors(basis, u_nTr, A_n).square().mean(-1) / h_nTD.float().square().mean(-1)
    moved_nTv = u_nTr @ A_n
    # ‖W m‖² = mᵀ(WᵀW)m avoids a tensor of shape (n, T, V).
    return ((moved_nTv @ (basis.W_out.T @ basis.W_out)) * moved_nTv).sum(-1) / len(basis.W_out)


def linearity_loss(y_qn: Tensor, Z_np: Tensor, ridge: float) -> Tensor:
    """min_v ‖y − Zv‖² + λ‖v‖², mean over the rows of ``y`` (paper Eq. 10); differentiable in ``y``.

    Args:
        y_qn: responses of q blocks to n subsets, nats.
        Z_np: those subsets' rows of M R (``projection``).
        ridge: λ > 0.

    Returns:
        A scalar, nats².

    Raises:
        StrideError: if n ≤ p: the unregularised residual would be zero for any operators.
    """
    n, p = Z_np.shape
    if n <= p:
        raise StrideError(f"The linearity loss needs more subsets than columns of its projection; got {n} and {p}.")
    gram_pp = Z_np.T @ Z_np + ridge * torch.eye(p, device=Z_np.device, dtype=Z_np.dtype)
    v_qp = torch.linalg.solve(gram_pp, Z_np.T @ y_qn.T).T
    return ((y_qn - v_qp @ Z_np.T).square().sum(1) + ridge * v_qp.square().sum(1)).mean()


def projection(membership: Membership, n_blocks: int, columns: int, seed: int) -> Tensor:
    """Z = M R with R ∈ R^{N×p} standard normal, divided by √(N d / K) so that entries are about N(0, 1).

    M is streamed, and R is drawn chunk by chunk from (seed, chunk), so memory does not grow with N.

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
    """Return the number of columns up to the batch's last target, at least 2; the suffix skips the rest (paper F.4)."""
    columns = (mask_nT[:, 1:] != 0).any(0).nonzero()
    return int(columns.max()) + 2 if len(columns) else min(2, mask_nT.shape[1])
