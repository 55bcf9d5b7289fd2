"""A checkpoint that was trained elsewhere becomes an expert, or the next version of one."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clustering.errors import UserError
from experts.adopt import adopt
from experts.expert import Expert
from experts.registry import Registry
from experts.verify import verify
from xelm import open_run
from xelm.inference import routers
from xelm.inference.routing import Routing
from xelm.models.adapters import Adapter
from xelm.models.checkpoint import family_of, load_parameters, read_config
from xelm.models.foreign import copy_foreign
from xelm.models.peft import write_adapter
from xelm.runs.options import AdoptOptions

H = {name: {"model.safetensors": name * 64} for name in "0123456789abcdef"}
SCALE = "model.norm.weight"


def foreign(run, folder, change=lambda tensors: tensors, **config):
    """A checkpoint of the seed's shape, with tensors of its own and no tokenizer."""
    folder.mkdir()
    tensors = load_file(run / "seed/model.safetensors")
    tensors = {name: values * np.float32(1.0009765625) for name, values in tensors.items()}
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    own = json.loads((run / "seed/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | config))
    return folder


def same_bits(one, other):
    return {n: v.tobytes() for n, v in one.items()} == {n: v.tobytes() for n, v in other.items()}


def test_weights_are_those_given_bit_for_bit_and_nothing_else_changes(copy, tmp_path):
    run = open_run(copy.directory)
    given = foreign(copy.directory, tmp_path / "given", auto_map={"AutoModel": "evil.Model"})
    (given / "evil.py").write_text("raise SystemExit('code was run')")
    (given / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    before = {e.name: (e.sha256, e.directory(copy.directory)) for e in run.registry().published()}
    expert = run.adopt(given, ["por"])
    assert (expert.reference, expert.parent, expert.round, expert.status) == (
        *("pt@v1", "seed", 1, "published"),
    )
    assert expert.made["by"] == "adopt"
    assert expert.made["from"] == str(given)
    assert expert.made["dtype"] == "float32"
    published = expert.directory(copy.directory)
    assert same_bits(
        load_file(published / "model.safetensors"), load_file(given / "model.safetensors")
    )
    assert "auto_map" not in json.loads((published / "config.json").read_text())
    assert not list(published.glob("*.py")) + list(published.glob("*.bin"))
    assert (published / "tokenizer.json").read_bytes() == (run.seed / "tokenizer.json").read_bytes()
    own = expert.evaluation["own"]["pt"]
    assert own["expert"] == pytest.approx(own["seed"], rel=1e-3)
    assert own["expert"] != own["seed"]
    assert verify(copy.directory) == []
    actions = [event.action for event in run.history("pt")]
    assert actions == ["adopt", "publish"]
    assert {n: run.registry().expert(n).sha256 for n in before} == {
        n: b[0] for n, b in before.items()
    }
    # Its text is that of the RUN's corpus, by which routers find it.
    scores = run.ensemble("tfidf").score([_text(copy.corpus / "pt.jsonl")])
    assert max(scores.weights, key=lambda name: scores.weights[name][0]) == "pt"
    assert "made | by adopt" in (published / "README.md").read_text()


def _text(path):
    return json.loads(path.read_text().splitlines()[0])["text"]


def test_an_expert_without_any_text_is_found_by_language_and_other_routers_work(
    copy, tmp_path, capsys
):
    run = open_run(copy.directory)
    texts = [_text(copy.held_out / "de.jsonl")]
    # Without the mixture for texts that look like no language that is served.
    learned, tfidf = (Routing(name=name, abstain=0.0) for name in ("learned", "tfidf"))
    before = run.ensemble(tfidf).score(texts).nats
    expert = run.adopt(foreign(copy.directory, tmp_path / "given"), ["sv"])
    assert expert.evaluation["own"] == {}
    assert "no text of sv is held out, so that it is not compared" in capsys.readouterr().err
    assert "centre.npz" not in expert.sha256
    assert run.ensemble(learned).score(texts).weights["sv"][0] == 0
    scores = run.ensemble(tfidf).score(texts)
    assert scores.weights["sv"][0] == 0
    assert scores.nats == pytest.approx(before, rel=1e-6)
    stated = run.ensemble("language").score(texts, languages=["sv"])
    assert stated.weights["sv"][0] == 1
    assert run.ensemble("uniform").score(texts).weights["sv"][0] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match=r"sv@v2 has no text in sv to train on; give some with"):
        run.train_again("sv")


def test_the_name_of_an_expert_makes_its_next_version(copy, tmp_path):
    run = open_run(copy.directory)
    shutil.copytree(copy.directory / "experts/en-es/v1", tmp_path / "tuned")
    with pytest.raises(
        UserError, match=r"'es' is served already, by en-es@v1 \(published\): to ad"
    ):
        run.adopt(tmp_path / "tuned", ["es", "en"])
    with pytest.raises(UserError, match="its languages, en, es; got de"):
        run.adopt(tmp_path / "tuned", ["de"], options=AdoptOptions(name="en-es"))
    # An export of the expert, which is named where transformers notes it.
    config = json.loads((tmp_path / "tuned/config.json").read_text())
    origin = str(copy.directory / "experts/en-es/v1")
    (tmp_path / "tuned/config.json").write_text(json.dumps(config | {"_name_or_path": origin}))
    expert = run.adopt(tmp_path / "tuned", options=AdoptOptions(name="en-es"))
    assert (expert.reference, expert.parent, expert.replaces) == ("en-es@v2", "en-es@v1", 1)
    assert (expert.cluster, expert.languages) == ("en-es", ("en", "es"))
    assert run.rollback("en-es").reference == "en-es@v1"
    assert verify(copy.directory) == []


def test_a_version_that_the_gate_refuses_can_be_published_or_discarded(copy, tmp_path):
    run = open_run(copy.directory)

    def worse(tensors):
        return tensors | {"model.embed_tokens.weight": -tensors["model.embed_tokens.weight"][::-1]}

    given = foreign(copy.directory, tmp_path / "given", worse)
    for _ in range(2):  # the second goes on with the first
        with pytest.raises(UserError, match=r"pt@v1 is not published: on held-out text it has"):
            run.adopt(given, ["pt"])
    for again in (lambda: run.train("pt"), lambda: run.train_again("pt")):
        with pytest.raises(UserError, match=r"pt@v1 is not trained here: it was begun with xelm"):
            again()
    with pytest.raises(UserError, match="pt@v1 is trained, and the gate keeps it back; publish"):
        run.adopt(copy.directory / "seed", ["pt"])
    assert run.discard("pt").reference == "pt@v1"
    assert not (copy.directory / "experts/pt").exists()
    assert not (copy.directory / "corpus/pt").exists()
    with pytest.raises(UserError, match="pt@v1 is not published"):
        run.adopt(given, ["pt"])
    assert run.publish("pt").status == "published"
    assert verify(copy.directory) == []


def test_weights_of_another_dtype_are_rounded_once(copy, tmp_path, capsys):
    run = open_run(copy.directory)

    def narrowed(tensors):
        return {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}

    given = foreign(copy.directory, tmp_path / "given", narrowed, dtype="bfloat16")
    found = run.plan_adoption(given, ["pt"])
    assert found.checks["dtype"] == "bfloat16; rounded to float32, the RUN's"
    assert not (copy.directory / "experts/pt").exists()
    assert not (copy.directory / "corpus/pt").exists()
    published = run.adopt(given, ["pt"]).directory(copy.directory)
    wanted = load_file(given / "model.safetensors")
    came = load_file(published / "model.safetensors")
    assert same_bits(came, {n: v.astype(np.float32) for n, v in wanted.items()})
    assert json.loads((published / "config.json").read_text())["dtype"] == "float32"
    assert "dtype: bfloat16; rounded to float32, the RUN's" in capsys.readouterr().err


def test_weights_are_rounded_to_the_nearest_value_of_a_narrower_dtype(initialised, tmp_path):
    """To the even one of two as near, which cutting bits off would not do."""
    directory, _ = initialised
    given = np.float32([1, 1.0078125, 1.00390625, 1.01171875, 1.0087890625, -3, 0, 2])
    wanted = [1, 1.0078125, 1, 1.015625, 1.0078125, -3, 0, 2]
    run = open_run(directory, settings=["weights_dtype=bfloat16"])

    def scaled(tensors):
        return tensors | {SCALE: np.concatenate([given, given])}

    def huge(tensors):
        return tensors | {SCALE: np.full(16, 3.4e38, np.float32)}

    source = foreign(directory, tmp_path / "given", scaled)
    found = run.plan_adoption(source, ["pt"])
    assert found.checks["dtype"] == "float32; rounded to bfloat16, the RUN's"
    copy_foreign(source, tmp_path / "copy", run.seed, dtype="bfloat16")
    came = load_file(tmp_path / "copy" / "model.safetensors")
    assert {str(values.dtype) for values in came.values()} == {"bfloat16"}
    assert came[SCALE].astype(np.float32).tolist() == [*wanted, *wanted]
    source = foreign(directory, tmp_path / "huge", huge)
    with pytest.raises(UserError, match=f"{SCALE} has values beyond the range of bfloat16"):
        copy_foreign(source, tmp_path / "other", run.seed, dtype="bfloat16")
    assert not (tmp_path / "other").exists()


def _nan(tensors):
    tensors[SCALE][3] = np.nan
    return tensors


def _short(tensors):
    return tensors | {SCALE: tensors[SCALE][:7]}


@pytest.mark.parametrize(
    "change, config, line",
    [
        (_nan, {}, f"{SCALE} in .*model.safetensors has NaN or infinite values"),
        (_short, {}, rf"does not match its config.json: {SCALE} has shape \(7,\)"),
        (dict, {"rope_theta": 5e5, "rope_parameters": None}, "of another shape: model.rope="),
        (dict, {"vocab_size": 400}, r"shape: model.vocabulary_size=400 \(wanted 384\)"),
        (dict, {"model_type": "t5"}, "model_type 't5' is not known"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_one_line(initialised, tmp_path, change, config, line):
    directory, _ = initialised
    given = foreign(directory, tmp_path / "given", change, **config)
    with pytest.raises(UserError, match=line) as refused:
        open_run(directory).plan_adoption(given, ["pt"])
    assert "\n" not in str(refused.value)


def test_pickles_are_refused_and_other_tokenizers_are_told_apart(initialised, tmp_path):
    directory, _ = initialised
    run, given = open_run(directory), foreign(directory, tmp_path / "given")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / "seed" / file, given)
    found = run.plan_adoption(given, ["pt"])
    assert found.checks["vocabulary"] == "384 ids, and a tokenizer equal to that of the RUN"
    tokenizer = json.loads((given / "tokenizer.json").read_text())
    cut = tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}
    (given / "tokenizer.json").write_text(json.dumps(cut))
    with pytest.raises(UserError, match="cuts text otherwise: pre_tokenizer of"):
        run.plan_adoption(given, ["pt"])
    vocabulary = dict(tokenizer["model"]["vocab"])
    names = sorted(vocabulary)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    swapped = tokenizer | {"model": tokenizer["model"] | {"vocab": vocabulary}}
    (given / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(UserError, match="is not that of the RUN: 2 pieces differ, such as"):
        run.plan_adoption(given, ["pt"])
    (given / "model.safetensors").unlink()
    (given / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"its .bin files can run code and are not read"):
        run.plan_adoption(given, ["pt"])


@pytest.fixture
def lora(initialised, tmp_path):
    """An adapter of the seed in PEFT's files, with nothing of ours beside them."""
    directory, _ = initialised
    shape, draw = read_config(directory / "seed"), np.random.default_rng(0)
    factors = {
        "blocks/query": (
            draw.normal(size=(2, 16, 4)).astype(np.float32) / 100,
            draw.normal(size=(2, 4, 16)).astype(np.float32) / 100,
        )
    }
    folder = tmp_path / "lora"
    folder.mkdir()
    given = Adapter(scale=0.5, factors=factors)
    write_adapter(folder, shape, family_of(directory / "seed"), given, base="some/model")
    return folder, given


def changed(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_adapter_of_peft_becomes_an_expert_with_its_files_as_they_are(copy, lora):
    run, (folder, given) = open_run(copy.directory), lora
    changed(folder, use_rslora=True)  # alpha 2 of rank 4: 2 / sqrt(4) in place of 2 / 4
    expert = run.adopt(folder, ["pt"])
    assert (expert.parent, expert.made["dtype"]) == ("seed", "float32")
    published = expert.directory(copy.directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (published / name).read_bytes() == (folder / name).read_bytes()
    assert set(expert.sha256) >= {"base.json", "centre.npz", "README.md"}
    shape = read_config(run.seed)
    before = load_parameters(run.seed, shape)["blocks"]
    after = load_parameters(published, shape)["blocks"]
    a, b = given.factors["blocks/query"]
    wanted = np.asarray(before["query"]["weight"]) + 1.0 * np.matmul(a, b)
    np.testing.assert_allclose(after["query"]["weight"], wanted, atol=1e-6)
    np.testing.assert_array_equal(after["key"]["weight"], before["key"]["weight"])
    assert verify(copy.directory) == []


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA; got IA3"),
        ({"use_dora": True}, "use_dora must not be set; only plain LoRA is read"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must not be set"),
        ({"bias": "all"}, "bias must be none; got all"),
        (
            {"base_model_name_or_path": "SEED-TUNED"},
            r"is an adapter of .*, and no model of the RUN",
        ),
    ],
)
def test_an_adapter_that_would_not_be_exact_is_refused(initialised, lora, tmp_path, settings, line):
    run, (folder, _) = open_run(initialised[0]), lora
    if "base_model_name_or_path" in settings:
        settings = {"base_model_name_or_path": str(foreign(initialised[0], tmp_path / "tuned"))}
    changed(folder, **settings)
    with pytest.raises(UserError, match=line) as refused:
        run.plan_adoption(folder, ["pt"])
    assert "\n" not in str(refused.value)


def test_an_adapter_that_names_another_model_of_the_run_is_refused(copy, lora):
    run, (folder, _) = open_run(copy.directory), lora
    changed(folder, base_model_name_or_path=str(copy.directory / "experts/de-fr/v1"))
    named = run.plan_adoption(folder, ["pt"])
    assert named.checks["parent"] == "de-fr@v1, which the adapter names as its base"
    for parent in ("de-fr", "de-fr@v1"):
        given = run.plan_adoption(folder, ["pt"], options=AdoptOptions(parent=parent))
        assert given.expert.parent == "de-fr@v1"
    with pytest.raises(UserError, match="an adapter of de-fr@v1, as it says; got --parent en-es"):
        run.plan_adoption(folder, ["pt"], options=AdoptOptions(parent="en-es"))


def test_an_adapter_of_another_shape_or_without_safetensors_is_refused(initialised, lora):
    run, (folder, _) = open_run(initialised[0]), lora
    changed(folder, base_model_name_or_path=str(run.seed))
    found = run.plan_adoption(folder, ["pt"]).checks
    assert found["adapter"] == "LoRA of rank 4 on q_proj"
    assert found["parent"] == "seed, which the adapter names as its base"
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, values, line in (
        (next(iter(tensors)), np.full((4, 16), np.nan, np.float32), "has NaN or infinite values"),
        (next(iter(tensors)), np.zeros((4, 20), np.float32), r"by a matrix of \(16, 20\); that of"),
        ("base_model.model.model.layers.7.x.lora_A.weight", np.zeros((4, 16)), "do not match"),
    ):
        save_file(tensors | {name: values}, path)
        with pytest.raises(UserError, match=line):
            run.plan_adoption(folder, ["pt"])
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model.safetensors; adapters in other files"):
        run.plan_adoption(folder, ["pt"])


def test_the_registry_says_what_can_be_done_instead():
    registry = Registry(
        seed_sha256=H["0"],
        experts=(
            Expert(
                name="a",
                languages=("en", "es"),
                corpora=("old",),
                sha256=H["1"],
                status="published",
            ),
            Expert(name="b", languages=("de",)),
            Expert(name="c", languages=("sv",), sha256=H["2"], status="retired"),
        ),
    )
    made = {"by": "adopt"}
    after = adopt(registry, ["spa", "eng"], "a", "a", made=made, corpora=("more",))
    assert after.experts[-1].reference == "a@v2"
    assert after.experts[-1].corpora == ("old", "more")
    fresh = adopt(registry, ["swe", "no"], "a@v1", made=made).experts[-1]
    assert (fresh.name, fresh.parent, fresh.round) == ("sv-no", "a@v1", 2)
    for arguments, line in {
        (("en",), "seed", None): "leave en out, take that expert out of use with: xelm retire RUN",
        (("de",), "seed", None): r"'de' is served already, by b@v1 \(training\): finish that",
        (("sv",), "seed", "c"): "c@v1 is retired; bring it back with: xelm restore RUN c",
        (("fi",), "b@v1", None): "b@v1 is training: it has no weights to descend from",
        ((), "seed", None): "name the languages of the new expert",
    }.items():
        with pytest.raises(UserError, match=line):
            adopt(registry, *arguments, made=made)


def test_a_router_over_some_experts_gives_the_others_no_weight():
    inner = routers.Fixed(weights=np.log([0.25, 0.75]))
    router = routers.OfSome(router=inner, places=[2, 0], experts=3)
    weights = router.log_weights(np.zeros((4, 0)), np.zeros((4, 3)))
    np.testing.assert_allclose(np.exp(weights), [[0.75, 0, 0.25]] * 4)
