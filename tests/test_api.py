"""The library's interface: what a user calls on a RUN."""

import pydoc
import shutil
from dataclasses import replace

import pytest

import xelm
from clustering.clustering import Clustering
from clustering.errors import UserError
from experts.grow import grow
from experts.lock import update
from xelm import EvaluationOptions, GrowOptions, InitOptions, Run, open_run, plan_init
from xelm.commands import COMMANDS

ON_NO_RUN = {"quickstart", "init", "cluster", "rename", "config"}
BY_THE_ENSEMBLE = {"generate", "fill", "serve"}


def test_every_command_on_a_run_is_a_method():
    wanted = set(COMMANDS) - ON_NO_RUN - BY_THE_ENSEMBLE
    assert wanted <= set(dir(Run))
    assert callable(Run.ensemble)
    assert callable(xelm.init)
    assert callable(xelm.quickstart)
    assert callable(xelm.pull)


def test_help_shows_what_can_be_done_with_a_run():
    page = pydoc.render_doc(xelm, renderer=pydoc.plaintext)
    assert "open_run(directory" in page
    methods = pydoc.render_doc(Run, renderer=pydoc.plaintext)
    for name in ("branch", "train", "grow", "evaluate", "ensemble", "report", "verify", "merge"):
        assert f"\n |  {name}(self" in methods
        assert getattr(Run, name).__doc__


def test_the_repr_of_a_run_names_its_place_and_languages(tiny):
    run = open_run(tiny.directory)
    assert repr(run) == f"<Run {tiny.directory}: 4 languages: en, de, es, fr>"
    many = replace(run, record={**run.record, "languages": [f"l{n:02}" for n in range(12)]})
    assert repr(many).endswith(": 12 languages: l00, l01, l02, l03, l04, l05, l06, l07, 4 more>")


def test_a_run_is_read_and_measured_by_its_methods(copy):
    run = open_run(copy.directory)
    assert run.verify() == []
    assert {each.state for each in run.status()} == {"done"}
    assert run.nearest("pt", ["typology"], ["es", "en"])[0].language == "es"
    options = EvaluationOptions(routings=["language"], max_documents=1)
    results = run.evaluate(copy.held_out, options, languages=["de"])
    assert {row.language for row in results.rows} == {"de"}


def test_documents_of_a_run_are_clustered_as_by_the_command(xelm, tiny, tmp_path, undrawn):
    given = ("--method", "tfidf", "--run", tiny.directory, "-k", 2, "--random-seed", 3)
    assert xelm("cluster", *given, "--out", tmp_path / "clusters").code == 0
    found = open_run(tiny.directory).cluster_documents(2, random_seed=3)
    assert found.of_documents and len(found.clusters) == 2
    assert Clustering.load(tmp_path / "clusters") == found


def test_what_commands_would_cost_is_known_beforehand(copy):
    run = open_run(copy.directory)
    assert run.plan_training() == []  # every expert is trained
    growth = run.plan_growth("pt", copy.corpus, GrowOptions(parent="en-es"))
    (expert,), (plan,), (text,) = growth.experts, growth.plans, growth.texts
    assert (expert.reference, expert.parent) == ("pt@v1", "en-es@v1")
    assert (plan.part, text.language) == ("grow", "pt")
    assert plan.steps == run.config.grow.steps
    options = InitOptions(seed=run.seed, languages=["pt"])
    plans, texts = plan_init(copy.directory.parent / "NEW", copy.corpus, run.config, options)
    assert [each.name for each in plans] == ["experts"]
    assert [each.language for each in texts] == ["pt"]
    assert not (copy.directory.parent / "NEW").exists()
    assert "pt" not in [each.name for each in run.registry().experts]


def test_a_training_that_cannot_be_is_refused_by_name(tiny):
    with pytest.raises(UserError, match="nobody"):
        open_run(tiny.directory).train("nobody")


def test_an_expert_that_grow_trains_is_refused_before_dense_is_trained(copy):
    shutil.rmtree(copy.directory / "dense")
    update(copy.directory, lambda registry: grow(registry, "pt", "en-es"), "grow")
    with pytest.raises(UserError, match=r"pt is a grown expert; .*: xelm grow \S+ --language pt"):
        open_run(copy.directory).train("pt", dense=True)
    assert not (copy.directory / "dense").exists()


def test_an_ensemble_is_opened_with_two_lines(tiny):
    run = open_run(str(tiny.directory))
    ensemble = run.ensemble(routing="learned", top_m=2)
    assert len(ensemble.generate("Habari ya asubuhi", max_new_tokens=4).text) > 0
    scores = ensemble.score(["Habari ya asubuhi", "Guten Tag"])
    assert scores.nats.shape == (2,)
    assert list(scores.weights)[:2] == [e.name for e in run.registry().published()]
