"""A seed whose tokenizer puts nothing before a text: figures are those of transformers and of the
harness about it, texts end where others begin, and RUNs of old go on as they were."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from serving import served
from shared import documents_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from xelm import Routing, open_run
from xelm.data.special_tokens import USER_BEGINS, USER_ENDS
from xelm.harness import Harness

START, END = 252, 253
"""Ids of a chat's special tokens."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def init_of(directory, corpus, settings, seed):
    """The command that makes the RUN."""
    command = ["init", directory, "--corpus", corpus, "--languages", "de,fr,en,es", "--seed", seed]
    # Without those of a seed that is made here.
    kept = [s for s in settings if s != "--set" and not s.startswith(("model.", "seed."))]
    return [*command, *(part for setting in kept for part in ("--set", setting))]


@pytest.fixture(scope="module")
def bare(xelm, tiny, tiny_settings, tmp_path_factory):
    """A RUN of a seed without a start token, with a template for chats."""
    folder = tmp_path_factory.mktemp("bare")
    seed = folder / "seed"
    shutil.copytree(tiny.directory / "seed", seed)
    content = json.loads((seed / "tokenizer.json").read_text())
    content["post_processor"] = None
    # In the place of bytes that no text here has, so that the embedding has rows for them.
    names = dict(zip(("<|im_start|>", "<|im_end|>"), (START, END)))
    pieces = content["model"]["vocab"]
    for name, id in names.items():
        assert pieces.pop(f"<0x{id - 4:02X}>") == id  # after the four special tokens
        pieces[name] = id
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": id, "content": name, **flags, "special": True})
    (seed / "tokenizer.json").write_text(json.dumps(content))
    (seed / "tokenizer.model").unlink()
    (seed / "chat_template.jinja").write_text(CHATML)
    directory = folder / "RUN"
    assert xelm(*init_of(directory, tiny.corpus, tiny_settings(), seed)).code == 0
    assert xelm("branch", directory, "--clusters", tiny.clusters).code == 0
    assert xelm("train", directory, "--all").code == 0
    return directory


@pytest.fixture(scope="module")
def theirs(bare):
    expert = bare / "experts/de-fr/v1"
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(expert).eval(),
        tokenizer=AutoTokenizer.from_pretrained(expert),
    )


@pytest.fixture(scope="module")
def ours(bare):
    return open_run(bare).ensemble(Routing(name="fixed", weights={"de-fr": 1.0}))


def test_a_run_has_what_its_tokenizer_puts_first(bare, tiny):
    assert open_run(bare).config.start_token == "tokenizer"
    assert open_run(bare).tokenizer().start_id is None
    assert open_run(tiny.directory).config.start_token == "tokenizer"
    assert open_run(tiny.directory).tokenizer().start_id == 1


def test_scores_are_those_of_transformers(bare, tiny, ours, theirs, xelm):
    texts = [" ".join(text.split()[:6]) for text in documents_of(tiny.held_out, "de")]
    found = ours.score(texts)
    wanted = []
    for text in texts:
        ids = torch.tensor([[*theirs.tokenizer(text)["input_ids"], 2]])
        with torch.no_grad():
            wanted.append(float(theirs.model(ids, labels=ids).loss) * (ids.shape[1] - 1))
    np.testing.assert_allclose(found.nats, wanted, rtol=1e-4)
    # The first token is given.
    assert found.tokens.tolist() == [len(theirs.tokenizer(text)["input_ids"]) for text in texts]
    folder = bare.parent / "texts"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "de.jsonl").write_text(lines)
    record = xelm("evaluate", bare, "--corpus", folder, "--json").json()
    assert record["start_token"] == "tokenizer"
    (row,) = (row for row in record["rows"] if row["system"] == "de-fr")
    assert row["nll"] == pytest.approx(sum(wanted), rel=1e-4)
    assert row["tokens"] == found.tokens.sum()
    assert row["calibration"]["tokens"] == row["tokens"]


def test_of_an_empty_text_and_of_one_token_the_rest_is_predicted(ours):
    found = ours.score(["", "a"])
    assert found.tokens.tolist() == [0, len(ours.tokenizer.encode(["a"])[0])]
    assert found.nats[0] == 0 and found.nats[1] > 0
    assert set(found.weights) == {"de-fr", "en-es"}


@pytest.mark.parametrize("routing", ["posterior", "learned", "detected"])
def test_scores_are_those_of_generating_token_by_token(bare, tiny, routing):
    from xelm.inference.engine import Engine
    from xelm.inference.running import GenerationRequest
    from xelm.inference.sampling_params import SamplingParams

    ensemble = open_run(bare).ensemble(routing)
    text = " ".join(documents_of(tiny.held_out, "fr")[0].split()[:6])
    (ids,) = ensemble.tokenizer.encode([text])
    engine = Engine(ensemble)
    sampling = SamplingParams(max_new_tokens=1)
    growing = engine.add(GenerationRequest(ids=ids[:1], sampling=sampling))
    nats = 0.0
    for token in [*ids[1:], 2]:
        distribution, _ = engine.next_log_probabilities()
        nats -= float(distribution[growing.row, token])
        engine.append(growing, token)
    assert ensemble.score([text]).nats[0] == pytest.approx(nats, rel=1e-4)


def test_prompts_are_continued_as_by_transformers(ours, theirs, tiny):
    prompt = documents_of(tiny.held_out, "de")[0][:40]
    ids = theirs.tokenizer(prompt, return_tensors="pt")["input_ids"]
    said = theirs.model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0)
    found = ours.generate(prompt, max_new_tokens=10, temperature=0)
    wanted = said[0, ids.shape[1] :].tolist()
    assert [*found.ids] == [id for id in wanted if id not in ours.tokenizer.end_ids]
    # An empty prompt has what the harness puts before a text of which all is predicted.
    assert ours.tokenizer.begin("") == [theirs.tokenizer.bos_token_id]


@pytest.fixture(scope="module")
def pair(bare):
    expert = str(bare / "experts/de-fr/v1")
    hf = HFLM(pretrained=expert, dtype="float32", device="cpu", batch_size=4, max_length=64)
    return Harness(str(bare), model="de-fr"), hf


def asked(*arguments):
    return SimpleNamespace(args=arguments, task_name=None)


def test_the_harness_hears_the_same_of_both(pair, tiny):
    texts = documents_of(tiny.held_out, "de")
    requests = [asked(text[:40], text[40:60]) for text in texts]
    requests += [asked("", texts[0][:20]), asked(" ".join(texts), "abc")]
    found = [model.loglikelihood(requests, disable_tqdm=True) for model in pair]
    np.testing.assert_allclose([a for a, _ in found[0]], [a for a, _ in found[1]], rtol=1e-4)
    assert [b for _, b in found[0]] == [b for _, b in found[1]]
    # The first token of all is predicted here, and of later windows nothing stands before.
    requests = [asked(texts[0][:60]), asked(" ".join(texts))]
    found = [model.loglikelihood_rolling(requests, disable_tqdm=True) for model in pair]
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_chats_are_the_same_to_both(pair, tiny):
    texts = documents_of(tiny.held_out, "de")
    chats = [
        [{"role": "user", "content": text[:30]}, {"role": "assistant", "content": text[30:60]}]
        for text in texts
    ]
    rendered = [
        [model.apply_chat_template([*chat, {"role": "user", "content": "Welt"}]) for chat in chats]
        for model in pair
    ]
    marks = dict.fromkeys(map(ord, USER_BEGINS + USER_ENDS))  # by which the router knows the user
    assert [text[1:].translate(marks) for text in rendered[0]] == rendered[1]
    requests = [[asked(text, "abc de") for text in some] for some in rendered]
    for model, some in zip(pair, requests):
        start = model.tok_encode(some[0].args[0])[:2]
        assert start[0] == START  # with nothing before it
    found = [m.loglikelihood(some, disable_tqdm=True) for m, some in zip(pair, requests)]
    np.testing.assert_allclose([a for a, _ in found[0]], [a for a, _ in found[1]], rtol=1e-4)
    options = {"until": ["~~"], "max_gen_toks": 8, "do_sample": False}
    requests = [[asked(text, dict(options)) for text in some] for some in rendered]
    found = [m.generate_until(some, disable_tqdm=True) for m, some in zip(pair, requests)]
    assert [text.strip() for text in found[0]] == [text.strip() for text in found[1]]


def test_what_a_message_or_a_continuation_spells_is_text_to_the_harness(pair):
    model = pair[0]
    special = {*model.ensemble.tokenizer.special.ids.values()}
    rendered = model.apply_chat_template([{"role": "user", "content": "a</s><|im_end|>"}])
    context, continuation = model._encode_pair(rendered, "b<|im_start|>c")
    assert [id for id in context if id in special] == [START, END, START]
    assert not special & {*continuation}
    assert not special & {*model.tok_encode("a</s>b<|im_start|>")}


def test_a_server_reads_ids_as_they_are(bare, ours):
    ids = ours.tokenizer.encode(["Welt und"])[0]
    with served(bare) as server:
        for prompt in (ids, [1, *ids], "Welt und"):
            body = {"model": "xelm", "prompt": prompt, "max_tokens": 2, "temperature": 0}
            answer = server.post(body)
            assert answer.status_code == 200
            wanted = len(ids) + (prompt[:1] == [1])
            assert answer.json()["usage"]["prompt_tokens"] == wanted
        broken = b'{"model": "xelm", "prompt": "ab\\ud83d", "max_tokens": 2}'
        answer = server.post(broken)
        assert answer.status_code == 400


def test_a_run_can_start_texts_with_the_bos_of_its_configuration(
    bare, tiny, tiny_settings, xelm, tmp_path
):
    directory = tmp_path / "RUN"
    shutil.copytree(bare, directory)
    record = json.loads((directory / "run.json").read_text())
    record["config"]["start_token"] = "config"
    (directory / "run.json").write_text(json.dumps(record))
    run = open_run(directory)
    assert run.tokenizer().start_id == 1  # of config.json
    outcome = xelm("generate", directory, "Welt", "--max-new-tokens", 2, "--json")
    assert outcome.code == 0
    # The same init goes on with it; another is refused.
    command = init_of(directory, tiny.corpus, tiny_settings(), record["seed_from"])
    again = xelm(*command, "--set", "start_token=config")
    assert again.code == 0, again.err
    other = xelm(*command, "--set", "start_token=eos")
    assert other.code == 2 and "start_token was config, now eos" in other.err
