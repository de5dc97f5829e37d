"""A frozen causal language model, split at one layer into a trunk and a suffix.

STRIDE steers the residual stream after layer ℓ and measures the effect on the loss (method: f, ℓ, h_ℓ(x)). The layers
up to ℓ (the trunk) are unaffected and run once per text; the layers above ℓ (the suffix) run per evaluation.

No architecture is reimplemented. For the duration of one call the ``forward`` of some modules is replaced and the
model's own code runs around them, so positions, masks, windows, norms and softcaps remain the model's own:

* trunk: layer ℓ returns its output to the caller and the run stops there;
* states: layers 1…ℓ ignore their input and return the given stream; the head returns its input to the caller;
* logits: the model's body is skipped and the head reads the given states.

A check at load time compares the parts with the full model. ``SplitModel`` is not thread-safe.

Texts are padded on the right: in a causal model no real token attends to that padding, so no attention mask is passed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from stride_ray.models.chunked_loss import FusedLosses
from stride_ray.models.download import loading_error, local_model
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import first_line, redact_url

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Elements in one chunk of logits; peak memory is a few times that. A CPU gains nothing beyond 64 MiB: the system
# reclaims large allocations when they are freed and zeroes every page of the next one.
LOGITS_BUDGET = {"cpu": 2**24, "cuda": 2**26}
Shift = Callable[[Tensor, Tensor], Tensor]


class _EarlyExit(BaseException):
    """Carries args[0] out of the model's forward; a BaseException, so that ``except Exception`` does not catch it."""


class SplitModel:
    """A frozen causal language model split after layer ℓ.

    Shape suffixes: B texts, T tokens, D width of the stream, V vocabulary, n positions picked from B×T. Inputs may be
    on any device; results are on the model's.

    Attributes:
        name: path or id of the model, for messages and file headers.
        model: the Hugging Face model, frozen (no parameter requires a gradient), in eval mode, otherwise unmodified.
        n_layers: L. ``split_layer``: ℓ, the number of layers in the trunk, 1…L. ``width``: D.
        vocabulary: V, the number of logits per position.
        context: maximum sequence length in tokens; None if the configuration sets no limit.
        embedding_is_trained: False for a classifier (builtin/classifier.py), which embeds an example as its features.
        device: of the weights. ``dtype``: of the weights, the stream and the states.
        logits_budget: elements in one chunk of logits (positions × V); lower it if memory is short.
    """

    def __init__(self, model: Any, split: int | float = 0.62, name: str = "model") -> None:
        """Freeze a Hugging Face model and split it (``resolve_split``); StrideError if it cannot be split."""
        self.name = name
        self.model = model.requires_grad_(False).eval()
        config = model.config.get_text_config(decoder=True)
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise StrideError(f"{name}: {type(model).__name__} has no language-model head; use a causal language model")
        self._layers = _decoder_layers(model, config, name)
        self.n_layers = len(self._layers)
        self.split_layer = resolve_split(split, self.n_layers)
        embedding = model.get_input_embeddings().weight
        self.embedding_is_trained = isinstance(embedding, nn.Parameter)
        self.device, self.dtype = embedding.device, embedding.dtype
        self.logits_budget = LOGITS_BUDGET.get(self.device.type, LOGITS_BUDGET["cpu"])
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._embedded = int(embedding.shape[0])
        # With a given stream the ids are unused, but some models look for the padding id.
        self._dummy = 1 if config.pad_token_id == 0 else 0
        # Padding without an attention mask is intended: skip the warning, whose check would synchronise with the GPU.
        for module in model.modules():
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):
                module.warn_if_padding_and_no_attention_mask = _skip_warning
        self._outputs: int | None = None  # length of the tuple that a layer returns; None if it returns a tensor
        self._body: Any = None  # output of the model below its head for one token
        self._probe()

    @torch.no_grad()
    def trunk(self, ids_BT: Tensor, layer: int | None = None) -> Tensor:
        """Compute the residual stream h_BTD after layer ℓ (or ``layer``, 1…L), in the model's dtype, without a graph.

        Args:
            ids_BT: integer token ids, right-padded with any valid id.
            layer: the layer to stop after; default ℓ.

        Raises:
            StrideError: ids are not integers of shape (B, T), one is outside the vocabulary, or T is 0 or exceeds the
                context.
        """
        self.check_ids(ids_BT)
        T = ids_BT.shape[-1]
        if ids_BT.dim() != 2 or T == 0:
            raise StrideError(f"{self.name}: token ids must be texts × tokens, got shape {tuple(ids_BT.shape)}")
        if self.context is not None and self.context < T:
            raise StrideError(f"{self.name}: {T} tokens are more than the context of {self.context}; shorten the texts")
        last = self._trunk_layers(layer)[-1]
        output = self._run(ids_BT.to(self.device, torch.long), [(last, _exit_with_output(last.forward))])
        return output[0] if isinstance(output, tuple) else output

    def last_stream(self, ids_BT: Tensor) -> Tensor:
        """``trunk`` at layer L: the residual stream before the final norm."""
        return self.trunk(ids_BT, layer=self.n_layers)

    def states(self, h_BTD: Tensor, layer: int | None = None) -> Tensor:
        """Layers ℓ+1…L and the final norm: the head's input z_BTD in the model's dtype, differentiable in ``h_BTD``.

        Args:
            h_BTD: the stream, steered or not; B is arbitrary (many steered copies of one text). Cast to the model's
                dtype.
            layer: the layer that the stream was taken after; default ℓ.
        """
        given = h_BTD.to(self.device, self.dtype)
        replaced = [(module, self._constant_forward(given)) for module in self._trunk_layers(layer)]
        ids_BT = torch.full(given.shape[:2], self._dummy, device=self.device)
        return self._run(ids_BT, [*replaced, (self._head, _exit_with_output(lambda z_BTD: z_BTD))])

    def read(self, ids_BT: Tensor) -> Tensor:
        """All layers and the final norm: ids to z_BTD, differentiable in activations that a hook made leaves."""
        return self._run(ids_BT.to(self.device, torch.long), [(self._head, _exit_with_output(lambda z_BTD: z_BTD))])

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's L layers."""
        return self._layers

    def logits(self, z_xD: Tensor) -> Tensor:
        """The head and any postprocessing such as softcaps: states (…, D) to logits (…, V), differentiable."""
        z_1nD = z_xD.reshape(1, -1, z_xD.shape[-1]).to(self.device, self.dtype)
        head = self._head.forward
        replaced = [(module, self._constant_forward(self._stub_11D)) for module in self._layers]
        if self._body is not None:
            replaced.append((self.model.base_model, lambda *args, **kwargs: self._body))
        replaced.append((self._head, lambda *args, **kwargs: head(z_1nD)))
        output = self._run(torch.full((1, 1), self._dummy, device=self.device), replaced, to_the_end=True)
        return output.logits.reshape(*z_xD.shape[:-1], self.vocabulary)

    def logits_rows(self, tokens: int) -> int:
        """The number of texts of ``tokens`` tokens whose logits fit ``logits_budget``; at least one."""
        return max(1, self.logits_budget // (self.vocabulary * max(1, tokens)))

    def suffix(self, h_BTD: Tensor) -> Tensor:
        """logits_BTV from the stream after layer ℓ; for small inputs, since all B×T×V elements are held at once."""
        return self.logits(self.states(h_BTD))

    def token_losses(
        self, z_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, shift: Shift | None = None, budget: int | None = None
    ) -> Tensor:
        """Cross-entropy of each target token, with one chunk of logits in memory at a time (paper F.4).

        Only positions that predict a target are computed. Under autograd no chunk is stored: gradients are computed in
        the forward pass (FusedLosses) or, if the head or a shift is trained too, the chunk is recomputed in the
        backward pass.

        Args:
            z_BTD: output of ``states``.
            ids_BT: token ids; a single row is broadcast over B.
            mask_BT: non-zero for targets; column 0 is ignored; a single row is broadcast over B.
            shift: differentiable function from the rows and positions of a chunk (int64, n each) to (n, V), which is
                added to the logits (method: ``logit``).
            budget: elements in one chunk of logits (at least one position); default ``logits_budget``.

        Returns:
            (B, T−1) float32, nats: at [b, t] the unweighted loss of token t+1; 0 where masked.
        """
        B, T = z_BTD.shape[:2]
        ids_BT = ids_BT.to(self.device, torch.long).expand(B, T)
        counts_BT1 = mask_BT.to(self.device).expand(B, T)[:, 1:] != 0
        losses_BT1 = torch.zeros(B, max(T - 1, 0), device=self.device)
        row_n, position_n = counts_BT1.nonzero(as_tuple=True)
        if len(row_n) == 0:
            return losses_BT1
        # Gather once, then split: a gather per chunk would allocate a B×T×D gradient per chunk in the backward pass.
        z_nD = z_BTD.to(self.device).reshape(B * T, -1).index_select(0, row_n * T + position_n)
        target_n = ids_BT[row_n, position_n + 1]
        step = max(1, (self.logits_budget if budget is None else budget) // self.vocabulary)
        trained = any(parameter.requires_grad for parameter in self._head.parameters())
        if shift is None and not trained and torch.is_grad_enabled() and z_nD.requires_grad:
            losses_n = cast(Tensor, FusedLosses.apply(z_nD, target_n, self.logits, step))
        else:
            parts = zip(z_nD.split(step), target_n.split(step), row_n.split(step), position_n.split(step), strict=True)
            again = functools.partial(checkpoint, self._chunk_losses, use_reentrant=False, preserve_rng_state=False)
            run = again if torch.is_grad_enabled() else self._chunk_losses
            losses_n = torch.cat([run(*part, shift) for part in parts])
        return losses_BT1.index_put((row_n, position_n), losses_n)

    def losses(self, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Masked mean cross-entropy of each text given its stream after layer ℓ (method: CE_k).

        Columns after the batch's last target are dropped before the suffix runs (paper F.4).

        Args:
            h_BTD: the stream, steered or not.
            ids_BT: as in ``token_losses``.
            mask_BT: as in ``token_losses``; it may hold weights ω.

        Returns:
            (B,) float32, nats per token, differentiable in ``h_BTD``; NaN for a row without a target.
        """
        columns = (mask_BT[:, 1:] != 0).any(0).nonzero()
        length = int(columns.max()) + 2 if len(columns) else min(2, h_BTD.shape[1])
        z_BTD = self.states(h_BTD[:, :length])
        return masked_mean(self.token_losses(z_BTD, ids_BT[:, :length], mask_BT[:, :length]), mask_BT[:, :length])

    def _chunk_losses(
        self, z_nD: Tensor, target_n: Tensor, row_n: Tensor, position_n: Tensor, shift: Shift | None
    ) -> Tensor:
        """Losses of n positions in float32, for any model dtype."""
        logits_nV = self.logits(z_nD).float()
        if shift is not None:
            logits_nV = logits_nV + shift(row_n, position_n).to(logits_nV)
        return cross_entropy(logits_nV, target_n, reduction="none")

    def check_ids(self, ids: Tensor) -> None:
        """Raise StrideError for ids that are not integers or not in the vocabulary (on a GPU, an opaque assert)."""
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise StrideError(f"{self.name}: token ids must be integers, got {ids.dtype}")
        # A classifier's examples are ids that it reads and never predicts.
        rows = min(self._embedded, self.vocabulary) if self.embedding_is_trained else self._embedded
        smallest, largest = (int(x) for x in torch.aminmax(ids)) if ids.numel() else (0, 0)
        if smallest < 0 or largest >= rows:
            wrong = f"largest token id is {largest}" if largest >= rows else f"smallest token id is {smallest}"
            range_of_ids = f"the model's vocabulary has {rows} ids (0..{rows - 1})"
            raise StrideError(f"{self.name}: the {wrong}, and {range_of_ids}; tokenize with the model's own tokenizer")

    def _trunk_layers(self, layer: int | None) -> list[nn.Module]:
        return self._layers[: self.split_layer if layer is None else resolve_split(layer, self.n_layers)]

    @torch.no_grad()
    def _probe(self) -> None:
        """Infer shapes from a tiny random input; check causality and that the parts reproduce the model's logits."""
        kind = type(self.model).__name__
        unsupported = f"{self.name}: {kind} computes its residual stream or logits in a way stride_ray does not support"
        T = min(8, self.context or 8)
        random = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(0, self._embedded, (2, T), generator=random).to(self.device)
        ids_other = ids_BT.clone()
        ids_other[:, -1] = (ids_other[:, -1] + 1) % self._embedded
        try:
            own, other = (self._run(ids, [], to_the_end=True).logits for ids in (ids_BT, ids_other))
            self.vocabulary = int(own.shape[-1])
            allowed = max(1.0, float(own.abs().max())) * (1e-4 if self.dtype == torch.float32 else 2e-2)
            output = self._run(ids_BT, [(self._layers[0], _exit_with_output(self._layers[0].forward))])
            self._outputs = len(output) if isinstance(output, tuple) else None
            streams = {layer: self.trunk(ids_BT, layer) for layer in (self.split_layer, self.n_layers)}
            self.width = int(streams[self.n_layers].shape[-1])
            # Outputs of the layers and the body for one token; ``logits`` substitutes them to run the head alone.
            self._stub_11D = streams[self.n_layers][:1, :1].clone()
            if (body := self.model.base_model) is not self.model:
                with contextlib.suppress(LookupError):  # some heads bypass base_model: skip only the layers
                    self._body = self._run(ids_BT[:1, :1], [(body, _exit_with_output(body.forward))])
            parts = [self.logits(self.states(h_BTD, layer)) for layer, h_BTD in streams.items()]
            difference = max(float((part - own).abs().max()) for part in parts)
        except Exception as error:
            raise StrideError(f"{unsupported} ({first_line(error)})") from error
        if not own.isfinite().all():
            raise StrideError(f"{self.name}: logits are not finite in {self.dtype}; use bfloat16 or float32")
        if T > 1 and float((own - other)[:, :-1].abs().max()) > allowed:
            raise StrideError(f"{self.name}: {kind} is not causal; STRIDE needs a causal language model")
        if not difference <= allowed:
            raise StrideError(f"{unsupported}: the split model's logits differ from its own by {difference:.2g}")

    def _run(self, ids_BT: Tensor, replaced: list[tuple[nn.Module, Callable]], to_the_end: bool = False) -> Any:
        """Run the model with some ``forward``s replaced; returns its output, or what ``_EarlyExit`` carries out."""
        # Accelerate sets ``forward`` on the instance: restore that one, not the class's.
        before = [(module, module.__dict__.get("forward")) for module, _ in replaced]
        try:
            for module, forward in replaced:
                module.__dict__["forward"] = forward
            output = self.model(input_ids=ids_BT, use_cache=False, return_dict=True)
        except _EarlyExit as caught:
            return caught.args[0]
        finally:
            for module, own in before:
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.__dict__["forward"] = own
        if not to_the_end:
            raise LookupError("its forward does not call the replaced layer or head")
        return output

    def _constant_forward(self, h_BTD: Tensor) -> Callable:
        """A layer forward that ignores its input and returns the given stream, in the layer's own output format."""
        output = h_BTD if self._outputs is None else (h_BTD, *[None] * (self._outputs - 1))
        return lambda *args, **kwargs: output


def _skip_warning(*args: Any, **kwargs: Any) -> None: ...


def _exit_with_output(forward: Callable) -> Callable:
    def carrying(*args: Any, **kwargs: Any) -> None:
        raise _EarlyExit(forward(*args, **kwargs))

    return carrying


def masked_mean(losses_BT1: Tensor, mask_BT: Tensor) -> Tensor:
    """Σ_t ω_t CE_t / Σ_t ω_t per text (method: fidelity), (B,) float32; nan for a row without a target.

    Takes the result of ``SplitModel.token_losses`` and a mask, bool or weights ω; a single row is broadcast over B.
    """
    weights_BT1 = mask_BT[:, 1:].to(losses_BT1)
    return (losses_BT1 * weights_BT1).sum(1) / weights_BT1.sum(1)


def resolve_split(split: int | float, n_layers: int) -> int:
    """ℓ from a layer number (int, 1…L) or a fraction of depth (float in (0, 1], rounded, at least layer 1)."""
    if isinstance(split, float):
        if not 0 < split <= 1:
            raise StrideError(f"split {split} is not a fraction of the model's depth in (0, 1]")
        return max(1, round(split * n_layers))
    if not 1 <= split <= n_layers:
        raise StrideError(f"layer {split} is outside the model's 1..{n_layers}")
    return split


def _decoder_layers(model: Any, config: Any, name: str) -> list[nn.Module]:
    """The decoder's outermost ModuleList with one entry per layer; StrideError if there is none."""
    found = [m for root in (model.get_decoder(), model) for m in root.modules() if isinstance(m, nn.ModuleList)]
    layers = next((list(m) for m in found if len(m) == getattr(config, "num_hidden_layers", None)), [])
    if not layers or len(set(layers)) < len(layers):
        raise StrideError(f"{name}: {type(model).__name__} has no list of decoder layers that stride_ray can find")
    return layers


def load_model(
    path: str | Path,
    *,
    split: int | float = 0.62,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> SplitModel:
    """Load a Hugging Face causal language model, frozen and split.

    Args:
        path: a model folder, a ``.gguf`` file (dequantised to ``dtype``), an fsspec URL of either (``s3://…``, see
            ``local_model``), or a hub id.
        split: ℓ, see ``resolve_split``.
        dtype: float32, bfloat16 or float16, for weights and stream; losses are always float32.
        device: auto (cuda if available, else cpu), cpu, cuda, cuda:N or mps.
        trust_remote_code: run Python code shipped with the model.

    Raises:
        StrideError: for an invalid argument, a model that cannot be loaded or split, or weights that are missing or
            not finite.
    """
    if dtype not in DTYPES:
        raise StrideError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    where = device_of(device)
    local, shown = local_model(path), redact_url(str(path))
    folder, options = local, dict[str, Any]()
    if local.endswith(".gguf"):
        folder, options["gguf_file"] = os.path.split(os.path.abspath(local))
    from stride_ray.models.builtin.classifier import auto_model  # takes seconds to import

    try:
        options |= {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code, "output_loading_info": True}
        model, loading_info = cast("tuple[Any, dict[str, Any]]", auto_model().from_pretrained(folder, **options))
        model.to(where)
    except Exception as error:
        raise loading_error(path, local, error) from error
    absent = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading_info.get(kind) or ()]
    if absent:
        raise StrideError(f"model {shown} lacks {len(absent)} weights ({min(absent)}, …); use a complete causal model")
    if spoilt := next((name for name, weights in model.named_parameters() if not weights.isfinite().all()), ""):
        raise StrideError(
            f"model {shown} has weights in {spoilt} that are not finite in {dtype}; use an intact "
            "checkpoint, or model.dtype = float32 if the weights overflow"
        )
    return SplitModel(model, split, shown)


def device_of(device: str) -> torch.device:
    """Resolve a device name as in ``load_model``; StrideError if this machine does not have it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise StrideError(f"unknown device {device!r}; choose auto, cpu, cuda, cuda:N or mps") from error
    have = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (wanted.index or 0) >= have.get(wanted.type, 0):
        raise StrideError(f"device {device} is not available on this machine; use auto or cpu")
    return wanted
