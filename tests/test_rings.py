"""Caches of local layers are rings of the window and a piece: values are those of whole caches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hub_models import CONFIGS, random_tokens, saved

from xelm.data.text_format import TextFormat
from xelm.inference.blocks import block_bytes, row_bytes, slots_for
from xelm.inference.decoder import LEAST_SHARED, PIECES, Decoder
from xelm.inference.piecewise import PiecewiseScorer
from xelm.inference.scoring import score_documents
from xelm.models.cache import Cache, empty_cache, ring_slots, slots_by_layer
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.models.config import ModelConfig, Rope
from xelm.models.parameters import bind, for_inference, fresh_parameters, inference_graph

WINDOW = 100
RING = 512
MODEL = ModelConfig(
    vocabulary_size=97,
    width=32,
    feedforward_width=48,
    layer_count=3,
    head_count=4,
    key_head_count=2,
    head_size=8,
    max_length=4096,
    local_window=WINDOW,
    local_layers=(0, 2),
)
KINDS = {
    "mixed": MODEL,
    "all layers": replace(MODEL, local_layers=(0, 1, 2)),
    "other angles and a cap": replace(
        MODEL, local_rope=Rope(theta=300.0), rope=Rope(theta=1e5), attention_cap=2.0
    ),
}
FORM = TextFormat(start_id=None, end_id=2, mask_id=None)


def parameters_of(model):
    return jax.tree.map(lambda p: np.asarray(4.0 * p), for_inference(fresh_parameters(model, 0)))


def ids_of(length, seed=0):
    return random_tokens((length,), seed=seed).tolist()


def scores_of(model, parameters, ids):
    """The log probability of each id but the first, by one forward pass without a cache."""
    options = {"text_format": FORM, "context_length": model.max_length}
    return score_documents(model, parameters, [np.asarray(ids)], **options)[0][1:-1]


def check(text, wanted):
    assert len(text.scores) == len(wanted) + 1
    np.testing.assert_allclose(text.scores[1:], wanted, rtol=1e-4, atol=1e-4)


def test_rings_have_slots_for_the_window_and_a_piece():
    assert ring_slots(MODEL) == RING >= WINDOW + PIECES[-1]
    assert slots_by_layer(MODEL, 256) == (256,) * 3
    assert slots_by_layer(MODEL, 2048) == (RING, 2048, RING)
    assert ring_slots(replace(MODEL, local_layers=(), local_window=None)) is None
    # Keys and values of two layers with rings and one without, two heads of 8 numbers each.
    assert row_bytes(MODEL, 2048, "float32") == 2 * 4 * 16 * (2048 + 2 * RING)
    block = block_bytes(MODEL, 3, 2048, "float32")
    cache = jax.eval_shape(lambda: empty_cache(MODEL, 3, 2048, "float32"))
    sizes = [4 * array.size for array in (*cache.keys, *cache.values)]
    assert block == sum(sizes) + 3 * 4 * MODEL.vocabulary_size


@pytest.mark.parametrize("kind", KINDS)
def test_texts_longer_than_a_ring_are_read_and_continued_as_without_a_cache(kind):
    model = KINDS[kind]
    parameters = parameters_of(model)
    prompts = [ids_of(1300, 1), ids_of(700, 2), ids_of(30, 3)]
    more = [ids_of(40, 4 + n) for n in range(3)]
    decoder = Decoder(model, lambda: parameters)
    texts = [decoder.open([*ids, *new], scored=True) for ids, new in zip(prompts, more)]
    # Whole pieces, part of one, and then token by token together, with others coming and going.
    decoder.read(dict(zip(texts, prompts)), scored=True)
    for place in range(40):
        decoder.read({t: [new[place]] for t, new in zip(texts, more)}, scored=True)
        if place == 20:
            decoder.close(texts[2])
            texts, more, prompts = texts[:2], more[:2], prompts[:2]
    for text, ids, new in zip(texts, prompts, more):
        check(text, scores_of(model, parameters, [*ids, *new]))
    assert {block.slots for block in decoder._shared} <= {1024, 2048}


def test_a_ring_is_as_large_for_any_length():
    parameters = parameters_of(MODEL)
    decoder = Decoder(MODEL, lambda: parameters)
    text = decoder.open(ids_of(1300))
    decoder.read({text: ids_of(1300)})
    assert [keys.shape[2] for keys in text.block.cache.keys] == [RING, 2048, RING]
    assert decoder.bytes == text.block.bytes == block_bytes(MODEL, 1, 2048, "float32")


@pytest.mark.parametrize(
    ("read", "common", "shared"),
    [
        (1000, 999, True),
        (1000, 950, True),
        (1000, 600, False),
        (400, 200, True),
        (520, 120, True),
    ],
)
def test_a_beginning_is_shared_as_far_as_the_ring_still_has_it(read, common, shared):
    parameters = parameters_of(MODEL)
    decoder = Decoder(MODEL, lambda: parameters, keep=4)
    first = decoder.open(ids := ids_of(read, 1))
    decoder.read({first: ids})
    decoder.close(first)
    other = [*ids[:common], *ids_of(120, 2)]
    text = decoder.open(other, scored=False)
    assert (len(text.ids) > LEAST_SHARED) is shared
    assert len(text.ids) in ((common, common - 1) if shared else (0,))
    rest = other[len(text.ids) :]
    decoder.read({text: rest[:-1]})
    decoder.read({text: rest[-1:]})
    whole = decoder.open(other, scored=True)
    decoder.read({whole: other}, scored=True)
    np.testing.assert_allclose(
        text.block.logits[text.index], whole.block.logits[whole.index], rtol=1e-3, atol=1e-3
    )


def test_a_text_that_is_read_again_from_its_beginning_sees_nothing_of_before():
    parameters = parameters_of(MODEL)
    decoder = Decoder(MODEL, lambda: parameters)
    ids = ids_of(900, 1)
    text = decoder.open(ids, scored=True)
    decoder.read({text: ids}, scored=False)
    decoder.rewind(text)
    decoder.read({text: ids}, scored=True)
    check(text, scores_of(MODEL, parameters, ids))


def test_prompts_are_scored_in_pieces_with_rings():
    parameters, ids = parameters_of(MODEL), np.asarray(ids_of(1200, 1))
    options = {"text_format": FORM, "context_length": 4096}
    scorer = PiecewiseScorer()
    work = scorer(MODEL, lambda: parameters, [ids], **options)
    (found,) = finished(scorer, work)
    wanted = score_documents(MODEL, parameters, [ids], **options)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def finished(scorer, work):
    while True:
        scorer.allowance.left = 64
        try:
            next(work)
        except StopIteration as end:
            return end.value


def test_more_tokens_than_a_ring_has_slots_for_are_refused():
    cache = empty_cache(MODEL, 1, 2048, jnp.float32)
    network = bind(inference_graph(MODEL), parameters_of(MODEL))
    with pytest.raises(ValueError, match="at most 413 tokens can be added to rings of 512 slots"):
        network.extend(jnp.zeros((1, 414), jnp.int32), jnp.full(1, 414), cache)
    assert isinstance(cache, Cache) and slots_for(1300) == 2048


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral-local", "gemma2", "olmo3")),
    ],
)
def test_families_with_local_layers_decode_past_a_ring_as_transformers_does(name, tmp_path):
    settings = CONFIGS[name].to_dict() | {"max_position_embeddings": 2048}
    found = saved(type(CONFIGS[name])(**settings), tmp_path / "hub")
    model = read_config(found.directory)
    parameters = read_for_inference(found.directory, model)
    assert model.local_layers and ring_slots(model) == RING
    ids = ids_of(705)
    ids = [number % model.vocabulary_size for number in ids]
    with torch.no_grad():
        whole = torch.log_softmax(found.reference(torch.tensor([ids])).logits[0], -1)
    wanted = whole[torch.arange(704), torch.tensor(ids[1:])].numpy()
    decoder = Decoder(model, lambda: parameters)
    text = decoder.open(ids, scored=True)
    decoder.read({text: ids[:700]}, scored=True)
    for token in ids[700:]:
        decoder.read({text: [token]}, scored=True)
    np.testing.assert_allclose(text.scores[1:], wanted, rtol=1e-4, atol=1e-4)
    last = jax.nn.log_softmax(text.block.logits[text.index])
    np.testing.assert_allclose(last, whole[-1].numpy(), rtol=1e-4, atol=1e-4)
