"""AirRep: its checkpoints, its pooling and loss against plain loops, and an encoder that learns what losses say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tokenizer
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import BertConfig, BertModel

from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.evaluate.baselines.representation import airrep
from stride_ray.evaluate.baselines.representation.encoder import SentenceEncoder
from stride_ray.evaluate.fitted_methods.airrep import (
    AirRepTraining,
    airrep_sums,
    fit_encoder,
    pooled,
    ranknet_loss,
    standardised_gains,
)
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.errors import StrideError

TOPICS = ["red apple pear plum fruit tree", "iron steel copper metal ore mine", "rain cloud wind storm snow sky"]
TRAINING = AirRepTraining(steps=200, blocks=12, queries=9, learning_rate=3e-3, sharpness=3.0, folds=2)


def sentences(count, seed):
    """Five words of one of three topics, in turn, and a word that marks every second sentence."""
    rng = np.random.default_rng(seed)
    marks = ("old", "new")
    return [" ".join([*rng.choice(TOPICS[row % 3].split(), 5), marks[row % 2]]) for row in range(count)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random encoder whose tokenizer knows the topics' words."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = save_tokenizer(folder, sentences(200, 9), 320)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=320, **sizes), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problem(encoder):
    """24 blocks and 9 queries of three topics, tokenized by the encoder's own tokenizer."""
    tokenizer = SentenceEncoder(encoder).tokenizer

    def texts(given):
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given]
        width = max(map(len, rows))
        mask = np.arange(width) < np.array([[len(row)] for row in rows])
        ids = np.zeros(mask.shape, dtype=np.int32)
        ids[mask] = np.concatenate(rows)
        return Texts(ids, mask)

    return Problem(texts(sentences(24, 0)), texts(sentences(9, 1)), model=encoder)


@pytest.fixture(scope="module")
def truth():
    """A query's loss falls with the number of blocks that have its mark; topics do not matter."""
    rng = np.random.default_rng(3)
    subsets = tuple(np.sort(rng.choice(24, 12, replace=False)) for _ in range(48))
    losses = np.array([[4 - 0.1 * np.sum(rows % 2 == query % 2) for query in range(9)] for rows in subsets])
    return RetrainingResults(subsets, losses[None].astype(np.float32), ("seed0",))


def lds(sums_QS, truth):
    return np.mean(
        [spearmanr(sums, -losses).statistic for sums, losses in zip(sums_QS, truth.losses[0].T, strict=True)]
    )


def test_pooling_is_attention_over_members():
    draw = torch.Generator().manual_seed(0)
    scores, member = 3 * torch.randn(4, 10, generator=draw), torch.rand(5, 10, generator=draw) < 0.5
    for query in range(4):
        for subset in range(5):
            own = scores[query, member[subset]]
            expected = (torch.softmax(own.abs(), 0) * own).sum()
            torch.testing.assert_close(pooled(scores, member)[query, subset], expected)
    far = torch.tensor([[200.0, -125.0, 100.0]])
    torch.testing.assert_close(pooled(far, ~torch.eye(3, dtype=torch.bool)), torch.tensor([[-125.0, 200.0, 200.0]]))


def test_ranknet_is_the_weighted_mean_over_ordered_pairs():
    draw = torch.Generator().manual_seed(0)
    predicted, gains = torch.randn(2, 3, 6, generator=draw)
    gains[0, :2] = torch.tensor([30.0, -30.0])  # a difference that is cut
    terms = [
        min(float(gain - other), 10.0) * np.log1p(np.exp(-float(row[a] - row[b])))
        for row, own in zip(predicted, gains, strict=True)
        for a, gain in enumerate(own)
        for b, other in enumerate(own)
        if gain > other
    ]
    assert ranknet_loss(predicted, gains).item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(ranknet_loss(predicted, torch.zeros(3, 6))) == 0.0


def test_gains_are_standardised_and_constant_losses_are_zero():
    losses = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    gains = standardised_gains(losses)
    torch.testing.assert_close(gains, torch.tensor([[1.5**0.5, 0, -(1.5**0.5)], [0, 0, 0]]))


def test_an_encoder_learns_what_similarity_gets_wrong(problem, encoder, truth):
    untrained = airrep_sums(problem, truth, replace(TRAINING, steps=0), encoder)
    assert (untrained.shape, untrained.dtype) == ((9, 48), np.float64)
    trained = airrep_sums(problem, truth, TRAINING, encoder)
    assert lds(untrained, truth) < 0.2
    assert lds(trained, truth) > lds(untrained, truth) + 0.3
    np.testing.assert_array_equal(airrep_sums(problem, truth, TRAINING, encoder), trained)


def test_a_folds_own_losses_do_not_matter_to_it(problem, encoder, truth):
    few = replace(TRAINING, steps=3)
    before = airrep_sums(problem, truth, few, encoder)
    order = np.random.default_rng(problem.seed).permutation(48)
    for fold in np.array_split(order, 2):
        losses = truth.losses.copy()
        losses[:, fold] += np.random.default_rng(1).normal(size=losses[:, fold].shape)
        after = airrep_sums(problem, replace(truth, losses=losses), few, encoder)
        np.testing.assert_array_equal(after[:, fold], before[:, fold])
        others = np.setdiff1d(order, fold)
        assert (after[:, others] != before[:, others]).any()


def test_embeddings_from_the_last_visit_change_nothing_that_is_embedded_anew(encoder, truth):
    """One step with every block in the batch has the gradients of plain AirRep."""
    blocks, queries = sentences(24, 0), sentences(9, 1)
    member, losses = torch.from_numpy(truth.membership(24).astype(bool)), truth.losses[0].T.astype(np.float64)
    whole = AirRepTraining(steps=1, blocks=24, queries=9, warmup=1)
    found = fit_encoder(encoder, queries, blocks, SentenceEncoder(encoder).embed(blocks), member, losses, whole, 0)
    plain = SentenceEncoder(encoder)
    plain.projector = torch.nn.Linear(16, 16)
    with torch.no_grad():
        scale = (whole.sharpness / SentenceEncoder(encoder)(blocks).square().sum(1).mean()).sqrt()
        plain.projector.weight.copy_(scale * torch.eye(16))
        plain.projector.bias.zero_()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=whole.learning_rate)
    loss = ranknet_loss(pooled(plain(queries) @ plain(blocks).T, member), standardised_gains(losses))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), whole.clip)
    optimizer.step()
    moved = (plain.projector.weight.detach() - scale * torch.eye(16)).abs().max()
    assert moved > 5e-5
    torch.testing.assert_close(
        found.projector.weight.detach(), plain.projector.weight.detach(), rtol=0, atol=0.05 * float(moved)
    )


def test_checkpoints_of_airrep_are_read_with_their_projection(encoder, problem, tmp_path):
    """As its authors save them: bert.* and projector.* in bfloat16, model type airrep."""
    torch.manual_seed(4)
    weights = {f"bert.{name}": each.bfloat16() for name, each in load_file(f"{encoder}/model.safetensors").items()}
    matrix, bias = torch.randn(16, 16).bfloat16(), torch.randn(16).bfloat16()
    save_file({**weights, "projector.weight": matrix, "projector.bias": bias}, tmp_path / "model.safetensors")
    config = json.loads((Path(encoder) / "config.json").read_text())
    theirs = {**config, "model_type": "airrep", "architectures": ["AirRepModel"]}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    SentenceEncoder(encoder).tokenizer.save_pretrained(tmp_path)
    plain, texts = SentenceEncoder(encoder), (sentences(9, 1), sentences(24, 0))
    plain.model.load_state_dict({name: each.bfloat16().float() for name, each in plain.model.state_dict().items()})
    queries, blocks = (plain.embed(each) @ matrix.float().T + bias.float() for each in texts)
    np.testing.assert_allclose(airrep.scores(problem, str(tmp_path)), queries @ blocks.T, rtol=1e-4, atol=1e-4)
    save_file({**weights, "projector.weight": matrix}, tmp_path / "model.safetensors")
    with pytest.raises(StrideError, match=r"could not be loaded: .* has no projector.bias"):
        SentenceEncoder(str(tmp_path))


def test_too_few_subsets_are_refused(problem, encoder, truth):
    with pytest.raises(StrideError, match="at least three subsets and two folds; there are 2 and 2"):
        airrep_sums(problem, RetrainingResults(truth.subsets[:2], truth.losses[:, :2], ("seed0",)), TRAINING, encoder)
