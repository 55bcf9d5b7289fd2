"""`xelm init`: seeds and corpora as people have them."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared import SEED, snapshot

from clustering.errors import UserError
from clustering.files import write_json
from xelm.data import contents
from xelm.data import tokenizer as tokenizers
from xelm.data.parts import Part
from xelm.runs.run import create_run, open_run


def test_a_seed_with_a_sentencepiece_model_alone_gets_a_tokenizer_json(
    xelm, place, monkeypatch, tmp_path
):
    monkeypatch.chdir(place)
    shutil.copytree("run/seed", tmp_path / "seed")
    (tmp_path / "seed" / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(tmp_path / "seed" / "tokenizer_config.json", settings)
    options = [tmp_path / "seed" if option == "run/seed" else option for option in SEED]
    outcome = xelm("init", tmp_path / "new", "--corpus", "corpus", *options)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "new" / "seed" / "tokenizer.json").exists()
    texts = ["Der alte Mann", "  und das Meer 🐟"]
    copied, given = (tokenizers.load(tmp_path / name) for name in ("new/seed", "seed"))
    assert copied.encode(texts) == given.encode(texts)


def test_init_lists_and_hashes_a_corpus_and_loads_each_tokenizer_once(
    xelm, place, monkeypatch, tmp_path
):
    hashed, loaded, listed = [], [], []
    listing = contents.list_files
    monkeypatch.setattr(contents, "list_files", lambda s: listed.append(s.path) or listing(s))
    digest, load = Part.digest, tokenizers.load
    monkeypatch.setattr(Part, "digest", lambda part: hashed.append(part.name) or digest(part))
    monkeypatch.setattr(tokenizers, "load", lambda path, *a: loaded.append(path) or load(path, *a))
    monkeypatch.chdir(place)
    outcome = xelm("init", tmp_path / "new", "--corpus", "corpus", *SEED)
    assert outcome.code == 0, outcome.err
    assert sorted(hashed) == sorted(path.name for path in Path("corpus").iterdir())
    assert listed == ["corpus"]
    assert loaded == [Path("run/seed"), tmp_path / "new" / "seed"]  # the copy is read as well


def test_the_tokenizer_of_a_run_is_loaded_again_only_if_it_changes(copy):
    run = open_run(copy.directory)
    first = run.tokenizer()
    assert open_run(copy.directory).tokenizer() is first
    path = run.seed / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"model_max_length": 77})
    assert run.tokenizer() is not first and run.tokenizer().hub.model_max_length == 77
    assert run.tokenizer() is run.tokenizer()


def test_a_seed_that_holds_no_numbers_is_refused_before_any_work(xelm, place, tmp_path):
    seed = shutil.copytree(place / "run/seed", tmp_path / "seed")
    tensors = load_file(seed / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 2] = np.nan
    save_file(tensors, seed / "model.safetensors", metadata={"format": "pt"})
    options = ("--corpus", place / "corpus", "--seed", seed, *SEED[2:])
    outcome = xelm("init", tmp_path / "new", *options)
    said = f"xelm: {name} in {seed}/model.safetensors has NaN or infinite values\n"
    assert (outcome.code, outcome.out, outcome.err) == (2, "", said)
    assert not (tmp_path / "new" / "run.json").exists()


def test_weights_are_readable_by_others_as_the_umask_says(tiny):
    for folder in (tiny.directory / "seed", tiny.directory / "dense"):
        modes = {(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}
        assert len(modes) == 1


def test_several_files_of_a_language_are_one_language(xelm, place, monkeypatch, tmp_path, undrawn):
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    lines = (place / "corpus" / "de.jsonl").read_bytes().splitlines(keepends=True)
    Path("corpus/de.0.jsonl").write_bytes(b"".join(lines[:20]))
    Path("corpus/de.1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[20:])))
    shutil.copytree(place / "run" / "seed", "run/seed")
    outcome = xelm("init", "new", "--corpus", "corpus", *SEED)
    assert outcome.code == 0, outcome.err
    store = open_run("new").store()
    assert list(store.languages) == ["de"] and len(store.languages["de"]) == len(lines)
    assert xelm("cluster", "-k", 1, "--corpus", "corpus", "--out", "c").code == 0


def test_a_corpus_counts_by_what_it_holds_from_wherever_it_is_asked(xelm, place, tmp_path):
    shutil.copytree(place / "corpus", tmp_path / "corpus")
    shutil.copytree(place / "run" / "seed", tmp_path / "run" / "seed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert xelm("init", "new", "--corpus", "corpus", *SEED).code == 0
    record = open_run(tmp_path / "new").record
    assert record["corpus"] == str((tmp_path / "corpus").resolve())
    assert open_run(tmp_path / "new").store().record["corpus"] == record["corpus"]
    seed = ["--seed", tmp_path / "run" / "seed", *SEED[2:]]
    assert xelm("init", tmp_path / "new", "--corpus", place / "corpus", *seed).code == 0
    changes = ["--set", "experts.tokens=7", "--set", "donor_share=0.5", "--languages", "de"]
    changes += ["--base-model", "owner/other"]
    refused = xelm("init", tmp_path / "new", "--corpus", tmp_path / "corpus", *seed, *changes)
    assert refused.code == 2
    assert "experts.tokens was 1000000000, now 7; donor_share was 0.25, now 0.5" in refused.err
    assert "languages was ['de', 'en'], now ['de']" in refused.err
    assert "base_model was None, now owner/other" in refused.err


def test_text_that_experts_were_trained_on_is_never_made_again(xelm, place, tmp_path):
    shutil.copytree(place / "run" / "seed", tmp_path / "run" / "seed")
    seed = ["--seed", tmp_path / "run" / "seed", *SEED[2:]]
    command = ("init", tmp_path / "new", "--corpus", place / "corpus", *seed)
    assert xelm(*command).code == 0
    folder = tmp_path / "new" / "corpus" / "train"
    # As earlier versions made it.
    record = json.loads((folder / "store.json").read_text())
    for name in ("language_codes", "languages_wanted", "fingerprints"):
        del record[name]
    write_json(folder / "store.json", record)
    before = snapshot(folder)
    again = xelm(*command)
    assert again.code == 0, again.err
    assert snapshot(folder) == before
    write_json(folder / "store.json", record | {"tokenizer_sha256": "of another"})
    before = snapshot(folder)
    refused = xelm(*command)
    assert refused.code == 2
    assert f"{folder} is the text that experts are trained on" in refused.err
    assert "tokenizer_sha256 was of another, now " in refused.err
    assert snapshot(folder) == before


def test_a_run_that_began_before_a_setting_existed_is_resumed(initialised, tmp_path):
    record = json.loads((initialised[0] / "run.json").read_text())
    facts = {k: v for k, v in record.items() if k not in ("format", "xelm", "command", "config")}
    config = open_run(initialised[0]).config
    for part in ("seed", "experts", "grow"):
        del record["config"][part]["mixture"]
    del record["config"]["model"]["expert_count"], record["config"]["model"]["experts_per_token"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "other").touch()  # it has begun
    assert create_run(tmp_path, config, facts).config == config
    other = replace(config, vectoriser_dimensions=13)
    with pytest.raises(UserError, match="vectoriser_dimensions was 12, now 13"):
        create_run(tmp_path, other, facts)
