"""Distillation: the divergence from a teacher, its predictions beside the rows, and a student of a
RUN's ensemble."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from small_training import CONFIG, SOURCES, TEXT

from clustering.errors import UserError
from xelm import open_run
from xelm.data.rows import LanguageRows, batches, documents_read
from xelm.data.teacher import TeacherStore, TeacherText, bytes_of
from xelm.data.text_format import TextFormat
from xelm.inference import teaching
from xelm.inference.predictions import likeliest_of_mixture, read_upto
from xelm.inference.teaching import teach
from xelm.models import head as output_head
from xelm.models.head import Head
from xelm.runs import distil as distillation
from xelm.training.loss import Teacher, cross_entropy
from xelm.training.loss import distillation as loss_of
from xelm.training.sharding import mesh_of_devices
from xelm.training.step import target_weights

WIDTH = 12


def inputs(positions: int, vocabulary: int, top: int, share: float = 0.7, seed: int = 0):
    draw = np.random.default_rng(seed)
    states = draw.normal(size=(positions, WIDTH)).astype(np.float32)
    head = Head(draw.normal(size=(vocabulary, WIDTH)).astype(np.float32))
    p = draw.dirichlet(np.full(vocabulary, 0.3), positions)
    ids = np.argsort(-p, axis=1)[:, :top]
    teacher = Teacher(
        ids.astype(np.int32),
        np.log(np.take_along_axis(p, ids, axis=1)).astype(np.float32),
        np.full(positions, share, np.float32),
    )
    targets, weights = draw.integers(0, vocabulary, positions), draw.uniform(size=positions)
    arrays = states, head, targets, weights.astype(np.float32), teacher
    return *jax.tree.map(jnp.asarray, arrays), p


def reference(states, head, targets, weights, teacher):
    """By its definition: all logits at once, and bins added up."""
    log_q = jax.nn.log_softmax(states @ head.matrix.T)
    p = jnp.exp(teacher.log_probabilities)
    q = jnp.exp(jnp.take_along_axis(log_q, teacher.ids, axis=1))
    divergence = (p * jnp.log(p / q)).sum(axis=1)
    if p.shape[1] < log_q.shape[1]:
        r, s = 1 - p.sum(axis=1), 1 - q.sum(axis=1)
        divergence = divergence + r * jnp.log(r / s)
    crossed = optax.softmax_cross_entropy_with_integer_labels(states @ head.matrix.T, targets)
    return (weights * ((1 - teacher.share) * crossed + teacher.share * divergence)).sum()


def with_gradients(function, *arguments):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(*arguments)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(output_head, "LOGITS_IN_A_CHUNK", 64)


@pytest.mark.parametrize(("positions", "vocabulary", "top"), [(1, 50, 4), (150, 97, 16)])
def test_the_divergence_and_its_gradients_are_those_of_its_definition(
    small_chunks, positions, vocabulary, top
):
    *arguments, _ = inputs(positions, vocabulary, top)
    found, gradients = with_gradients(loss_of, *arguments)
    wanted, references = with_gradients(reference, *arguments)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), gradients, references
    )


def test_with_all_tokens_it_is_the_divergence_over_the_vocabulary():
    states, head, targets, weights, teacher, p = inputs(40, 30, 30, share=1.0)
    log_q = jax.nn.log_softmax(states @ head.matrix.T)
    wanted = (weights * (p * (np.log(p) - log_q)).sum(axis=1)).sum()
    value = jax.jit(loss_of)
    found = value(states, head, targets, weights, teacher)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # With fewer it is less: tokens in one bin cannot differ from each other.
    fewer = Teacher(teacher.ids[:, :5], teacher.log_probabilities[:, :5], teacher.share)
    assert 0 < value(states, head, targets, weights, fewer) < 0.95 * wanted


def test_it_is_zero_where_the_student_is_the_teacher_and_nowhere_else():
    states, head, targets, weights, teacher, _ = inputs(40, 30, 6, share=1.0)
    log_q = jax.nn.log_softmax(states @ head.matrix.T)
    values, ids = jax.lax.top_k(log_q, 6)
    same = Teacher(ids, values, teacher.share)
    found, (gradient, _) = with_gradients(loss_of, states, head, targets, weights, same)
    np.testing.assert_allclose(found, 0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    # A tenth less on the likeliest token, all of it given to the rest.
    other = same._replace(log_probabilities=values.at[:, 0].add(np.log(0.9)))
    assert loss_of(states, head, targets, weights, other) > 1e-2


def test_what_the_student_is_to_become_sums_to_one_and_keeps_the_rest_in_proportion():
    states, head, targets, weights, teacher, _ = inputs(9, 20, 3, share=1.0)

    def loss(logits):  # the states are the logits
        return loss_of(logits, Head(jnp.eye(20)), targets, weights, teacher)

    logits = jnp.asarray(states @ head.matrix.T)
    q = np.asarray(jax.nn.softmax(logits))
    wanted = q - np.asarray(jax.jit(jax.grad(loss))(logits)) / weights[:, None]
    np.testing.assert_allclose(wanted.sum(axis=1), 1, rtol=1e-5)
    for row, ids, values in zip(range(9), teacher.ids, np.exp(teacher.log_probabilities)):
        np.testing.assert_allclose(wanted[row, ids], values, atol=1e-5)
        rest = np.setdiff1d(np.arange(20), ids)
        ratios = wanted[row, rest] / q[row, rest]
        np.testing.assert_allclose(ratios, (1 - values.sum()) / q[row, rest].sum(), rtol=1e-3)


def test_probabilities_whose_rounded_sum_is_above_one_leave_nothing_to_the_rest():
    states, head, targets, weights, teacher, p = inputs(200, 40, 12, share=1.0)
    top = np.sort(p, axis=1)[:, ::-1][:, :12]
    sure = 1.001 * top / top.sum(axis=1, keepdims=True)
    sure = teacher._replace(log_probabilities=jnp.log(jnp.asarray(sure, jnp.float32)))
    found, gradients = with_gradients(loss_of, states, head, targets, weights, sure)
    assert np.isfinite(found) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_without_a_share_it_is_the_cross_entropy():
    *arguments, teacher, _ = inputs(70, 97, 8, share=0.0)
    found = with_gradients(lambda *a: loss_of(*a, teacher), *arguments)
    wanted = with_gradients(cross_entropy, *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)


def test_spread_over_a_mesh_it_is_the_same():
    states, head, targets, weights, teacher, _ = inputs(64, 97, 8)
    wanted = with_gradients(loss_of, states, head, targets, weights, teacher)
    with jax.set_mesh(mesh_of_devices(np.asarray(jax.devices()).reshape(1, 2, 2, 2))):
        found = with_gradients(
            lambda *a: loss_of(*a, targets, weights, teacher, spread=True), states, head
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, wanted)


def taught(source, ids_of):
    """A source whose teacher predicts, at each target, that target and the number of its place."""
    numbers = np.arange(len(source.ids))[1:]  # it has not read the first document
    rows = [np.append(source.ids.document(n), 2) for n in numbers]
    ids = np.concatenate([np.stack([row, np.arange(len(row))], axis=1) for row in rows])
    teacher = TeacherText(
        ids=ids.astype(np.uint16),
        log_probabilities=np.log(np.stack([0.5 + 0 * ids[:, 0], 0.25 + 0 * ids[:, 0]], axis=1)),
        numbers=numbers,
        ends=np.cumsum([len(row) for row in rows]),
        share=0.5,
    )
    return replace(source, documents=numbers, teacher=teacher)


@pytest.mark.parametrize("start_id", [1, None])
def test_the_teacher_of_a_row_predicts_its_own_next_tokens(start_id):
    form = TextFormat(start_id=start_id, end_id=2)
    rows = LanguageRows(taught(SOURCES[0], None), CONFIG, form)
    plain = LanguageRows(replace(SOURCES[0], documents=rows.teacher.numbers), CONFIG, form)
    count = 0
    for number in range(len(rows)):
        row = rows[number]
        for name, array in plain[number].items():
            np.testing.assert_array_equal(row[name], array)
        predicted = target_weights(row["segments"])
        np.testing.assert_array_equal(
            row["teacher_ids"][predicted, 0], row["tokens"][1:][predicted]
        )
        # A row may begin within a document, of which its positions know nothing.
        inside = predicted & (row["segments"][1:] > 1)
        offset = 0 if start_id is None else 1
        np.testing.assert_array_equal(
            row["teacher_ids"][inside, 1], row["positions"][1:][inside] - offset
        )
        values = np.exp(row["teacher_log_probabilities"][predicted].astype(np.float32))
        np.testing.assert_allclose(values, [[0.5, 0.25]] * predicted.sum(), rtol=1e-3)
        count += predicted.sum()
    assert count == rows.teacher.ends[-1] - (start_id is None) * len(rows.teacher.numbers)


def test_the_teacher_reads_the_documents_of_the_rows_and_no_others():
    source = replace(SOURCES[0], share=1.0)
    config = replace(CONFIG, tokens=7 * 128)  # 56 of 63 rows
    packed, seen = LanguageRows(source, config, TEXT), set()
    for batch in batches([source], config, TEXT):
        for row in batch["row"]:
            starts = np.arange(17) + int(row) * 16
            starts = starts[starts < packed.ends[-1]]
            places = np.searchsorted(packed.ends, starts, side="right")
            seen |= set(packed.order[places].tolist())
    assert documents_read(source, 56, config, TEXT).tolist() == sorted(seen)
    few = documents_read(source, 2, config, TEXT)
    assert 2 <= len(few) <= 4 < len(seen)
    assert documents_read(source, 10**6, config, TEXT).tolist() == list(range(40))


@pytest.mark.parametrize(("vocabulary", "size"), [(2**16, 2), (2**16 + 1, 4)])
def test_predictions_that_were_cut_short_are_written_again(tmp_path, vocabulary, size):
    draw = np.random.default_rng(0)
    ids = draw.integers(0, vocabulary, (50, 3))
    values = -draw.gamma(2, size=(50, 3))
    assert bytes_of(50, 3, vocabulary) == 50 * 3 * (size + 2)
    store = TeacherStore(tmp_path / "t", targets=50, top=3, vocabulary_size=vocabulary)
    with store.writing() as writer:
        writer.append(ids[:20], values[:20])
        writer.save(tokens_read=40)
        writer.append(ids[20:30] * 0, values[20:30])  # killed before these are counted
    assert (store.written, store.complete) == (20, False)
    with store.writing() as writer:
        writer.append(ids[20:], values[20:])
        writer.save(tokens_read=60)
    assert (store.complete, store.tokens_read) == (True, 100)
    parts = [(np.asarray([2, 5]), np.asarray([10, 25])), (np.asarray([0]), np.asarray([15]))]
    first, second = store.open(parts, 0.5)
    assert first.ids.dtype == f"<u{size}"
    for text, number, rows in ((first, 2, slice(0, 10)), (first, 5, slice(10, 35))):
        np.testing.assert_array_equal(text.document(number)[0], ids[rows])
        np.testing.assert_allclose(text.document(number)[1], values[rows], rtol=1e-3)
    np.testing.assert_array_equal(second.document(0)[0], ids[35:])
    (tmp_path / "t" / "ids").write_bytes(b"")
    with pytest.raises(UserError, match=r"ids does not match teacher\.json; delete"):
        store.open(parts, 0.5)
    with pytest.raises(UserError, match="ids does not match"), store.writing():
        pass


def test_the_teacher_predicts_what_the_ensemble_does(tiny):
    run = open_run(tiny.directory)
    ensemble = run.ensemble("tfidf")
    texts = [run.tokenizer().decode(run.store().languages["de"].document(3).tolist())]
    ids = [np.asarray(some, np.int64) for some in run.tokenizer().encode(texts)]
    lesson = teach(ensemble, ids, ensemble.model.vocabulary_size)
    (found,) = lesson.predictions
    np.testing.assert_allclose(np.exp(found.log_probabilities).sum(axis=1), 1, rtol=1e-5)
    wanted = np.append(ids[0], run.tokenizer().text_format.end_id)
    assert len(found.ids) == len(wanted)
    came = found.log_probabilities[found.ids == wanted[:, None]]
    np.testing.assert_allclose(-came.sum(), ensemble.score(texts).nats[0], rtol=1e-5)
    # At a named place: the fifth token, by what the ensemble says is likeliest after four.
    framed = run.tokenizer().text_format.framed(ids[0])[:-1]
    at = 5 + len(framed) - len(ids[0])
    for rank, place in ((0, 0), (7, 7)):
        token = int(found.ids[5, place])
        likely = ensemble.likelihoods([framed[:at].tolist()], [[token]])
        np.testing.assert_allclose(-found.log_probabilities[5, rank], likely.nats[0], rtol=1e-4)
    (few,) = teach(ensemble, ids, 4).predictions
    np.testing.assert_array_equal(few.ids, found.ids[:, :4])
    assert len(ids[0]) < lesson.tokens_read <= 2 * len(ids[0])  # two experts, one to its end


def test_models_read_a_text_up_to_where_they_have_weight(tiny):
    run, draw = open_run(tiny.directory), np.random.default_rng(0)
    ensemble = run.ensemble("uniform")
    documents = [draw.integers(4, 300, length) for length in (30, 12)]
    weights = [np.zeros((31, 2)), np.zeros((13, 2))]
    weights[0][5:, 0] = -np.inf  # the first reads a beginning of the one, nothing of the other
    weights[1][:, 0] = -np.inf
    models = [lambda n=n: ensemble.parameters[n] for n in range(2)]
    arguments = (ensemble.model, models, documents)
    found = likeliest_of_mixture(*arguments, weights, 3, **ensemble.reading)
    alone = [np.where([[True, False]], -np.inf, np.zeros_like(w)) for w in weights]
    second = likeliest_of_mixture(*arguments, alone, 3, **ensemble.reading)
    wanted = likeliest_of_mixture(
        *arguments, [np.zeros_like(w) for w in weights], 3, **ensemble.reading
    )
    assert read_upto(ensemble.model, documents, [w[:, 0] for w in weights]) == {0: 5}
    assert read_upto(ensemble.model, documents, [w[:, 1] for w in weights]) == {0: 30, 1: 12}
    np.testing.assert_array_equal(found[0].ids[:5], wanted[0].ids[:5])
    np.testing.assert_allclose(
        found[0].log_probabilities[:5], wanted[0].log_probabilities[:5], atol=1e-5
    )
    np.testing.assert_array_equal(found[1].ids, second[1].ids)
    assert not np.array_equal(found[0].ids[5:], wanted[0].ids[5:])


def test_encoders_are_refused_in_one_line(tiny, monkeypatch):
    read = distillation.read_config
    monkeypatch.setattr(distillation, "read_config", lambda d: replace(read(d), causal=False))
    with pytest.raises(UserError, match="has encoders, whose predictions depend on the masks"):
        open_run(tiny.directory).plan_distil()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--name ../a", "'../a' cannot name a student"),
        ("--top 0", "top must be at least 1; got 0"),
        ("--top 385", "top must be at most 384, the vocabulary; got 385"),
        ("--teacher-share 1.5", "teacher_share must be between 0 and 1; got 1.5"),
        ("--routing fixed", "invalid choice: 'fixed'"),
        ("--set experts.batch_size=8", "experts.batch_size cannot change once a RUN is made"),
    ],
)
def test_mistakes_are_one_line(xelm, tiny, arguments, message):
    outcome = xelm("distil", tiny.directory, *arguments.split(), "--dry-run")
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (tiny.directory / "students").exists()


def test_a_plan_names_the_disk_space_and_writes_nothing(xelm, tiny):
    (plan,) = xelm("distil", tiny.directory, "--dry-run", "--json").json()["trainings"]
    dense = open_run(tiny.directory).config.dense
    assert (plan["name"], plan["tokens"]) == ("students/student", dense.tokens)
    # 16 ids of 2 bytes, and as many values, at each token and end of a document. The rows are not
    # a whole pass: the teacher reads documents of which they have a part.
    most = sum(len(i.ids) + len(i) for i in open_run(tiny.directory).store().languages.values())
    assert max(plan["passes"].values()) < 0.4
    assert dense.tokens < plan["teacher_bytes"] / (16 * 4) < 0.75 * most
    assert not (tiny.directory / "train" / "students+student").exists()


@pytest.fixture(scope="module")
def distilled(tiny, xelm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("distilled") / "RUN"
    shutil.copytree(tiny.directory, directory)
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        outcome = xelm("distil", directory, "--name", "half", "--teacher-share", ".5", "--json")
    assert outcome.code == 0, outcome.err
    return directory, outcome


def small_parts(patch):
    """The teacher's predictions are written after every few documents."""
    for name in ("_LEAST_TOKENS", "_MOST_TOKENS"):
        patch.setattr(teaching, name, 500)


@pytest.mark.slow
def test_a_student_is_a_model_of_the_run(distilled, xelm, tiny):
    directory, outcome = distilled
    assert outcome.json()["model"] == "students/half"
    run, path = open_run(directory), directory / "students/half"
    assert list(run.combined()) == ["students/half"]
    recipe = json.loads((path / "recipe.json").read_text())
    assert (recipe["top"], recipe["teacher_share"], recipe["method"]) == (16, 0.5, "distil")
    assert recipe["teacher_tokens_read"] >= recipe["targets"]
    assert not run.training("students/half").exists()
    assert "# students/half" in (path / "README.md").read_text()
    assert xelm("verify", directory).code == 0
    assert "students/half" in xelm("history", directory).out
    results = xelm("evaluate", directory, "--corpus", tiny.held_out, "--json").json()
    assert "students/half" in json.dumps(results)
    out = directory.parent / "out"
    assert xelm("export", directory, "students/half", "--out", out).code == 0
    assert (out / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    again = xelm("distil", directory, "--name", "half")
    assert again.code == 2 and "exists already" in again.err


@pytest.mark.slow
def test_without_a_share_of_the_teacher_the_student_is_the_dense_baseline(distilled, xelm):
    directory, _ = distilled
    assert xelm("distil", directory, "--name", "none", "--teacher-share", "0").code == 0
    found, dense = (
        load_file(directory / name / "model.safetensors") for name in ("students/none", "dense")
    )
    for name, tensor in dense.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6)


@pytest.mark.slow
def test_a_killed_distillation_goes_on_and_ends_with_the_same_bits(
    distilled, xelm, tiny, tmp_path, monkeypatch
):
    directory = tmp_path / "RUN"
    shutil.copytree(tiny.directory, directory)
    run, arguments = open_run(directory), ("--name", "half", "--teacher-share", ".5")
    small_parts(monkeypatch)
    calls = []

    def killed(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return teach(*given)

    monkeypatch.setattr(distillation, "teach", killed)
    with pytest.raises(KeyboardInterrupt):
        run.distil("half", distillation.DistilOptions(teacher_share=0.5))
    record = json.loads((run.training("students/half") / "teacher/teacher.json").read_text())
    assert 0 < record["written"] < record["targets"]
    other = xelm("distil", directory, "--name", "half", "--top", 8)
    assert other.code == 2 and "students/half was begun otherwise (top was 16, now 8" in other.err
    assert "students/half" in xelm("status", directory).out

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "join", stopped)  # killed before it is recorded
    with pytest.raises(KeyboardInterrupt):
        run.distil("half", distillation.DistilOptions(teacher_share=0.5))
    assert not run.combined()
    monkeypatch.undo()
    small_parts(monkeypatch)
    assert xelm("distil", directory, *arguments).code == 0
    names = [p.name for p in (directory / "students/half").iterdir() if p.suffix == ".safetensors"]
    for name in names:
        found, wanted = (load_file(d / "students/half" / name) for d in (directory, distilled[0]))
        for tensor, array in wanted.items():
            np.testing.assert_array_equal(found[tensor], array)


@pytest.mark.slow
def test_a_distillation_that_is_given_up_leaves_nothing(tiny, xelm, tmp_path, monkeypatch):
    directory = tmp_path / "RUN"
    shutil.copytree(tiny.directory, directory)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "teach", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run(directory).distil("gone")
    assert xelm("discard", directory, "students/gone").code == 0
    assert not list((directory / "train").glob("*+*"))
    assert "not in training" in xelm("discard", directory, "students/gone").err
