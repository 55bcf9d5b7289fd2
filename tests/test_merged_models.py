"""Merged models of a RUN: what they are made of, and that nothing else of the RUN changes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared import LANGUAGES, NAMES, snapshot

from clustering.errors import UserError
from clustering.files import sha256
from experts.merge_methods import MergeOptions
from experts.registry import Registry
from xelm import Routing, open_run
from xelm.runs.merge import _shares, _weights
from xelm.serving.models import open_served_models


def _tensors(directory):
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def merged(xelm, tiny, tmp_path_factory):
    """A RUN with two merged models, and the files that it had before."""
    directory = tmp_path_factory.mktemp("merged") / "RUN"
    shutil.copytree(tiny.directory, directory)
    before = snapshot(directory)
    for name, *options in (("mean",), ("sum", "--method", "task-arithmetic", "--scale", 0.5)):
        outcome = xelm("merge", directory, "--name", name, *options)
        assert (outcome.code, outcome.out) == (0, f"{directory / 'merges' / name}\n")
    return directory, before


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The same RUN without merged models."""
    directory = tmp_path_factory.mktemp("plain") / "RUN"
    shutil.copytree(tiny.directory, directory)
    return directory


def test_a_merged_model_is_what_its_method_computes(merged):
    directory = merged[0]
    seed = _tensors(directory / "seed")
    experts = [_tensors(directory / f"experts/{name}/v1") for name in sorted(NAMES)]
    mean, total = (_tensors(directory / "merges" / name) for name in ("mean", "sum"))
    for name, tensor in seed.items():
        base = tensor.astype(np.float64)
        one, other = (each[name].astype(np.float64) for each in experts)
        np.testing.assert_array_equal(mean[name], ((one + other) / 2).astype(np.float32))
        wanted = base + 0.5 * (one - base + other - base)
        np.testing.assert_allclose(total[name], wanted.astype(np.float32), rtol=1e-6, atol=1e-9)


def test_merge_json_says_how_it_was_made(merged):
    directory = merged[0]
    record = json.loads((directory / "merges/sum/merge.json").read_text())
    assert record["method"] == "task-arithmetic" and record["parameters"] == {"scale": 0.5}
    assert record["base"]["name"] == "seed"
    for source, name in zip(record["sources"], sorted(NAMES), strict=True):
        file = directory / f"experts/{name}/v1/model.safetensors"
        assert source == {
            "name": f"{name}@v1",
            "path": str(file.parent),
            "sha256": {"model.safetensors": sha256(file)},
            "weight": 1.0,
        }


@pytest.mark.slow
def test_nothing_else_of_the_run_changes(merged, plain):
    directory, before = merged
    after = snapshot(directory)
    assert {name for name in after if after[name] != before.get(name)} == {
        "hashes.json",
        "registry.json",
        *(name for name in after if name.startswith("merges/")),
    }
    found, registry = Registry.load(directory), Registry.load(plain)
    assert replace(found, history=registry.history) == registry
    more = found.history[len(registry.history) :]
    assert [event.action for event in more] == ["merge"] * len(more) and more
    assert found.history[: len(registry.history)] == registry.history
    assert {t: found.for_language(t).name for t in LANGUAGES} == {
        tag: name for name, tags in NAMES.items() for tag in tags
    }
    texts = ["Guten Tag", "hello"]
    for routing in ("learned", "detected", "tfidf"):  # the first two mix all models behind
        scores = [open_run(d).ensemble(routing).score(texts).nats for d in (directory, plain)]
        np.testing.assert_array_equal(*scores)


@pytest.mark.slow
def test_merged_models_are_evaluated_beside_the_others(xelm, merged, plain, tiny, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(merged[0], run)
    outcome = xelm("evaluate", run, "--corpus", tiny.held_out, "--json")
    rows = {(r["system"], r["routing"], r["language"]): r["nll"] for r in outcome.json()["rows"]}
    for tag in LANGUAGES:
        assert (("merges/mean", None, tag) in rows) and (("merges/sum", None, tag) in rows)
    # The systems that were there before have the figures that they had.
    before = xelm("evaluate", plain, "--corpus", tiny.held_out, "--json").json()["rows"]
    assert {(r["system"], r["routing"], r["language"]): r["nll"] for r in before}.items() <= (
        rows.items()
    )
    shown = xelm("evaluate", run, "--corpus", tiny.held_out).out
    assert "bits/B                seed   dense  merges/mean  merges/sum\n" in shown
    assert "bits/B by expert      seed   de-fr   en-es\n" in shown
    assert xelm("report", run).code == 0
    assert "merges/mean" in (run / "results/report.html").read_text()


def test_a_server_has_merged_models(merged):
    served = open_served_models(open_run(merged[0]), Routing())
    names = ["de-fr", "en-es", "seed", "dense", "merges/mean", "merges/sum"]
    assert list(served.routers) == ["xelm", *(f"xelm:{name}" for name in names)]
    alone = served.routers["xelm:merges/mean"]
    np.testing.assert_array_equal(alone.weights, [-np.inf] * 4 + [0.0, -np.inf])


def test_one_expert_merged_alone_has_its_figures(xelm, copy):
    run = copy.directory
    assert xelm("merge", run, "en-es", "--name", "alone").code == 0
    rows = xelm("evaluate", run, "--corpus", copy.held_out, "--json").json()["rows"]
    found = {(r["system"], r["language"]): r["nll"] for r in rows if r["routing"] is None}
    for tag in LANGUAGES:
        assert found["merges/alone", tag] == found["en-es", tag]


def test_verify_compares_merged_models_and_one_may_be_deleted(xelm, merged, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(merged[0], run)
    assert xelm("verify", run).code == 0
    file = run / "merges/mean/model.safetensors"
    tensors = _tensors(file.parent)
    save_file({n: t + np.float32(0.5) for n, t in tensors.items()}, file, {"format": "pt"})
    assert "changed: merges/mean/model.safetensors" in xelm("verify", run).err
    refused = xelm("merge", run, "merges/mean", "--out", tmp_path / "out")
    assert refused.code == 2 and "merges/mean: changed" in refused.err
    shutil.rmtree(run / "merges/mean")
    assert xelm("verify", run).code == 0
    assert list(open_run(run).combined()) == ["merges/sum"]
    assert xelm("merge", run, "--name", "mean").code == 0
    assert list(open_run(run).combined()) == ["merges/mean", "merges/sum"]


def test_a_merge_that_was_interrupted_is_made_again(merged, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(merged[0], run)
    hashes = json.loads((run / "hashes.json").read_text())
    hashes["files"] = {n: h for n, h in hashes["files"].items() if not n.startswith("merges/mean")}
    (run / "hashes.json").write_text(json.dumps(hashes))  # killed before the hashes were recorded
    (run / "merges/mean/model.safetensors").write_bytes(b"")
    assert list(open_run(run).combined()) == ["merges/sum"]
    open_run(run).merge(name="mean")
    assert (run / "merges/mean/model.safetensors").read_bytes() == (
        merged[0] / "merges/mean/model.safetensors"
    ).read_bytes()


def test_seed_dense_merges_and_directories_can_be_merged(merged, tmp_path):
    run = open_run(merged[0])
    outside = tmp_path / "outside"
    shutil.copytree(run.dense, outside)
    path = run.merge(
        *("seed", "dense", "merges/mean", str(outside), "de-fr@v1"),
        weights=[1, 2, 3, 4, 0],
        out=tmp_path / "out",
    ).path
    parts = [_tensors(d) for d in (run.seed, run.dense, run.directory / "merges/mean", outside)]
    for name, tensor in _tensors(path).items():
        wanted = sum(w * part[name].astype(np.float64) for w, part in zip((1, 2, 3, 4), parts))
        np.testing.assert_allclose(tensor, wanted / 10, rtol=1e-6, atol=1e-9)


def test_the_base_may_be_another_model(merged, tmp_path):
    run = open_run(merged[0])
    options = MergeOptions(method="task-arithmetic", scale=1.0)
    run.merge("en-es", options=options, base="dense", weights=[-1.0], out=tmp_path / "out")
    dense, expert = _tensors(run.dense), _tensors(run.directory / "experts/en-es/v1")
    for name, tensor in _tensors(tmp_path / "out").items():
        wanted = 2 * dense[name].astype(np.float64) - expert[name]
        np.testing.assert_allclose(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_a_retired_version_is_merged_by_its_reference_only(copy, tmp_path):
    registry = Registry.load(copy.directory)
    registry.retire("en-es", 1).save(copy.directory)
    run = open_run(copy.directory)
    with pytest.raises(UserError, match="en-es@v1 is retired"):
        run.merge("en-es", out=tmp_path / "out")
    made = run.merge("en-es@v1", out=tmp_path / "out")
    assert made.weights == {"en-es@v1": 1.0}


def test_weights_by_share_and_by_held_out_text(tiny):
    run = open_run(tiny.directory)
    experts = run.registry().published()
    tokens = {tag: len(store.ids) for tag, store in run.store().languages.items()}
    exponent = run.config.experts.data.sampling_exponent
    wanted = [sum(tokens[tag] ** exponent for tag in e.languages) for e in experts]
    np.testing.assert_allclose(_shares(run, experts), np.divide(wanted, sum(wanted)))

    class Model:
        def __init__(self, reference, figures):
            self.source = None
            self.expert = type("E", (), {"reference": reference, "evaluation": {"own": figures}})

    figures = [
        {"en": {"expert": 1.5, "seed": 2.0}, "es": {"expert": 1.0, "seed": 2.0}},  # saves 3/8
        {"de": {"expert": 1.75, "seed": 2.0}},  # 1/8
        {"fr": {"expert": 3.0, "seed": 2.0}},  # nothing
    ]
    models = [Model(str(n), each) for n, each in enumerate(figures)]
    np.testing.assert_allclose(_weights(run, models, "held-out"), [9 / 4, 3 / 4, 0])
    with pytest.raises(UserError, match="no expert saves anything on held-out text"):
        _weights(run, models[2:], "held-out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method slerp en-es --name x", "slerp merges exactly 2 models; got 1"),
        ("--method ties --density 0 --name x", "density must be above 0 and at most 1; got 0.0"),
        ("--density .5 --name x", "density has no effect on linear"),
        ("--base dense --name x", "base has no effect on linear; it goes with task-arithmetic"),
        ("--weights 1 --name x", "one weight for each of 2 models; got 1.0"),
        ("--weights some --name x", "weights must be numbers or one of equal, share, held-out"),
        ("seed --weights share --name x", "seed is no expert, so that it has no weight by share"),
        ("en-es en-es@v1 --name x", "en-es@v1 is named twice"),
        ("en-es@v7 --name x", "expert 'en-es' has no version 7"),
        ("./nowhere --name x", "there is no directory ./nowhere"),
        ("--name mean", "mean exists already; nothing is overwritten"),
        ("--name ../mean", "'../mean' cannot name a merged model"),
        ("--name x --out y", "not allowed with argument"),
        ("", "one of the arguments --name --out is required"),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(xelm, merged, arguments, message):
    before = snapshot(merged[0])
    outcome = xelm("merge", merged[0], *arguments.split())
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert snapshot(merged[0]) == before


def test_other_vocabularies_are_refused_by_name(merged, tmp_path):
    run = open_run(merged[0])
    other = tmp_path / "other"
    shutil.copytree(run.seed, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    if isinstance(pieces, dict):
        pieces["zzz"] = pieces.pop(next(p for p, i in pieces.items() if i == 300))
    else:
        pieces[300][0] = "zzz"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="different vocabularies") as caught:
        run.merge("en-es", str(other), name="x")
    assert f"zzz is missing in en-es@v1 and 300 in {other}" in str(caught.value)
    assert not (run.directory / "merges/x").exists()
