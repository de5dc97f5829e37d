"""Which model lies at a path: what tells one from another under the same name."""

import shutil

import fsspec
import pytest
import torch
from test_model import tiny

from stride_ray.models import download
from stride_ray.models.download import model_fingerprint
from stride_ray.runtime.errors import StrideError


def test_a_models_state_is_its_files(tmp_path, monkeypatch):
    folder, copy = tmp_path / "llama", tmp_path / "m"
    tiny().save_pretrained(folder)
    shutil.copytree(folder, copy)
    (copy / "checkpoint-1").mkdir()
    (copy / "README.md").write_text("a card")
    assert model_fingerprint(copy) == model_fingerprint(folder)
    monkeypatch.setattr(download, "LARGE", 1000)  # at some places only
    sampled = model_fingerprint(copy)
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(copy)
    assert (copy / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    assert model_fingerprint(copy) != sampled
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/state", recursive=True)
    before = model_fingerprint("memory://bucket/state")
    assert model_fingerprint("memory://bucket/state") == before
    store.pipe("/bucket/state/model.safetensors", (copy / "model.safetensors").read_bytes())
    assert model_fingerprint("memory://bucket/state") != before
    with pytest.raises(StrideError, match="memory://nowhere/m cannot be listed"):
        model_fingerprint("memory://nowhere/m")
    with pytest.raises(StrideError, match=r"model nobody/nothing could not be loaded: no such path"):
        model_fingerprint("nobody/nothing")


def test_a_hub_models_state_is_its_commit(tmp_path, monkeypatch):
    cached = tmp_path / "models--someone--model"
    for commit in ("1" * 40, "2" * 40):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = set()
    for commit in ("1" * 40, "2" * 40):
        (cached / "refs/main").write_text(commit)
        found.add(model_fingerprint("someone/model"))
    assert len(found) == 2
