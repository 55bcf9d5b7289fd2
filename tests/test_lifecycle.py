"""The life of experts: retired, restored, renamed; their history, the table of all, differences."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from clustering.errors import UserError
from clustering.files import write_json
from experts import manifest
from experts.branch import branch
from experts.expert import Expert
from experts.grow import grow
from experts.history import Event, about, name_now
from experts.lock import record, update
from experts.registry import FILE_NAME, Registry
from experts.verify import hash_directory, verify
from xelm import open_run, tables
from xelm.inference.routing import Routing
from xelm.runs.compare import Comparison, Difference, ListedExpert
from xelm.runs.ensembles import open_ensemble
from xelm.runs.gate import refusal_of

H = {name: {"model.safetensors": name * 64} for name in "0123456789abcdef"}
EVALUATION = {"own": {"pt": {"documents": 8, "expert": 3.0, "parent": 4.0, "seed": 5.0}}}


def registry_of_two() -> Registry:
    """`a` with versions 1 (retired) and 2 (published), and its grown child `b`."""
    first = Registry(seed_sha256=H["0"], experts=(Expert(name="a", languages=("en",)),))
    second = first.publish("a", 1, sha256=H["1"], tokens=1).start("a")
    second = second.publish("a", 2, sha256=H["2"], tokens=2)
    return grow(second, "de", "a", name="b").publish("b", 1, sha256=H["3"], tokens=3)


def saved(run, registry: Registry) -> Registry:
    registry.save(run)
    for expert in registry.experts:
        if expert.sha256:
            manifest.record_expert(run, expert)
    return registry


@pytest.fixture
def grown(copy):
    """The tiny RUN with a grown expert `pt`, which is the weights of en-es."""
    run = copy.directory
    shutil.copytree(run / "experts/en-es/v1", run / "experts/pt/v1")
    hashes = hash_directory(run / "experts/pt/v1")
    registry = grow(Registry.load(run), "pt", "en-es", settings={"grow.tokens": 512})
    registry = registry.publish("pt", 1, sha256=hashes, tokens=512, evaluation=EVALUATION)
    saved(run, registry)
    assert verify(run) == []
    return run


def test_a_version_does_not_bring_back_an_expert_that_was_retired_meanwhile(grown):
    run, changes = (
        open_run(grown),
        [
            ("again", lambda r: r.start("pt", parent="pt@v1"), False),
            ("retire", lambda r: r.retire_expert("pt"), True),
            ("push", lambda r: r, True),
            ("restore", lambda r: r.restore("pt"), False),
            ("retire", lambda r: r.retire_expert("pt"), True),
        ],
    )
    for action, change, retired in changes:
        registry = update(grown, change, action)
        if action == "push":
            record(grown, "push", ["pt@v1"], {"to": "jane/pt"})
        refusal = refusal_of(run, registry.expert("pt", 2), {"own": EVALUATION["own"]})
        assert refusal == ("pt was retired after its training began" if retired else None)
    registry = update(grown, lambda r: r.discard("pt"), "discard")
    registry = update(grown, lambda r: grow(r, "pt", "en-es"), "grow")  # begun after that
    assert refusal_of(run, registry.expert("pt", 2), {"own": EVALUATION["own"]}) is None


def test_a_change_and_its_event_are_written_together(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/xelm", "retire", "my run", "b"])
    before = saved(tmp_path, registry_of_two())
    after = update(tmp_path, lambda r: r.retire_expert("b"), "retire", {"why": "too old"})
    (event,) = after.history
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", event.time)
    assert event == Event(
        time=event.time,
        action="retire",
        experts={"b@v1": "retired"},
        command="xelm retire 'my run' b",
        facts={"why": "too old"},
    )
    assert Registry.load(tmp_path) == after
    assert replace(after, history=()) == before.retire_expert("b")
    grown = update(tmp_path, lambda r: r.start("a"), "train")
    removed = update(tmp_path, lambda r: r.discard("a"), "discard")
    assert [e.experts for e in (grown.history[-1], removed.history[-1])] == [
        {"a@v3": "training"},
        {"a@v3": None},
    ]


def test_a_change_that_changes_nothing_is_no_event(tmp_path):
    saved(tmp_path, registry_of_two().retire_expert("b"))
    before = (tmp_path / FILE_NAME).read_bytes()
    update(tmp_path, lambda r: r.retire_expert("b"), "retire")
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"time": 5}, r"history\[0\]: 'time' should be str; got 5"),
        ({"experts": {"a@1": "retired"}}, "'a@1' names no version of an expert"),
        ({"experts": {"a@v1": 3}}, r"history\[0\]: experts: 'a@v1' should be str"),
        ({"renamed": {"a": 3}}, r"history\[0\]: renamed: 'a' should be str"),
    ],
)
def test_a_damaged_history_is_refused(event, message, tmp_path):
    registry_of_two().save(tmp_path)
    value = json.loads((tmp_path / FILE_NAME).read_text())
    whole = {"time": "", "action": "retire", "experts": {}, "command": ""}
    value["history"] = [whole | event]
    (tmp_path / FILE_NAME).write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        Registry.load(tmp_path)


def test_a_retired_expert_is_out_of_use_and_comes_back_in_the_version_that_was_in_use(tmp_path):
    saved(tmp_path, registry_of_two().rollback("a", 1))
    retired = update(tmp_path, lambda r: r.retire_expert("a"), "retire")
    assert [e.name for e in retired.published()] == ["b"] and retired.retired() == ("a",)
    found = (retired.last_in_use("a"), retired.retired_for("en"))
    assert [each.version for each in found if each] == [1, 1]
    hint = "a@v1 is retired; bring it back with: xelm restore RUN a"
    for use in (
        lambda: retired.for_language("en"),
        lambda: retired.in_use("a"),
        lambda: grow(retired, "fr", "a"),
        lambda: grow(retired, "fr", "a@v2"),
    ):
        with pytest.raises(UserError, match=hint):
            use()
    assert verify_records(tmp_path) == []
    restored = update(tmp_path, lambda r: r.restore("a"), "restore")
    assert restored.expert("a").version == 1  # not the newest: it had been rolled back
    assert retired.restore("a", 2).expert("a").reference == "a@v2"
    assert restored.restore("a") == restored
    assert retired.retire_expert("a") == retired


def verify_records(run):
    return [fault for fault in verify(run) if fault.file in (FILE_NAME, manifest.FILE_NAME)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.retire_expert("b").retire_expert("a"), "a is the last published expert"),
        (lambda r: r.start("b").retire_expert("c"), "no expert 'c'; known: a, b"),
        (lambda r: grow(r, "fr", "a").retire_expert("fr"), "fr was never published; give it up"),
        (lambda r: r.restore("a", 1), "a@v2 is published; go back to v1 with: xelm rollback RUN a"),
        (lambda r: r.retire_expert("a").restore("a"), "not known which version of a was in use"),
        (lambda r: r.retire_expert("a").restore("a", 7), "no version 7"),
        (lambda r: r.rename({"a": "b"}), "'b' names another expert already"),
        (lambda r: r.rename({"a": "B"}), "'B' names another expert already"),
        (lambda r: r.rename({"a": "c", "b": "c"}), "two experts cannot have one name"),
        (lambda r: r.rename({"a": "seed"}), "'seed' cannot name an expert"),
        (lambda r: r.rename({"x": "y"}), "no expert 'x'; known: a, b"),
        (lambda r: r.start("a").rename({"a": "c"}), "a@v3 is in training; finish it"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        change(registry_of_two())
    assert "\n" not in str(caught.value)


def test_a_renamed_expert_keeps_files_versions_children_and_history(tmp_path):
    before = saved(tmp_path, registry_of_two())
    change = {"a": "west"}
    update(tmp_path, lambda r: r.retire_expert("a"), "retire")
    update(tmp_path, lambda r: r.rename(change), "rename", {"renamed": change})
    after = update(tmp_path, lambda r: r.restore("west"), "restore")
    assert [e.reference for e in after.experts] == ["west@v1", "west@v2", "b@v1"]
    assert [e.path for e in after.experts] == [e.path for e in before.experts]
    assert [e.first_reference for e in after.experts] == ["a@v1", "a@v2", "b@v1"]
    assert after.expert("b").parent == "west@v2"
    assert verify_records(tmp_path) == []
    assert [e.action for e in about(after.history, "west")] == ["retire", "rename", "restore"]
    with pytest.raises(UserError, match="no expert 'a'; it was renamed to 'west'; known: b, west"):
        after.expert("a")
    # Again: nothing. Back: as if nothing had been.
    assert after.rename(change) == after
    assert replace(after.rename({"west": "a"}), history=()) == before
    # The record is still guarded.
    forged = replace(after, experts=(replace(after.experts[0], tokens=99), *after.experts[1:]))
    forged.save(tmp_path)
    assert [f.detail for f in verify_records(tmp_path)] == [
        "the record of west@v1 changed after it was published"
    ]


def test_a_name_that_was_given_up_can_be_taken_again_and_no_file_is_shared(tmp_path):
    saved(tmp_path, registry_of_two())
    change = {"b": "german"}
    update(tmp_path, lambda r: r.rename(change), "rename", {"renamed": change})
    update(tmp_path, lambda r: r.retire_expert("german"), "retire")
    after = update(tmp_path, lambda r: grow(r, "de", "a", name="b"), "grow")
    assert after.expert("b").reference == "b@v2" and after.expert("b").path == "experts/b/v2"
    assert [e.action for e in about(after.history, "b")] == ["grow"]
    assert [e.action for e in about(after.history, "german")] == ["rename", "retire"]
    assert name_now(after.history, "b") == "german"


def test_branching_again_after_a_rename_changes_nothing(copy):
    run = open_run(copy.directory)
    after = run.rename({"de-fr": "middle"})
    assert branch(after, run.clusters()) == after
    assert verify(run.directory) == []
    assert run.registry().expert("middle").cluster == "de-fr"


def test_commands_retire_restore_and_rename(xelm, grown):
    assert xelm("retire", grown, "pt").out == (
        f"retired: pt@v1; bring it back with: xelm restore {grown} pt\n"
    )
    assert verify(grown) == []
    for refused in (
        ("grow", grown, "--language", "ca", "--parent", "pt"),
        ("merge", grown, "pt", "--out", grown.parent / "merged"),
        ("generate", grown, "abc", "--routing", "fixed", "--weights", "pt=1"),
        ("push", grown, "pt", "--to", "jane/pt", "--dry-run"),
        ("export", grown, "pt", "--out", grown.parent / "exported"),
    ):
        outcome = xelm(*refused)
        assert outcome.code == 2
        assert "pt@v1 is retired; bring it back with: xelm restore RUN pt" in outcome.err
    asked = xelm("generate", grown, "abc", "--language", "pt", "--routing", "language")
    assert asked.code == 2
    assert "pt, the expert for 'pt', is retired; bring it back with: xelm restore RUN pt" in (
        asked.err
    )
    assert xelm("restore", grown, "pt", "--json").json() == {"published": "pt@v1"}
    renamed = xelm("rename", grown, "pt=portuguese", "--json").json()
    assert renamed == {"renamed": {"pt": "portuguese"}, "experts": ["portuguese@v1"]}
    assert xelm("rename", grown, "pt=portuguese").out == "pt is now portuguese\n"
    assert verify(grown) == []
    names = open_ensemble(open_run(grown), Routing(name="uniform")).names
    assert names == ["de-fr", "en-es", "portuguese"]


def test_rows_of_evaluations_are_renamed(xelm, grown):
    rows = [{"system": system, "nll": 1.0} for system in ("seed", "pt", "en-es")]
    write_json(grown / "results/results.json", {"format": 1, "rows": rows, "summaries": rows})
    for _ in range(2):  # the second call finds it done
        xelm("rename", grown, "pt=portuguese")
        tables = json.loads((grown / "results/results.json").read_text())
        assert [row["system"] for row in tables["rows"]] == ["seed", "portuguese", "en-es"]
        assert tables["summaries"] == tables["rows"] and "removed" not in tables


def test_lines_of_many_experts_and_of_long_paths_fit_a_terminal():
    many = {f"{name}@v1": "training" for name in "abcdefg"} | {"h@v1": "published"}
    event = Event(time="2026-11-30T08:00:00+00:00", action="branch", experts=many, command="xelm b")
    assert tables.history([event]).splitlines()[1].split("  ")[1:] == [
        "branch",
        "a@v1, b@v1 and 5 more training, h@v1 published",
        "xelm b",
    ]
    source = "data.sv.sv.sources./home/somebody/texts.files"
    facts = [
        ("tokens", 5, None),
        ("data.sv.sv.corpus", "/home/somebody/texts/of/many/languages", None),
        ("data.sv.sv.sha256", "a" * 64, "b" * 64),
        (source, 1, None),
        ("SHA-256 of w", "a" * 64, "b" * 64),
    ]
    found = [Difference(name=name, first=first, second=second) for name, first, second in facts]
    shown = tables.comparison(Comparison(first="sv@v1", second="seed", differences=found))
    assert [re.split(r"\s{2,}", line) for line in shown.splitlines()] == [
        ["", "sv@v1", "seed", "change"],
        ["tokens", "5", "-"],
        ["data.sv.sv.corpus", "...y/texts/of/many/languages", "-"],
        ["SHA-256 of w", "aaaaaaaaaaaa...", "bbbbbbbbbbbb..."],
        ["and 2 details of their text, which --json has"],
    ]


def test_a_column_has_room_for_text_in_a_script_that_a_model_does_not_know():
    for perplexity, shown in {280.24: "280.2", 99_999.9: "99999.9", 2_231_208.6: "2.2e+06"}.items():
        pair = tables._pair(perplexity, 21.018)
        assert pair == f"{shown} 21.018" and len(pair) < tables._WIDTH


def test_tokens_that_nobody_knows_are_not_called_none():
    known = {"name": "sv", "version": 1, "status": "published", "parent": "seed"}
    each = ListedExpert(**known, languages=("sv",), tokens=0, bytes=1_600_000, figures={})
    row = tables.experts([each]).splitlines()[1]
    assert row.split() == ["sv@v1", "published", "seed", "sv", "-", "1.6", "-", "-", "-"]


def test_history_is_printed(xelm, grown, monkeypatch):
    monkeypatch.setattr("sys.argv", ["xelm", "..."])
    xelm("retire", grown, "pt")
    xelm("rename", grown, "pt=portuguese")
    trained = open_run(grown).history("en-es")
    assert [event.action for event in trained] == ["branch", "train", "publish"]
    assert trained[-1].experts == {"en-es@v1": "published"}
    whole = open_run(grown).history()
    assert [event.action for event in whole][:2] == ["init", "branch"]
    dense = [event for event in whole if event.facts.get("model") == "dense"]
    assert [event.action for event in dense] == ["train"]
    lines = xelm("history", grown, "portuguese").out.splitlines()
    assert lines[0].split() == ["time", "(UTC)", "action", "experts", "command"]
    assert [re.split(r"\s{2,}", line)[1:] for line in lines[1:]] == [
        ["retire", "pt@v1 retired", "xelm ..."],
        ["rename", "portuguese@v1 retired, pt is now portuguese", "xelm ..."],
    ]
    update(grown, lambda r: r.restore("portuguese"), "restore", {"refusal": "3.1 bits"})
    assert xelm("history", grown).out.splitlines()[-1] == "  refusal: 3.1 bits"
    shown = xelm("history", grown, "--json").json()[:-1]
    assert [event["action"] for event in shown[-2:]] == ["retire", "rename"]
    assert xelm("history", grown, "nobody").code == 2


def test_experts_are_listed_with_sizes_and_figures(xelm, grown):
    found = {f"{each.name}@v{each.version}": each for each in open_run(grown).experts()}
    assert list(found) == ["de-fr@v1", "en-es@v1", "pt@v1"]
    pt = found["pt@v1"]
    assert (pt.status, pt.parent, pt.languages, pt.tokens) == (
        "published",
        "en-es@v1",
        ("pt",),
        512,
    )
    files = (grown / "experts/pt/v1").iterdir()
    assert pt.bytes == sum(file.stat().st_size for file in files)
    assert pt.figures == {"expert": 3.0, "parent": 4.0, "seed": 5.0}
    xelm("retire", grown, "pt")
    line = xelm("experts", grown).out.splitlines()[3].split()
    assert line[:5] == ["pt@v1", "retired", "en-es@v1", "pt", "512"]
    assert line[6:] == ["3.000", "4.000", "5.000"]
    assert xelm("experts", grown, "--json").json()[2]["status"] == "retired"


def test_differences_of_two_models_are_listed(xelm, grown):
    run = open_run(grown)
    facts = {d.name: (d.first, d.second) for d in run.diff("pt", "en-es").differences}
    assert facts["parent"] == ("en-es@v1", "seed")
    assert facts["settings.grow.tokens"] == (512, None)
    assert facts["bits a byte in pt"] == (3.0, 4.0)  # as the child's evaluation has its parent's
    assert not {"bytes on disk", "status", "SHA-256 of model.safetensors"} & set(facts)
    with_seed = {d.name: (d.first, d.second) for d in run.diff("seed", "pt@v1").differences}
    assert with_seed["bits a byte in pt"] == (5.0, 3.0)
    assert "SHA-256 of model.safetensors" in with_seed
    lines = xelm("diff", grown, "en-es", "pt").out.splitlines()
    assert lines[0].split() == ["en-es@v1", "pt@v1", "change"]
    assert lines[1].startswith("bits a byte in ")  # what is asked for first
    (bits,) = [line for line in lines if line.startswith("bits a byte in pt")]
    assert bits.split()[-3:] == ["4.000", "3.000", "-1.000"]
    same = xelm("diff", grown, "pt", "pt@v1").out
    assert same == "pt@v1 and pt@v1 do not differ in anything that is recorded\n"
    assert xelm("diff", grown, "pt", "seed", "--json").json()["second"] == "seed"
    assert xelm("diff", grown, "pt", "pt@v7").code == 2
