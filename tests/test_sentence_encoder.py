"""Folders of sentence-transformers as seeds."""

import json
import shutil

import pytest
from shared import SEED

from clustering.errors import UserError
from xelm.models.checkpoint import README
from xelm.runs.sentence_encoder import MODULES, body_of

POOLING = {
    "idx": 1,
    "name": "1",
    "path": "1_Pooling",
    "type": "sentence_transformers.models.Pooling",
}


def folder_with(directory, *modules):
    directory.mkdir(exist_ok=True)
    (directory / MODULES).write_text(json.dumps([*modules, POOLING]))
    return directory


def transformer(path, kind="sentence_transformers.models.Transformer"):
    return {"idx": 0, "name": "0", "path": path, "type": kind}


@pytest.mark.parametrize("path", ["", "0_Transformer"])
@pytest.mark.parametrize(
    "kind",
    [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.base.modules.transformer.Transformer",
    ],
)
def test_the_body_is_where_modules_say(path, kind, tmp_path):
    folder = folder_with(tmp_path / "encoder", transformer(path, kind))
    assert body_of(folder) == folder / path


def test_a_folder_of_no_modules_is_itself(tmp_path):
    assert body_of(tmp_path) == tmp_path and body_of(tmp_path / "none") == tmp_path / "none"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], r"without a transformer \(its modules: sentence_transformers.models.Pooling\); .*xlm"),
        ([transformer("../other")], "names a folder elsewhere: ../other"),
        ([transformer("", "sentence_transformers.models.StaticEmbedding")], "StaticEmbedding, "),
    ],
)
def test_other_folders_are_refused_in_one_line(modules, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        body_of(folder_with(tmp_path / "encoder", *modules))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"0": "Transformer"}', "must be a list of modules"), ("[", "is not valid JSON")],
)
def test_a_list_of_modules_that_is_none_is_refused(content, message, tmp_path):
    (tmp_path / MODULES).write_text(content)
    with pytest.raises(UserError, match=message):
        body_of(tmp_path)


def test_a_seed_is_the_body_with_the_card_of_its_folder(xelm, place, tmp_path):
    folder = folder_with(tmp_path / "encoder", transformer("0_Transformer"))
    shutil.copytree(place / "run/seed", folder / "0_Transformer")
    (folder / "0_Transformer" / README).unlink(missing_ok=True)
    (folder / README).write_text("---\nlicense: mit\n---\n")
    options = ("--corpus", place / "corpus", "--seed", folder, *SEED[2:])
    outcome = xelm("init", tmp_path / "run", *options, "--base-model", "someone/encoder")
    assert outcome.code == 0, outcome.err
    for name in ("model.safetensors", "config.json"):
        copied, given = (tmp_path / "run" / "seed" / name, folder / "0_Transformer" / name)
        assert copied.read_bytes() == given.read_bytes()
    assert (tmp_path / "run" / "seed" / README).read_text() == (folder / README).read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["base_model"] == "someone/encoder"
