"""What a seed makes of languages: the file, distances of its states, and where they come from."""

import jax.numpy as jnp
import numpy as np
import pytest
from shared import LANGUAGES, documents_of

from clustering import files, internal
from clustering.errors import UserError
from clustering.internal import States
from xelm.inference.states import document_states
from xelm.models.checkpoint import load_parameters, read_config
from xelm.models.parameters import bind, graph
from xelm.runs.distances import Sources, measured
from xelm.runs.features import features
from xelm.runs.run import open_run


def saved(tmp_path, values, tags=("en", "de", "fr")):
    path = tmp_path / "states.npz"
    States(languages=tags, values=np.asarray(values, np.float32), made_from={"a": "b"}).save(path)
    return path


@pytest.fixture
def random_states(tmp_path):
    return saved(tmp_path, np.random.default_rng(0).normal(size=(3, 10, 4, 6)) + 5.0)


def test_the_file_is_read_as_it_was_written(random_states):
    states = States.load(random_states)
    assert states.languages == ("en", "de", "fr") and states.made_from == {"a": "b"}
    assert states.values.shape == (3, 10, 4, 6) and states.values.dtype == np.float32


def test_cosine_is_of_means_without_what_all_have_in_common(random_states):
    values = States.load(random_states).values[:, :, 1].astype(float)
    means = values.mean(axis=1) - values.mean(axis=(0, 1))
    cos = means[0] @ means[2] / np.linalg.norm(means[0]) / np.linalg.norm(means[2])
    found = internal.cosine(random_states)
    assert found.between("en", "fr") == pytest.approx((1 - cos) / 2)
    assert found.parameters == {"layer": 2, "documents": 10}  # the middle of four
    assert found.made_from["a"] == "b" and "states.npz" in found.made_from
    assert internal.cosine(random_states, layer=4) != found
    # What is common to all must not make everybody near.
    assert found.values.max() > 0.5


def test_alignment_is_linear_cka(random_states):
    x, y = States.load(random_states).values[[0, 1], :, 2].astype(float)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    cka = np.sum((y.T @ x) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    found = internal.alignment(random_states, layer=3)
    assert found.between("en", "de") == pytest.approx(1 - cka, abs=1e-6)


def test_alignment_knows_no_turns_shifts_or_scales(tmp_path):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(12, 5))
    turn = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    values = np.stack([x, 3.0 * x @ turn + 2.0, x[::-1]])[:, :, None]
    found = internal.alignment(saved(tmp_path, values))
    assert found.between("en", "de") == pytest.approx(0.0, abs=1e-6)
    assert found.between("en", "fr") > 0.3  # other documents are no parallel text


def test_some_languages_alone(random_states):
    found = internal.cosine(random_states, ["fr", "eng"])
    assert found.languages == ("fr", "en")


def test_what_is_wrong_with_states_is_said(tmp_path, random_states):
    with pytest.raises(UserError, match=r"states.npz has no states of ja, sw"):
        internal.cosine(random_states, ["en", "ja", "sw"])
    for layer in (0, 5):
        with pytest.raises(UserError, match=f"layer must be between 1 and 4, .*; got {layer}"):
            internal.alignment(random_states, layer=layer)
    with pytest.raises(UserError, match="has 2 documents of each language; 3 are wanted"):
        internal.alignment(saved(tmp_path, np.ones((3, 2, 1, 4))))
    with pytest.raises(UserError, match=r"states knows nothing of en-de, en-fr, de-fr$"):
        internal.cosine(saved(tmp_path, np.ones((3, 3, 1, 4))))
    files.write_arrays(tmp_path / "other.npz", {"a": np.ones(3)})
    with pytest.raises(UserError, match=r"other.npz wants arrays 'languages' and 'states'"):
        internal.cosine(tmp_path / "other.npz")


# Made by a seed


def test_states_of_documents_are_those_of_each_alone(tiny):
    run = open_run(tiny.directory)
    model = read_config(run.seed)
    parameters = load_parameters(run.seed, model)
    documents = [np.arange(3, 3 + n, dtype=np.int32) for n in (5, 1, 40, 17)] * 5
    found = document_states(model, parameters, documents, sequence_length=24)
    assert found.shape == (20, model.layer_count, model.width)
    network = bind(graph(model), parameters)
    for row in (0, 1, 2, 18):
        alone = documents[row][None, :24]
        seen = jnp.ones(alone.shape, bool)
        wanted = network.means(jnp.asarray(alone), valid=seen)[:, 0]
        np.testing.assert_allclose(found[row], wanted, atol=1e-5)


def test_features_of_a_run_measure_its_languages(xelm, tiny, tmp_path):
    path = tmp_path / "states.npz"
    outcome = xelm("features", tiny.directory, "--documents", 7, "--out", path)
    assert outcome.code == 0, outcome.err
    assert "5 languages, 7 documents of each, 2 layers of 16" in outcome.out
    run = open_run(tiny.directory)
    states = features(run, languages=LANGUAGES, documents=7)
    tokenizer, model = run.tokenizer(), read_config(run.seed)
    ids = tokenizer.encode(documents_of(tiny.corpus, "de")[:7])
    framed = [np.array([tokenizer.start_id, *one, tokenizer.end_id], np.int32) for one in ids]
    wanted = document_states(
        model, load_parameters(run.seed, model), framed, sequence_length=model.max_length
    )
    np.testing.assert_allclose(states.values[LANGUAGES.index("de")], wanted, atol=1e-5)
    assert "corpus" in states.made_from and "seed/model.safetensors" in states.made_from
    found = measured("states", LANGUAGES, Sources(states=path))
    np.testing.assert_allclose(found.values, internal.cosine(path, LANGUAGES).values)
    clusters = xelm(
        *("cluster", "--method", "states+alignment", "--states", path, "-k", 2, "--layer", 2),
        *("--out", tmp_path / "clusters", "--json"),
    ).json()["clusters"]
    assert sorted(tag for tags in clusters.values() for tag in tags) == sorted([*LANGUAGES, "pt"])
    again = xelm("features", tiny.directory, "--out", path)
    assert (again.code, again.out) == (2, "") and "exists already" in again.err


def test_text_that_cannot_be_used_is_refused(xelm, tiny, tmp_path):
    (tmp_path / "en.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    for more, said in (([], "1 with empty text"), (["--documents", 0], "at least 1; got 0")):
        outcome = xelm(
            "features", tiny.directory, "--corpus", tmp_path, "--out", tmp_path / "x.npz", *more
        )
        assert outcome.code == 2 and said in outcome.err and outcome.out == ""
    assert not (tmp_path / "x.npz").exists()
