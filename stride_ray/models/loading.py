"""Models of a run, cached per process: the trained model, and a checkpoint interpolated on the way to it."""

import os
import warnings
from functools import lru_cache

import torch
import transformers

from stride_ray.models.causal_lm import SplitModel, load_model
from stride_ray.models.download import model_fingerprint
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError

# Checkpoint interpolation: exact influence is measured at this fraction of the way from model.start to the model.
INTERPOLATION_WEIGHT = 0.75


def load_run_model(config: Config, device: str) -> SplitModel:
    """Load the run's model, split where its operators act: at ℓ, or after the last layer for the logit form.

    The process caches the model that was loaded last.

    Raises:
        StrideError: as load_model, or model.split is neither a share of the depth nor a whole number of layers.
    """
    transformers.utils.logging.disable_progress_bar()
    split = config.model.split
    # The option is a float, so 1 means the whole depth; layer 1 is given as a small share of the depth.
    layer: int | float = 1.0 if config.operators.form == "logit" else (split if split <= 1 else _layer_number(split))
    return _load_cached(config.model.path, layer, config.model.dtype, device)


def _layer_number(split: float) -> int:
    if split != int(split):
        raise StrideError(f"model.split is {split:g}, neither a share of the depth, up to 1, nor a number of layers.")
    return int(split)


def load_measured_model(config: Config, device: str) -> SplitModel:
    """Load the model on which exact influence is computed: the run's, or an interpolation if ``model.start`` is set.

    Its parameters are INTERPOLATION_WEIGHT of the way from ``model.start`` to the run's model. Influence predicts
    training on less data, and gradients slightly before the end of training predict it better (this project's LDS
    benchmarks).

    Raises:
        StrideError: as load_run_model, or if the two models' parameters differ in name or shape.
    """
    if not config.model.start:
        return load_run_model(config, device)
    return interpolated_model(config.model.start, config.model.path, config.model.dtype, device)


def measured_model_fingerprint(config: Config) -> str:
    """Fingerprint (download.model_fingerprint) of the weights that load_measured_model returns.

    Raises:
        StrideError: if no model is configured.
    """
    if not config.model.path:
        raise StrideError("No model is configured; give --model, a Hugging Face folder or hub id (model.path).")
    state = model_fingerprint(config.model.path)
    return f"{state}-{model_fingerprint(config.model.start)}" if config.model.start else state


def _use_deterministic_kernels(device: str, dtype: str) -> None:
    """On a GPU, use deterministic kernels, so that the same GPU gives the same bytes, and TF32 for bfloat16 models.

    TF32 represents bfloat16 values exactly, and computing the products of J at all sites takes a third of the time.
    """
    if not device.startswith("cuda"):
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # None of the operations that it warns about accumulates two values into one element.
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "bfloat16" else "ieee"


@lru_cache(maxsize=1)
def interpolated_model(start_path: str, path: str, dtype: str, device: str) -> SplitModel:
    """Load both models and interpolate: INTERPOLATION_WEIGHT of the way from ``start_path`` to ``path``.

    Raises:
        StrideError: as load_model, or if the two models' parameters differ in name or shape.
    """
    _use_deterministic_kernels(device, dtype)
    measured, start = (load_model(each, split=1.0, dtype=dtype, device=device) for each in (path, start_path))
    ends, starts = (dict(each.model.named_parameters()) for each in (measured, start))
    if {name: p.shape for name, p in ends.items()} != {name: p.shape for name, p in starts.items()}:
        raise StrideError(
            f"model.start {start.name} and the model {measured.name} do not have the same parameters; training on the "
            "pool must have begun from model.start."
        )
    with torch.no_grad():
        for name, parameter in ends.items():
            parameter.lerp_(starts[name], 1 - INTERPOLATION_WEIGHT)
    return measured


@lru_cache(maxsize=1)
def _load_cached(path: str, layer: int | float, dtype: str, device: str) -> SplitModel:
    _use_deterministic_kernels(device, dtype)
    return load_model(path, split=layer, dtype=dtype, device=device)
