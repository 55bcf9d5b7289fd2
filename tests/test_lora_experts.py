"""Experts that are adapters: trained, published as PEFT has them, and composed when read."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xelm import open_run
from xelm.models.checkpoint import load_parameters, read_config
from xelm.models.stored import chain

pytestmark = pytest.mark.slow
LORA = ("--set", "grow.lora.rank=4", "--set", "gate.worse=null")


@pytest.fixture(scope="module")
def grown(tiny, xelm, tmp_path_factory):
    """The tiny RUN with an adapter of an expert, and an adapter of that."""
    directory = tmp_path_factory.mktemp("lora") / "RUN"
    shutil.copytree(tiny.directory, directory)
    for command in (
        ("grow", directory, "--language", "pt", "--corpus", tiny.corpus),
        ("train", directory, "pt", "--again"),
    ):
        found = xelm(*command, *LORA)
        assert found.code == 0, found.err
    return directory


@pytest.fixture
def run(grown, tmp_path):
    shutil.copytree(grown, tmp_path / "RUN")
    return open_run(tmp_path / "RUN")


def test_a_lora_expert_stores_an_adapter_of_its_parent(run):
    first, second = run.registry().versions("pt")
    assert (first.stored, second.stored, second.parent) == ("adapter", "adapter", "pt@v1")
    directory = second.directory(run.directory)
    names = {path.name for path in directory.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json"} <= names
    assert not names & {"config.json", "model.safetensors", "tokenizer.json"}
    assert [str(path) for path in chain(directory)[1:]] == [
        str(run.directory / path)
        for path in (first.path, run.registry().expert(*first.parent.split("@v")[:1]).path)
    ]
    factors = load_file(directory / "adapter_model.safetensors")
    assert sum(each.size for each in factors.values()) == 2 * 4 * (4 * 32 + 3 * 40)
    cards = [(e.directory(run.directory) / "README.md").read_text() for e in (first, second)]
    assert "adapter of pt@v1" in cards[1]
    # PEFT loads an adapter of a complete checkpoint, and none of an adapter.
    assert ["PeftModel" in each for each in cards] == [True, False]
    assert "`xelm export\n--adapter` writes one adapter" in cards[1]


def test_what_is_trained_is_what_is_read(run, xelm):
    """Bits a byte in the last measurement of the training, against those of the gate."""
    expert = run.registry().expert("pt", 1)
    directory = expert.directory(run.directory)
    shape = read_config(directory)
    before = load_parameters(chain(directory)[1], shape)
    after = load_parameters(directory, shape)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved["blocks"]["query"])) and not moved["embedding"]
    found = json.loads((directory / "held_out.jsonl").read_text().splitlines()[-1])
    own = expert.evaluation["own"]["pt"]
    assert own["expert"] != own["parent"]
    assert found["bits_per_byte"]["pt"] == pytest.approx(own["expert"], rel=0.05)
    assert xelm("verify", run.directory).code == 0
    assert xelm("generate", run.directory, "a", "--max-new-tokens", 2).code == 0


def test_experts_of_clusters_are_adapters_of_the_seed_where_init_says_so(
    tiny, tiny_settings, xelm, tmp_path
):
    """From init on, through training beside a dense baseline without adapters, to what is read."""
    directory = tmp_path / "RUN"
    given = tiny_settings(experts__lora__rank=4, experts__optimizer__learning_rate=0.03)
    for command in (
        ("init", directory, "--corpus", tiny.corpus, "--languages", "en,de,es,fr", *given),
        ("branch", directory, "--clusters", tiny.clusters),
        ("train", directory, "--all", "--dense"),
        ("train", directory, "en-es", "--again", "--set", "gate.worse=null"),
    ):
        outcome = xelm(*command)
        assert outcome.code == 0, outcome.err
    run = open_run(directory)
    first, second = run.registry().versions("en-es")
    assert [(e.stored, e.parent) for e in (first, second)] == [
        ("adapter", "seed"),
        ("adapter", "en-es@v1"),
    ]
    factors = load_file(first.directory(directory) / "adapter_model.safetensors")
    assert sum(each.size for each in factors.values()) == 2 * 4 * (4 * 32 + 3 * 40)
    assert (run.dense / "model.safetensors").exists() and not (run.dense / "base.json").exists()
    command = ("evaluate", directory, "--corpus", tiny.held_out, "--routing", "language", "--json")
    found = xelm(*command).json()
    bits = {(r["system"], r["language"]): r["nll"] / r["bytes"] for r in found["rows"]}
    for tag in ("en", "es"):
        assert bits["en-es", tag] == bits["ensemble", tag] < bits["seed", tag]
    # An exported expert scores as the RUN's does.
    assert xelm("export", directory, "en-es", "--out", tmp_path / "whole").code == 0
    shape, published = read_config(run.seed), second.directory(directory)
    found, wanted = load_parameters(tmp_path / "whole", shape), load_parameters(published, shape)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    chained = xelm("export", directory, "en-es", "--adapter", tmp_path / "adapter", "--json")
    assert chained.json()["base"] == str(run.seed)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8  # of both versions
    language = ("--routing", "language", "--language", "es", "--max-new-tokens", 2)
    assert "es" in xelm("generate", directory, "a", *language).err
    assert xelm("verify", directory).code == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_an_export_is_a_complete_checkpoint_and_an_adapter_of_the_whole_chain(run, xelm, tmp_path):
    directory = run.registry().expert("pt").directory(run.directory)
    shape = read_config(directory)
    assert xelm("export", run.directory, "pt", "--out", tmp_path / "whole").code == 0
    assert (tmp_path / "whole" / "tokenizer.json").exists()
    found, wanted = load_parameters(tmp_path / "whole", shape), load_parameters(directory, shape)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    outcome = xelm("export", run.directory, "pt", "--adapter", tmp_path / "adapter", "--json")
    base = outcome.json()["base"]
    assert base == str(chain(directory)[-1])
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (8, 16)
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload()
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        np.testing.assert_allclose(merged.state_dict()[name].numpy(), value.numpy(), atol=1e-6)
    outcome = xelm("export", run.directory, "seed", "--adapter", tmp_path / "no")
    assert outcome.code == 2 and "is a complete checkpoint, and no adapter" in outcome.err


def test_a_merge_takes_what_an_adapter_stands_for(run, xelm, tmp_path):
    other = next(e.name for e in run.registry().published() if e.name != "pt")
    outcome = xelm("merge", run.directory, "pt", other, "--out", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    paths = [run.registry().expert(name).directory(run.directory) for name in ("pt", other)]
    shape = read_config(paths[0])
    one, two = (load_parameters(path, shape) for path in paths)
    found = load_parameters(tmp_path / "merged", shape)
    jax.tree.map(
        lambda m, a, b: np.testing.assert_allclose(m, (a + b) / 2, atol=1e-6), found, one, two
    )


def test_frozen_layers_are_stored_once_and_read_to_the_bit(run, xelm):
    settings = ("--set", "grow.lora.rank=null", "--set", "grow.frozen_layers=1")
    gate = ("--set", "gate.worse=null")
    found = xelm("train", run.directory, "pt", "--again", "--from", "seed", *settings, *gate)
    assert found.code == 0, found.err
    expert = run.registry().expert("pt")
    directory = expert.directory(run.directory)
    assert (expert.version, expert.parent, expert.stored) == (3, "seed", "difference")
    assert not any("layers.1." in name for name in load_file(directory / "model.safetensors"))
    shape = read_config(directory)
    blocks, before = (load_parameters(d, shape)["blocks"] for d in (directory, run.seed))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), blocks, before)
    assert (blocks["query"]["weight"][0] != before["query"]["weight"][0]).any()
    assert xelm("verify", run.directory).code == 0


def test_a_changed_base_is_refused(run, xelm):
    path = run.directory / run.registry().expert("pt", 1).path / "adapter_model.safetensors"
    factors = load_file(path)
    save_file({name: each + 1 for name, each in factors.items()}, path)
    outcome = xelm("generate", run.directory, "a", "--max-new-tokens", 2)
    assert outcome.code == 2 and "pt@v1: changed:" in outcome.err


def test_an_adapter_of_another_base_is_refused(run, xelm):
    expert = run.registry().expert("pt")
    path = expert.directory(run.directory) / "base.json"
    record = json.loads(path.read_text())
    record["sha256"] = dict.fromkeys(record["sha256"], "0" * 64)
    path.write_text(json.dumps(record))
    outcome = xelm("verify", run.directory)
    assert "pt@v2 was made on another base (adapter): adapter_config.json" in outcome.err


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("grow.lora.rank=99", "grow.lora.rank must be at most 16, the smaller dimension of"),
        ("grow.lora.targets=q,x", "must be all, or some of q,k,v,o,gate,up,down; got q,x"),
        ("grow.frozen_layers=0-2", "grow.frozen_layers must be some of the layers 0 to 1 of this"),
    ],
)
def test_settings_that_the_model_cannot_have_are_refused_at_once(run, xelm, tiny, setting, fault):
    before, clear = run.registry(), []
    if "frozen" in setting:
        clear = ["--set", "grow.lora.rank=null"]
    outcome = xelm("train", run.directory, "pt", "--again", *clear, "--set", setting)
    assert outcome.code == 2 and fault in outcome.err, outcome.err
    assert run.registry() == before
