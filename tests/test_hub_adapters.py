"""Adapters and differences on the Hub: what joins a RUN, and what their cards say."""

import hashlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hub_server import fails, standing_in
from safetensors.numpy import load, load_file, save_file
from shared import snapshot

from experts import manifest
from experts.card import card
from experts.grow import grow
from experts.registry import Registry
from experts.verify import hash_directory, verify
from xelm import load_model
from xelm.models.adapters import Adapter
from xelm.models.checkpoint import family_of, read_config
from xelm.models.peft import write_adapter
from xelm.models.stored import write_base

# Of the library's HTTP client, in another thread.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def hub():
    with standing_in() as found:
        yield found


def with_adapter(run: Path, name: str, parent: str) -> None:
    """Adds to a RUN an expert that is an adapter of another, or of the seed."""
    base = run / (parent if parent == "seed" else f"experts/{parent}/v1")
    folder = run / f"experts/{name}/v1"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0).normal(size=(2, 2, 64)).astype(np.float32)
    factors = draw[0].reshape(2, 16, 4), draw[1].reshape(2, 4, 16)
    adapter = Adapter(scale=1.0, factors={"blocks/query": factors})
    write_adapter(folder, read_config(base), family_of(base), adapter, base=parent)
    write_base(folder, folder, base)
    registry = grow(Registry.load(run), name, parent, corpora=())
    hashes, made = hash_directory(folder), {"tokens": 9, "stored": "adapter"}
    published = registry.publish(name, 1, sha256=hashes, **made)
    (folder / "README.md").write_text(card(published.expert(name), published, {}))
    registry = registry.publish(name, 1, sha256=hash_directory(folder), **made)
    registry.save(run)
    manifest.record_expert(run, registry.expert(name))


def test_an_adapter_joins_a_run_that_has_its_base_alone(xelm, copy, hub, tiny, tmp_path):
    """The base is found by its weights, since its card is another in each RUN."""
    run, theirs = copy.directory, tmp_path / "theirs"
    shutil.copytree(tiny.directory, theirs)
    with_adapter(theirs, "pt", "en-es")
    pushed = xelm("push", theirs, "pt", "--to", "jane/pt")
    assert pushed.code == 0, pushed.err
    files = dict(hub.repo("jane/pt").head())
    value = json.loads(files["xelm.json"])

    def with_parent(**hashes):
        content = json.dumps(value | {"parent": value["parent"] | hashes}).encode()
        hub.repo("jane/pt").add("main", files | {"xelm.json": content})

    with_parent(**{"model.safetensors": "0" * 64})
    before = snapshot(run)
    fails(xelm("pull", "jane/pt", "--into", run), "jane/pt is an adapter of en-es@v1, whose weight")
    after = snapshot(run)
    assert {name: after[name] for name in after if not name.startswith(".pulled")} == before
    with_parent(**{"README.md": "0" * 64})
    pulled = xelm("pull", "jane/pt", "--into", run)
    assert pulled.code == 0, pulled.err
    assert Registry.load(run).expert("pt").parent == "en-es@v1"


def card_of(hub, name: str) -> str:
    return hub.repo(name).head()["README.md"].decode()


@pytest.mark.slow
def test_the_card_of_an_adapter_says_where_its_parent_can_be_had(xelm, copy, hub, tmp_path):
    run = copy.directory
    with_adapter(run, "pt", "en-es")
    push = ("push", run, "pt", "--to", "jane/pt")
    assert xelm(*push).code == 0
    unknown = card_of(hub, "jane/pt")
    assert (
        "It is for the expert en-es@v1, which is another checkpoint.\n"
        "Where that can be had is not recorded. Ask those who share this repository for it: "
        "`xelm push RUN en-es --to OWNER/REPO` shares it, and `xelm export RUN en-es --out DIR` "
        "writes it into a directory."
    ) in unknown
    assert "base_model" not in unknown
    # In a whole RUN that was pushed.
    assert xelm("push", run, "--to", "jane/all").code == 0
    whole = hub.repo("jane/all").branches["main"]
    assert xelm(*push).code == 0
    inside = card_of(hub, "jane/pt")
    assert "It is in the repository jane/all, in the folder experts/en-es/v1." in inside
    given = f'revision="{whole}", subfolder="experts/en-es/v1")'
    assert f'base = dict(pretrained_model_name_or_path="jane/all", {given}' in inside
    # Alone: the commit that has this version, whatever is pushed there later.
    assert xelm("push", run, "en-es", "--to", "jane/western").code == 0
    commit = hub.repo("jane/western").branches["main"]
    before = dict(hub.requests)
    assert xelm(*push).code == 0
    known = card_of(hub, "jane/pt")
    assert "It is in the repository jane/western.\n" in known
    assert f'dict(pretrained_model_name_or_path="jane/western", revision="{commit}")' in known
    assert 'base = "BASE"' not in known and '.from_pretrained(**base), "jane/pt")' in known
    assert 'base_model: "jane/western"\nbase_model_relation: adapter\n---' in known
    # Of the adapter, nothing but the card was uploaded; and its hash is that of the card.
    assert hub.requests["upload"] == before.get("upload")
    files = hub.repo("jane/pt").head()
    digest = hashlib.sha256(files["README.md"]).hexdigest()
    assert json.loads(files["xelm.json"])["files"]["README.md"] == digest
    assert "nothing was uploaded" in xelm(*push).out
    # Whoever pulls both, and pushes the adapter on, says the same.
    other = tmp_path / "other"
    assert xelm("pull", "jane/all", other).code == 0
    for name, expert in (("jane/western", "en-es"), ("jane/pt", "pt")):
        assert xelm("pull", name, "--into", other).out == f"published: {expert}@v1\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_code_on_the_card_of_an_adapter_loads_it(xelm, copy, hub, tmp_path, monkeypatch):
    run = copy.directory
    with_adapter(run, "pt", "en-es")
    for name, to in (("en-es", "jane/western"), ("pt", "jane/pt")):
        assert xelm("push", run, name, "--to", to).code == 0
        for file, content in hub.repo(to).head().items():
            (tmp_path / to).mkdir(parents=True, exist_ok=True)
            (tmp_path / to / file).write_bytes(content)
    monkeypatch.chdir(tmp_path)  # where folders have the names of the repositories
    code = card_of(hub, "jane/pt").partition("```python\n")[2].partition("```")[0]
    found: dict = {}
    exec(code, found)
    ids = found["tokenizer"]("abc def", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = found["model"](ids).logits[0].numpy()
    own = load_model(run / "experts/pt/v1", dtype="float32")(jnp.asarray(ids))[0]
    np.testing.assert_allclose(own, theirs, rtol=1e-3, atol=1e-4)
    base = load_model(run / "experts/en-es/v1", dtype="float32")(jnp.asarray(ids))[0]
    assert np.abs(np.asarray(base) - theirs).max() > 1e-3


def test_the_card_of_an_adapter_of_the_seed_names_the_seeds_repository(xelm, copy, hub):
    run = copy.directory
    with_adapter(run, "pt", "seed")
    record = json.loads((run / "run.json").read_text())
    for name, shown in (
        (None, "`xelm export RUN seed --out DIR` writes it into a directory."),
        ("meta/base-7", "It is in the repository meta/base-7.\n"),
    ):
        (run / "run.json").write_text(json.dumps(record | {"base_model": name}))
        pushed = xelm("push", run, "pt", "--to", "jane/pt")
        assert pushed.code == 0, pushed.err
        found = card_of(hub, "jane/pt")
        assert "It is for the seed, which is another checkpoint.\n" in found and shown in found
    assert 'base = dict(pretrained_model_name_or_path="meta/base-7")' in found


def test_the_card_of_an_adapter_of_an_adapter_says_what_to_pull_first(xelm, copy, hub):
    run = copy.directory
    with_adapter(run, "pt", "en-es")
    with_adapter(run, "gl", "pt")
    assert xelm("push", run, "pt", "--to", "jane/pt").code == 0
    assert xelm("push", run, "gl", "--to", "jane/gl").code == 0
    found = card_of(hub, "jane/gl")
    said = "an adapter of the expert pt@v1, which is an adapter itself. It is in the repository "
    assert f"{said}jane/pt." in found
    assert "(`xelm pull jane/gl --into RUN`, the parent\nfirst)" in found
    assert "then `xelm export RUN gl --out DIR`" in found


def test_an_expert_that_is_stored_as_differences_is_pushed_whole(xelm, copy, hub):
    run = copy.directory
    folder = run / "experts/pt/v1"
    folder.mkdir(parents=True)
    tensors = load_file(run / "experts/en-es/v1/model.safetensors")
    changed = {"model.norm.weight": tensors["model.norm.weight"] * np.float32(1.5)}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    write_base(folder, folder, run / "experts/en-es/v1")
    registry = grow(Registry.load(run), "pt", "en-es")
    facts = {"tokens": 9, "stored": "difference"}
    published = registry.publish("pt", 1, sha256=hash_directory(folder), **facts)
    (folder / "README.md").write_text(card(published.expert("pt"), published, {}))
    registry = registry.publish("pt", 1, sha256=hash_directory(folder), **facts)
    registry.save(run)
    manifest.record_expert(run, registry.expert("pt"))
    assert verify(run) == []
    assert xelm("push", run, "pt", "--to", "jane/pt").code == 0
    there = hub.repo("jane/pt").head()
    assert {"config.json", "tokenizer.json", "README.md"} < set(there) and "base.json" not in there
    # The card is that of a complete checkpoint, with the hashes of its files.
    page = there["README.md"].decode()
    assert "other programs cannot load it" not in page and "AutoModelForCausalLM" in page
    for file in ("model.safetensors", "config.json"):
        assert f"| `{file}` | `{hashlib.sha256(there[file]).hexdigest()}` |" in page
    pushed = load(there["model.safetensors"])
    assert set(pushed) == set(tensors)
    wanted = tensors | changed
    assert all(np.array_equal(pushed[name], wanted[name]) for name in wanted)
    # With the whole RUN goes what it differs from, even when that is out of use.
    xelm("retire", run, "en-es")
    files = xelm("push", run, "--to", "jane/all", "--dry-run", "--json").json()["files"]
    assert {"experts/en-es/v1/model.safetensors", "experts/pt/v1/base.json"} < set(files)
