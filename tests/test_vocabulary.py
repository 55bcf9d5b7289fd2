"""More pieces for new text: what a tokenizer learns, what a model makes of it, and a mixture of
models of which some have the pieces and some do not."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from small_vocabularies import TINY
from tokenizers import models, pre_tokenizers, trainers

from clustering.errors import UserError
from clustering.vectoriser import Vectoriser
from xelm.data import tokenizer as loading
from xelm.data.tokenizer_training import train
from xelm.data.vocabulary import load_vocabulary
from xelm.data.vocabulary_training import extend, kind_of
from xelm.inference.ensemble import Ensemble
from xelm.inference.route import log_likelihoods_along, states_along
from xelm.inference.routers import ByLanguage, Fixed, Posterior, Tfidf, uniform
from xelm.inference.routing import RoutingLimits
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.vocabularies import InPieces, choose, joined, loader
from xelm.models import vocabulary_rows
from xelm.models.parameters import NEW_ROWS, bind, for_inference, fresh_parameters, graph
from xelm.models.vocabulary_rows import mean_weights, new_rows, resized

NEW = 60
KINDS = ("bpe", "unigram", "bytes")


def texts(letters: str, count: int, seed: int = 0) -> list[str]:
    """Texts of made-up words, some of them frequent."""
    draw = random.Random(f"{letters} {seed // 100}")
    words = ["".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(60)]
    draw, weights = random.Random(seed), [1 / rank for rank in range(1, 61)]
    return [" ".join(draw.choices(words, weights, k=12)) + "." for _ in range(count)]


OLD_TEXT = texts("abcdefghijklmno", 200)
# With Latin words too: their new pieces are of old ones.
NEW_TEXT = texts("աբգդեզէըթժիլխծկ", 300) + texts("abcdeponm", 150)
UNSEEN = [
    *texts("աբգդեզէըթժիլխծկ", 40, seed=1),
    *texts("abcdefghijklmno", 40, seed=1),
    *texts("abcdeponm", 40, seed=1),
    *("", "ա"),
]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """By kind of tokenizer: the old one, its folder, and the vocabulary with more pieces."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        if kind == "bytes":
            _byte_level(folder / "old")
        else:
            train({"en": OLD_TEXT}, 350, folder / "old", algorithm=kind)
        base = loading.load(folder / "old")
        # Three rows more than the tokenizer has ids, as of models that are padded.
        first = len(base.hub) + 3
        extend(base, folder / "old", NEW_TEXT, NEW, first, folder / "new")
        vocabulary = load_vocabulary(folder / "new", base, first, "tokenizer")
        found[kind] = SimpleNamespace(base=base, folder=folder, vocabulary=vocabulary)
    return found


def test_chats_and_ends_are_those_of_the_seed_also_where_they_are_told_it_later(extended, tmp_path):
    one, seed = extended["bpe"], tmp_path / "seed"
    shutil.copytree(one.folder / "old", seed)
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (seed / "chat_template.jinja").write_text(template)
    (seed / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    base = loading.load(seed)
    new = load_vocabulary(one.folder / "new", base, one.vocabulary.base_size, "tokenizer").tokenizer
    messages = [{"role": "user", "content": NEW_TEXT[0]}]
    ids, mask = new.chat(messages)
    assert new.decode(ids).strip() == NEW_TEXT[0] and any(mask)
    assert new.end_ids == base.end_ids == {1, 2}
    assert (new.start_id, new.prefix_id) == (base.start_id, base.prefix_id)


def _byte_level(folder) -> None:
    """A byte-level BPE whose special tokens have ids behind the model's pieces; one is known to
    transformers alone."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(OLD_TEXT, trainer)
    made.add_special_tokens(["<|end|>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", KINDS)
def test_new_pieces_stand_for_runs_of_old_tokens(extended, kind):
    base, vocabulary = extended[kind].base, extended[kind].vocabulary
    old, new = base.encode(UNSEEN), vocabulary.tokenizer.encode(UNSEEN)
    assert [vocabulary.expand(np.asarray(ids, int)).tolist() for ids in new] == old
    for ids, before in zip(new, old):
        assert vocabulary.counts(np.asarray(ids, int)).sum() == len(before)
    # A text of the old language may have new pieces too; one of the new language has few tokens.
    assert sum(map(len, new[:40])) < 0.4 * sum(map(len, old[:40]))
    assert vocabulary.tokenizer.decode(new[3]) == base.decode(old[3]) == UNSEEN[3]


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_are_segmented_as_their_text(extended, kind):
    base, vocabulary = extended[kind].base, extended[kind].vocabulary
    for text in UNSEEN:
        new = vocabulary.tokenizer.encode([text])[0]
        found, places = vocabulary.segment(np.asarray(base.encode([text])[0], int))
        assert found.tolist() == new
        # Each piece ends with the last of the old ids that it stands for.
        assert places.tolist() == (np.cumsum(vocabulary.counts(np.asarray(new, int))) - 1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_parts_of_characters_stay_where_old_ids_are_segmented(extended, kind):
    base, vocabulary = extended[kind].base, extended[kind].vocabulary
    old, new = base.encode([NEW_TEXT[0]])[0], vocabulary.tokenizer.encode([NEW_TEXT[0]])[0]
    end = base.end_id
    found, places = vocabulary.segment(np.asarray([end, *old, end, *old]))
    assert found.tolist() == [end, *new, end, *new]
    assert places[[0, len(new), len(new) + 1, -1]].tolist() == [
        *(0, len(old), len(old) + 1),
        2 * len(old) + 1,
    ]
    # No piece goes from one group to another.
    first = vocabulary.expand(np.asarray(new[:1]))
    groups = np.arange(len(first)) > 0
    apart, _ = vocabulary.segment(first, groups)
    assert vocabulary.segment(first)[0].tolist() == new[:1] and len(apart) > 1
    # The text of all but the last byte of a character is none that the tokenizer reads.
    if kind == "bpe":
        cut = np.asarray(base.encode(["ա"])[0][:-1])
        assert vocabulary.segment(cut)[0].tolist() == cut.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_follow(extended, kind):
    base, vocabulary = extended[kind].base, extended[kind].vocabulary
    before, after = base.hub.get_vocab(), vocabulary.tokenizer.hub.get_vocab()
    assert {piece: after[piece] for piece in before} == before
    first = len(before) + 3
    assert vocabulary.base_size == first and vocabulary.size == first + NEW
    assert sorted(after.values()) == list(range(first + NEW))
    assert vocabulary.tokenizer.end_id == base.end_id
    # As anybody else loads it.
    hub = transformers.AutoTokenizer.from_pretrained(str(extended[kind].folder / "new"))
    assert len(hub) == vocabulary.size
    ours = vocabulary.tokenizer.encode([UNSEEN[0]])[0]
    assert hub(UNSEEN[0], add_special_tokens=False)["input_ids"] == ours
    assert max(ours) >= first


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_sentencepiece_model_has_the_same_pieces(extended, kind):
    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(extended[kind].folder / "new" / "tokenizer.model"))
    assert model.vocab_size() == extended[kind].vocabulary.size
    assert model.encode(UNSEEN[:80]) == extended[kind].vocabulary.tokenizer.encode(UNSEEN[:80])


def test_pieces_that_the_text_lacks_are_refused(extended, tmp_path):
    one = extended["bpe"]
    with pytest.raises(UserError, match=r"--extend-vocabulary 5000: the text has [0-9]+ more"):
        extend(one.base, one.folder / "old", NEW_TEXT[:5], 5000, 400, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"type": "WordPiece", "vocab": {}}, "is WordPiece"),
        ({"type": "BPE", "merges": [], "end_of_word_suffix": "</w>"}, "BPE with end_of_word_suffi"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(model, found):
    with pytest.raises(UserError, match=found):
        kind_of(model)


EXPANSIONS = [[3, 4], [5], [6, 7, 8]]
SHAPES = {
    "tied": TINY,
    "untied": replace(TINY, tie_embeddings=False),
    "capped, with a bias": replace(TINY, logit_cap=5.0, head_bias=True, tie_embeddings=False),
}


def logits(model, parameters, tokens):
    network = bind(graph(model), jax.tree.map(jnp.asarray, parameters))
    return np.asarray(network(jnp.asarray([tokens]))[0])


def read_as(parameters, known, size, expansions):
    """The parameters of a model for a vocabulary of which it knows so many ids."""
    return {**parameters, NEW_ROWS: new_rows(parameters["embedding"], known, size, expansions)}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_old_model_gives_new_ids_probability_zero_and_reads_them_as_a_mean(shape):
    model = SHAPES[shape]
    old = jax.tree.map(lambda p: np.asarray(9 * p), fresh_parameters(model, 0))
    wide = read_as(old, 20, 23, EXPANSIONS)
    assert wide["embedding"] is old["embedding"] and wide[NEW_ROWS].shape == (3, 8)
    np.testing.assert_allclose(wide[NEW_ROWS][0], old["embedding"][3:5].mean(0), rtol=1e-6)
    # An id before those that have expansions is in no text.
    more = new_rows(old["embedding"], 20, 25, EXPANSIONS)
    np.testing.assert_array_equal(more[2:], wide[NEW_ROWS])
    np.testing.assert_allclose(more[:2], [old["embedding"].mean(0)] * 2, rtol=1e-5)
    before = logits(model, old, [1, 2, 3])
    after = logits(resized(model, 23), wide, [1, 2, 3])
    np.testing.assert_allclose(after[:, :20], before, rtol=1e-5, atol=1e-6)
    assert (after[:, 20:] == -np.inf).all()
    probabilities = np.asarray(jax.nn.softmax(after))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    # As if the mean were the embedding of an id that it has.
    changed = {**old, "embedding": np.array(old["embedding"])}
    changed["embedding"][9] = old["embedding"][3:5].mean(0)
    if shape == "untied":
        read = logits(resized(model, 23), wide, [1, 20, 2])[-1, :20]
        np.testing.assert_allclose(
            read, logits(model, changed, [1, 9, 2])[-1], rtol=1e-4, atol=1e-5
        )


def test_a_model_with_more_ids_is_cut_to_those_of_the_others():
    model = resized(TINY, 23)
    wide = jax.tree.map(lambda p: np.asarray(9 * p), fresh_parameters(model, 1))
    cut = read_as(wide, 20, 20, ())
    found = logits(TINY, cut, [4, 5, 6])
    np.testing.assert_allclose(found, logits(model, wide, [4, 5, 6])[:, :20], rtol=1e-5, atol=1e-6)
    # In a third vocabulary both of its own ids and of theirs nothing is left but the first 20.
    other = read_as(wide, 20, 22, [[1, 2], [3]])
    found = logits(resized(TINY, 22), other, [4, 5, 6])
    np.testing.assert_allclose(found[:, :20], logits(TINY, cut, [4, 5, 6]), rtol=1e-5, atol=1e-6)
    assert (found[:, 20:] == -np.inf).all()


@pytest.fixture(scope="module")
def pools(extended):
    """An old model and one with more pieces, both random; and the ensemble by routing."""
    one = extended["bpe"]
    base, vocabulary = one.base, one.vocabulary
    size = vocabulary.base_size
    model = replace(TINY, vocabulary_size=size)
    shapes = [model, resized(model, vocabulary.size)]
    full = [
        jax.tree.map(lambda p: np.asarray(12 * p), fresh_parameters(shape, seed))
        for seed, shape in enumerate(shapes)
    ]
    read = [lambda shape, p=p: for_inference(p) for p in full]

    def parameters(pool):
        loaders = [loader(r, model, own, pool) for r, own in zip(read, (None, vocabulary))]
        return [load() for load in loaders]

    def ensemble(router, **limits):
        common = {"names": ["old", "new"], "context_length": 48, "sampling": SAMPLING}
        common["limits"] = RoutingLimits(**limits)
        further = Ensemble(
            model=shapes[1],
            parameters=parameters(vocabulary),
            router=InPieces(router=router, vocabulary=vocabulary, owners=[1]),
            tokenizer=vocabulary.tokenizer,
            vocabulary=vocabulary,
            owners=[1],
            **common,
        )
        first = Ensemble(
            model=model,
            parameters=parameters(None),
            router=router,
            tokenizer=base,
            **common,
        )
        return joined(first, [further])

    return SimpleNamespace(
        ensemble=ensemble, full=full, shapes=shapes, vocabulary=vocabulary, base=base
    )


SAMPLING = SamplingParams(max_new_tokens=6, temperature=0.0)
BY_LANGUAGE = ByLanguage(experts=2, serving={"en": 0, "hy": 1}, otherwise=uniform(2))
TEXT = NEW_TEXT[0][:40]


def by_hand(pools, ids):
    """Log probabilities by each model at each place of a text in further pieces, [2, T, V + N]."""
    start = pools.base.text_format.start_ids
    tokens = [*start, *ids]
    old = read_as(
        pools.full[0],
        pools.vocabulary.base_size,
        pools.vocabulary.size,
        pools.vocabulary.expansions,
    )
    found = [logits(pools.shapes[1], p, tokens) for p in (old, pools.full[1])]
    return np.asarray(jax.nn.log_softmax(np.stack(found)))


def test_a_mixture_over_unequal_vocabularies_is_that_of_its_parts(pools):
    ids = pools.vocabulary.tokenizer.encode([TEXT])[0]
    assert max(ids) >= pools.vocabulary.base_size  # it has new pieces
    parts = by_hand(pools, ids)
    np.testing.assert_allclose(np.exp(parts).sum(axis=-1), 1, rtol=1e-5)
    wanted = np.asarray([*ids, pools.base.end_id])
    # A third of the weight is the old model's, as the best one with the pieces has two thirds.
    mixed = np.logaddexp(parts[0] + np.log(1 / 3), parts[1] + np.log(2 / 3))
    np.testing.assert_allclose(np.exp(mixed).sum(axis=-1), 1, rtol=1e-5)
    further = pools.ensemble(uniform(2)).further[0]
    found = further.score([TEXT])
    nats = -mixed[np.arange(len(wanted)), wanted].sum()
    np.testing.assert_allclose(found.nats, [nats], rtol=1e-5)
    np.testing.assert_allclose(found.weights["new"], [2 / 3], rtol=1e-6)


def test_greedy_continuations_over_unequal_vocabularies_are_those_by_hand(pools):
    further = pools.ensemble(uniform(2)).further[0]
    ids = list(further.tokenizer.encode([TEXT])[0])
    found = further.generate(TEXT)
    parts = by_hand(pools, [*ids, *found.ids])[:, len(ids) : -1]
    mixed = np.logaddexp(parts[0] + np.log(1 / 3), parts[1] + np.log(2 / 3))
    assert len(found.ids) == SAMPLING.max_new_tokens
    assert mixed.argmax(axis=1).tolist() == list(found.ids)


def test_the_language_decides_in_which_vocabulary_a_text_is_read(pools):
    ensemble = pools.ensemble(BY_LANGUAGE)
    old = ensemble.tokenizer.encode([TEXT])[0]
    new = ensemble.further[0].tokenizer.encode([TEXT])[0]
    found = ensemble.score([TEXT, TEXT], ["en", "hy"])
    assert found.tokens.tolist() == [len(old) + 1, len(new) + 1]
    parts = by_hand(pools, new)[1][np.arange(len(new) + 1), [*new, pools.base.end_id]]
    np.testing.assert_allclose(found.nats[1], -parts.sum(), rtol=1e-5)
    # To the last bit what an ensemble without further pieces gives.
    alone = replace(ensemble, further=())
    assert found.nats[0] == alone.score([TEXT], ["en"]).nats[0]
    # Generation reads the prompt the same way, and each text is returned in its place.
    several = ensemble.generate_batch([TEXT] * 3, languages=["hy", "en", "hy"])
    assert several[0].ids == several[2].ids
    assert several[0].weights == {"old": 0.0, "new": 1.0}
    assert several[1] == alone.generate(TEXT, language="en")
    assert max(several[1].ids) < pools.vocabulary.base_size


def test_otherwise_the_router_decides_by_the_old_ids(pools):
    centres = np.stack([_centre(pools, OLD_TEXT), _centre(pools, NEW_TEXT)])
    router = Tfidf(vectoriser=_vectoriser(pools), centres=centres)
    ensemble = pools.ensemble(router, top_m=1)
    prompts = [ensemble.tokenizer.begin(text) for text in (OLD_TEXT[1], NEW_TEXT[1])]
    chosen = choose(ensemble, prompts, [None, None])
    assert chosen[0] is ensemble and chosen[1] is ensemble.further[0]
    # One expert a token, and never one that cannot give the next piece.
    assert np.isfinite(ensemble.score([OLD_TEXT[1], NEW_TEXT[1]]).nats).all()


def test_the_state_of_a_router_is_that_of_the_old_ids(pools):
    vocabulary, router = (
        pools.vocabulary,
        Tfidf(vectoriser=_vectoriser(pools), centres=np.eye(2, 4)),
    )
    own = InPieces(router=router, vocabulary=vocabulary, owners=[1])
    new = np.asarray(vocabulary.tokenizer.encode([TEXT])[0])
    states = states_along(own, own.start(None), new)
    old = states_along(router, router.start(None), vocabulary.expand(new))
    np.testing.assert_allclose(states, old[np.cumsum([0, *vocabulary.counts(new)])], atol=1e-9)


def test_the_best_expert_with_the_pieces_has_two_thirds_of_the_weight(pools):
    prior = np.log([0.7, 0.2, 0.1])
    own = InPieces(router=Fixed(weights=prior), vocabulary=pools.vocabulary, owners=[1, 2])
    found = np.exp(own.log_weights(np.zeros((2, 0)), np.zeros((2, 3))))
    np.testing.assert_allclose(found, [[0.7 / 0.8 / 3, 2 / 3, 0.1 / 0.8 / 3]] * 2)
    given = replace(own, given=True)
    np.testing.assert_array_equal(
        given.log_weights(np.zeros((2, 0)), np.zeros((2, 3))), [prior] * 2
    )


def test_a_router_survives_a_token_that_an_expert_cannot_give():
    scores = np.asarray([[-1.0, -np.inf, -1.0], [-2.0, -2.0, -2.0]])
    for memory in (1.0, 0.5):
        router = Posterior(prior=uniform(2).weights, memory=memory)
        found = router.log_weights(np.zeros((4, 0)), log_likelihoods_along(router, scores))
        assert np.isfinite(found).all() and found[2].argmax() == 1


def _vectoriser(pools):
    size = pools.vocabulary.base_size
    projection = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
    return Vectoriser(idf=np.ones(size, np.float32), projection=projection)


def _centre(pools, some):
    documents = [np.asarray(ids) for ids in pools.base.encode(some[2:50])]
    return _vectoriser(pools).transform(documents).mean(axis=0)


def test_rows_are_made_of_old_rows():
    mean = mean_weights([[1, 3], [2], [0, 0, 1]], 4)
    np.testing.assert_allclose(
        mean.toarray(), [[0, 0.5, 0, 0.5], [0, 0, 1, 0], [2 / 3, 1 / 3, 0, 0]]
    )
    old = np.eye(3, 5)
    vectors = np.concatenate([old, [old[1], old[0] + 0.5 * old[2]], np.zeros((1, 5))])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    mean = mean_weights([[0], [1], [2]], 3)
    counts = np.asarray([5, 5, 5, 2, 2, 0])
    focus = vocabulary_rows.focus_weights(vectors, counts, mean).toarray()
    np.testing.assert_allclose(focus.sum(axis=1), 1)
    # The same direction as an old piece; two old pieces; and one that the text lacks.
    np.testing.assert_allclose(focus[0], [0, 1, 0], atol=1e-9)
    assert focus[1][1] == 0 and focus[1][0] > focus[1][2] > 0
    np.testing.assert_allclose(focus[2], [0, 0, 1])


def test_pieces_are_similar_that_keep_the_same_company():
    draw = np.random.default_rng(0)
    # 0 and 1 stand between 4 and 5; 2 and 3 between 6 and 7.
    documents = [
        np.concatenate([[4, a, 5] if a < 2 else [6, a, 7] for a in draw.integers(4, size=20)])
        for _ in range(20)
    ]
    vectors, counts = vocabulary_rows.auxiliary_vectors(documents, 8)
    assert counts.sum() == 20 * 60
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.9 and similar[2, 3] > 0.9 and similar[0, 2] < 0.5
