"""What is said of whole distributions is what it is of those that transformers makes."""

from functools import partial

import numpy as np
import pytest
import torch
from hub_models import CONFIGS, random_tokens, saved

from xelm.data.text_format import TextFormat
from xelm.inference import predictions
from xelm.inference.predictions import predict_documents
from xelm.inference.scoring import APART, targets
from xelm.models.checkpoint import read_config, read_for_inference

FORMAT = TextFormat(start_id=1, end_id=2, mask_id=3)
OPTIONS = {"text_format": FORMAT, "context_length": 40}


def distributions(pair, model, ids):
    """[targets, V] of a document that fits a window."""
    framed = torch.tensor([[1, *ids, 2]])
    with torch.no_grad():
        if model.causal:
            return torch.softmax(pair.reference(framed[:, :-1]).logits[0], dim=-1).numpy()
        found = np.zeros((len(ids), model.vocabulary_size), np.float32)
        for phase in range(APART):
            places = [place for place in range(1, len(ids) + 1) if place % APART == phase]
            given = framed.clone()
            given[0, places] = 3
            logits = pair.reference(given).logits[0]
            found[np.array(places, int) - 1] = torch.softmax(logits, dim=-1)[places]
        return found


@pytest.mark.parametrize("name", ["llama3", "gemma2", "bert"])
def test_guesses_are_those_of_the_distributions(name, tmp_path, monkeypatch):
    config = CONFIGS[name]
    pairs = [saved(config, tmp_path / str(seed)) for seed in range(2)]
    with torch.no_grad():  # two models, both of opinions
        for pair, factor in zip(pairs, (10.0, 20.0)):
            for weight in pair.reference.get_output_embeddings().parameters():
                weight.mul_(factor)
            pair.reference.save_pretrained(pair.directory)
    model = read_config(pairs[0].directory)
    # Several chunks, the last one not full.
    monkeypatch.setattr(predictions, "VALUES_AT_ONCE", 17 * 4 * model.vocabulary_size)
    documents = [random_tokens((length,), seed=length) for length in (21, 3, 0, 30)]
    wanted = [targets(model, ids, FORMAT) for ids in documents]
    wanted[-1] = wanted[-1][:25]  # of a sample that ends within a document
    weights = np.random.default_rng(0).uniform(size=(2, sum(map(len, wanted)), 2))
    weights[1, :, 1] = 0  # one way leaves it all to the first
    weights = (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    models = [partial(read_for_inference, pair.directory, model) for pair in pairs]
    found = predict_documents(model, models, documents, wanted, log_weights, **OPTIONS)
    alone = np.stack(
        [
            np.concatenate(
                [distributions(p, model, i)[: len(w)] for i, w in zip(documents, wanted)]
            )
            for p in pairs
        ]
    )
    mixed = np.einsum("RNM,MNV->RNV", weights, alone)
    came = np.concatenate(wanted)
    for number, p in enumerate([*alone, *mixed]):
        hot = np.eye(model.vocabulary_size)[came]
        np.testing.assert_allclose(found.confidence[number], p.max(axis=1), atol=1e-5)
        np.testing.assert_allclose(found.brier[number], np.square(p - hot).sum(axis=1), atol=1e-5)
        np.testing.assert_array_equal(found.correct[number], p.argmax(axis=1) == came)
    np.testing.assert_allclose(found.brier[3], found.brier[0], atol=1e-5)
    chance = 1 / model.vocabulary_size
    assert found.confidence[:2].min(axis=1).max() > 2 * chance  # opinions, indeed
    assert np.abs(found.confidence[0] - found.confidence[1]).max() > chance
    # Without the first targets of documents.
    offsets = np.cumsum([0, *map(len, wanted)])
    at = np.concatenate([np.arange(o + 2, o + len(w)) for o, w in zip(offsets, wanted)])
    weights, some = log_weights[:, at], [target[2:] for target in wanted]
    ends = predict_documents(model, models, documents, some, weights, first=2, **OPTIONS)
    for part, whole in zip(ends, found):
        np.testing.assert_allclose(part, whole[:, at], atol=1e-5)
