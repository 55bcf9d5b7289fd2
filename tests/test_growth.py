"""Several languages grown at once, a family, a language that joins an expert; others untouched."""

import shutil
from dataclasses import replace

import pytest
from conftest import write_corpus
from shared import snapshot

from clustering.errors import UserError
from experts.expert import Expert
from experts.grow import begun_with, grow
from experts.lock import update
from experts.registry import Registry
from experts.verify import verify
from xelm.api import open_run
from xelm.data.contents import contents_in
from xelm.runs import train
from xelm.runs.jobs import command_of, expert_job
from xelm.runs.new_languages import default_clusters, groups_of, languages_to_grow
from xelm.runs.options import GrowOptions
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
    assert default_clusters(place.registry(), 3) == 2  # the RUN has two experts of two languages
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
        ((), "name the languages to grow, or their family, and not both"),
        (("--language", "it", "--family", "Romance"), "and not both"),
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


FEW = ("--tokens", 128, "--set", "gate.worse=null")


@pytest.fixture(scope="module")
def several(xelm, tiny, corpus, tmp_path_factory):
    """The tiny RUN with three languages in two experts, of whose growth the process ended once, and
    the files before it."""
    directory = tmp_path_factory.mktemp("grown") / "RUN"
    shutil.copytree(tiny.directory, directory)
    before = snapshot(directory)
    command = ("grow", directory, "--language", "it,pt", "--language", "sv", *FEW)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

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
    after = snapshot(directory)
    new = ("experts/it-pt/", "experts/sv/", "corpus/it-pt/", "corpus/sv/", ".locks/")
    changed = {name for name in after if after[name] != before.get(name)}
    others = {name for name in changed if not name.startswith(new)}
    assert others == {"registry.json", "hashes.json"} and before.keys() <= after.keys()
    old, now = Registry.load(tiny.directory), Registry.load(directory)
    assert now.experts[: len(old.experts)] == old.experts
