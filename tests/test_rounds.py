"""Training in rounds from scratch: coarse clusters first, finer ones from them."""

import shutil

import pytest
from shared import snapshot

from clustering.clustering import Clustering
from clustering.errors import UserError
from experts.branch import branch
from experts.card import card
from experts.expert import Expert
from experts.registry import Registry
from experts.rounds import begin_rounds, next_round, rounds_of
from experts.verify import verify
from xelm.api import open_run
from xelm.runs.jobs import expert_job

FOUR = {"de-en": ("de", "en"), "es-fr": ("es", "fr"), "ja": ("ja",), "ru": ("ru",)}
LEVELS = [
    {"de-plus5": ("de", "en", "es", "fr", "ja", "ru")},
    {"de-en-es-fr": ("de", "en", "es", "fr"), "ja-ru": ("ja", "ru")},
    FOUR,
]
HASHES = {"model.safetensors": "a" * 64}


def begun() -> Registry:
    clustering = Clustering(
        method="by-hand", clusters=FOUR, languages=("de", "en", "es", "fr", "ja", "ru")
    )
    return begin_rounds(branch(Registry(seed_sha256={}), clustering), LEVELS)


def trained(registry: Registry, *names: str) -> Registry:
    for name in names:
        registry = registry.publish(name, 1, sha256=HASHES, tokens=1)
    return registry


def test_every_expert_awaits_that_of_the_coarser_cluster_it_lies_in():
    registry = begun()
    assert {e.name: e.awaits for e in registry.experts} == {
        "k1-de-plus5": None,
        "k2-de-en-es-fr": "k1-de-plus5",
        "k2-ja-ru": "k1-de-plus5",
        "de-en": "k2-de-en-es-fr",
        "es-fr": "k2-de-en-es-fr",
        "ja": "k2-ja-ru",
        "ru": "k2-ja-ru",
    }
    assert rounds_of(registry) == (1, 2, 4)
    assert next_round(registry) is registry  # nobody's parent is trained


def test_experts_start_from_their_parents_one_round_later():
    registry = next_round(trained(begun(), "k1-de-plus5"))
    second = registry.expert("k2-ja-ru")
    assert (second.parent, second.round, second.awaits) == ("k1-de-plus5@v1", 2, None)
    assert registry.expert("ja").awaits == "k2-ja-ru"
    registry = next_round(trained(registry, "k2-ja-ru"))
    assert (registry.expert("ja").parent, registry.expert("ja").round) == ("k2-ja-ru@v1", 3)
    assert registry.expert("de-en").awaits == "k2-de-en-es-fr"  # its parent is not trained
    assert Registry._from_json(registry.to_json()) == registry


def test_intermediate_experts_are_parents_and_never_in_use():
    registry = next_round(trained(begun(), "k1-de-plus5"))
    registry = trained(next_round(trained(registry, "k2-ja-ru", "k2-de-en-es-fr")), "ja", "ru")
    assert [expert.name for expert in registry.published()] == ["ja", "ru"]
    assert registry.retired() == ()
    assert registry.expert("k2-ja-ru").state == "parent"
    assert registry.for_language("ja").name == "ja"
    for change in (registry.restore, registry.rollback, registry.in_use):
        with pytest.raises(UserError, match="k2-ja-ru@v1 is the intermediate expert of a round"):
            change("k2-ja-ru", *([] if change == registry.in_use else [1]))
    page = card(registry.expert("ja"), registry, {})
    assert "ja@v1 ← k2-ja-ru@v1 ← k1-de-plus5@v1 ← seed" in page


def test_rounds_come_before_other_training():
    clustering = Clustering(
        method="by-hand", clusters=FOUR, languages=("de", "en", "es", "fr", "ja", "ru")
    )
    registry = trained(branch(Registry(seed_sha256={}), clustering), "ja")
    with pytest.raises(UserError, match="before all other training, and ja@v1 began already"):
        begin_rounds(registry, LEVELS)
    adopted = Expert(name="uk", languages=("uk",), made={"by": "adopt"})
    registry = branch(Registry(seed_sha256={}), clustering).add(adopted)
    with pytest.raises(UserError, match="before all other training, and uk@v1 began already"):
        begin_rounds(registry, LEVELS)


def test_the_clusters_that_a_run_was_branched_on_are_still_known():
    clustering = Clustering(
        method="by-hand", clusters=FOUR, languages=("de", "en", "es", "fr", "ja", "ru")
    )
    registry = trained(begun(), "k1-de-plus5")
    assert branch(registry, clustering) is registry
    # Also once a language has joined an expert.
    plain = trained(branch(Registry(seed_sha256={}), clustering), "ja")
    more = plain.start("ja", parent="ja@v1", languages=("ja", "ko"), joined=("ko",))
    assert branch(more, clustering) is more
    with pytest.raises(UserError, match="joined"):
        Expert(name="ja", languages=("ja",), joined=("ko",))


@pytest.fixture(scope="module")
def branched(xelm, initialised, tiny, tmp_path_factory):
    """A RUN with two clusters whose experts are not trained."""
    directory = tmp_path_factory.mktemp("rounds") / "RUN"
    shutil.copytree(initialised[0], directory)
    assert xelm("branch", directory, "--clusters", tiny.clusters).code == 0
    return directory


def test_the_tokens_are_divided_over_the_rounds_and_the_languages(xelm, branched):
    before = snapshot(branched)
    found = xelm("train", branched, "--rounds", "1,2", "--dry-run", "--json").json()
    tokens = {training["name"]: training["tokens"] for training in found["trainings"]}
    names = ["de-fr", "en-es", "k1-en-de-es-fr"]
    assert sorted(tokens) == names
    run = open_run(branched)
    step, whole = run.config.experts.tokens_per_step, run.config.experts.tokens
    assert tokens["k1-en-de-es-fr"] == pytest.approx(whole / 2, abs=step)
    assert tokens["de-fr"] + tokens["en-es"] == pytest.approx(whole / 2, abs=2 * step)
    assert snapshot(branched) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "2"), "ascending numbers of clusters, of which the last is the 2"),
        (("--rounds", "1,3"), "got 1,3"),
        (("--rounds", "1,2", "--all"), "--rounds trains all experts; it goes with neither names"),
        (("--rounds", "1,2", "en-es"), "--rounds trains all experts; it goes with neither names"),
    ],
)
def test_rounds_that_are_impossible_are_refused(xelm, branched, options, message):
    outcome = xelm("train", branched, *options)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1) and message in outcome.err


def test_a_trained_run_is_not_trained_in_rounds(xelm, tiny):
    outcome = xelm("train", tiny.directory, "--rounds", "1,2", "--dry-run")
    assert (
        "rounds come before all other training, and en-es@v1, de-fr@v1 began already" in outcome.err
    )


@pytest.mark.slow
def test_rounds_that_were_interrupted_go_on_to_the_same_weights(
    xelm, branched, tiny, tmp_path, monkeypatch
):
    straight, run = tmp_path / "straight", tmp_path / "RUN"
    shutil.copytree(branched, straight)
    shutil.copytree(branched, run)
    command = ("--rounds", "1,2", "--set", "gate.worse=null")
    outcome = xelm("train", straight, *command)
    assert outcome.code == 0, outcome.err

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    for moment in ("xelm.runs.train.train_checkpoints", "xelm.runs.train.publish"):
        with monkeypatch.context() as patch:
            patch.setattr(moment, stop)
            assert xelm("train", run, *command).code == 130
    assert "awaits" not in open_run(run).registry().expert("k1-en-de-es-fr").to_json()
    other = xelm("train", run, "--all")
    assert f"go on with: xelm train {run} --rounds 1,2" in other.err
    assert xelm("train", run, *command).code == 0
    registry = open_run(run).registry()
    lines = {e.name: (e.parent, e.round, e.state) for e in registry.experts}
    assert lines == {
        "k1-en-de-es-fr": ("seed", 1, "parent"),
        "en-es": ("k1-en-de-es-fr@v1", 2, "published"),
        "de-fr": ("k1-en-de-es-fr@v1", 2, "published"),
    }
    for expert in registry.experts:
        file = f"{expert.path}/model.safetensors"
        assert (run / file).read_bytes() == (straight / file).read_bytes()
    assert verify(run) == []
    shown = xelm("status", run).out
    assert "k1-en-de-es-fr@v1" in shown and "parent" in shown
    assert "k1-en-de-es-fr@v1 parent" in xelm("history", run, "k1-en-de-es-fr").out
    # Each round draws its rows anew, and inference knows the finest experts alone.
    seeds = {e.name: expert_job(open_run(run), e).config.random_seed for e in registry.experts}
    assert seeds["en-es"] == seeds["k1-en-de-es-fr"] + 1
    results = open_run(run).evaluate(tiny.held_out, languages=["en"])
    assert {row.system for row in results.rows} >= {"seed", "en-es", "de-fr", "ensemble"}
    assert not any(row.system.startswith("k1-") for row in results.rows)
