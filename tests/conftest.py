"""Eight CPU devices and strict arrays for every test; a tiny corpus and a tiny RUN, made once."""

import atexit
import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# Before anything imports JAX.
# Most of the time of these tests was compiling, of which LLVM's optimisation and XLA's newer code
# for fused loops take seven parts of eight, and what these give is for longer programs. Where an
# optimisation level is set, as .ci/run does for the slow tests, all is compiled as users have it.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} "
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Of torch, scikit-learn and NumPy: on arrays as small as these, threads cost more than they do, and
# those of several workers wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Workers of -n, and commands that tests start, share what is compiled. They inherit the folder from
# the process that made it, which removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xelm-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Entries are not written at once: who reads a part of one compiles it again, and says so.
    os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_training import CONFIG, MODEL, SOURCES, TEXT

from clustering.files import write_json
from experts.grow import grow
from experts.lock import update
from xelm import open_run
from xelm.cli import main
from xelm.models.parameters import fresh_parameters
from xelm.training.loop import train
from xelm.training.metrics import read_metrics
from xelm.training.trainer import TrainingSpec

jax.config.update("jax_numpy_rank_promotion", "raise")
# The files of a test need not outlast the machine, and there are thousands of them: the system
# writes them when it likes. (A process that is killed loses nothing by it.)
os.fsync = lambda descriptor: None

TRAINED = ("en", "de", "es", "fr")
GROWN = "pt"
# What the presets call for is minutes of work; this is seconds. One set of settings for all
# trainings, so that they share one compiled step.
SETTINGS = {
    "model.vocabulary_size": 384,
    "model.width": 16,
    "model.feedforward_width": 24,
    "model.layer_count": 2,
    "model.head_size": 8,
    "model.head_count": 2,
    "model.key_head_count": 2,
    "model.max_length": 64,
    "vectoriser_dimensions": 12,
    "dense_batch_size": 4,
    "dense_learning_rate": 1e-3,
}
for part, tokens in {"seed": 2048, "experts": 4096, "grow": 1024}.items():
    SETTINGS |= {
        f"{part}.tokens": tokens,
        f"{part}.sequence_length": 32,
        f"{part}.batch_size": 4,
        f"{part}.evaluation.every": 16,
        f"{part}.runtime.mesh_data": 1,
        f"{part}.runtime.checkpoint_every": 4,
        f"{part}.runtime.log_every": 1,
    }


# Of 65,530 (Linux's usual vm.max_map_count), beyond which LLVM's next program ends the process.
MAPS_TO_KEEP = 16_384


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """After each file, forgets compiled programs once they hold many of a process's memory maps.

    Each takes about three, for as long as JAX keeps it: the slow tests of one worker alone would
    come to more than the system allows.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPS_TO_KEEP:
        jax.clear_caches()


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    def json(self):
        assert self.code == 0, self.err
        return json.loads(self.out)


def run_command(*arguments) -> Outcome:
    """Runs `xelm` with these arguments in this process."""
    out, err = io.StringIO(), io.StringIO()
    # The environment that a program may change and a test may not.
    with (
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # of the argument parser
            code = int(exit.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def words(language: str) -> list[str]:
    """A made-up vocabulary of 150 words, its own for each language, a few letters too."""
    draw = random.Random(language)
    letters = draw.sample("abcdefghijklmnopqrstuvwxyz", 12) + draw.sample("äöüéèñçãõß", 2)
    return ["".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(150)]


def write_corpus(folder: Path, languages, documents: int, seed: int) -> Path:
    """Documents of Zipfian words that tend to follow each other, so that there is much to learn."""
    folder.mkdir(parents=True)
    for language in languages:
        vocabulary, draw = words(language), random.Random(f"{language} {seed}")
        weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
        with (folder / f"{language}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(documents):
                chosen = draw.choices(range(len(vocabulary)), weights, k=draw.randint(5, 20))
                spoken = [word for i in chosen for word in (i, (7 * i + 1) % len(vocabulary))]
                text = " ".join(vocabulary[i] for i in spoken)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return folder


def settings(**changes) -> list[str]:
    """`--set` for the tiny RUN, with names such as experts__tokens changed."""
    changed = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in ("--set", f"{name}={value}")]


@dataclass(frozen=True)
class TinyRun:
    """A RUN that was initialised, branched on two clusters of languages, and trained."""

    directory: Path
    corpus: Path
    """With text in one more language, `GROWN`."""
    held_out: Path
    clusters: Path
    outcomes: dict[str, Outcome]
    """By command, as they came."""


@pytest.fixture(scope="session")
def xelm() -> Callable[..., Outcome]:
    return run_command


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are empty files, which saves a second a clustering, where they are not the claim.

    Every kind is drawn from the command line elsewhere: of languages for the tiny RUN, of
    documents in test_run_training.py, of a combination of measures in test_measures.py.
    """
    from matplotlib.figure import Figure  # what draws few tests need

    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())


@pytest.fixture(scope="session")
def tiny_settings() -> Callable[..., list[str]]:
    return settings


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    return write_corpus(folder / "train", (*TRAINED, GROWN), documents=60, seed=0)


@pytest.fixture(scope="session")
def initialised(tmp_path_factory, tiny_corpus) -> tuple[Path, Outcome]:
    """A RUN with a seed and no experts."""
    directory = tmp_path_factory.mktemp("initialised") / "RUN"
    languages = ",".join(TRAINED)
    outcome = run_command(
        "init", directory, "--corpus", tiny_corpus, "--languages", languages, *settings()
    )
    assert outcome.code == 0, outcome.err
    return directory, outcome


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_corpus, initialised) -> TinyRun:
    folder = tmp_path_factory.mktemp("tiny")
    directory = folder / "RUN"
    shutil.copytree(initialised[0], directory)
    held_out = write_corpus(folder / "held-out", TRAINED, documents=6, seed=1)
    commands = {
        "cluster": ("-k", 2, "--languages", ",".join(TRAINED), "--out", folder / "clusters"),
        "branch": (directory, "--clusters", folder / "clusters"),
        "train": (directory, "--all", "--dense"),
    }
    outcomes = {"init": initialised[1]}
    for verb, arguments in commands.items():
        outcomes[verb] = run_command(verb, *arguments)
        assert outcomes[verb].code == 0, outcomes[verb].err
    return TinyRun(
        directory=directory,
        corpus=tiny_corpus,
        held_out=held_out,
        clusters=folder / "clusters",
        outcomes=outcomes,
    )


@pytest.fixture(scope="session")
def place(tiny, initialised, tmp_path_factory):
    """Folders that commands may name: a RUN, one with a seed only, corpora, and what is broken."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny.directory, folder / "run")
    open_run(folder / "run").ensemble()  # what is fitted once is there
    shutil.copytree(initialised[0], folder / "seeded")
    shutil.copytree(tiny.clusters, folder / "clusters")
    for name in ("de", "en"):
        (folder / "corpus").mkdir(exist_ok=True)
        shutil.copy(tiny.corpus / f"{name}.jsonl", folder / "corpus")
    (folder / "odd").mkdir()
    shutil.copy(tiny.corpus / "de.jsonl", folder / "odd" / "klingonish.jsonl")
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    (folder / "text.csv").write_text("language,b\nen,SVO\n")
    (folder / "twice.yaml").write_text("a: [en]\nb: [eng]\n")
    (folder / "doubled.yaml").write_text("a: [en]\na: [de]\n")
    (folder / "broken.yaml").write_text("a: [en\n")
    for name in ("bare", "pickled", "damaged", "foreign", "shrunk", "wordless"):
        shutil.copytree(tiny.directory / "seed", folder / name)
        if name == "wordless":
            for path in (folder / name).glob("tokenizer*"):
                path.unlink()
        weights = folder / name / "model.safetensors"
        if name in ("bare", "pickled"):
            weights.unlink()
        if name == "damaged":
            weights.write_bytes(weights.read_bytes()[:-100])
        if name == "shrunk":
            tensors = load_file(weights)
            tensors["model.norm.weight"] = np.zeros(7, np.float32)
            save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    config = json.loads((folder / "foreign" / "config.json").read_text())
    (folder / "foreign" / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    changes = {"worded": {"hidden_size": "64"}, "uneven": {"num_key_value_heads": 3}}
    for name, change in changes.items():
        shutil.copytree(tiny.directory / "seed", folder / name)
        write_json(folder / name / "config.json", config | change)
    contents = {"no-object": "[]", "no-index": "{", "no-map": "{}"}
    for name, content in contents.items():
        shutil.copytree(tiny.directory / "seed", folder / name)
        file = "config.json" if name == "no-object" else "model.safetensors.index.json"
        (folder / name / file).write_text(content)
        if name != "no-object":  # one file of weights would come before an index
            (folder / name / "model.safetensors").unlink()
    for name in ("run.json", "registry.json", "clusters.json"):
        newer = folder / f"newer-{name}"
        shutil.copytree(tiny.directory, newer)
        value = json.loads((newer / name).read_text())
        write_json(newer / name, value | {"format": 99})
    shutil.copytree(initialised[0], folder / "unfinished")
    (folder / "unfinished" / "registry.json").unlink()
    shutil.copytree(tiny.directory, folder / "growing")
    update(folder / "growing", lambda registry: grow(registry, "pt", "en-es"), "grow")
    (folder / "half").mkdir()
    (folder / "half" / "run.json").write_text('{"format": 3}')
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> TinyRun:
    """The tiny RUN to be changed."""
    shutil.copytree(tiny.directory, tmp_path / "RUN")
    return TinyRun(
        directory=tmp_path / "RUN",
        corpus=tiny.corpus,
        held_out=tiny.held_out,
        clusters=tiny.clusters,
        outcomes=tiny.outcomes,
    )


@pytest.fixture
def llama(tmp_path):
    """The folder of a small random Llama, as transformers write it."""
    from hub_models import CONFIGS, saved  # few tests need torch

    return saved(CONFIGS["llama-grouped"], tmp_path / "hub").directory


@pytest.fixture(scope="session")
def parameters():
    """Random parameters of `small_training.MODEL`."""
    return jax.tree.map(np.asarray, fresh_parameters(MODEL, random_seed=0))


@pytest.fixture
def trained(parameters, tmp_path):
    """A function that trains in a folder of the test, and what metrics.jsonl says of it."""

    def run(config=CONFIG, folder="training", sources=SOURCES, start=parameters, held_out=()):
        training = TrainingSpec(
            label="test",
            start=lambda shardings: jax.device_put(start, shardings),
            sources=sources,
            config=config,
            held_out=held_out,
            directory=tmp_path / folder,
        )
        result = train(training, MODEL, TEXT)
        return result, read_metrics(tmp_path / folder / "metrics.jsonl")

    return run


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """The tiny RUN, whose tokenizer has a template for chats."""
    directory = tmp_path_factory.mktemp("serving") / "RUN"
    shutil.copytree(tiny.directory, directory)
    (directory / "seed" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    return directory


@pytest.fixture(scope="module")
def server(chatty):
    """A server of the RUN `chatty`."""
    from serving import served  # what a server needs few tests need

    with served(chatty) as found:
        yield found


@pytest.fixture
def slow(monkeypatch):
    """Steps that take their time, so that texts are still under way; how long is at ["seconds"]."""
    from xelm.inference.engine import Engine

    step, pace = Engine.step, {"seconds": 0.05}

    def slowed(self, *given):
        time.sleep(pace["seconds"])
        return step(self, *given)

    monkeypatch.setattr(Engine, "step", slowed)
    return pace
