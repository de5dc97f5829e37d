"""Steering operators: how they modify the model, and the gradient J of a block's loss at zero steering.

All three forms are one bilinear map. With u = act(LN(h) W_in) the operator of subset k adds

    s_k = (u A_k) W_outᵀ

    form     added to                A_k                 W_out
    gate     residual stream at ℓ    diag(a_k), r×r      D×r   (paper's Appendix F.1)
    matrix   residual stream at ℓ    r×D                 D×D   (paper's Fig. 2)
    logit    the logits              r×v                 V×v   (paper's Eq. 7, in a sketch of v directions)

so the gradient of a loss with respect to A_k at zero steering is J = Σ_t u_t ⊗ (W_outᵀ g_t), where g_t is the loss's
gradient with respect to the stream or the logits (for gate, the diagonal of J). W_in and W_out include the
preconditioner, so that inner products of J are J(x)ᵀ H⁻¹ J_i (docs/method.md).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.linear_algebra.matrices import gaussian_sketch, orthonormal
from stride_ray.models.linear_algebra.vocabulary import next_tokens

# Elements in one chunk of logits; bounds memory for any vocabulary.
LOGIT_BUDGET = 2**24


@dataclass(frozen=True)
class Basis:
    """The matrices and settings that all operators share.

    Attributes:
        form: gate, matrix or logit.
        W_in: (D, r) float32.
        W_out: (outputs, v) float32; see the table above.
        activation: "linear" (closed form, whitened) or "silu" (paper).
        target: logit form: the distribution that y_t is subtracted from: "model" (p_t, which gives the true gradient of
            the loss) or "unigram" (the pool's unigram distribution π).
        centre: (v,) W_outᵀ π for target "unigram", else empty.
        unit: normalise J to unit norm.
    """

    form: str
    W_in: Tensor
    W_out: Tensor
    activation: str = "linear"
    target: str = "model"
    centre: Tensor = field(default_factory=lambda: torch.empty(0))
    unit: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one operator: (r,) for gate, else (r, v)."""
        rank = self.W_in.shape[1]
        return (rank,) if self.form == "gate" else (rank, self.W_out.shape[1])

    def to(self, device: Any) -> "Basis":
        """Return a copy on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("W_in", "W_out", "centre")}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to store in safetensors."""
        return {"W_in": self.W_in, "W_out": self.W_out, "centre": self.centre}

    def facts(self) -> dict[str, Any]:
        """Settings to store in JSON."""
        return {"form": self.form, "activation": self.activation, "target": self.target, "unit": self.unit}


def normalised(h: Tensor) -> Tensor:
    """LayerNorm without affine weights over the last axis, in float32 (paper's Appendix F.1)."""
    return F.layer_norm(h.float(), h.shape[-1:])


def features(basis: Basis, h_BTD: Tensor) -> Tensor:
    """u = act(LN(h) W_in): (B, T, D) to (B, T, r) float32."""
    u = normalised(h_BTD) @ basis.W_in
    return F.silu(u) if basis.activation == "silu" else u


def steering_vectors(basis: Basis, u_BTr: Tensor, A: Tensor) -> Tensor:
    """The steering vectors s: u (B, T, r) with A (B, *shape) or (*shape) to (B, T, outputs) float32."""
    moved = u_BTr * A.unsqueeze(-2) if basis.form == "gate" else u_BTr @ A
    return moved @ basis.W_out.T


def gradients(basis: Basis, model: SplitModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """J of each sequence's masked mean loss with respect to an operator at zero steering.

    Args:
        basis: on the model's device.
        model: split at the basis's layer (after the last layer for the logit form).
        ids_BT: (B, T) int64 token ids.
        mask_BT: (B, T) bool, targets.

    Returns:
        (B, *basis.shape) float32; zeros for a sequence without targets. With ``basis.unit``, NaN for a sequence whose
        |J| overflows float32.
    """
    h_BTD = model.trunk(ids_BT)
    weights = mask_BT[:, 1:].float()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    u = features(basis, h_BTD[:, :-1] if basis.form == "logit" else h_BTD)
    if basis.form == "logit":
        g = _logit_gradients(basis, model, h_BTD, ids_BT) * weights.unsqueeze(-1)
    else:
        g = stream_gradients(model, h_BTD, ids_BT, mask_BT) @ basis.W_out
    J = (u * g).sum(1) if basis.form == "gate" else u.transpose(1, 2) @ g
    if basis.unit:
        # A norm that overflows to infinity would turn J into zeros; NaN marks it as not finite.
        norms = J.flatten(1).norm(dim=1).clamp(min=1e-30)
        norms = norms.masked_fill(~norms.isfinite(), torch.nan)
        J = J / norms.view(-1, *[1] * (J.ndim - 1))
    return J


def stream_gradients(model: SplitModel, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """∂(each sequence's masked mean loss)/∂h: one forward and one backward of the suffix, (B, T, D) float32."""
    leaf = h_BTD.detach().requires_grad_(True)
    with torch.enable_grad():
        losses = model.losses(leaf, ids_BT, mask_BT)
        total = losses[mask_BT[:, 1:].any(1)].sum()
        if not total.requires_grad:
            return torch.zeros_like(h_BTD, dtype=torch.float32)
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient.float()


def _logit_gradients(basis: Basis, model: SplitModel, h_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """W_outᵀ(target − y_t) for the T−1 positions that predict a token: (B, T−1, v)."""
    actual = basis.W_out[next_tokens(ids_BT, model.vocabulary)]
    if basis.target == "unigram":
        return basis.centre - actual
    z = model.states(h_BTD)[:, :-1].detach()
    rows = z.reshape(-1, z.shape[-1])
    chunk = max(1, LOGIT_BUDGET // model.vocabulary)
    expected = [
        torch.softmax(model.logits(piece).float(), -1) @ basis.W_out[: model.vocabulary] for piece in rows.split(chunk)
    ]
    return torch.cat(expected).view(*z.shape[:2], -1) - actual


@dataclass(frozen=True)
class Operators:
    """K fitted operators.

    Attributes:
        basis: shared by all K.
        A: (K, *basis.shape) float32.
        scale: steering strength in exact mode (the closed form gives only directions; validation sets this by a search
            over strengths on members' loss).
    """

    basis: Basis
    A: Tensor
    scale: float = 1.0

    def to(self, device: Any) -> "Operators":
        """Return a copy on a device."""
        return replace(self, basis=self.basis.to(device), A=self.A.to(device))

    def linear(self, model: SplitModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """First-order responses y_k = −J(x)·A_k (docs/method.md): (B, K) float32."""
        J = gradients(self.basis, model, ids_BT, mask_BT)
        return -(J.flatten(1) @ self.A.flatten(1).T)

    @torch.no_grad()
    def exact(
        self, model: SplitModel, ids_T: Tensor, mask_T: Tensor, subsets: Tensor, batch_tokens: int
    ) -> tuple[float, Tensor]:
        """Responses by steered forward passes: y_k = CE_0 − CE_k.

        Args:
            model: split at the operators' layer.
            ids_T: (T,) one query.
            mask_T: (T,) its targets.
            subsets: (n,) indices of the operators.
            batch_tokens: tokens per steered forward pass.

        Returns:
            The base loss in nats and (n,) float32 responses in nats.
        """
        ids, mask = ids_T.unsqueeze(0), mask_T.unsqueeze(0)
        h = model.trunk(ids)
        u = features(self.basis, h)
        base = model.losses(h, ids, mask)[0]
        if self.basis.form == "logit":
            steered = self._steered_logit_losses(model, h, u, ids, mask, subsets)
        else:
            count = max(1, batch_tokens // ids.shape[1])
            pieces = []
            for chosen in subsets.split(count):
                moved = h + (self.scale * steering_vectors(self.basis, u, self.A[chosen])).to(h.dtype)
                many = len(chosen)
                pieces.append(model.losses(moved, ids.expand(many, -1), mask.expand(many, -1)))
            steered = torch.cat(pieces)
        return float(base), base - steered

    def _steered_logit_losses(
        self, model: SplitModel, h: Tensor, u: Tensor, ids: Tensor, mask: Tensor, subsets: Tensor
    ) -> Tensor:
        """Losses (n,); one forward pass serves all operators, since only the logits change."""
        at = mask[0, 1:].nonzero().squeeze(1)
        z, u, targets = model.states(h)[0, at], u[0, at], ids[0, at + 1]
        sums = torch.zeros(len(subsets), device=h.device)
        positions = max(1, min(len(at), LOGIT_BUDGET // (8 * model.vocabulary)))
        count = max(1, LOGIT_BUDGET // (positions * model.vocabulary))
        W_out = self.basis.W_out[: model.vocabulary]
        for part in range(0, len(at), positions):
            rows = slice(part, part + positions)
            logits = model.logits(z[rows]).float()
            for first in range(0, len(subsets), count):
                moved = torch.einsum("tr,krv->ktv", u[rows], self.A[subsets[first : first + count]]) @ W_out.T
                steered = logits + self.scale * moved
                true = steered.gather(2, targets[rows].expand(len(steered), -1).unsqueeze(2)).squeeze(2)
                sums[first : first + count] += (steered.logsumexp(2) - true).sum(1)
        return sums / len(at)


def random_basis(
    form: str, width: int, vocabulary: int, rank: int, sketch: int, seed: int, activation: str = "silu"
) -> Basis:
    """A random basis: orthonormal W_in; W_out orthonormal (gate), the identity (matrix) or Gaussian (logit).

    Args:
        form: gate, matrix or logit.
        width: D.
        vocabulary: V.
        rank: r, capped at D.
        sketch: v of the logit form.
        seed: of the draw.
        activation: silu (paper) or linear.
    """
    generator = torch.Generator().manual_seed(seed)
    W_in = orthonormal(width, min(rank, width), generator)
    if form == "gate":
        W_out = orthonormal(width, min(rank, width), generator)
    elif form == "matrix":
        W_out = torch.eye(width)
    else:
        W_out = gaussian_sketch(vocabulary, sketch, generator)
    return Basis(form, W_in, W_out, activation)
