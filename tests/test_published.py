"""What a published expert's directory holds: the seed's dtype and licence, and a card."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from shared import snapshot

from clustering.files import sha256
from experts.registry import Registry
from xelm import load_model, open_run, save_model
from xelm.models.checkpoint import stored_dtype
from xelm.runs.origin import base_model_of, licence_of

README = """\
---
license: llama3.2
license_name: community
tags: [seed]
---
# A seed
"""
BESIDE = {
    "README.md": README,
    "LICENSE.txt": "terms",
    "NOTICE": "whose it is",
    "chat_template.jinja": "{{ messages[0]['content'] }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


def with_set(settings):
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="module")
def half(tmp_path_factory, xelm, tiny, tiny_settings):
    """A RUN from a seed in bfloat16 with a licence, whose trainings move nothing by any amount that
    bfloat16 can tell, and a grown expert."""
    folder = tmp_path_factory.mktemp("half")
    save_model(load_model(tiny.directory / "seed"), folder / "seed", dtype="bfloat16")
    for name, text in BESIDE.items():
        (folder / "seed" / name).parent.mkdir(exist_ok=True)
        (folder / "seed" / name).write_text(text)
    changes = tiny_settings(
        experts__optimizer__learning_rate=1e-30,
        grow__optimizer__learning_rate=1e-30,
        dense_learning_rate=1e-30,
    )
    settings = [p for p in changes if p != "--set" and not p.startswith(("model.", "seed."))]
    run, options = folder / "RUN", ("--languages", "en,de,es,fr", *with_set(settings))
    seed = ("--seed", folder / "seed", "--base-model", "someone/small-8B")
    for command in (
        ("init", run, *seed, "--corpus", tiny.corpus, *options),
        ("branch", run, "--clusters", tiny.clusters),
        ("train", run, "--all", "--dense"),
        ("grow", run, "--language", "pt", "--corpus", tiny.corpus, "--parent", "en-es"),
    ):
        outcome = xelm(*command)
        assert outcome.code == 0, outcome.err
    return run


@pytest.mark.slow
def test_published_weights_have_the_dtype_of_the_seeds(half, tiny):
    """Before training moves them they are the seed's, byte by byte, and as large."""
    seed = half / "seed" / "model.safetensors"
    for name in ("dense", "experts/en-es/v1", "experts/de-fr/v1", "experts/pt/v1"):
        assert json.loads((half / name / "config.json").read_text())["dtype"] == "bfloat16"
        assert stored_dtype(half / name) == "bfloat16"
        assert (half / name / "model.safetensors").read_bytes() == seed.read_bytes()
    fresh = tiny.directory / "experts" / "en-es" / "v1"  # of a seed that was trained in float32
    assert stored_dtype(fresh) == "float32"


@pytest.mark.slow
def test_another_dtype_of_published_weights_is_set(half, xelm, tmp_path, tiny):
    settings = ("experts.tokens=128", "experts.sequence_length=32", "experts.runtime.mesh_data=1")
    options = (*with_set(settings), "--set", "experts.batch_size=4", "--languages", "en,de,es,fr")
    lengths = ("--set", "grow.sequence_length=32", "--set", "vectoriser_dimensions=12")
    made = xelm(
        *("init", tmp_path / "RUN", "--seed", half / "seed", "--corpus", tiny.corpus, *options),
        *("--set", "weights_dtype=float32", "--clusters", tiny.clusters, *lengths),
    )
    assert made.code == 0, made.err
    done = xelm("train", tmp_path / "RUN", "en-es")
    assert done.code == 0, done.err
    assert stored_dtype(tmp_path / "RUN" / "experts" / "en-es" / "v1") == "float32"


@pytest.mark.slow
def test_an_average_keeps_the_dtype(half, xelm, tmp_path):
    done = xelm("merge", half, "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    assert {str(t.dtype) for t in load_file(tmp_path / "merged/model.safetensors").values()} == {
        "bfloat16"
    }


@pytest.mark.slow
def test_an_expert_carries_templates_and_licence(half):
    for name in ("experts/en-es/v1", "experts/pt/v1", "dense"):
        for file in BESIDE.keys() - {"README.md"}:
            assert (half / name / file).read_text() == BESIDE[file]
    assert (half / "seed" / "README.md").read_text() == README


@pytest.mark.slow
def test_the_card_is_readme_with_what_the_hub_wants(half):
    text = (half / "experts" / "pt" / "v1" / "README.md").read_text()
    _, front, _ = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "language": ["pt"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xelm"],
        "base_model": "someone/small-8B",
        "license": "llama3.2",
        "license_name": "community",
    }


@pytest.mark.slow
def test_the_registry_has_the_hash_of_the_card_and_the_card_those_of_the_others(half, xelm):
    expert = Registry.load(half).expert("pt")
    folder = expert.directory(half)
    card = (folder / "README.md").read_text()
    assert expert.sha256["README.md"] == sha256(folder / "README.md")
    for file in expert.sha256.keys() - {"README.md"}:
        assert f"| `{file}` | `{expert.sha256[file]}` |" in card
    assert "`README.md`" not in card
    assert xelm("verify", half).code == 0


def test_an_edited_card_is_noticed(copy, xelm):
    folder = copy.directory / "experts" / "de-fr" / "v1"
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("de-fr", "the best"))
    found = xelm("verify", copy.directory)
    assert found.code == 2 and "changed: experts/de-fr/v1/README.md" in found.err
    (folder / "README.md").write_text(card)
    assert xelm("verify", copy.directory).code == 0


def test_a_publication_that_was_interrupted_behind_its_card_is_finished(copy, xelm, monkeypatch):
    from experts.lock import update
    from xelm.runs import publish

    update(copy.directory, lambda registry: registry.start("de-fr", parent="de-fr@v1"), "train")
    with monkeypatch.context() as patch:
        patch.setattr(publish, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert xelm("train", copy.directory, "de-fr").code != 0
    assert (copy.directory / "experts/de-fr/v2/README.md").exists()
    assert xelm("train", copy.directory, "de-fr").code == 0
    assert xelm("verify", copy.directory).code == 0


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, {}),
        ({"README.md": "# no front matter"}, {}),
        ({"README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}),
        (
            {"LICENSE": "terms"},
            {"license": "other", "license_name": "that-of-the-seed", "license_link": "LICENSE"},
        ),
        ({"LICENSE": "terms", "README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}),
    ],
)
def test_the_licence_is_what_lies_beside_the_seed(files, wanted, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == wanted


def test_the_seeds_name_is_given_or_that_of_the_hubs_cache():
    cached = "/a/hub/models--EleutherAI--pythia-70m/snapshots/0123abcd"
    assert base_model_of(cached, None) == "EleutherAI/pythia-70m"
    assert base_model_of(cached, "me/mine") == "me/mine"
    assert base_model_of("/models/EleutherAI/pythia-70m", None) is None


@pytest.mark.parametrize("harm", ["numbers", "bytes", "gone", "shape"])
def test_a_model_that_is_not_what_was_published_is_named_before_any_work(harm, copy, xelm):
    """By every command that opens models."""
    folder = copy.directory / "experts" / "de-fr" / "v1"
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if harm == "numbers":
        content[-4:] = np.float32(np.nan).tobytes()
    elif harm == "bytes":
        content[-1] ^= 1
    weights.write_bytes(content)
    if harm == "gone":
        weights.unlink()
    if harm == "shape":
        weights.write_bytes((copy.directory / "seed" / "model.safetensors").read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 777.0
        (folder / "config.json").write_text(json.dumps(config))
    names = {
        "numbers": "xelm: de-fr@v1: model.norm.weight in ",
        "bytes": "xelm: de-fr@v1: changed: experts/de-fr/v1/model.safetensors",
        "gone": "xelm: de-fr@v1: missing: experts/de-fr/v1/model.safetensors",
        "shape": "xelm: de-fr@v1: changed: experts/de-fr/v1/config.json",
    }
    before = snapshot(copy.directory)
    out = copy.directory.parent / "out"
    for command in (
        ("generate", copy.directory, "abc", "--max-new-tokens", 2),
        ("evaluate", copy.directory, "--corpus", copy.held_out),
        ("serve", copy.directory, "--port", 0),
        ("merge", copy.directory, "--out", out),
        ("grow", copy.directory, "--language", "pt", "--corpus", copy.corpus, "--parent", "de-fr"),
    ):
        outcome = xelm(*command)
        assert outcome.code == 2 and outcome.out == "", command
        assert outcome.err.splitlines()[-1].startswith(names[harm]), outcome.err
        assert "Traceback" not in outcome.err
    assert snapshot(copy.directory) == before and not out.exists()


def test_a_file_is_read_once_for_all_commands_until_it_changes(copy, monkeypatch):
    from xelm.runs import check

    read = []
    (copy.directory / check.REMEMBERED).unlink(missing_ok=True)  # by another test of this RUN
    looked_at = check._looked_at
    monkeypatch.setattr(check, "_looked_at", lambda f: read.append(f.name) or looked_at(f))
    open_run(copy.directory).ensemble("uniform")
    assert read.count("model.safetensors") == 2
    read.clear()
    open_run(copy.directory).ensemble("uniform")
    assert read == []
    path = copy.directory / "experts/de-fr/v1/config.json"
    path.write_bytes(path.read_bytes())
    open_run(copy.directory).ensemble("uniform")
    assert read == ["config.json"]
