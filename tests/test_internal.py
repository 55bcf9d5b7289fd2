"""What a seed makes of languages: the file, distances of its states, and where they come from."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import LANGUAGES, documents_of

from clustering import files, internal
from clustering.errors import UserError
from clustering.internal import States, Updates
from xelm.data.held_out import divide
from xelm.data.rows import LanguageShare
from xelm.inference.states import document_states
from xelm.models.checkpoint import load_parameters, read_config
from xelm.models.parameters import bind, graph
from xelm.runs import updates
from xelm.runs.distances import Sources, measured
from xelm.runs.features import features
from xelm.runs.run import open_run
from xelm.settings import vary
from xelm.training.loop import train
from xelm.training.trainer import TrainingSpec


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
    with pytest.raises(UserError, match=r"states.npz knows nothing of ja, sw"):
        internal.cosine(random_states, ["ja", "sw"])
    assert internal.cosine(random_states, ["fr", "ja", "en"]).without_gaps()[1] == ("ja",)
    for layer in (0, 5):
        with pytest.raises(UserError, match=f"layer must be between 1 and 4, .*; got {layer}"):
            internal.alignment(random_states, layer=layer)
    with pytest.raises(UserError, match="must have 3 documents of each language; got 2"):
        internal.alignment(saved(tmp_path, np.ones((3, 2, 1, 4))))
    with pytest.raises(UserError, match=r"states knows nothing of en-de, en-fr, de-fr$"):
        internal.cosine(saved(tmp_path, np.ones((3, 3, 1, 4)))).complete()
    files.write_arrays(tmp_path / "other.npz", {"a": np.ones(3)})
    with pytest.raises(UserError, match=r"other.npz must have arrays 'languages' and 'states'"):
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
    for row in (0, 1, 2):
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
    # No further than the rows in training.
    assert run.context_length() == 32 < max(map(len, framed))
    wanted = document_states(
        model, load_parameters(run.seed, model), framed, sequence_length=run.context_length()
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
    for more, said in (([], "empty text (1"), (["--documents", 0], "at least 1; got 0")):
        outcome = xelm(
            "features", tiny.directory, "--corpus", tmp_path, "--out", tmp_path / "x.npz", *more
        )
        assert outcome.code == 2 and said in outcome.err and outcome.out == ""
    assert not (tmp_path / "x.npz").exists()


# How it moves in training, and what experts lose


def test_updates_are_compared_by_their_angle_over_the_last_three_layers(tmp_path):
    moved = np.random.default_rng(2).normal(size=(5, 3, 20))
    moved[:, 1] = 7.0 * moved[:, 0]  # as far along, the same way
    path, tags = tmp_path / "updates.npz", ("en", "de", "fr")
    inner = moved @ moved.swapaxes(1, 2)
    Updates(languages=tags, values=inner, made_from={"a": "b"}).save(path)
    found = internal.updates(path)
    assert found.between("en", "de") == pytest.approx(0.0, abs=1e-12)
    x, y = moved[2:, 0].ravel(), moved[2:, 2].ravel()
    cos = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert found.between("en", "fr") == pytest.approx((1 - cos) / 2)
    assert found.parameters == {"layers": [3, 5]} and found.made_from["a"] == "b"
    x, y = moved[1, 0], moved[1, 2]
    cos = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    alone = internal.updates(path, ["fra", "en"], layer=2)
    assert alone.languages == ("fr", "en")
    assert alone.between("en", "fr") == pytest.approx((1 - cos) / 2)
    with pytest.raises(UserError, match=r"layer must be between 1 and 5, .*; got 6"):
        internal.updates(path, layer=6)
    with pytest.raises(UserError, match=r"must have arrays 'languages' and 'states'"):
        internal.cosine(path)


def test_updates_of_a_run_are_what_training_changed(tiny, tmp_path):
    shutil.copytree(tiny.directory, tmp_path / "run")
    run = open_run(tmp_path / "run")
    model = read_config(run.seed)
    before = load_parameters(run.seed, model)["blocks"]
    dense, moved = run.config.dense, {}
    config = vary(dense, {"tokens": 2 * dense.tokens_per_step, "optimizer.weight_decay": 0.0})
    for tag in ("en", "fr"):
        training = TrainingSpec(
            label=tag,
            start=lambda shardings: load_parameters(run.seed, model, shardings),
            sources=divide(
                [LanguageShare(ids=run.store().languages[tag], share=1.0)], run.config.held_out
            ).sources,
            config=config,
            directory=tmp_path / tag,
        )
        after = train(training, model, run.tokenizer().text_format).parameters["blocks"]
        moved[tag] = {
            name: np.asarray(after[name]["weight"]) - np.asarray(before[name]["weight"])
            for name in ("up", "gate", "down")
        }

    def inner(one, other):
        """By layer, over all entries."""
        return sum((moved[one][n] * moved[other][n]).sum(axis=(1, 2)) for n in moved[one])

    found = updates.updates(run, ["en", "fr"], steps=2)
    for (i, one), (j, other) in itertools.product(enumerate(("en", "fr")), repeat=2):
        np.testing.assert_allclose(found.values[:, i, j], inner(one, other), rtol=1e-4)
    assert not any(run.training("").glob("updates-*"))


def test_of_large_weights_the_same_entries_are_drawn_whoever_asks(tiny, monkeypatch):
    run = open_run(tiny.directory)
    parameters = load_parameters(run.seed, read_config(run.seed))
    monkeypatch.setattr(updates, "DRAWN", 200)  # of 16 x 24
    drawn = updates._drawn(parameters)
    assert drawn.shape == (2, 3 * 200)
    more = jax.tree.map(lambda leaf: 2 * leaf, parameters)
    np.testing.assert_array_equal(updates._drawn(more), 2 * drawn)
    for layer, (up, gate, down) in enumerate(drawn.reshape(2, 3, 200)):
        for name, part in (("up", up), ("gate", gate), ("down", down)):
            assert np.isin(part, parameters["blocks"][name]["weight"][layer]).all()
            assert len(np.unique(part)) > 120  # of all over the matrix


def test_interrupted_updates_go_on_with_the_languages_that_are_left(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.directory, tmp_path / "run")
    run = open_run(tmp_path / "run")
    whole = updates.updates(run, ["en", "de"], steps=1)
    trained = []

    def killed(training, *more):
        trained.append(training.label)
        if trained == ["en", "de"]:
            raise KeyboardInterrupt
        return train(training, *more)

    monkeypatch.setattr(updates, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        updates.updates(run, ["en", "de"], steps=1)
    again = updates.updates(run, ["en", "de"], steps=1)
    assert trained == ["en", "de", "de"]
    np.testing.assert_array_equal(again.values, whole.values)


@pytest.mark.slow
def test_updates_from_the_command_line(xelm, tiny, tmp_path):
    path = tmp_path / "updates.npz"
    command = ("features", tiny.directory, "--of", "updates", "--languages", "en,de,es", "--out")
    outcome = xelm(*command, path, "--steps", 1)
    assert outcome.code == 0 and "3 languages, 2 layers" in outcome.out, outcome.err
    clusters = xelm(
        *("cluster", "--method", "updates", "--updates", path, "-k", 2, "--json"),
        *("--out", tmp_path / "clusters"),
    ).json()["clusters"]
    assert sorted(tag for tags in clusters.values() for tag in tags) == ["de", "en", "es"]
    for more, said in (
        (["--steps", 0], "steps must be at least 1; got 0"),
        (["--documents", 3], "--corpus and --documents go with --of states"),
        (["--of", "states", "--steps", 3], "--steps goes with --of updates"),
        (["--languages", "en,sw"], "has no text in sw"),
    ):
        outcome = xelm(*command, tmp_path / "x.npz", *more)
        assert outcome.code == 2 and said in outcome.err and not (tmp_path / "x.npz").exists()


def test_losses_are_what_the_own_expert_spares():
    nats = np.array([[2.0, 4.0, 3.0], [4.0, 3.0, 3.0], [2.5, 2.0, 1.5]])
    found = internal.losses(["en", "de", "fr"], nats, {"a": "b"})
    assert found.between("en", "de") == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found.between("en", "fr") == pytest.approx((1 / 5 + 1 / 2) / 2)
    # The French expert is the better one on German.
    assert found.between("de", "fr") == pytest.approx((0 + 1 / 2) / 2)
    assert found.made_from == {"a": "b"}


def test_losses_are_of_a_runs_results(tiny, tmp_path):
    run = alone(tiny, tmp_path)
    experts = {expert.languages[0]: expert.name for expert in run.registry().published()}
    nats = {("en", "en"): 20.0, ("en", "de"): 60.0, ("de", "en"): 40.0, ("de", "de"): 30.0}
    rows = [
        *(row(experts[one], other, value) for (one, other), value in nats.items()),
        row("seed", "en", 1.0),
        row("ensemble", "en", 1.0, "uniform"),
    ]
    run.results.mkdir(exist_ok=True)
    files.write_json(run.results / "results.json", {"format": 1, "rows": rows})
    found = measured("losses", ["en", "deu"], Sources(run=run))
    assert found.between("en", "de") == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert "results.json" in found.made_from
    files.write_json(run.results / "results.json", {"format": 1, "rows": rows[1:]})
    with pytest.raises(UserError, match=r"no loss of the expert of en on en; run xelm evaluate"):
        measured("losses", ["en", "de"], Sources(run=run))
    with pytest.raises(UserError, match=r"of one language each; .* has none of it, ro alone"):
        measured("losses", ["it", "ro"], Sources(run=run))


def alone(tiny, tmp_path):
    """The tiny RUN's registry as if its clusters were of one language each."""
    shutil.copytree(tiny.directory, tmp_path / "run")
    registry = files.read_json(tmp_path / "run" / "registry.json")
    for expert, language in zip(registry["experts"], ("en", "de")):
        expert["languages"] = [language]
    files.write_json(tmp_path / "run" / "registry.json", registry)
    return open_run(tmp_path / "run")


def row(system, language, nll, routing=None):
    counts = {"documents": 1, "tokens": 10, "bytes": 40}
    return {"system": system, "routing": routing, "language": language, "nll": nll, **counts}
