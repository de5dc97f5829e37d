"""The split model against the model's own forward, on tiny random models of every family it promises to cut."""

import gc
import json
import pickle
import re
import shutil
import weakref

import fsspec
import pytest
import torch
import torch.nn.functional as nnf
import transformers as hf
from safetensors.torch import load_file, save_file

from stride_ray.models.causal_lm import SplitModel, load_model, resolve_split
from stride_ray.models.download import local_model
from stride_ray.runtime.errors import StrideError

V, D, L = 100, 32, 3
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": L, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**COMMON),
    "qwen2": lambda: hf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=4, layer_types=WINDOWED),
    "qwen3": lambda: hf.Qwen3Config(**COMMON),
    "gpt2": lambda: hf.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=64, **IDS),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON, rotary_pct=0.5),
    "olmo2": lambda: hf.Olmo2Config(**COMMON),
    "gemma": lambda: hf.GemmaConfig(**COMMON),
    "gemma2": lambda: hf.Gemma2Config(
        **COMMON, sliding_window=4, layer_types=WINDOWED, final_logit_softcapping=2.0, attn_logit_softcapping=1.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**COMMON, sliding_window=4, layer_types=WINDOWED),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=4),
    "nanochat": lambda: hf.NanoChatConfig(**COMMON, final_logit_softcapping=1.5),
    # And some with things of their own: scaled logits, layers that return tuples, a head that goes round the body.
    "cohere": lambda: hf.CohereConfig(**COMMON, logit_scale=0.25),
    "granite": lambda: hf.GraniteConfig(**COMMON, logits_scaling=8.0, residual_multiplier=0.3, embedding_multiplier=6),
    "gptj": lambda: hf.GPTJConfig(vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=64, rotary_dim=4, **IDS),
    "opt": lambda: hf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
}


def tiny(family="llama", std=0.15):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for p in model.parameters():  # the usual initialisation is so small that layers hardly matter
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=std)
    return model.eval()


def texts(B=3, T=17, seed=1):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def split():
    return SplitModel(tiny(), split=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny().save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_suffix_of_trunk_is_the_model(family):
    model = tiny(family)
    ids = texts()
    with torch.no_grad():
        own = model(ids).logits
    split = SplitModel(model.train(), split=2)
    assert (split.n_layers, split.split_layer, split.width, split.vocabulary, split.context) == (L, 2, D, V, 64)
    assert own.std() > 0.05
    for layer in range(1, L + 1):
        h = split.trunk(ids, layer)
        assert h.shape == (3, 17, D)
        torch.testing.assert_close(split.logits(split.states(h, layer)), own, atol=1e-5, rtol=0)
    torch.testing.assert_close(split.suffix(split.trunk(ids)), own, atol=1e-5, rtol=0)
    assert (split.suffix(split.trunk(ids) * torch.linspace(0.5, 1.5, D)) - own).abs().max() > 1e-3  # the stream matters
    with torch.no_grad():  # nothing is left behind in the model
        assert torch.equal(model(ids).logits, own)
    assert not any("forward" in module.__dict__ for module in model.modules())


CAP = "final_logit_softcapping"


@pytest.mark.parametrize(("family", "setting"), [("mistral", "sliding_window"), ("gemma2", CAP), ("nanochat", CAP)])
def test_windows_and_softcaps_of_the_tiny_models_bite(family, setting):
    model = tiny(family)
    plain = hf.AutoModelForCausalLM.from_config(type(model.config)(**{**model.config.to_dict(), setting: None}))
    plain.load_state_dict(model.state_dict())
    assert (model(texts()).logits - plain.eval()(texts()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_equals_a_hooked_forward(family):
    model = tiny(family)
    split = SplitModel(model, split=2)
    ids, weights = texts(), torch.randn(3, 17, V, generator=torch.Generator().manual_seed(2))
    kept = []

    def replace(module, args, output):
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    layers = model.transformer.h if family == "gpt2" else model.model.layers
    with layers[1].register_forward_hook(replace):
        (model(ids).logits * weights).sum().backward()
    h = split.trunk(ids).requires_grad_()
    (split.suffix(h) * weights).sum().backward()
    torch.testing.assert_close(h, kept[0])
    torch.testing.assert_close(h.grad, kept[0].grad)
    assert h.grad.abs().max() > 1e-3


def test_frozen_and_in_eval_mode(split):
    assert not any(module.training for module in split.model.modules())
    h = split.trunk(texts())
    assert not h.requires_grad
    split.losses(h.requires_grad_(), texts(), torch.ones(3, 17)).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in split.model.parameters())


def test_last_stream_is_before_the_final_norm(split):
    ids, body = texts(), split.model.model
    torch.testing.assert_close(body.norm(split.last_stream(ids)), body(ids).last_hidden_state)
    torch.testing.assert_close(split.states(split.trunk(ids)), body(ids).last_hidden_state)
    assert (split.last_stream(ids) - split.trunk(ids)).abs().max() > 0.01


def test_many_steered_copies_of_one_text(split):
    ids, mask = texts(B=1), torch.ones(1, 17)
    steered = split.trunk(ids) + torch.randn(5, 17, D, generator=torch.Generator().manual_seed(3))
    many = split.losses(steered, ids, mask)
    assert many.std() > 1e-3
    torch.testing.assert_close(many, torch.cat([split.losses(h[None], ids, mask) for h in steered]))


def test_right_padding_changes_nothing(split):
    ids = texts()
    padded = torch.cat([ids, torch.zeros(3, 6, dtype=torch.long)], 1)
    torch.testing.assert_close(split.suffix(split.trunk(padded))[:, :17], split.suffix(split.trunk(ids)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny("gpt2").to(dtype)
    split = SplitModel(model, split=2)
    ids = texts()
    h = split.trunk(ids)
    assert h.dtype == dtype == split.states(h).dtype
    torch.testing.assert_close(split.suffix(h), model(ids).logits, atol=0.05, rtol=0)
    leaf = h.float().requires_grad_()  # a float32 stream is cast, and its gradient comes back in float32
    losses = split.losses(leaf, ids, torch.ones(3, 17))
    assert losses.dtype == torch.float32
    expected = nnf.cross_entropy(model(ids).logits[:, :-1].float().mT, ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(losses, expected, atol=0.02, rtol=0)
    losses.sum().backward()
    assert leaf.grad.abs().max() > 0


def some_mask():
    mask = torch.rand(3, 17, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[:, 0] = True  # never a target, whatever the mask says
    mask[:, 12:] = False
    return mask


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("budget", [1, 3 * V, 7 * V + 1, None])
def test_token_losses_equal_whole_logits(family, budget):
    split = SplitModel(tiny(family), split=2)
    ids, mask = texts(), some_mask()
    weights = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    z = split.states(split.trunk(ids))
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    losses = split.token_losses(ours, ids, mask, budget=budget)
    whole = nnf.cross_entropy(split.logits(theirs)[:, :-1].mT, ids[:, 1:], reduction="none") * mask[:, 1:]
    assert losses.shape == (3, 16)
    torch.testing.assert_close(losses, whole)
    (losses * weights).sum().backward()
    (whole * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(split.token_losses(z, ids, mask, budget=budget), whole.detach())


def test_shift_is_added_to_the_logits(split):
    ids, mask = texts(), some_mask()
    z = split.states(split.trunk(ids))
    u = torch.randn(3, 17, 4, generator=torch.Generator().manual_seed(6)).requires_grad_()
    A = torch.randn(4, V, generator=torch.Generator().manual_seed(7)).requires_grad_()
    losses = split.token_losses(z, ids, mask, shift=lambda row, at: u[row, at] @ A, budget=5 * V)
    whole = nnf.cross_entropy((split.logits(z) + u @ A)[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(losses, whole * mask[:, 1:])
    ours = torch.autograd.grad(losses.sum(), [u, A])
    theirs = torch.autograd.grad((whole * mask[:, 1:]).sum(), [u, A])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("budget", "largest"), [(4 * V, 4 * V), (4 * V - 1, 3 * V), (1, V)])
def test_no_chunk_of_logits_exceeds_the_budget(split, monkeypatch, budget, largest):
    sizes, logits = [], split.logits
    monkeypatch.setattr(split, "logits", lambda z: sizes.append(len(z) * V) or logits(z))
    monkeypatch.setattr(split, "logits_budget", budget)
    split.losses(split.trunk(texts()).requires_grad_(), texts(), torch.ones(3, 17)).sum().backward()
    assert max(sizes) == largest
    assert sum(sizes) == 3 * 16 * V  # slopes were taken with the values: no logits were kept, none made again


def test_a_head_that_learns_has_gradients_too(monkeypatch):
    split = SplitModel(tiny(), split=2)
    ids, mask, sizes, logits = texts(), some_mask(), [], split.logits
    z = split.states(split.trunk(ids)).requires_grad_()
    weight = split.model.get_output_embeddings().weight.requires_grad_()
    monkeypatch.setattr(split, "logits", lambda z: sizes.append(len(z)) or logits(z))
    ours = torch.autograd.grad(split.token_losses(z, ids, mask, budget=5 * V).sum(), [z, weight])
    assert sum(sizes) == 2 * int(mask[:, 1:].sum())  # once forward, once again backward
    whole = nnf.cross_entropy(logits(z)[:, :-1].mT, ids[:, 1:], reduction="none") * mask[:, 1:]
    torch.testing.assert_close(ours, torch.autograd.grad(whole.sum(), [z, weight]), atol=1e-5, rtol=1e-4)


def test_losses_are_weighted_means_trimmed_to_the_last_target(split, monkeypatch):
    ids = texts()
    weights = some_mask() * torch.rand(3, 17, generator=torch.Generator().manual_seed(8))
    weights[1, 1:] = 0
    h = split.trunk(ids)
    every = nnf.cross_entropy(split.suffix(h)[:, :-1].mT, ids[:, 1:], reduction="none")
    expected = (every * weights[:, 1:]).sum(1) / weights[:, 1:].sum(1)
    lengths, states = [], split.states
    monkeypatch.setattr(split, "states", lambda h: lengths.append(h.shape[1]) or states(h))
    losses = split.losses(h, ids, weights)
    assert losses[1].isnan()
    torch.testing.assert_close(losses, expected, equal_nan=True)
    assert lengths == [int(weights.any(0).nonzero().max()) + 1] == [12]
    assert split.losses(h, ids, torch.zeros(3, 17)).isnan().all()


def test_an_error_on_the_way_leaves_the_model_whole(split, monkeypatch):
    ids = texts()
    own = split.model(ids).logits
    monkeypatch.setattr(split.model.model.layers[2].mlp, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        split.suffix(split.trunk(ids))
    monkeypatch.undo()
    assert torch.equal(split.model(ids).logits, own)


def test_a_forward_that_was_on_the_instance_is_put_back():
    model = tiny()
    first = model.model.layers[0]
    calls, forward = [], first.forward
    first.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    split = SplitModel(model, split=1)
    calls.clear()
    split.suffix(split.trunk(texts()))
    assert len(calls) == 1  # in the trunk alone
    model(texts())
    assert len(calls) == 2


def test_streams_are_freed_without_the_garbage_collector(split):
    gc.collect()
    gc.disable()
    h = split.trunk(texts())
    z = split.states(h + 1)
    freed = [weakref.ref(h), weakref.ref(z)]
    del h, z
    gc.enable()
    assert [ref() for ref in freed] == [None, None]


def test_a_split_model_travels(split):
    copy = pickle.loads(pickle.dumps(split))
    torch.testing.assert_close(copy.suffix(copy.trunk(texts())), split.suffix(split.trunk(texts())))


def test_padding_is_not_warned_about(capsys, caplog):
    hf.logging.enable_propagation()
    SplitModel(tiny("gpt2"), split=1).trunk(torch.zeros(2, 5, dtype=torch.long))
    assert "attention_mask" not in caplog.text + capsys.readouterr().err


def test_load_a_folder(folder):
    split = load_model(folder, dtype="float32", device="cpu")
    assert (split.split_layer, split.n_layers, split.dtype, split.device.type) == (2, 3, torch.float32, "cpu")
    assert split.name == str(folder)
    torch.testing.assert_close(split.suffix(split.trunk(texts())), tiny()(texts()).logits)
    assert load_model(str(folder), dtype="bfloat16", split=1).dtype == torch.bfloat16


def test_load_a_url(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/m", recursive=True)
    store.pipe("/bucket/m/checkpoint-1/optimizer.pt", b"large")
    split = load_model("memory://bucket/m", split=1)
    torch.testing.assert_close(split.suffix(split.trunk(texts())), tiny()(texts()).logits)
    fetched = local_model("memory://bucket/m")
    assert sorted(p.name for p in (tmp_path / "stride_ray" / "models").iterdir()) == [fetched.rsplit("/", 1)[-1]]
    store.pipe("/bucket/m/config.json", store.cat("/bucket/m/config.json"))  # written anew: fetched anew
    assert local_model("memory://bucket/m") != fetched
    (tmp_path / "m.gguf").write_text("x")
    assert local_model(f"file://{tmp_path}/m.gguf").endswith("/m.gguf")
    with pytest.raises(StrideError, match=r"memory://bucket is not a model folder"):
        local_model("memory://bucket")
    with pytest.raises(StrideError, match=r"memory://nowhere/m could not be fetched"):
        local_model("memory://nowhere/m")


PAPER = [(0.62, 12, 7), (0.62, 16, 10), (0.62, 20, 12), (0.62, 24, 15)]


@pytest.mark.parametrize(("split", "L", "expected"), [*PAPER, (1, 12, 1), (12, 12, 12), (0.01, 4, 1), (1.0, 5, 5)])
def test_split_layer(split, L, expected):
    assert resolve_split(split, L) == expected


def test_wrong_ids(split):
    split.check_ids(torch.tensor([[V - 1]], dtype=torch.int32))
    with pytest.raises(StrideError, match=rf"largest token id is {V}, and the model's vocabulary has {V} ids"):
        split.trunk(torch.tensor([[1, V]]))
    with pytest.raises(StrideError, match="smallest token id is -100"):
        split.last_stream(torch.tensor([[1, -100]]))
    with pytest.raises(StrideError, match="must be integers"):
        split.check_ids(torch.zeros(1, 2))
    with pytest.raises(StrideError, match="65 tokens are more than the context of 64"):
        split.trunk(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(StrideError, match="texts × tokens"):
        split.trunk(torch.zeros(2, 0, dtype=torch.long))


WRONG = [
    ("{folder}", {"dtype": "int8"}, "unknown dtype 'int8'; choose one of float32, bfloat16, float16"),
    ("{folder}", {"device": "gpu"}, "unknown device 'gpu'"),
    ("{folder}", {"device": "cuda"}, "device cuda is not available on this machine"),
    ("{folder}", {"split": 40}, "layer 40 is outside the model's 1..3"),
    ("{folder}", {"split": 0}, "layer 0 is outside the model's 1..3"),
    ("{folder}", {"split": 1.5}, "split 1.5 is not a fraction of the model's depth"),
    ("{tmp}/nothing", {}, "does not exist"),
    ("nothing.gguf", {}, "model path nothing.gguf does not exist"),
    ("{tmp}", {}, "is not a model folder: it has no config.json"),
    ("{tmp}/notes.txt", {}, "is a file"),
    ("{tmp}/broken.gguf", {}, "broken.gguf could not be loaded"),
]


@pytest.mark.parametrize(("path", "options", "told"), WRONG)
def test_wrong_arguments(folder, tmp_path, monkeypatch, path, options, told):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.gguf").write_text("x")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(StrideError, match=re.escape(told)):
        load_model(path.format(folder=folder, tmp=tmp_path), **options)


def test_a_hub_id_without_a_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect\nmore lines")

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(StrideError, match=r"model a/b could not be loaded: .*Hub error: We couldn't connect$"):
        load_model("a/b")


def test_unusable_checkpoints(folder, tmp_path):
    for name in ("lacking", "unknown", "empty", "spoilt"):
        shutil.copytree(folder, tmp_path / name)
    file = tmp_path / "lacking" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(StrideError, match=r"lacks 3 weights \(model\.layers\.1\.mlp"):
        load_model(tmp_path / "lacking")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    with pytest.raises(StrideError, match=r"could not be loaded: .*no_such_type"):
        load_model(tmp_path / "unknown")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(StrideError, match="could not be loaded"):
        load_model(tmp_path / "empty")
    weights = load_file(tmp_path / "spoilt/model.safetensors")
    weights["model.embed_tokens.weight"][V - 1, 0] = torch.nan
    save_file(weights, tmp_path / "spoilt/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StrideError, match=r"weights in model\.embed_tokens\.weight that are not finite in bfloat16"):
        load_model(tmp_path / "spoilt", dtype="bfloat16")


def test_a_model_that_cannot_be_cut_is_refused():
    config = hf.BertConfig(**{k: v for k, v in COMMON.items() if k not in ("head_dim", "num_key_value_heads")})
    with pytest.raises(StrideError, match="BertLMHeadModel is not causal"):
        SplitModel(hf.BertLMHeadModel(config), split=1)
    with pytest.raises(StrideError, match="LlamaModel has no language-model head"):
        SplitModel(hf.LlamaModel(FAMILIES["llama"]()), split=1)
    model = tiny()
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(StrideError, match="logits are not finite"):
        SplitModel(model, split=1)


def test_a_model_with_a_side_channel_is_refused():
    class Sneaky(hf.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits + self.get_input_embeddings().weight[input_ids].sum(-1, keepdim=True)
            return output

    with pytest.raises(StrideError, match="Sneaky computes its residual stream or logits in a way stride_ray does not"):
        SplitModel(Sneaky(FAMILIES["llama"]()), split=1)
