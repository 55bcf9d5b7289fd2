"""Experts and RUNs are pushed to, and pulled from, a stand-in for the Hugging Face Hub."""

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from hub_server import fails, standing_in
from safetensors.numpy import load_file, save_file
from shared import full, snapshot

from clustering.files import sha256
from experts import package
from experts.grow import grow
from experts.places import registry_to_share, without_folders
from experts.registry import Registry
from experts.verify import hash_directory, verify

# Of the library's HTTP client, in another thread.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def hub():
    with standing_in() as found:
        yield found


@pytest.mark.parametrize("offered", [True, False], ids=["with Xet", "without Xet"])
def test_large_files_are_uploaded_through_xet_and_otherwise_by_http(
    xelm, copy, hub, monkeypatch, offered
):
    """As of a host of one's own, which has the library's older way alone."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    weights = copy.directory / "experts/en-es/v1"
    # What arrives there in parts, which the stand-in does not put together again.
    hub.xet = [file.read_bytes() for file in weights.iterdir()] if offered else None
    pushed = xelm("push", copy.directory, "en-es", "--to", "jane/western")
    assert pushed.code == 0, pushed.err
    there = hub.repo("jane/western").head()["model.safetensors"]
    assert there == (weights / "model.safetensors").read_bytes()
    assert (hub.requests["xet"] > 0, hub.requests["upload"] > 0) == (offered, not offered)
    assert ("Xet does not take the files" in pushed.err) != offered
    assert not huggingface_hub.constants.HF_HUB_DISABLE_XET


@pytest.fixture(scope="module")
def whole(tiny, xelm, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A RUN that was pushed, and the files of its repository."""
    run = tmp_path_factory.mktemp("pushed") / "RUN"
    shutil.copytree(tiny.directory, run)
    (run / "results").mkdir(exist_ok=True)
    (run / "results/results.json").write_text('{"corpus": "/home/jane/texts"}')
    with standing_in() as found:
        assert xelm("push", run, "--to", "jane/all", "--private").code == 0
        assert found.repo("jane/all").private
        return run, found.repo("jane/all").head()


@pytest.fixture
def pushed(hub, whole):
    """The repository jane/all with a whole RUN."""
    return hub.make("jane/all", whole[1])


def test_an_expert_is_pushed_whole_and_a_second_push_uploads_nothing(xelm, copy, hub):
    run = copy.directory
    done = xelm("push", run, "en-es", "--to", "jane/western", "--json").json()
    expert = Registry.load(run).expert("en-es")
    there = hub.repo("jane/western").head()
    for file in expert.sha256:
        assert there[file] == (run / expert.path / file).read_bytes()
    assert set(there) == {*expert.sha256, package.FILE_NAME, ".gitattributes"}
    assert sorted(done["uploaded"]) == sorted({*expert.sha256, package.FILE_NAME})
    assert hub.requests["commit"] == 1
    before = dict(hub.requests)
    again = xelm("push", run, "en-es", "--to", "jane/western")
    assert (
        again.code == 0 and "all of them were there already, and nothing was uploaded" in again.out
    )
    for kind in ("commit", "upload", "batch", "create", "preupload"):
        assert hub.requests[kind] == before[kind]
    pushes = [event for event in Registry.load(run).history if event.action == "push"]
    assert [event.facts["to"] for event in pushes] == ["jane/western"]
    assert pushes[0].facts["commit"] == done["commit"] and pushes[0].experts == {
        "en-es@v1": "published"
    }
    assert verify(run) == []


def test_a_push_that_was_not_recorded_is_recorded_by_the_next(xelm, copy, hub, monkeypatch):
    command = ("push", copy.directory, "en-es", "--to", "jane/western")
    with monkeypatch.context() as patch:
        patch.setattr("xelm.runs.push.record", full)
        refused = xelm(*command)
    there = hub.repo("jane/western").branches["main"]
    fails(refused, f"jane/western has the files now, in the commit {there}, and {copy.directory}")
    assert "has no record of that (No space left on device); push again, which" in refused.err
    assert "nothing was changed" not in refused.err
    assert [e for e in Registry.load(copy.directory).history if e.action == "push"] == []
    for _ in range(2):
        assert "nothing was uploaded" in xelm(*command).out
        (push,) = [e for e in Registry.load(copy.directory).history if e.action == "push"]
        assert push.facts == {"to": "jane/western", "commit": there, "kind": "expert"}


@pytest.mark.slow
def test_a_run_is_pulled_as_it_was_pushed_and_works_without_its_text(
    xelm, copy, hub, whole, tmp_path
):
    run, (_, pushed), there = copy.directory, whole, tmp_path / "theirs"
    hub.make("jane/all", pushed)
    assert not [name for name in pushed if name.split("/")[0] in ("corpus", "train", "logs")]
    assert {name.split("/")[0] for name in pushed} >= {"seed", "dense", "experts", "routers"}
    done = xelm("pull", "jane/all", there, "--json").json()
    assert done["experts"] == ["de-fr@v1", "en-es@v1"]
    files = snapshot(there)
    for name in files.keys() - {"registry.json"}:
        assert files[name] == pushed[name], name
    assert set(pushed) - set(files) == {package.FILE_NAME, ".gitattributes"}
    mine, theirs = Registry.load(run), Registry.load(there)
    assert theirs.experts == registry_to_share(mine).experts
    assert [event.action for event in theirs.history][-1] == "pull"
    assert "push" not in [event.action for event in theirs.history]
    assert verify(there) == []
    # What this gives here, it gives there.
    prompt = ("generate", "--max-new-tokens", "5", "--temperature", "0", "--json")
    for routing in ("learned", "detected", "tfidf"):
        found = [
            xelm(prompt[0], place, "abc", *prompt[1:], "--routing", routing).json()
            for place in (run, there)
        ]
        assert found[0] == found[1]
    measure = ("--corpus", copy.held_out, "--routing", "language", "--json")
    found = [xelm("evaluate", place, *measure).json()["rows"] for place in (run, there)]
    rows = [
        [(row["system"], row["language"], row["documents"], row["nll"]) for row in each]
        for each in found
    ]
    assert rows[0] == rows[1]
    # What needs the text says so.
    for command in (("train", there, "en-es", "--again"), ("train", there, "--dense")):
        outcome = xelm(*command)
        assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
        assert (
            "this needs the tokenised text, which a RUN from the Hub does not have" in outcome.err
        )
    assert xelm("export", there, "en-es", "--out", tmp_path / "exported").code == 0
    assert verify(there) == []


def test_the_card_of_a_run_has_what_the_hub_reads(whole, tmp_path):
    run, there = whole
    (tmp_path / "card.md").write_bytes(there["README.md"])
    card, facts = (
        there["README.md"].decode(),
        huggingface_hub.metadata_load(tmp_path / "card.md") or {},
    )
    assert facts["language"] == ["de", "en", "es", "fr"] and facts["library_name"] == "xelm"
    expert = Registry.load(run).expert("en-es")
    assert expert.evaluation is not None
    bits = expert.evaluation["own"]["en"]
    row = f"| [en-es@v1](experts/en-es/v1) | en es | seed | {expert.tokens:,} | en "
    assert f"{row}{bits['expert']:.3f} (seed {bits['seed']:.3f})" in card
    assert "xelm pull jane/all experts" in card and "`dense`" in card


def test_a_shared_run_has_no_folders_of_the_machine_that_it_comes_from(whole, xelm, hub):
    run, there = whole
    home = str(run.parents[1])
    assert json.loads((run / "run.json").read_text())["corpus"].startswith(home)
    texts = {name: content for name, content in there.items() if name.endswith((".json", ".md"))}
    assert len(texts) > 10
    assert [name for name, content in texts.items() if home.encode() in content] == []
    assert json.loads(there["results/results.json"]) == {"corpus": "texts"}
    shared = json.loads(there["run.json"])
    assert shared["corpus"] == "train"
    mine, theirs = Registry.load(run), json.loads(there["registry.json"])
    assert mine.expert("en-es").data["en"][0]["corpus"].startswith(home)
    assert {
        text["corpus"] for e in theirs["experts"] for texts in e["data"].values() for text in texts
    } == {"train"}
    xelm("push", run, "en-es", "--to", "jane/western")
    alone = hub.repo("jane/western").head()
    assert [
        n for n, c in alone.items() if n.endswith((".json", ".md")) and home.encode() in c
    ] == []


def test_paths_become_names_and_other_texts_stay():
    value = {
        "corpus": "/home/jane/texts/sv.jsonl",
        "hub": "hf://jane/texts",
        "share": 0.5,
        "list": ["~/texts", "texts/sv", None],
        "command": "xelm grow /data/RUN --corpus '/home/my texts/sv' --set=/a/b --tokens 5",
    }
    assert without_folders(value) == {
        "corpus": "sv.jsonl",
        "hub": "hf://jane/texts",
        "share": 0.5,
        "list": ["texts", "texts/sv", None],
        "command": "xelm grow RUN --corpus sv --set=b --tokens 5",
    }
    assert without_folders({"command": "an unclosed ' /a/b"}) == {"command": "an unclosed ' b"}


def test_what_is_gone_here_is_deleted_there_in_the_same_commit(xelm, hub, whole, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(whole[0], run)
    hub.make("jane/all", whole[1] | {"LICENSE": b"CC0"})
    again = xelm("push", run, "--to", "jane/all", "--json").json()
    assert (again["uploaded"], again["deleted"], hub.requests["commit"]) == ([], [], 0)
    xelm("retire", run, "en-es")
    done = xelm("push", run, "--to", "jane/all", "--json").json()
    there = hub.repo("jane/all").head()
    assert not [name for name in there if name.startswith("experts/en-es/")]
    assert {"experts/en-es/v1/model.safetensors"} < set(done["deleted"])
    assert there["LICENSE"] == b"CC0" and hub.requests["commit"] == 1
    shared = json.loads(there["registry.json"])
    assert sorted(each["status"] for each in shared["experts"]) == ["published", "retired"]
    # Pushes are known here alone, or each would change what is pushed.
    mine = [event.action for event in Registry.load(run).history]
    theirs = [event["action"] for event in shared["history"]]
    assert "push" in mine and theirs == [action for action in mine if action != "push"]


def test_a_dry_run_lists_the_files_and_reaches_no_host(xelm, copy, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    before = snapshot(copy.directory)
    planned = xelm("push", copy.directory, "en-es", "--to", "jane/w", "--dry-run", "--json").json()
    expert = Registry.load(copy.directory).expert("en-es")
    weights = copy.directory / expert.path / "model.safetensors"
    assert planned["files"]["model.safetensors"] == weights.stat().st_size
    assert set(planned["files"]) == {*expert.sha256, package.FILE_NAME}
    assert planned["url"] == f"{hub.endpoint}/jane/w" and planned["commit"] is None
    whole = xelm("push", copy.directory, "--to", "jane/all", "--dry-run").out
    assert "vectoriser.npz" in whole and "would be in jane/all" in whole
    assert not hub.requests and snapshot(copy.directory) == before


def test_what_the_hub_refuses_is_one_line_and_nothing_is_half_made(xelm, copy, hub, monkeypatch):
    run = copy.directory
    push = ("push", run, "en-es", "--to", "jane/w")
    for token, message in (
        ("hf_reader", "cannot create jane/w: the token has no right to do this"),
        ("hf_wrong", "the token is missing or not valid"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        fails(xelm(*push), message)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    fails(xelm(*push), "writing to the Hub needs a token: log in with hf auth login")
    fails(xelm("pull", "jane/none", run.parent / "x"), "there is no such repository, or it is")
    monkeypatch.undo()
    assert hub.repos == {}


@pytest.mark.slow
def test_a_push_is_whole_or_not_at_all(xelm, copy, hub):
    run = copy.directory
    push = ("push", run, "en-es", "--to", "jane/w")
    for kind, status, message in (
        ("upload", 403, "cannot write jane/w: the token has no right to do this"),
        ("commit", 413, "cannot write jane/w: the Hub answered 413"),
        ("info", 429, "cannot read jane/w: the Hub wants fewer requests"),
    ):
        hub.refuse = {kind: status}
        fails(xelm(*push), message)
        assert set(hub.repo("jane/w").head()) == {".gitattributes"}
    hub.refuse = {}
    hub.before_commit = lambda: hub.repo("jane/w").add("main", {"README.md": b"theirs"})
    fails(xelm(*push), "jane/w: it was changed at the same time; nothing was written")
    assert hub.repo("jane/w").head() == {"README.md": b"theirs"}
    assert "push" not in [event.action for event in Registry.load(run).history]
    hub.before_commit = lambda: None
    hub.spoilt = "config.json"
    fails(xelm(*push), "jane/w has another content than was sent in config.json")
    hub.spoilt = ""
    assert xelm(*push, "--json").json()["uploaded"] == ["config.json"]
    fails(xelm("push", run, "de-fr", "--to", "jane/w"), "jane/w has the expert en-es@v1 (en es)")
    fails(xelm("push", run, "--to", "jane/w"), "jane/w has the expert en-es@v1 (en es)")
    hub.make("jane/other", {"model.safetensors": b"x"})
    fails(xelm("push", run, "--to", "jane/other"), "has files that xelm did not push: model.safe")
    weights = run / "experts/en-es/v1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    fails(xelm(*push), "en-es@v1: changed: experts/en-es/v1/model.safetensors: wanted sha256")


def test_a_name_that_no_repository_has_is_refused(xelm, place, tmp_path):
    for name in ("w", "a/b/c", "a b/c", "a--b/c", "../b", ""):
        fails(xelm("push", place / "run", "--to", name), "a repository is OWNER/REPO, such as")
        fails(xelm("pull", name, tmp_path / "x"), "a repository is OWNER/REPO, such as")


@pytest.mark.slow  # the library waits before it tries again
def test_an_interrupted_download_goes_on_where_it_ended(xelm, pushed, hub, tmp_path):
    there = tmp_path / "theirs"
    hub.break_after = 21
    outcome = xelm("pull", "jane/all", there)
    assert outcome.code == 2 and not there.exists(), outcome
    hub.break_after, first = None, set(hub.sent[1:20])
    hub.sent.clear()
    assert xelm("pull", "jane/all", there).code == 0
    # xelm.json is read each time.
    assert len(hub.sent) < 30 and not first & set(hub.sent) - {package.FILE_NAME}
    assert verify(there) == []
    assert [path.name for path in tmp_path.iterdir() if "theirs" in path.name] == ["theirs"]
    fails(xelm("pull", "jane/all", there), "exists already; give a new or empty directory")


@pytest.mark.slow
def test_a_tampered_file_is_not_pulled(xelm, pushed, hub, tmp_path):
    there, files = tmp_path / "theirs", pushed.head()
    good = dict(files)
    files["seed/model.safetensors"] = good["seed/model.safetensors"][:-1] + b"x"
    fails(xelm("pull", "jane/all", there), "seed/model.safetensors is not as it was pushed: wanted")
    assert not there.exists()
    # A whole list of new hashes does not help: the registry has them too.
    value = json.loads(good["xelm.json"])
    value["files"]["seed/model.safetensors"] = hashlib.sha256(
        files["seed/model.safetensors"]
    ).hexdigest()
    pushed.add("main", files | {"xelm.json": json.dumps(value).encode()})
    fails(xelm("pull", "jane/all", there), "jane/all is damaged: changed: seed/model.safetensors")
    pushed.add("main", good)
    assert xelm("pull", "jane/all", there).code == 0 and verify(there) == []


def test_what_could_run_code_or_lies_elsewhere_is_not_downloaded(xelm, pushed, hub, tmp_path):
    files, there = dict(pushed.head()), tmp_path / "theirs"
    for file, message in (
        ("seed/pytorch_model.bin", "seed/pytorch_model.bin could run code and is not read"),
        ("seed/weights.PT", "seed/weights.PT could run code and is not read"),
        ("seed/modeling.py", "seed/modeling.py could run code and is not read"),
        ("../../evil.json", "the file '../../evil.json' leaves its directory"),
        ("seed/gone.json", "jane/all lacks seed/gone.json, which it lists"),
    ):
        value = json.loads(files["xelm.json"])
        value["files"][file] = hashlib.sha256(b"evil").hexdigest()
        more = {} if "gone" in file else {file: b"evil"}
        pushed.add("main", files | {"xelm.json": json.dumps(value).encode()} | more)
        hub.sent.clear()
        fails(xelm("pull", "jane/all", there), message)
        assert hub.sent == [package.FILE_NAME]
    # What xelm.json does not list is not downloaded either.
    pushed.add("main", files | {"seed/pytorch_model.bin": b"evil", "seed/modeling.py": b"evil"})
    assert xelm("pull", "jane/all", there).code == 0
    assert not [name for name in hub.sent if name.endswith((".bin", ".py"))]


def test_what_cannot_be_pulled_is_told_in_one_line(xelm, pushed, hub, whole, tmp_path, monkeypatch):
    there = tmp_path / "theirs"
    fails(xelm("pull", "jane/all", there, "--revision", "v9"), "it has no such revision")
    hub.make("jane/plain", {"model.safetensors": b"x"})
    fails(xelm("pull", "jane/plain", there), "jane/plain has no xelm.json: xelm push did not write")
    xelm("push", whole[0], "en-es", "--to", "jane/w")
    fails(
        xelm("pull", "jane/w", there), "is a single expert; pull it with: xelm pull jane/w --into"
    )
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    fails(xelm("pull", "jane/all", there), "0.1 MB are free there")
    monkeypatch.undo()
    assert not there.exists()


def test_a_host_that_does_not_answer_is_named(xelm, place, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    huggingface_hub.close_session()
    for command in (("pull", "jane/all", tmp_path / "x"), ("push", place / "run", "--to", "a/b")):
        fails(xelm(*command), "http://127.0.0.1:9 does not answer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    fails(xelm("pull", "jane/all", tmp_path / "x"), "HF_HUB_OFFLINE is set")


@pytest.mark.slow
def test_an_expert_from_the_hub_joins_a_run(xelm, copy, hub, tiny, tmp_path):
    run, theirs = copy.directory, tmp_path / "theirs"
    shutil.copytree(tiny.directory, theirs)
    shutil.copytree(theirs / "experts/en-es/v1", theirs / "experts/pt/v1")
    registry = grow(Registry.load(theirs), "pt", "en-es")
    weights = theirs / "experts/pt/v1/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= np.float32(1.001)
    save_file(tensors, weights, metadata={"format": "pt"})
    registry.publish("pt", 1, sha256=hash_directory(theirs / "experts/pt/v1"), tokens=9).save(
        theirs
    )
    assert xelm("push", theirs, "pt", "--to", "jane/pt").code == 0
    before = snapshot(run)
    joined = xelm("pull", "jane/pt", "--into", run, "--corpus", tiny.corpus, "--json")
    assert joined.json() == {"published": "pt@v1"}
    expert = Registry.load(run).expert("pt")
    assert (expert.status, expert.parent, expert.languages) == ("published", "en-es@v1", ("pt",))
    assert expert.made is not None and expert.made["from"] == "jane/pt"
    assert expert.made["sha256"] == {"model.safetensors": sha256(weights)}
    assert verify(run) == []
    after = snapshot(run)
    kept = [name for name in before if name.startswith(("experts/", "seed/", "dense/"))]
    assert kept and all(after[name] == before[name] for name in kept)
    assert not list(run.glob(".pulled*"))
    registered = (run / "registry.json").read_bytes()
    assert xelm("pull", "jane/pt", "--into", run).out == "published: pt@v1\n"
    assert (run / "registry.json").read_bytes() == registered
    files = dict(hub.repo("jane/pt").head())
    value = json.loads(files["xelm.json"])
    value["seed"]["model.safetensors"] = "0" * 64
    hub.repo("jane/pt").add("main", files | {"xelm.json": json.dumps(value).encode()})
    fails(xelm("pull", "jane/pt", "--into", run), "jane/pt is an expert of another seed than that")
    fails(xelm("pull", "jane/pt"), "give a new directory for a whole RUN, or --into RUN")
    xelm("push", run, "--to", "jane/all")
    fails(xelm("pull", "jane/all", "--into", run), "jane/all is a whole RUN; pull it with: xelm pu")
