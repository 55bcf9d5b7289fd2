"""The evaluation harness asks us what it asks transformers, and hears the same."""

import inspect
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from lm_eval import tasks
from lm_eval.models.huggingface import HFLM
from shared import LANGUAGES, NAMES, documents_of

from clustering.errors import UserError
from xelm import Run, open_run
from xelm.commands.harness import main as commands_main
from xelm.harness import Harness, main
from xelm.inference.routing import DEFAULT, Routing


def asked(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def texts(tiny):
    return [documents_of(tiny.held_out, tag)[n] for n in range(3) for tag in LANGUAGES]


@pytest.fixture(scope="module")
def pair(tiny):
    """One expert by us and by transformers."""
    directory = tiny.directory / "experts/de-fr/v1"
    theirs = HFLM(
        pretrained=str(directory),
        tokenizer=str(tiny.directory / "seed"),
        add_bos_token=True,
        dtype="float32",
        device="cpu",
        batch_size=4,
        max_length=32,  # of the rows in training: later positions the models have never seen
    )
    return Harness(str(tiny.directory), model="de-fr"), theirs


def requests_of(texts):
    """Contexts of any length, too long ones too, and continuations."""
    found = [asked(text[:40], text[40:60]) for text in texts]
    found += [
        asked(" ".join(texts), "abc"),
        asked(texts[0], texts[0][:24]),
        asked("", texts[1][:20]),
    ]
    return [request for request in found if request.args[1]]


def test_likelihoods_are_those_of_transformers(pair, texts):
    ours, theirs = (model.loglikelihood(requests_of(texts), disable_tqdm=True) for model in pair)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], rtol=1e-4)
    assert [b for _, b in ours] == [b for _, b in theirs]


def test_what_is_greedy_is_known(pair, texts):
    model = pair[0]
    context = texts[0][:20]
    most = model.ensemble.generate(context, max_new_tokens=3, temperature=0)
    likeliest = asked((None, model.tok_encode(context), list(most.ids)))
    other = asked((None, model.tok_encode(context), [int(most.ids[0]) + 1, *most.ids[1:]]))
    found = model._loglikelihood_tokens([likeliest.args[0], other.args[0]], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_whole_texts_are_read_in_windows(pair, texts):
    long = " ".join(texts[:4])
    assert len(pair[0].tok_encode(long)) > 2 * 32
    short = asked(texts[0][:60])
    # Told to add the id that starts every text, theirs has it predicted, too.
    plain = HFLM(
        pretrained=pair[1].model, tokenizer=pair[1].tokenizer, add_bos_token=False, max_length=32
    )
    pair = pair[0], plain
    ours, theirs = (m.loglikelihood_rolling([short], disable_tqdm=True) for m in pair)
    assert ours == pytest.approx(theirs, rel=1e-4)
    # Of later windows theirs lack the id that starts every text: nearly the same, not the same.
    ours, theirs = (m.loglikelihood_rolling([asked(long)], disable_tqdm=True) for m in pair)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_texts_are_continued_as_by_transformers(pair, texts):
    options = {"until": ["~~"], "max_gen_toks": 10, "do_sample": False}
    requests = [asked(text[:40], dict(options)) for text in texts[:4]]
    ours, theirs = (m.generate_until(requests, disable_tqdm=True) for m in pair)
    assert [text.strip() for text in ours] == [text.strip() for text in theirs]
    whole = ours[0]
    (cut,) = pair[0].generate_until(
        [asked(texts[0][:40], options | {"until": [whole[4:6], "~~"]})], disable_tqdm=True
    )
    assert cut == whole[: whole.index(whole[4:6])]


def test_the_seed_is_asked_also_where_the_run_has_a_single_expert(copy, texts, xelm):
    assert xelm("retire", copy.directory, "en-es").code == 0
    seed = Harness(str(copy.directory), model="seed")
    assert seed.ensemble.names == ["seed"]
    alone = open_run(copy.directory).model("seed")
    start, *ids = alone.tokenizer.begin(texts[0][:40])
    ((found, _),) = seed._loglikelihood_tokens([(None, [start], ids)], disable_tqdm=True)
    scores = alone.likelihoods([[start]], [ids])
    assert found == pytest.approx(-scores.nats[0], rel=1e-6)
    expert = open_run(copy.directory).model("de-fr").likelihoods([[start]], [ids])
    assert abs(expert.nats[0] - scores.nats[0]) > 1e-3


@pytest.mark.parametrize(
    ("routing", "route_per"),
    [("detected", "prompt"), ("posterior", "token"), ("posterior", "prompt")],
)
def test_ensembles_are_asked_as_they_score(tiny, texts, routing, route_per):
    model = Harness(str(tiny.directory), routing=routing, route_per=route_per)
    ensemble = open_run(tiny.directory).ensemble(Routing(name=routing, route_per=route_per))
    whole = [" ".join(text.split()[:6]) for text in texts]
    contexts = [" ".join(text.split()[:3]) for text in whole]
    pairs = [model._encode_pair(c, w[len(c) :]) for c, w in zip(contexts, whole)]
    assert max(len(c) + len(x) for c, x in pairs) <= model.max_length + 1  # as `by_steps` reads
    found = model._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    # By scores of the same ids with the end, less that of the end alone.
    for (context, continuation), (log_probability, _) in zip(pairs, found):
        assert log_probability == pytest.approx(by_steps(ensemble, context, continuation), rel=1e-4)


@pytest.mark.parametrize("routing", ["detected", "posterior"])
def test_a_chat_is_routed_by_what_the_user_says(copy, routing):
    """As `Ensemble.generate` has it for the same messages: a template in one language does not
    decide for a user who writes another."""
    english = documents_of(copy.held_out, "en")[0].split()[:5]
    template = " ".join(english) + " {% for m in messages %}{{ m['content'] }} {% endfor %}"
    (copy.directory / "seed" / "chat_template.jinja").write_text(template)
    model = Harness(str(copy.directory), routing=routing)
    messages = [
        {"role": "user", "content": " ".join(documents_of(copy.held_out, "de")[0].split()[:2])}
    ]
    rendered = model.apply_chat_template(messages)
    ensemble = open_run(copy.directory).ensemble(routing)
    options = {"max_gen_toks": 8, "do_sample": False, "until": []}
    (found,) = model.generate_until([asked(rendered, options)], disable_tqdm=True)
    wanted = ensemble.generate(messages, max_new_tokens=8, temperature=0)
    assert found == wanted.text
    # Likelihoods go by the same weights.
    context, mask = ensemble.tokenizer.chat(messages)
    assert mask is not None and not all(mask)
    pair = model._encode_pair(rendered, "abc")
    assert pair[0] == context[: len(pair[0])] and len(context) + len(pair[1]) < 32
    request = ((rendered, "abc"), *pair)
    ((value, _),) = model._loglikelihood_tokens([request], disable_tqdm=True)
    assert value == pytest.approx(
        by_steps(ensemble, *pair, user_mask=mask[: len(pair[0])]), rel=1e-4
    )
    assert value != pytest.approx(by_steps(ensemble, *pair), rel=1e-3)
    # The string says what the user's text is: it may come from a cache, and another run reads it.
    again = Harness(str(copy.directory), routing=routing)
    assert again._loglikelihood_tokens([request], disable_tqdm=True) == [(value, False)]


def by_steps(ensemble, context, continuation, user_mask=None):
    """One token after the other, from the distributions that generating draws from."""
    from xelm.inference.engine import Engine
    from xelm.inference.running import GenerationRequest
    from xelm.inference.sampling_params import SamplingParams

    engine = Engine(ensemble)
    sampling = SamplingParams(max_new_tokens=1)
    text = engine.add(GenerationRequest(ids=context, sampling=sampling, user_mask=user_mask))
    total = 0.0
    for token in continuation:
        distribution, _ = engine.next_log_probabilities()
        total += float(distribution[text.row, token])
        engine.append(text, token)
    return total


TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_a_local_task_through_the_command_line(tiny, tmp_path, capsys, monkeypatch):
    """Which of two continuations is that of the text: the right expert knows it more often."""
    rows = []
    for number in range(6):
        for place, tag in enumerate(LANGUAGES):
            here = documents_of(tiny.held_out, tag)[number].split()
            other = documents_of(tiny.held_out, LANGUAGES[place - 1])[number].split()
            choices = [" ".join(here[4:8]), " ".join(other[4:8])]
            rows.append(
                {
                    "context": " ".join(here[:4]),
                    "choices": choices[:: 1 if number % 2 else -1],
                    "label": 0 if number % 2 else 1,
                }
            )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(data=data))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    accuracy = {}
    for name in ("run", *NAMES):
        chosen = f"run={tiny.directory}," + (
            "routing=posterior" if name == "run" else f"model={name}"
        )
        out = tmp_path / f"{name}.json"
        options = ("--tasks", "tiny_choice", "--include_path", str(tmp_path / "tasks"))
        code = main([chosen, *options, "--output_path", str(out)])
        assert code == 0
        (written,) = tmp_path.rglob(f"{name}*.json")
        accuracy[name] = json.loads(written.read_text())["results"]["tiny_choice"]["acc,none"]
        written.unlink()
        right = []
        model = Harness(**dict(part.split("=") for part in chosen.split(",")))
        for row in rows:
            pairs = [model._encode_pair(row["context"], f" {c}") for c in row["choices"]]
            found = model._loglikelihood_tokens([(None, *p) for p in pairs], disable_tqdm=True)
            right.append(int(np.argmax([value for value, _ in found])) == row["label"])
        assert accuracy[name] == pytest.approx(np.mean(right))
    assert "tiny_choice" in capsys.readouterr().out
    assert accuracy["run"] > 0.5


def test_the_same_router_speaks_wherever_none_is_asked_for():
    asked = [inspect.signature(each).parameters["routing"] for each in (Run.ensemble, Harness)]
    assert {DEFAULT, Routing().name, *(each.default for each in asked)} == {"learned"}


def test_mistakes_are_told(tiny, capsys, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="there is no expert 'nobody'"):
        Harness(str(tiny.directory), model="nobody")
    for more in ({"routing": "posterior"}, {"language": "de"}, {"top_m": 1}):
        with pytest.raises(UserError, match="model=de-fr runs one model alone, which nothing rout"):
            Harness(str(tiny.directory), model="de-fr", **more)
    with pytest.raises(UserError, match="there is no option 'tom_m' of routing; there are top_m, "):
        Harness(str(tiny.directory), tom_m=1)
    # The harness's own tasks are thousands of files, and none of them is needed here.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\noutput_type: multiple_choice\n"
    )
    given = ["run=/nowhere", "--tasks", "tiny", "--include_path", str(tmp_path)]
    assert main(given) == 2
    assert "xelm-lm-eval: " in capsys.readouterr().err


def test_without_the_harness_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "xelm.harness")
    monkeypatch.delattr("xelm.harness")
    assert commands_main() == 2
    wanted = "xelm-lm-eval: lm_eval is not installed; pip install 'xelm[lm-eval]'\n"
    assert capsys.readouterr().err == wanted
