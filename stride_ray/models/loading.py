"""The models of a run, loaded once in a process: the trained one, and the one on the way to it."""

import os
import warnings
from functools import lru_cache

import torch
import transformers

from stride_ray.models.causal_lm import SplitModel, load_model
from stride_ray.models.download import model_state
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError

# Where on the way from the model that training began from to the trained one exact influence is measured.
LATE = 0.75


def load_run_model(config: Config, device: str) -> SplitModel:
    """The run's model, split where its operators act: at ℓ, or at the end for the logit form.

    A process keeps the last one that it loaded.

    Raises:
        StrideError: as load_model does.
    """
    transformers.utils.logging.disable_progress_bar()
    split = config.model.split
    layer: int | float = 1.0 if config.operators.form == "logit" else (split if split < 1 else int(split))
    return _loaded(config.model.path, layer, config.model.dtype, device)


def load_measured_model(config: Config, device: str) -> SplitModel:
    """The model that exact influence is measured at: the run's; where ``model.start`` is known, one on the way to it.

    Its parameters lie LATE of the way from the start's to the run's. Influence is about training that could have seen
    less data, so it is better measured a little before the end (LDS benchmarks of this project).

    Raises:
        StrideError: as load_run_model does, and where the two models' parameters differ in name or shape.
    """
    if not config.model.start:
        return load_run_model(config, device)
    return interpolated_model(config.model.start, config.model.path, config.model.dtype, device)


def measured_weights(config: Config) -> str:
    """Which model influence is measured at (load_measured_model), as download.model_state tells it.

    Raises:
        StrideError: where none is configured.
    """
    if not config.model.path:
        raise StrideError("No model is configured; give --model, a Hugging Face folder or hub id (model.path).")
    state = model_state(config.model.path)
    return f"{state}-{model_state(config.model.start)}" if config.model.start else state


def _settle_gpu(device: str, dtype: str) -> None:
    """On a GPU: kernels that add in one order, so the same GPU gives the same bytes again; TF32 where it costs nothing.

    TF32 holds what comes out of a bfloat16 model exactly, and the products of J at all sites take a third of the time.
    """
    if not device.startswith("cuda"):
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Of what it warns, nothing adds two numbers into one place.
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "bfloat16" else "ieee"


@lru_cache(maxsize=1)
def interpolated_model(start_path: str, path: str, dtype: str, device: str) -> SplitModel:
    """The model whose parameters lie LATE of the way from those at ``start_path`` to those at ``path``.

    Raises:
        StrideError: as load_model does, and where the two's parameters differ in name or shape.
    """
    _settle_gpu(device, dtype)
    measured, start = (load_model(each, split=1.0, dtype=dtype, device=device) for each in (path, start_path))
    ends, starts = (dict(each.model.named_parameters()) for each in (measured, start))
    if {name: p.shape for name, p in ends.items()} != {name: p.shape for name, p in starts.items()}:
        raise StrideError(
            f"model.start {start.name} and the model {measured.name} do not have the same parameters; training on the "
            "pool must have begun from model.start."
        )
    with torch.no_grad():
        for name, parameter in ends.items():
            parameter.lerp_(starts[name], 1 - LATE)
    return measured


@lru_cache(maxsize=1)
def _loaded(path: str, layer: int | float, dtype: str, device: str) -> SplitModel:
    _settle_gpu(device, dtype)
    return load_model(path, split=layer, dtype=dtype, device=device)
