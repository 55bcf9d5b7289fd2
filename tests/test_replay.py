"""Replay against forgetting: which languages an expert replays, and in which shares of its rows."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from clustering.errors import UserError
from clustering.files import read_arrays
from experts.expert import SEED, Expert
from xelm.api import open_run
from xelm.data.contents import contents_in
from xelm.runs.jobs import expert_job
from xelm.runs.provenance import provenance
from xelm.runs.publish import CENTRE, write_centre
from xelm.runs.text import tokenise


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory):
    """The tiny RUN, in a place where text is added, and the record of an expert for Portuguese."""
    directory = tmp_path_factory.mktemp("replay") / "RUN"
    shutil.copytree(tiny.directory, directory)
    run = open_run(directory)
    tokenise(run, contents_in(tiny.corpus, ["pt"]), "pt")
    return run, Expert(name="pt", languages=("pt",), parent="en-es@v1", round=2, corpora=("pt",))


def with_settings(run, *settings):
    return replace(run, settings=settings)


def shares(job):
    """Part of the rows of each language."""
    found = {}
    for source in job.text.sources:
        tag = source.ids.language
        found[tag] = found.get(tag, 0) + source.share / job.text.share
    return {tag: round(share, 6) for tag, share in found.items()}


EQUAL = "grow.data.sampling_exponent=0"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["donor_share=.25"], {"pt": 0.75, "en": 0.125, "es": 0.125}),
        (
            ["donor_share=.25", "grow.data.replay_share=.25", EQUAL],
            {"pt": 0.5, "en": 0.125, "es": 0.125, "de": 0.125, "fr": 0.125},
        ),
        # Without a donor, its languages are replayed like the others.
        (
            ["donor_share=0", "grow.data.replay_share=.2", EQUAL],
            {"pt": 0.8, "en": 0.05, "es": 0.05, "de": 0.05, "fr": 0.05},
        ),
    ],
)
def test_the_other_languages_of_the_corpus_have_their_share_of_the_rows(grown, settings, wanted):
    run, expert = grown
    job = expert_job(with_settings(run, *settings), expert)
    assert shares(job) == wanted
    assert job.text.share == pytest.approx(1)
    assert {s.ids.language for s in job.text.held_out} == set(wanted)
    assert {s.ids.language for s in job.own.sources} == {"pt"}


def test_languages_are_replayed_by_size_where_the_exponent_is_1(grown):
    run, expert = grown
    settings = ("donor_share=0", "grow.data.replay_share=.5", "grow.data.sampling_exponent=1")
    found = shares(expert_job(with_settings(run, *settings), expert))
    store = run.store().languages
    sizes = {tag: len(store[tag].ids) for tag in ("de", "fr")}
    assert found["de"] / found["fr"] == pytest.approx(sizes["de"] / sizes["fr"], rel=0.05)
    assert found["de"] != found["fr"]


def test_tokens_are_all_rows_and_passes_are_over_own_text(grown):
    run, expert = grown
    settings = ("donor_share=.25", "grow.data.replay_share=.25", EQUAL)
    for tokens in (256, 1024):
        job = expert_job(with_settings(run, *settings, f"grow.tokens={tokens}"), expert)
        assert job.config.tokens == tokens
    job = expert_job(with_settings(run, *settings, "grow.passes=2"), expert)
    # Half of the rows are Portuguese.
    assert job.config.tokens == pytest.approx(2 * job.own.tokens / 0.5, abs=1)


def test_a_cluster_replays_within_its_part_of_all_tokens(grown):
    run, _ = grown
    (expert,) = (e for e in run.registry().published() if e.name == "en-es")
    before = expert_job(run, expert)
    job = expert_job(with_settings(run, "experts.data.replay_share=.1"), expert)
    found = shares(job)
    assert set(found) == {"en", "es", "de", "fr"}
    assert found["de"] + found["fr"] == pytest.approx(0.1)
    assert found["en"] / found["es"] == pytest.approx(shares(before)["en"] / shares(before)["es"])
    assert job.config == replace(before.config, data=job.config.data)


def test_an_expert_of_the_seed_replays_and_what_has_no_other_language_does_not(grown):
    run, expert = grown
    run = with_settings(run, "grow.data.replay_share=.2", EQUAL)
    assert shares(expert_job(run, replace(expert, parent=SEED, round=1)))["de"] == 0.05
    everything = replace(expert, languages=("pt", "en", "es", "de", "fr"), parent=SEED, round=1)
    assert set(shares(expert_job(run, replace(everything, corpora=("pt", "train"))))) == {
        *("pt", "en", "es", "de", "fr")
    }


def test_the_record_of_an_expert_names_what_it_replayed(grown):
    run, expert = grown
    settings = ("donor_share=.25", "grow.data.replay_share=.25", EQUAL)
    data = provenance(expert_job(with_settings(run, *settings), expert))
    assert {tag: (one["role"], one["share"]) for tag, (one,) in data.items()} == {
        "pt": ("own", 0.5),
        "en": ("donor", 0.125),
        "es": ("donor", 0.125),
        "de": ("replay", 0.125),
        "fr": ("replay", 0.125),
    }
    assert [one["text"] for one in data["de"]] == ["train"]


def test_the_centre_of_an_expert_is_that_of_its_own_text(grown):
    run, expert = grown
    centres = []
    for share in (0, 0.4):
        job = expert_job(with_settings(run, f"grow.data.replay_share={share}"), expert)
        run.training("pt").mkdir(parents=True, exist_ok=True)
        write_centre(run, "pt", job.own.sources)
        centres.append(read_arrays(run.training("pt") / CENTRE)["centre"])
    assert np.array_equal(*centres)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["seed.data.replay_share=.1"], "seed.data.replay_share must be 0"),
        (["donor_share=.5", "grow.data.replay_share=.5"], "must be below 1 together; got 0.5 and"),
        (["grow.data.replay_share=1"], "replay_share must be in 0..1"),
    ],
)
def test_impossible_shares_are_refused(grown, settings, message):
    run, _ = grown
    with pytest.raises(UserError, match=message):
        _ = with_settings(run, *settings).config
