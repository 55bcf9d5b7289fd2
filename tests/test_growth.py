"""Several languages grown at once, a family, a language that joins an expert; others untouched."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_corpus
from shared import snapshot, without_routers

from clustering.errors import UserError
from clustering.files import read_arrays
from experts.expert import Expert
from experts.grow import begun_with, grow
from experts.lock import update
from experts.registry import Registry
from experts.verify import verify
from xelm.api import open_run
from xelm.data.contents import contents_in
from xelm.runs import fit, train
from xelm.runs.discard import _names_languages
from xelm.runs.jobs import command_of, expert_job
from xelm.runs.new_languages import default_clusters, groups_of, languages_to_grow
from xelm.runs.options import GrowOptions
from xelm.runs.shares import expert_text
from xelm.runs.text import tokenise

NEW = ("it", "pt", "sv")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text in Italian, Portuguese and Swedish."""
    return write_corpus(tmp_path_factory.mktemp("several") / "text", NEW, 40, seed=0)


@pytest.fixture(scope="module")
def place(tiny, corpus, tmp_path_factory):
    """The tiny RUN, where no test changes the registry."""
    directory = tmp_path_factory.mktemp("place") / "RUN"
    shutil.copytree(tiny.directory, directory)
    return open_run(directory)


def test_near_languages_share_an_expert(place, corpus):
    # The RUN has two experts of two languages.
    assert [default_clusters(place.registry(), count) for count in (1, 2, 3, 5)] == [1, 1, 2, 3]
    found = groups_of(place, NEW, corpus, GrowOptions())
    assert found == {"it-pt": ("it", "pt"), "sv": ("sv",)}
    alone = groups_of(place, NEW, corpus, GrowOptions(clusters=3))
    assert alone == {"it": ("it",), "pt": ("pt",), "sv": ("sv",)}
    assert groups_of(place, NEW, corpus, GrowOptions(clusters=1)) == {"it-pt-sv": NEW}


def test_a_family_is_its_languages_in_the_corpus_that_nobody_serves(place, corpus):
    assert languages_to_grow(place, (), corpus, "Romance") == ("it", "pt")
    assert languages_to_grow(place, (), corpus, "north germanic") == ("sv",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "languages to grow (--language), or their family (--family); got neither"),
        (("--language", "it", "--family", "Romance"), "or their family (--family); got both"),
        (("--language", "it,en"), "'en' is served already, by en-es@v1 (published); to train it"),
        (("--language", "it,ita"), "languages are given more than once: it (as it, ita)"),
        (("--language", "it,pt", "--clusters", 3), "2 languages cannot form 3 clusters"),
        (("--family", "Romanish"), "URIEL knows no language family 'Romanish'; the nearest is "),
        (("--family", "Turkic"), "has no text in a Turkic language"),
        (("--language", "it", "--into", "nobody"), "there is no expert 'nobody'; known: de-fr, en"),
        (("--language", "de", "--into", "en-es"), "'de' is served already, by de-fr@v1"),
        (("--language", "it", "--into", "en-es", "--parent", "seed"), "--parent goes with experts"),
        (("--language", "it", "--into", "en-es", "--by", "geography"), "--by goes with experts of"),
        (("--language", "it", "--into", "en-es", "--clusters", 1), "--clusters goes with experts"),
        (("--language", "it", "--into", "en-es", "--initialise", "mean"), "--initialise goes with"),
        (("--language", "it", "--by", "geography", "--parent", "de-fr"), "give one of them"),
        (("--language", "it", "--clusters", 0), "--clusters must be at least 1; got 0"),
        (("--language", "it", "--parent", "nobody"), "there is no expert 'nobody'"),
    ],
)
def test_what_cannot_be_grown_is_said_in_one_line(xelm, place, corpus, arguments, message):
    outcome = xelm("grow", place.directory, *arguments, "--corpus", corpus, "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("xelm: ") and outcome.err.count("\n") == 1
    assert message in outcome.err
    assert not (place.directory / "corpus" / "it").exists()


def test_a_corpus_that_is_not_there_is_no_matter_of_parents(xelm, place):
    outcome = xelm("grow", place.directory, "--language", "it", "--corpus", "nowhere", "--dry-run")
    assert (outcome.code, outcome.err) == (2, "xelm: corpus nowhere does not exist\n")


def test_a_family_that_is_served_is_refused_with_the_names_of_who_serves_it(place, tiny):
    with pytest.raises(UserError, match="are served: German by de-fr, English by en-es"):
        languages_to_grow(place, (), tiny.corpus, "West Germanic")


def test_nothing_changes_in_a_dry_run(xelm, place, corpus):
    before = snapshot(place.directory)
    several = xelm(
        "grow", place.directory, "--language", "it,pt,sv", "--corpus", corpus, "--dry-run"
    )
    assert "it-pt@v1 would start from en-es@v1; sv@v1 would start from " in several.out
    assert "it-pt (it pt) grows from en-es, which serves es, the nearest" in several.err
    joins = ("--language", "pt", "--into", "en-es", "--dry-run", "--json")
    joined = xelm("grow", place.directory, *joins, "--corpus", corpus).json()
    assert [training["name"] for training in joined["trainings"]] == ["en-es"]
    assert set(joined["trainings"][0]["passes"]) == {"en", "es", "pt"}
    assert snapshot(place.directory) == before


def test_a_language_of_the_runs_corpus_that_joins_is_not_read_twice(place, tiny):
    tokenise(place, contents_in(tiny.corpus, ["fr"]), "en-es-fr")
    facts = {"cluster": "en-es", "languages": ("en", "es", "fr"), "corpora": ("en-es-fr",)}
    joined = Expert(name="en-es", version=2, parent="en-es@v1", joined=("fr",), **facts)
    again = Expert(name="en-es", version=3, parent="en-es@v1", **facts)
    for expert in (joined, again):
        text = expert_text(place, expert)
        for part in (text.sources, text.held_out):
            read = [(source.ids.directory.name, source.ids.language) for source in part]
            assert read == [("train", "en"), ("train", "es"), ("en-es-fr", "fr")]


def test_former_languages_keep_their_share_of_the_rows(place, corpus):
    tokenise(place, contents_in(corpus, ["pt"]), "en-es-v2")
    expert = Expert(
        name="en-es",
        version=2,
        parent="en-es@v1",
        languages=("en", "es", "pt"),
        joined=("pt",),
        cluster="en-es",
        corpora=("en-es-v2",),
    )
    for kept in (0.5, 0.8):
        settings = ("grow.data.sampling_exponent=0", f"kept_share={kept}", "grow.tokens=256")
        job = expert_job(replace(place, settings=settings), expert)
        shares = {source.ids.language: source.share for source in job.text.sources}
        assert shares == pytest.approx({"en": kept / 2, "es": kept / 2, "pt": 1 - kept})
        assert (job.part, job.config.tokens) == ("grow", 256)
        assert {source.ids.language for source in job.text.held_out} == {"en", "es", "pt"}
    # A share of other languages is within that.
    more = replace(place, settings=(*settings, "grow.data.replay_share=.2"))
    shares = {s.ids.language: s.share for s in expert_job(more, expert).text.sources}
    assert shares == pytest.approx({"en": 0.32, "es": 0.32, "pt": 0.16, "de": 0.1, "fr": 0.1})
    assert command_of(place, expert).endswith("--language pt --into en-es")


def published(name, *languages):
    hashes = {"model.safetensors": "a" * 64}
    return Expert(name=name, languages=languages, cluster=name, status="published", sha256=hashes)


def test_a_cluster_of_new_languages_is_one_record_and_others_stay_as_they_are():
    before = Registry(seed_sha256={}, experts=(published("slavic", "ru", "bg"),))
    after = grow(before, ["pl", "ces"], "slavic")
    assert after.experts[0] is before.experts[0]
    assert (after.experts[1].name, after.experts[1].languages) == ("pl-cs", ("pl", "cs"))
    with pytest.raises(UserError, match="'cs' is served already, by pl-cs@v1"):
        grow(after, "cs", "slavic")


def test_experts_that_one_command_began_belong_together(tmp_path):
    Registry(seed_sha256={}, experts=(published("slavic", "ru"),)).save(tmp_path)

    def both(registry):
        return grow(grow(registry, ["pl", "cs"], "slavic"), "uk", "slavic")

    update(tmp_path, both, "grow")
    registry = update(tmp_path, lambda registry: grow(registry, "be", "slavic"), "grow")
    groups = {e.name: [o.name for o in begun_with(registry, e)] for e in registry.training()}
    assert groups == {"pl-cs": ["pl-cs", "uk"], "uk": ["pl-cs", "uk"], "be": ["be"]}


@pytest.mark.parametrize(("name", "is_one"), [("az-kk", True), ("az-plus5", True), ("sv", True)])
def test_text_of_a_cluster_is_known_by_its_name(name, is_one):
    assert _names_languages(name) == is_one
    assert not _names_languages(f"evaluation-{name}") and not _names_languages(f"{name}-v2")


FEW = ("--tokens", 128, "--set", "gate.worse=null")


def stop(*arguments, **options):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def several(xelm, tiny, corpus, tmp_path_factory):
    """The tiny RUN with three languages in two experts, of whose growth the process ended once, and
    the files before it."""
    directory = tmp_path_factory.mktemp("grown") / "RUN"
    shutil.copytree(tiny.directory, directory)
    before = snapshot(directory)
    command = ("grow", directory, "--language", "it,pt", "--language", "sv", *FEW)

    with pytest.MonkeyPatch.context() as patch:
        # The first is published, and the second has not begun.
        original, finished = train.finish, []

        def once(*arguments):
            if finished:
                stop()
            finished.append(original(*arguments))
            return finished[-1]

        patch.setattr(train, "finish", once)
        interrupted = xelm(*command, "--corpus", corpus)
        assert interrupted.code == 130
    registry = open_run(directory).registry()
    assert [e.reference for e in registry.training()] == ["sv@v1"]
    other = xelm("grow", directory, "--language", "sv", "--corpus", corpus)
    assert (
        "go on with: xelm grow" in other.err and "--language it,pt,sv, or give it up" in other.err
    )
    outcome = xelm(*command, "--corpus", corpus)
    assert outcome.code == 0, outcome.err
    return directory, before, outcome


def test_a_growth_of_several_languages_that_was_interrupted_goes_on(several):
    directory, _, outcome = several
    run = open_run(directory)
    experts = [run.registry().expert(name) for name in ("it-pt", "sv")]
    assert [e.status for e in experts] == ["published"] * 2
    assert outcome.out.splitlines()[0].startswith("it-pt@v1 (it pt) from en-es@v1, round 2, ")
    assert outcome.out.splitlines()[1].startswith("sv@v1 from ")
    assert run.registry().for_language("por").name == "it-pt"
    assert set(run.store("it-pt").languages) == {"it", "pt"}
    assert verify(directory) == []


def test_growing_several_leaves_every_other_file_and_record(several, tiny):
    directory, before, _ = several
    before, after = without_routers(before), without_routers(snapshot(directory))
    new = ("experts/it-pt/", "experts/sv/", "corpus/it-pt/", "corpus/sv/", ".locks/")
    changed = {name for name in after if after[name] != before.get(name)}
    others = {name for name in changed if not name.startswith(new)}
    assert others == {"registry.json", "hashes.json"} and before.keys() <= after.keys()
    old, now = Registry.load(tiny.directory), Registry.load(directory)
    assert now.experts[: len(old.experts)] == old.experts


def test_a_growth_that_ended_before_its_record_leaves_text_that_can_be_discarded(
    xelm, place, corpus, tmp_path, monkeypatch
):
    run = tmp_path / "RUN"
    shutil.copytree(place.directory, run)
    before = snapshot(run)
    monkeypatch.setattr("xelm.runs.grow.update", stop)
    assert xelm("grow", run, "--language", "it,pt", "--corpus", corpus).code == 130
    assert (run / "corpus" / "it-pt").exists()
    assert xelm("discard", run, "it-pt").code == 0
    assert snapshot(run) == before


def columns(run):
    """Identity of each expert -> its column of the learned router, as it lies in the RUN."""
    run.ensemble("learned")
    (path,) = (run.directory / "routers").glob("learned-*.npz")
    arrays = read_arrays(path)
    names = [name.partition(" ")[0] for name in arrays["experts"].tolist()]
    return dict(
        zip(names, np.concatenate([arrays["weights"], arrays["bias"][None]]).T, strict=True)
    )


def bits(run, tiny):
    found = run.evaluate(tiny.held_out).rows
    return {(r.system, r.language): r.bits_per_byte for r in found if r.routing is None}


@pytest.mark.slow
def test_who_joins_an_expert_changes_that_expert_alone(xelm, several, tiny, corpus, tmp_path):
    directory = tmp_path / "RUN"
    shutil.copytree(several[0], directory)
    run = open_run(directory)
    rows, scores, before = columns(run), bits(run, tiny), snapshot(directory)
    text = write_corpus(tmp_path / "text", ["ca"], 40, seed=3)
    command = ("grow", directory, "--language", "ca", "--into", "it-pt", "--corpus", text, *FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xelm.runs.train.train_checkpoints", stop)
        assert xelm(*command).code == 130
    again = xelm("train", directory, "it-pt", "--again")
    assert "since ca joins it; go on with: xelm grow" in again.err
    assert "--language ca --into it-pt" in xelm(*command[:3], "sv", *command[4:]).err
    outcome = xelm(*command)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("it-pt@v2 (it pt ca) from it-pt@v1, round 2, ")
    run = open_run(directory)
    expert = run.registry().expert("it-pt")
    assert (expert.joined, expert.corpora) == (("ca",), ("it-pt", "it-pt-v2"))
    assert run.registry().for_language("ca") == run.registry().for_language("it") == expert
    shares = {tag: entries[0]["share"] for tag, entries in (expert.data or {}).items()}
    assert shares["ca"] == pytest.approx(shares["it"] + shares["pt"], abs=0.001)
    # Files, records, evaluations and columns of all others are the same to the last bit.
    after = snapshot(directory)
    own = ("experts/it-pt/v2/", "corpus/it-pt-v2/")
    assert all(after[name] == before[name] for name in before if name.startswith("experts/"))
    changed = {name for name in after if name not in before and not name.startswith(own)}
    assert not [name for name in changed if name.startswith(("experts/", "corpus/it", "train/"))]
    found = bits(run, tiny)
    others = [key for key in scores if key[0] != "it-pt"]
    assert others and all(found[key] == scores[key] for key in others)
    now = columns(run)
    assert set(now) == {*rows, "it-pt@v2"} - {"it-pt@v1"}
    assert all((now[name] == rows[name]).all() for name in now if name in rows)
    # From then on all its languages are its own.
    third = xelm("train", directory, "it-pt", "--again", "--dry-run", "--json").json()
    (training,) = third["trainings"]
    assert set(training["passes"]) == {"it", "pt", "ca", "en", "es"}
    assert training["tokens"] == 128
    # One that is retired loses its column, and no other moves.
    assert xelm("retire", directory, "sv").code == 0
    left = columns(open_run(directory))
    assert set(left) == {*now} - {"sv@v1"} and all((left[n] == now[n]).all() for n in left)


@pytest.mark.slow
def test_the_learned_router_gets_a_column_for_a_new_expert_and_finds_it(
    xelm, tiny, corpus, tmp_path
):
    directory = tmp_path / "RUN"
    shutil.copytree(tiny.directory, directory)
    rows = columns(open_run(directory))
    command = ("grow", directory, "--language", "sv", "--corpus", corpus, *FEW)
    assert xelm(*command).code == 0
    run = open_run(directory)
    now = columns(run)
    assert set(now) == {*rows, "sv@v1"}
    assert all((now[name] == rows[name]).all() for name in rows)
    experts = run.registry().published()
    router = fit.learned(run, experts)
    names = [expert.name for expert in experts]
    right = []
    for expert in experts:
        for source in expert_text(run, expert).held_out:
            for number in source.documents:
                sums = run.vectoriser().sums([source.ids.document(int(number))])
                found = int(np.argmax(router.log_weights(sums, None)[0]))
                right.append(names[found] == expert.name)
    assert np.mean(right) > 0.9
