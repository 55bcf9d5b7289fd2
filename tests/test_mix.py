"""Mixtures of experts: their routers, their shape in transformers, their training, and their place
in a RUN."""

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from hub_models import auto_model
from safetensors.numpy import load_file
from serving import served
from shared import needs_llama_cpp
from small_training import CONFIG, MODEL, SOURCES, TEXT
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from clustering.errors import UserError
from xelm import open_run
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.models.config import Rope
from xelm.models.mixture import (
    Moments,
    discriminants,
    mean_of,
    mixed,
    mixture_shape,
    with_feedforward,
)
from xelm.models.parameters import bind, by_path, graph, shapes
from xelm.runs import mix as mixing
from xelm.runs.options import MixOptions
from xelm.settings import vary
from xelm.training.loop import train
from xelm.training.metrics import read_metrics
from xelm.training.step import balance
from xelm.training.trainable import completed, divide
from xelm.training.trainer import TrainingSpec
from xelm.training_config import MixtureConfig


def moments_of(texts) -> list[Moments]:
    """Of the inputs of one layer, [N, D] for each expert."""
    return [Moments(len(x), x.sum(axis=0)[None], (x.T @ x)[None]) for x in texts]


def test_routers_are_the_linear_discriminants_of_the_texts():
    """The log odds of two normal distributions with one covariance, which are known."""
    draw = np.random.default_rng(0)
    means = np.asarray([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    spread = np.asarray([[1.0, 0.3, 0.0], [0.3, 0.5, 0.0], [0.0, 0.0, 0.01]])
    texts = [draw.multivariate_normal(mean, spread, 200_000) for mean in means]
    (router,) = discriminants(moments_of(texts))
    np.testing.assert_allclose(router.sum(axis=1), 0, atol=1e-9)
    inverse = np.linalg.inv(spread)
    points = np.asarray([[1.0, 1.0, 1.0], [2.0, -1.0, 1.0], [0.0, 0.0, 1.0]])
    # The third direction is nearly 1 everywhere, so that a constant can stand in it.
    odds = points @ inverse @ (means[0] - means[1])
    odds += -means[0] @ inverse @ means[0] / 2 + means[1] @ inverse @ means[1] / 2
    np.testing.assert_allclose(points @ (router[:, 0] - router[:, 1]), odds, rtol=0.15, atol=0.1)


def test_the_router_finds_the_expert_of_each_of_five_texts():
    draw = np.random.default_rng(1)
    means = draw.normal(size=(5, 16)) + 1
    texts = [mean + 0.5 * draw.normal(size=(500, 16)) for mean in means]
    (router,) = discriminants(moments_of(texts))
    right = [np.mean((text @ router).argmax(axis=1) == e) for e, text in enumerate(texts)]
    assert min(right) > 0.95


@pytest.fixture(scope="module")
def models():
    def random(seed):
        draw, found = np.random.default_rng(seed), {}
        for path, leaf in by_path(shapes(MODEL)).items():
            values = draw.normal(scale=0.2, size=leaf.shape).astype(np.float32)
            found[path] = values + path.endswith("scale")
        return unflatten_dict(found, sep="/")

    return [random(seed) for seed in range(3)]


def logits(config, parameters, tokens):
    network = graph(config)
    return jax.jit(lambda p: bind(network, p)(tokens))(parameters)


@pytest.mark.parametrize("length", [7, 32])
def test_a_mixture_of_equal_experts_is_the_expert(models, length):
    """In few tokens, of which only experts with weight read the parameters, and in many."""
    one = models[0]
    mean, draw = mean_of([one, one, one]), np.random.default_rng(0)
    routers = draw.normal(size=(MODEL.layer_count, MODEL.width, 3))
    tokens = jnp.asarray(draw.integers(0, 40, (3, length)))
    found = logits(mixture_shape(MODEL, 3, 2), mixed(mean, [one] * 3, routers), tokens)
    np.testing.assert_allclose(found, logits(MODEL, one, tokens), atol=1e-5)


def test_a_token_that_is_routed_to_one_expert_passes_that_alone(models):
    """Routers with the logit of expert 1 far above the others on the given states, in a model whose
    states all have a positive first entry."""
    mean = mean_of(models)
    flat = by_path(mean)
    flat["embedding"] = flat["embedding"].copy()
    flat["embedding"][:, 0] = 30  # which no attention or feed-forward of this size overturns
    mean = {**mean, "embedding": flat["embedding"]}
    routers = np.zeros((MODEL.layer_count, MODEL.width, 3))
    routers[:, 0, 1] = 100
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 9)))
    found = logits(mixture_shape(MODEL, 3, 1), mixed(mean, models, routers), tokens)
    wanted = logits(MODEL, with_feedforward(mean, models[1]), tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    other = logits(MODEL, with_feedforward(mean, models[2]), tokens)
    assert np.abs(found - other).max() > 1e-3


def test_the_mean_is_that_of_all_weights_and_feedforwards_stay_apart(models):
    mean = by_path(mean_of(models))
    flat = [by_path(model) for model in models]
    for path, array in mean.items():
        np.testing.assert_allclose(array, np.mean([f[path] for f in flat], axis=0), atol=1e-7)
    shape = mixture_shape(MODEL, 3, 2)
    found = by_path(mixed(mean_of(models), models, np.zeros((2, 16, 3))))
    assert {p: a.shape for p, a in found.items()} == {
        p: a.shape for p, a in by_path(shapes(shape)).items()
    }
    np.testing.assert_array_equal(found["blocks/expert_2/up/weight"], flat[2]["blocks/up/weight"])
    assert shape.parameter_count == sum(array.size for array in found.values())
    apart = 3 * 16 * 24 * 2  # one expert in two layers
    assert shape.active_parameter_count == shape.parameter_count - apart


def test_balance_is_that_of_transformers_and_least_where_all_experts_are_used_equally():
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(1, 2, 50, 4)).astype(np.float32)
    probabilities = jax.nn.softmax(jnp.asarray(scores))
    found = balance(probabilities, jnp.ones((2, 50), bool), 2)
    wanted = load_balancing_loss_func((torch.tensor(scores.reshape(-1, 4)),), 4, 2)
    np.testing.assert_allclose(found, float(wanted), rtol=1e-5)
    # Each token surely passes two experts, each pair as often as the others.
    pairs = np.kron(np.eye(2), np.ones((1, 2))) * 0.5
    even = jnp.asarray(np.tile(pairs, (25, 1)).reshape(1, 1, 50, 4), jnp.float32)
    np.testing.assert_allclose(balance(even, jnp.ones((1, 50), bool), 2), 2.0, rtol=1e-6)
    one = even.at[:].set(jnp.asarray([0.5, 0.5, 0, 0]))
    np.testing.assert_allclose(balance(one, jnp.ones((1, 50), bool), 2), 4.0, rtol=1e-6)
    # What is no text counts for nothing.
    half = jnp.concatenate([even, one], axis=2)
    valid = jnp.arange(100)[None] < 50
    np.testing.assert_allclose(balance(half, valid, 2), 2.0, rtol=1e-6)


def test_routers_are_trained_alone_where_that_is_wanted(models):
    shape = mixture_shape(MODEL, 3, 2)
    whole = mixed(mean_of(models), models, np.ones((2, 16, 3)))
    config = replace(CONFIG, mixture=MixtureConfig(trained="router"))
    trained, fixed = divide(whole, config, shape)
    assert list(by_path(trained)) == ["blocks/router/weight"]
    assert {*by_path(trained), *by_path(fixed.frozen)} == set(by_path(whole))
    changed = jax.tree.map(lambda x: x + 1, trained)
    found = by_path(completed(changed, whole, config, shape))
    for path, array in by_path(whole).items():
        np.testing.assert_array_equal(found[path], array + (path == "blocks/router/weight"))


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all", "router"])
def test_a_mixture_is_trained_alike_on_one_device_and_on_eight(models, tmp_path, trained):
    shape = mixture_shape(MODEL, 2, 1)
    whole = mixed(mean_of(models[:2]), models[:2], np.ones((2, 16, 2)) * [1, -1])
    found = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        config = replace(
            CONFIG, tokens=6 * 128, mixture=MixtureConfig(trained=trained, balance=0.1)
        )
        names = ("data", "fsdp", "tensor")
        config = vary(config, {f"runtime.mesh_{n}": size for n, size in zip(names, mesh)})
        spec = TrainingSpec(
            label="mixture",
            start=lambda shardings: jax.tree.map(jax.device_put, whole, shardings),
            sources=SOURCES,
            config=config,
            directory=tmp_path / str(mesh),
        )
        result = train(spec, shape, TEXT)
        lines = read_metrics(spec.directory / "metrics.jsonl")
        found.append(([line["loss"] for line in lines], by_path(result.parameters)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    assert found[0][0][0] - found[0][0][-1] > (0.02 if trained == "all" else -1)
    for path, array in by_path(whole).items():
        np.testing.assert_allclose(found[0][1][path], found[1][1][path], atol=2e-4)
        changed = not np.array_equal(found[0][1][path], array)
        assert changed == (trained == "all" or path == "blocks/router/weight"), path


@pytest.fixture(scope="module")
def mixed_run(tiny, xelm, tmp_path_factory):
    """A RUN with a mixture whose routers were trained."""
    directory = tmp_path_factory.mktemp("mixed") / "RUN"
    shutil.copytree(tiny.directory, directory)
    arguments = ("--name", "two", "--train", "router", "--tokens", 1024, "--top", 1)
    outcome = xelm("mix", directory, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return directory, outcome


@pytest.mark.slow
def test_a_mixture_is_read_by_transformers_with_equal_logits(mixed_run):
    path = mixed_run[0] / "mixes/two"
    config = json.loads((path / "config.json").read_text())
    assert (config["architectures"], config["num_local_experts"]) == (["MixtralForCausalLM"], 2)
    tokens = np.random.default_rng(0).integers(4, 300, (2, 40))
    with torch.no_grad():
        wanted = auto_model(path)(torch.tensor(tokens)).logits.numpy()
    shape = read_config(path)
    parameters = read_for_inference(path, shape)
    form = open_run(mixed_run[0]).tokenizer().text_format
    scores = score_documents(shape, parameters, list(tokens), text_format=form, context_length=64)
    if form.start_id is None:
        log_p = torch.log_softmax(torch.tensor(wanted), -1).numpy()
        came = np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
        np.testing.assert_allclose([s[1:40] for s in scores], came, atol=1e-4)
    else:
        framed = np.concatenate([np.full((2, 1), form.start_id), tokens], axis=1)
        with torch.no_grad():
            log_p = torch.log_softmax(auto_model(path)(torch.tensor(framed)).logits, -1).numpy()
        came = np.take_along_axis(log_p[:, :-1], tokens[:, :, None], axis=2)[..., 0]
        np.testing.assert_allclose([s[:40] for s in scores], came, atol=1e-4)


@pytest.mark.slow
def test_a_mixture_is_a_model_of_the_run(mixed_run, xelm, tiny):
    directory, outcome = mixed_run
    assert outcome.json()["model"] == "mixes/two"
    run, path = open_run(directory), directory / "mixes/two"
    assert list(run.combined()) == ["mixes/two"]
    recipe = json.loads((path / "recipe.json").read_text())
    shape = read_config(path)
    assert recipe["parameters"] == shape.parameter_count > recipe["active_parameters"]
    assert xelm("verify", directory).code == 0
    assert "mixes/two" in xelm("history", directory).out
    results = xelm("evaluate", directory, "--corpus", tiny.held_out, "--json").json()
    rows = [row for row in results["rows"] if row["system"] == "mixes/two"]
    assert {row["language"] for row in rows} == {"en", "de", "es", "fr"}
    out = directory.parent / "out"
    assert xelm("export", directory, "mixes/two", "--out", out).code == 0
    said = xelm("generate", directory, "ab", "--model", "mixes/two", "--max-new-tokens", 5)
    assert said.code == 0 and said.out.startswith("ab")
    with served(directory, "language") as server:
        assert [model.id for model in server.client().models.list()][-1] == "xelm:mixes/two"
        body = {"prompt": ["ab", "cd"], "max_tokens": 5, "temperature": 0, "logprobs": 1}
        found = server.post({"model": "xelm:mixes/two", "echo": True, **body}).json()["choices"]
        alone = run.model("mixes/two")
        for text, choice in zip(("ab", "cd"), found):
            wanted = alone.generate(text, max_new_tokens=5, temperature=0.0)
            assert choice["text"] == text + wanted.text
            assert choice["xelm"]["weights"] == {"mixes/two": 1.0}
            start, *ids = alone.tokenizer.begin(text)
            (nats,) = alone.likelihoods([[start]], [ids]).nats
            read = choice["logprobs"]["token_logprobs"][: len(ids)]
            assert -sum(read) == pytest.approx(nats, rel=1e-5)
    refused = xelm("merge", directory, "dense", "mixes/two", "--name", "x")
    assert refused.code == 2 and "different configurations" in refused.err
    again = xelm("mix", directory, "--name", "two")
    assert again.code == 2 and "exists already" in again.err


@needs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_itself_reads_a_mixture_as_xelm_does(mixed_run, xelm, tmp_path):
    outcome = xelm("export", mixed_run[0], "mixes/two", "--gguf", tmp_path / "a.gguf")
    assert outcome.code == 0, outcome.err
    assert re.search("the same ids of [0-9]+ texts and continues 8 prompts", outcome.out)


@pytest.mark.slow
def test_trained_routers_change_no_other_weight(mixed_run):
    directory, run = mixed_run[0], open_run(mixed_run[0])
    found = load_file(directory / "mixes/two/model.safetensors")
    experts = [
        load_file(e.directory(directory) / "model.safetensors") for e in run.registry().published()
    ]
    for number, expert in enumerate(experts):
        for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            np.testing.assert_array_equal(
                found[f"model.layers.1.block_sparse_moe.experts.{number}.{ours}.weight"],
                expert[f"model.layers.1.mlp.{theirs}_proj.weight"],
            )
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(found[name], (experts[0][name] + experts[1][name]) / 2, atol=1e-7)


@pytest.mark.slow
def test_a_killed_mixture_goes_on_and_ends_with_the_same_bits(
    mixed_run, tiny, tmp_path, monkeypatch, xelm
):
    directory = tmp_path / "RUN"
    shutil.copytree(tiny.directory, directory)
    run = open_run(directory)
    options = MixOptions(train="router", tokens=1024, top=1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    for name in ("write_checkpoint", "train.train_checkpoints", "join"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            home, _, last = name.rpartition(".")
            patch.setattr(getattr(mixing, home) if home else mixing, last, killed)
            run.mix("two", options)
    other = xelm("mix", directory, "--name", "two", "--top", 2)
    # It is written and not recorded: nothing is trained again.
    assert other.code in (0, 2)
    if not run.combined():
        run.mix("two", options)
    found, wanted = (
        load_file(d / "mixes/two/model.safetensors") for d in (directory, mixed_run[0])
    )
    for tensor, array in wanted.items():
        np.testing.assert_array_equal(found[tensor], array)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--name ../a", "'../a' cannot name a mixture"),
        ("--name a --top 3", "top must be at most the 2 experts; got 3"),
        ("--name a --top 0", "top must be at least 1; got 0"),
        ("--name a --tokens 0", "tokens must be at least 1; got 0"),
        ("--name a --balance -1", "balance must be at least 0; got -1.0"),
        ("--name a --learning-rate 0", "learning_rate must be above 0; got 0.0"),
        ("", "the following arguments are required: --name"),
    ],
)
def test_mistakes_are_one_line(xelm, tiny, arguments, message):
    outcome = xelm("mix", tiny.directory, *arguments.split(), "--dry-run")
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (tiny.directory / "mixes").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"query_bias": True}, r"query_bias=True \(wanted False\)"),
        ({"residual_scale": 0.5}, r"residual_scale=0.5 \(wanted 1.0\)"),
        ({"parallel": "two norms"}, r"parallel=two norms \(wanted no\)"),
        ({"head_norm": True, "head_norm_after_positions": True}, r"head_norm=True"),
        ({"rope": Rope(partial_rotary_factor=0.5)}, r"model.rope=.*factor': 0.5"),
        ({"causal": False}, r"causal=False \(wanted True\)"),
    ],
)
def test_other_architectures_are_refused_with_what_does_not_fit(
    tiny, monkeypatch, setting, message
):
    read = mixing.read_config
    monkeypatch.setattr(mixing, "read_config", lambda d: replace(read(d), **setting))
    with pytest.raises(UserError, match=rf"Mixtral's cannot express .*{message}"):
        open_run(tiny.directory).plan_mix("a")


def test_experts_of_several_feedforwards_are_not_mixed(tiny, monkeypatch):
    read, several = mixing.read_config, {"expert_count": 4, "experts_per_token": 2}
    monkeypatch.setattr(mixing, "read_config", lambda d: replace(read(d), **several))
    with pytest.raises(UserError, match="are mixtures of feed-forwards already"):
        open_run(tiny.directory).plan_mix("a")


def test_experts_with_more_pieces_are_refused_with_what_can_be_done(tiny, monkeypatch):
    read, run = mixing.read_config, open_run(tiny.directory)
    size = read(run.seed).vocabulary_size

    def extended(directory):
        return replace(read(directory), vocabulary_size=size + 1200 * ("en-es" in str(directory)))

    monkeypatch.setattr(mixing, "read_config", extended)
    with pytest.raises(UserError, match=r"en-es@v1 has 1,200 more pieces .*xelm retire .* en-es"):
        run.plan_mix("a")


def test_a_plan_is_of_the_mixture_and_writes_nothing(xelm, tiny):
    arguments = ("mix", tiny.directory, "--name", "a", "--dry-run", "--json")
    (plan,) = xelm(*arguments).json()["trainings"]
    config = open_run(tiny.directory).config
    assert plan["name"] == "mixes/a"
    assert plan["tokens"] == 256  # a twentieth of 4096, in whole steps of 128
    shape = mixture_shape(config.model, 2, 2)
    assert plan["model_bytes"] == 4 * shape.parameter_count
    assert not (tiny.directory / "train").exists() or not list(
        (tiny.directory / "train").glob("mixes*")
    )
