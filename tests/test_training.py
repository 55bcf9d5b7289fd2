"""Training: the losses it had, the same bits after a crash, the same losses on any mesh, one
compilation, and languages in their shares."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from clustering.errors import UserError
from xelm.config import TrainConfig
from xelm.data.rows import ORIGIN, Source
from xelm.data.store import LanguageIds
from xelm.models.config import ModelConfig
from xelm.models.parameters import fresh_parameters
from xelm.training import guard, loop
from xelm.training.account import DivergedError
from xelm.training.loop import train
from xelm.training.metrics import MetricsLog, read_metrics
from xelm.training.preemption import Preempted
from xelm.training.sharding import make_mesh, parameter_shardings
from xelm.training.step import program

MODEL = ModelConfig(
    vocabulary_size=48,
    width=16,
    feedforward_width=24,
    layer_count=2,
    head_count=2,
    key_head_count=2,
    head_size=8,
    max_length=32,
)
CONFIG = TrainConfig(
    tokens=20 * 128,
    sequence_length=16,
    batch_size=8,
    learning_rate=3e-3,
    checkpoint_every=6,
    log_every=1,
    mesh_data=1,
)
SHARES = {"de": 0.5, "el": 0.3, "sw": 0.2}


def source(language: str, documents: int = 40, length: int = 23) -> Source:
    """Chains in which each token decides the next: 5 x + c modulo 40, c by language."""
    step = 3 + 2 * list(SHARES).index(language)
    draw = np.random.default_rng(step)
    found = []
    for first in draw.integers(0, 40, documents):
        chain = [int(first)]
        while len(chain) < length:
            chain.append((5 * chain[-1] + step) % 40)
        found += chain
    ids = LanguageIds(
        language=language,
        ids=np.asarray(found, np.uint16) + 4,
        ends=np.arange(1, documents + 1) * length,
        bytes=np.full(documents, length),
    )
    return Source(ids=ids, share=SHARES[language])


SOURCES = [source(language) for language in SHARES]


@pytest.fixture(scope="module")
def parameters():
    return jax.tree.map(np.asarray, fresh_parameters(MODEL, random_seed=0))


@pytest.fixture
def trained(parameters, tmp_path):
    """A function that trains in a folder of the test, and what metrics.jsonl says of it."""

    def run(config=CONFIG, folder="training", sources=SOURCES, start=parameters):
        result = train(
            lambda shardings: jax.device_put(start, shardings),
            MODEL,
            sources,
            config,
            tmp_path / folder,
            start_id=1,
            end_id=2,
            label="test",
        )
        return result, read_metrics(tmp_path / folder / "metrics.jsonl")

    return run


def losses(metrics) -> list[float]:
    return [line["loss"] for line in metrics]


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.parameters, other.parameters)
    assert (one.tokens, one.language_tokens) == (other.tokens, other.language_tokens)


def assert_same_lines(one, other):
    """All but how fast it went."""
    assert [line | {"tokens_per_second": 0} for line in one] == [
        line | {"tokens_per_second": 0} for line in other
    ]


# On one CPU device; any change of these is a change of what is learned.
GOLDEN = [
    3.899032,
    3.837285,
    3.780018,
    3.74053,
    3.687658,
    3.654704,
    3.633157,
    3.586802,
    3.582025,
    3.542381,
    3.534164,
    3.506486,
    3.474526,
    3.451954,
    3.446051,
    3.441262,
    3.430692,
    3.429717,
    3.430289,
    3.426795,
]


def test_the_losses_are_those_recorded(trained):
    _, metrics = trained()
    np.testing.assert_allclose(losses(metrics), GOLDEN, atol=1e-4)


def test_training_changes_what_it_returns_and_not_what_it_was_given(trained, parameters):
    before = jax.tree.map(np.copy, parameters)
    result, _ = trained(replace(CONFIG, tokens=128))
    jax.tree.map(np.testing.assert_array_equal, parameters, before)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), result.parameters, before)
    assert all(jax.tree.leaves(changed))


def test_gradients_are_clipped_and_their_norm_before_that_is_told(trained, parameters):
    # Far below Adam's epsilon, so that next to nothing is left to move by.
    config = replace(CONFIG, tokens=3 * 128, clip_norm=1e-14, weight_decay=0.0)
    result, metrics = trained(config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), result.parameters, parameters
    )
    assert all(line["grad_norm"] > 0.1 for line in metrics)


def test_what_can_be_learned_is_learned(trained):
    # The next token follows from the last two but for the first of each document: nothing else to
    # know. ln 48 = 3.87 at first.
    config = replace(CONFIG, tokens=150 * 128, learning_rate=2e-2, checkpoint_every=1000)
    _, metrics = trained(config)
    assert metrics[-1]["loss"] < 0.7


def test_accumulated_parts_make_the_update_of_the_whole_batch(trained):
    # Few documents: the last row of each pass is padded, so that parts have unequal targets.
    sources = [source(language, documents=5) for language in SHARES]
    config = replace(CONFIG, tokens=6 * 128)
    whole, metrics = trained(config, "whole", sources)
    parts, other = trained(replace(config, accumulation_steps=4), "parts", sources)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.parameters, parts.parameters
    )
    np.testing.assert_allclose(losses(metrics), losses(other), atol=1e-5)
    assert whole.language_tokens == parts.language_tokens


def test_trainings_of_one_shape_share_one_compiled_step(trained):
    for changes in (
        {"tokens": 3 * 128},
        {"tokens": 5 * 128, "learning_rate": 1e-2, "schedule": "wsd", "random_seed": 3},
        {"tokens": 2 * 128, "log_every": 2, "checkpoint_every": 1, "sampling_exponent": 1.0},
    ):
        trained(replace(CONFIG, **changes), folder=str(changes["tokens"]))
    compiled = program(MODEL, CONFIG, make_mesh(CONFIG))
    assert (compiled.step._cache_size(), compiled.create._cache_size()) == (1, 1)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [
        (2, 2, 2),
        *(pytest.param(*m, marks=pytest.mark.slow) for m in ((8, 1, 1), (2, 4, 1), (1, 1, 2))),
    ],
)
def test_the_losses_do_not_depend_on_the_mesh(trained, data, fsdp, tensor):
    short = replace(CONFIG, tokens=6 * 128)
    config = replace(short, mesh_data=data, mesh_fsdp=fsdp, mesh_tensor=tensor)
    mesh = make_mesh(config)
    assert mesh.shape == {"data": data, "fsdp": fsdp, "tensor": tensor}
    up = parameter_shardings(MODEL, mesh)["blocks"]["up"]["weight"]
    assert up.shard_shape((2, 16, 24)) == (2, 16 // fsdp, 24 // tensor)
    _, wanted = trained(short, "one device")
    _, metrics = trained(config, "mesh")
    np.testing.assert_allclose(losses(metrics), losses(wanted), atol=1e-4)


@pytest.mark.parametrize(("batch_size", "data"), [(8, 8), (12, 6), (7, 7), (16, 8), (1, 1)])
def test_a_small_batch_takes_as_many_devices_as_divide_it(batch_size, data):
    mesh = make_mesh(replace(CONFIG, mesh_data=0, batch_size=batch_size))
    assert mesh.shape["data"] == data


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"mesh_data": 16}, "a mesh of data 16 x fsdp 1 x tensor 1 needs 16 devices; there are 8"),
        ({"mesh_data": 3}, "must be a multiple of data x fsdp = 3; got 8"),
        ({"mesh_data": 4, "accumulation_steps": 4}, "data x fsdp = 4; got 2"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_a_users_mistake(changes, fault):
    with pytest.raises(UserError, match=fault):
        make_mesh(replace(CONFIG, **changes))


def test_a_model_that_the_mesh_does_not_divide_is_a_users_mistake():
    mesh = make_mesh(replace(CONFIG, mesh_tensor=7))
    with pytest.raises(UserError, match=r"must be a multiple of mesh axis tensor = 7; got \d+"):
        parameter_shardings(MODEL, mesh)


def test_half_precision_stays_close_to_full(trained):
    _, metrics = trained(replace(CONFIG, dtype="bfloat16"))
    assert losses(metrics) != pytest.approx(GOLDEN, abs=1e-6)
    np.testing.assert_allclose(losses(metrics), GOLDEN, rtol=5e-3)


def test_rematerialisation_changes_no_loss(trained):
    _, metrics = trained(replace(CONFIG, rematerialise=True))
    np.testing.assert_allclose(losses(metrics), GOLDEN, atol=1e-5)


def test_languages_are_seen_in_their_shares_and_counted(trained):
    result, metrics = trained(replace(CONFIG, tokens=100 * 128, checkpoint_every=1000))
    assert result.tokens == sum(result.language_tokens.values()) == metrics[-1]["tokens"]
    assert metrics[-1]["language_tokens"] == result.language_tokens
    # Documents are of one length, so shares of rows are shares of tokens.
    for language, share in SHARES.items():
        assert result.language_tokens[language] / result.tokens == pytest.approx(share, rel=0.01)
    # Of 24 tokens to predict, one starts a document and is no target.
    assert result.tokens == pytest.approx(100 * 128 * 24 / 25, rel=0.01)


def test_metrics_say_what_happened(trained):
    _, metrics = trained()
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert all(line["skipped"] == 0 and "utilisation" not in line for line in metrics)
    assert metrics[0]["learning_rate"] == pytest.approx(3e-3)  # one step of warm-up
    assert metrics[-1]["learning_rate"] == pytest.approx(3e-4, rel=1e-3)
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in metrics)


class Interrupt(Exception):
    pass


def interrupt_at(monkeypatch, step: int):
    """The machine dies as the metrics of that step are to be written."""
    write = MetricsLog.write

    def fail(self, line):
        if line["step"] == step:
            raise Interrupt
        write(self, line)

    monkeypatch.setattr(MetricsLog, "write", fail)


@pytest.mark.parametrize("steps", [(3,), (7,), (12,), (8, 9, 20)])
def test_resumed_equals_uninterrupted_bit_for_bit(trained, steps):
    whole, metrics = trained(folder="whole")
    for step in steps:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
            interrupt_at(patch, step)
            trained(folder="resumed")
    resumed, other = trained(folder="resumed")
    assert_same_bits(resumed, whole)
    assert_same_lines(other, metrics)


def test_a_resumed_training_goes_on_from_its_checkpoint(trained, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        trained()
    # A line that the crash cut short.
    with (tmp_path / "training" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "los')
    begun = []
    batches = loop.batches
    monkeypatch.setattr(
        loop, "batches", lambda *a, **k: begun.append(k["first_step"]) or batches(*a, **k)
    )
    _, metrics = trained()
    assert begun == [12]
    assert [line["step"] for line in metrics] == list(range(1, 21))


def test_a_finished_training_run_again_gives_the_same_at_once(trained, monkeypatch):
    first, metrics = trained()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)  # would raise, were there a step to do
        again, other = trained()
    assert_same_bits(again, first)
    assert other == metrics


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate was 0\.003, now 0\.001"),
        ({"random_seed": 1, "batch_size": 16}, "was 8, now 16; random_seed was 0, now 1"),
    ],
)
def test_other_settings_in_a_half_done_folder_are_refused(trained, tmp_path, changes, fault):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 8)
        trained()
    before = (tmp_path / "training" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=fault) as caught:
        trained(replace(CONFIG, **changes))
    assert str(tmp_path / "training") in str(caught.value)
    assert (tmp_path / "training" / "metrics.jsonl").read_bytes() == before
    # How often it is saved and logged may change.
    trained(replace(CONFIG, checkpoint_every=2, log_every=3))


def test_other_languages_in_a_half_done_folder_are_refused(trained):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 8)
        trained()
    with pytest.raises(UserError, match="the languages differ"):
        trained(sources=SOURCES[:2])


@pytest.mark.parametrize("method", ["save", "check_for_errors"])
def test_a_checkpoint_that_cannot_be_saved_is_a_users_mistake(
    trained, tmp_path, monkeypatch, method
):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, method, fail)
    with pytest.raises(UserError, match=r"cannot save a checkpoint in .*No space left") as caught:
        trained()
    assert str(tmp_path / "training" / "checkpoints") in str(caught.value)


@pytest.mark.slow
def test_a_training_killed_at_any_moment_ends_with_the_same_bytes(
    initialised, tiny_settings, xelm, tmp_path
):
    settings = tiny_settings(experts__tokens=128 * 600, experts__checkpoint_every=7)
    corpus = json.loads((initialised[0] / "run.json").read_text())["corpus"]
    runs = [tmp_path / "whole", tmp_path / "killed"]
    xelm("cluster", "-k", 2, "--languages", "en,de,es,fr", "--out", tmp_path / "clusters")
    for run in runs:
        made = xelm(
            "init",
            run,
            "--corpus",
            corpus,
            "--languages",
            "en,de,es,fr",
            "--clusters",
            tmp_path / "clusters",
            *settings,
        )
        assert made.code == 0, made.err
    command = [sys.executable, "-m", "xelm.cli", "train", "--all"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, runs[0]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    draw = random.Random(0)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = 0
    for _ in range(30):
        process = subprocess.Popen([*command, runs[1]], env=environment, **quiet)
        before = progress_of(runs[1])
        wanted = draw.randint(1, 30)
        while progress_of(runs[1]) < before + wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed == 30
    done = subprocess.run([*command, runs[1]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = sorted(runs[0].glob("experts/*/v1/model.safetensors"))
    assert len(weights) == 2
    for path in weights:
        other = runs[1] / path.relative_to(runs[0])
        assert other.read_bytes() == path.read_bytes()
        assert not (runs[1] / "train" / path.parts[-3]).exists()  # what a crash left is gone
    assert xelm("verify", runs[1]).code == 0


def progress_of(run) -> int:
    """Steps whose metrics are on disk, over all experts."""
    found = [*run.glob("train/*/metrics.jsonl"), *run.glob("experts/*/v1/metrics.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in found)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    trained, tmp_path, monkeypatch, capsys
):
    whole, _ = trained(folder="whole")
    with pytest.raises(Interrupt):
        interrupt_at(monkeypatch, 15)
        trained(folder="broken")
    monkeypatch.undo()
    checkpoints = tmp_path / "broken" / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir())
    assert steps == [6, 12]
    for file in (checkpoints / "12" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"not what it was")
    again, _ = trained(folder="broken")
    said = capsys.readouterr().err
    assert "step 12 is damaged" in said and "test: going on after step 6" in said
    assert_same_bits(again, whole)
    # It is kept, should it be of use to somebody.
    assert (tmp_path / "broken" / "damaged-12" / "state").is_dir()


def test_a_checkpoint_with_a_damaged_list_of_hashes_is_damaged(trained, tmp_path, capsys):
    half_done(trained, tmp_path / "broken")
    (tmp_path / "broken/checkpoints/12/sha256.json").write_text("{")
    trained(folder="broken")
    said = capsys.readouterr().err
    assert "step 12 is damaged" in said and "sha256.json" in said
    assert "test: going on after step 6" in said


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_any_change_of_a_checkpoint_is_noticed(trained, tmp_path, monkeypatch, capsys, harm):
    whole, _ = trained(folder="whole")
    half_done(trained, tmp_path / "broken")
    files = [path for path in (tmp_path / "broken/checkpoints/12").rglob("*") if path.is_file()]
    spoilt = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(spoilt.read_bytes())
    if harm == "gone":
        spoilt.unlink()
    else:
        content[len(content) // 2] ^= 1  # a single bit
        spoilt.write_bytes(content if harm == "flipped" else content[:-1])
    again, _ = trained(folder="broken")
    name = spoilt.relative_to(tmp_path / "broken/checkpoints/12").as_posix()
    why = "is missing" if harm == "gone" else "is not as it was written"
    said = capsys.readouterr().err
    assert f"the checkpoint of step 12 is damaged ({name} {why}); going back" in said
    assert "test: going on after step 6" in said
    assert_same_bits(again, whole)


def test_a_training_that_diverges_is_stopped_before_it_is_saved(trained, tmp_path):
    config = replace(CONFIG, learning_rate=1e30, clip_norm=1e30, log_every=1000)
    said = r"test has diverged: its parameters are no numbers after step 6; a peak rate of 1e\+30"
    with pytest.raises(DivergedError, match=said):
        trained(config)
    assert not list((tmp_path / "training" / "checkpoints").glob("[0-9]*"))


def batches_of(config):
    found = loop.batches(
        list(SOURCES),
        steps=config.steps,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        start_id=1,
        end_id=2,
        random_seed=config.random_seed,
    )
    return list(found)


def test_a_step_without_a_number_changes_nothing_but_what_is_counted(parameters):
    mesh = make_mesh(CONFIG)
    functions = program(MODEL, CONFIG, mesh)
    batch = {name: array for name, array in batches_of(CONFIG)[0].items() if name not in ORIGIN}
    spoilt = jax.tree.map(np.copy, parameters)
    spoilt["norm"]["scale"][3] = np.nan
    with jax.set_mesh(mesh):
        before = functions.create(spoilt)
        kept = jax.tree.map(np.array, before)
        state, metrics = functions.step(before, batch, 1e-3)
    for part in ("parameters", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(kept, part))
    assert np.isnan(metrics.loss) and (metrics.skipped, metrics.most_in_a_row) == (1, 1)
    assert (state.step, state.guard.known) == (1, 0) and not state.guard.losses.any()
    assert not functions.sound(state.parameters) and functions.sound(parameters)


def skip(monkeypatch, steps):
    """To these steps, the losses before them look as if they had been far lower."""

    def spying(model, config, mesh):
        functions = program(model, config, mesh)

        def step(state, batch, rate):
            if int(state.step) + 1 not in steps:
                return functions.step(state, batch, rate)
            guard = jax.tree.map(np.array, state.guard)
            low = guard._replace(losses=guard.losses - 100, known=np.int32(1000))
            low = jax.device_put(low, functions.state_shardings.guard)
            state, metrics = functions.step(state._replace(guard=low), batch, rate)
            guard = state.guard._replace(losses=guard.losses, known=guard.known)
            guard = jax.device_put(guard, functions.state_shardings.guard)
            return state._replace(guard=guard), metrics

        return functions._replace(step=step)

    monkeypatch.setattr(loop, "program", spying)


def test_steps_that_are_skipped_are_counted_and_the_training_goes_on(trained, monkeypatch):
    plain, metrics = trained(folder="plain")
    skip(monkeypatch, {5, 6, 7, 12})
    skipped, other = trained(folder="skipped")
    assert [line["skipped"] for line in other] == [0] * 4 + [1, 2] + [3] * 5 + [4] * 9
    assert losses(other)[:5] == losses(metrics)[:5] and losses(other)[8] != losses(metrics)[8]
    assert skipped.language_tokens == plain.language_tokens
    # Steps 6 and 12, which are saved, are among them.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        trained(folder="broken")
    again, lines = trained(folder="broken")
    assert_same_bits(again, skipped)
    assert_same_lines(lines, other)


@pytest.mark.parametrize("log_every", [1, 10])
def test_after_too_many_in_a_row_a_training_ends(trained, monkeypatch, tmp_path, log_every):
    skip(monkeypatch, set(range(8, 12)))  # over before anybody looks, if that is seldom
    config = replace(CONFIG, skip_limit=4, log_every=log_every, checkpoint_every=7)
    seen = 11 if log_every == 1 else 14
    said = f"diverged: 4 steps in a row were skipped; at step {seen} it has loss 3.*reads rows "
    with pytest.raises(DivergedError, match=said) as caught:
        trained(config)
    assert [path.name for path in (tmp_path / "training/checkpoints").iterdir()] == ["7"]
    batch = batches_of(config)[seen - 1]
    rows = {tag: [] for tag in SHARES}
    for index, row in zip(batch["language"], batch["row"]):
        rows[list(SHARES)[index]].append(row)
    for tag, numbers in rows.items():
        assert f"{tag} {', '.join(map(str, numbers))}" in str(caught.value)


def test_losses_far_above_those_before_are_spikes():
    draw, of = np.random.default_rng(0), guard.fresh()
    asked, later = jax.jit(guard.harmless), jax.jit(guard.after)
    norm, yes, no = np.float32(1), np.bool_(True), np.bool_(False)
    for number, loss in enumerate((3 + draw.normal(size=200)).astype(np.float32)):
        # Nothing is a spike before there are enough losses to tell.
        assert bool(asked(of, np.float32(50), norm)) == (number < 64)
        if number >= 64:
            known = np.asarray(of.losses)[: min(number, 128)]
            edge = known.mean() + 6 * known.std()
            assert asked(of, np.float32(edge - 0.01), norm)
            assert not asked(of, np.float32(edge + 0.01), norm)
        assert not asked(of, np.float32("nan"), norm)
        assert not asked(of, loss, np.float32("inf"))
        of = later(of, loss, yes)
        assert (of.known, of.skipped, of.in_a_row) == (number + 1, 0, 0)
    for times in range(1, 4):
        of = later(of, np.float32("nan"), no)
        assert (of.known, of.skipped, of.in_a_row, of.most_in_a_row) == (200, times, times, times)
    of = later(of, np.float32(3), yes)
    assert (of.in_a_row, of.most_in_a_row) == (0, 3)


def test_what_lasts_is_no_spike_for_long():
    of, later, asked = guard.fresh(), jax.jit(guard.after), jax.jit(guard.harmless)
    for _ in range(150):
        of = later(of, np.float32(2), np.bool_(True))
    # Three nats above even losses, which a few rows of a hard language may be, are none.
    assert asked(of, np.float32(4.9), np.float32(1))
    skipped = 0
    for _ in range(50):
        made = asked(of, np.float32(6), np.float32(1))
        of = later(of, np.float32(6), made)
        skipped += not made
    assert 1 < skipped < 10
    assert asked(of, np.float32(6), np.float32(1))


def end_at(monkeypatch, step: int):
    """The machine is to be given back as the metrics of that step are written."""
    write = MetricsLog.write

    def ask(self, line):
        write(self, line)
        if line["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", ask)


@pytest.mark.parametrize("step", [1, 8, 19, 20])
def test_a_training_that_is_asked_to_end_is_saved_first(trained, tmp_path, step):
    whole, metrics = trained(folder="whole")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        end_at(patch, step)
        with pytest.raises(Preempted, match="test was asked to end; it is saved"):
            trained(folder="ended")
    saved = [int(path.name) for path in (tmp_path / "ended/checkpoints").iterdir()]
    assert max(saved) == min(20, step + 1)
    assert signal.getsignal(signal.SIGTERM) == before
    again, other = trained(folder="ended")
    assert_same_bits(again, whole)
    assert_same_lines(other, metrics)


def test_a_training_of_another_version_is_refused(trained, tmp_path, monkeypatch):
    half_done(trained, tmp_path / "older")
    monkeypatch.setattr(loop, "STATE", loop.STATE + 1)
    with pytest.raises(UserError, match="unfinished training of another version of xelm"):
        trained(folder="older")


def test_as_many_checkpoints_are_kept_as_asked_for(trained, tmp_path):
    config = replace(CONFIG, checkpoint_every=2, keep_checkpoints=3, keep_every=8)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 19)
        trained(config)
    kept = sorted(int(path.name) for path in (tmp_path / "training/checkpoints").iterdir())
    assert kept == [8, 14, 16, 18]


def test_a_start_that_is_no_number_is_not_blamed_on_the_rate(trained, parameters):
    spoilt = jax.tree.map(lambda x: x * np.float32("nan"), parameters)
    with pytest.raises(
        UserError, match="test has loss nan and gradient norm nan before anything was learned"
    ):
        trained(start=spoilt)


def half_done(trained, folder: Path) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        trained(folder=folder.name)
    return sorted(file for file in (folder / "checkpoints").rglob("*") if file.is_file())


def test_checkpoints_that_are_all_damaged_are_named_and_left_alone(trained, tmp_path):
    files = half_done(trained, tmp_path / "broken")
    for file in files:
        if "state" in file.parts:
            file.write_bytes(b"not what it was")
    with pytest.raises(UserError, match=r"step 12 is .*; the checkpoint of step 6 is .*; delete"):
        trained(folder="broken")
    assert sorted(f for f in (tmp_path / "broken/checkpoints").rglob("*") if f.is_file()) == files


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_healthy_checkpoints_outlive_a_machine_in_trouble(trained, tmp_path, monkeypatch, error):
    files = half_done(trained, tmp_path / "half")

    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(type(error)):
            trained(folder="half")
    assert sorted(f for f in (tmp_path / "half/checkpoints").rglob("*") if f.is_file()) == files
