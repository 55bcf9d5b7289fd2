"""Continuations: cached in batches as uncached one by one, and as transformers' own; stop strings,
streaming, chats."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hub_models import CONFIGS, DECODERS, FAMILIES, by_speed, random_tokens, saved
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from clustering.errors import UserError
from xelm import open_run
from xelm.data import tokenizer as tokenizers
from xelm.inference.ensemble import Ensemble
from xelm.inference.generation import generate
from xelm.inference.routers import uniform
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.sequence import Detokenizer
from xelm.models.checkpoint import load_model, read_config
from xelm.models.parameters import for_inference, parameters_of

NEW = 12
logits_of = nnx.jit(lambda model, tokens: model(tokens))


class Letters:
    """A tokenizer of one character an id."""

    end_ids = frozenset({2})

    def starts(self, ids):
        return 1

    def decode(self, ids):
        return "".join(chr(0x100 + int(number)) for number in ids)


def alone(directory, **options):
    """The ensemble of one model."""
    model = load_model(directory)
    return Ensemble(
        names=["one"],
        model=model.config,
        parameters=[for_inference(parameters_of(model))],
        router=uniform(1),
        tokenizer=Letters(),  # ty: only what generating needs
        **options,
    )


@pytest.fixture(params=by_speed([n for n in FAMILIES if n in DECODERS]), scope="module")
def pair(request, tmp_path_factory):
    return saved(CONFIGS[request.param], tmp_path_factory.mktemp(request.param) / "hub")


def continued(ensemble, prompts, sampling, languages, *stream):
    requests = [
        GenerationRequest(ids=ids, sampling=sampling, language=language)
        for ids, language in zip(prompts, languages)
    ]
    return generate(ensemble, requests, *stream)


def prompts_of_unequal_length():
    return [random_tokens((length,), seed=length).tolist() for length in (17, 3, 10)]


def test_greedy_continuations_equal_those_of_transformers_and_uncached_ones(pair):
    prompts = prompts_of_unequal_length()
    ensemble = alone(pair.directory)
    sampling = SamplingParams(max_new_tokens=NEW, temperature=0.0)
    found = continued(ensemble, prompts, sampling, [None] * 3)

    longest = max(map(len, prompts))
    tokens = np.zeros((3, longest), int)
    for row, ids in enumerate(prompts):
        tokens[row, longest - len(ids) :] = ids
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        mask[row, longest - len(ids) :] = 1
    with torch.no_grad():
        said = pair.reference.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=2,
            pad_token_id=0,
        )[:, longest:].tolist()
    for generation, ids in zip(found, said):
        assert list(generation.ids) == [*(ids[: ids.index(2)] if 2 in ids else ids)]

    model = load_model(pair.directory)
    for prompt, generation in zip(prompts, found):
        # Padded behind, where decoders do not look, so that one shape is compiled.
        ids = list(prompt)
        for token in generation.ids:
            padded = jnp.asarray([ids + [0] * (longest + NEW - len(ids))])
            assert int(logits_of(model, padded)[0, len(ids) - 1].argmax()) == token
            ids.append(token)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generation") / "hub"
    return alone(saved(CONFIGS["llama3"], directory).directory)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.5, "top_k": 9}])
def test_the_first_of_a_batch_is_what_it_is_alone(ensemble, settings):
    sampling = SamplingParams(max_new_tokens=NEW, top_p=1.0, **settings)
    prompts = prompts_of_unequal_length()
    together = continued(ensemble, prompts, sampling, [None] * 3)
    (single,) = continued(ensemble, prompts[:1], sampling, [None])
    assert together[0].ids == single.ids
    # Alike in all but their number, they differ.
    same = continued(ensemble, prompts[:1] * 2, sampling, [None] * 2)
    assert (same[0].ids == same[1].ids) == (sampling.temperature == 0)


def test_no_prompts_have_no_continuations(ensemble):
    assert continued(ensemble, [], SamplingParams(), []) == []


def test_repetitions_are_penalised_as_in_transformers(tmp_path):
    pair = saved(CONFIGS["llama3"], tmp_path / "hub")
    prompt = random_tokens((9,)).tolist()
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.7}
    (found,) = continued(
        alone(pair.directory), [prompt], SamplingParams(temperature=0.0, **options), [None]
    )
    with torch.no_grad():
        said = pair.reference.generate(
            torch.tensor([prompt]), do_sample=False, eos_token_id=2, pad_token_id=0, **options
        )[0, len(prompt) :].tolist()
    assert list(found.ids) == said
    plain = SamplingParams(temperature=0.0, max_new_tokens=NEW)
    assert continued(alone(pair.directory), [prompt], plain, [None])[0].ids != found.ids


def test_tokens_without_an_embedding_are_refused(ensemble):
    with pytest.raises(UserError, match="has a special token, 97, for which this model of 97 ids"):
        continued(ensemble, [[1, 5, 97]], SamplingParams(), [None])


def told(reply, ids):
    return [reply.add(number) for number in ids] + [reply.rest()]


def letters(text):
    return [ord(letter) - 0x100 for letter in text]


def test_a_stop_string_ends_the_text_before_it_and_is_never_told():
    text = "".join(chr(0x100 + number) for number in (9, 5, 6, 5, 6, 7, 8))
    stop = text[3:6]  # after a false beginning
    reply = Detokenizer(Letters(), [1, 4], [stop, "zz"])
    pieces = told(reply, letters(text[:6]))
    assert reply.stopped and reply.text == text[:3] == "".join(pieces)
    # "5" alone may be the beginning of the stop string, and so is held back.
    assert pieces[:4] == [text[0], "", "", text[1:3]]


def test_an_unfinished_beginning_of_a_stop_string_is_told_at_the_end():
    reply = Detokenizer(Letters(), [1], [chr(0x105) + chr(0x106)])
    assert told(reply, [9, 5]) == [chr(0x109), "", chr(0x105)]
    assert not reply.stopped and reply.text == chr(0x109) + chr(0x105)


@pytest.mark.parametrize("stop", ["b漢", "漢字", "字 ", " 漢", "b 漢字 c"])
def test_a_stop_string_of_characters_of_several_ids_ends_the_text(tiny, stop):
    """What stands before such a character is held back until that is whole."""
    tokenizer = open_run(tiny.directory).tokenizer()
    text = "ab 漢字 cb漢 d"
    ids = tokenizer.encode([text])[0]
    for prompt in ("abcd", "漢"):
        reply = Detokenizer(tokenizer, tokenizer.begin(prompt), [stop])
        pieces = []
        for number in ids:
            pieces.append(reply.add(number))
            if reply.stopped:
                break
        wanted = f" {text}"[: f" {text}".index(stop)]
        assert reply.stopped and reply.text == "".join(pieces) == wanted


def test_a_character_of_several_ids_is_told_whole(tiny):
    tokenizer = open_run(tiny.directory).tokenizer()
    text = "ab 漢字 c"  # bytes, in a vocabulary of Latin letters
    ids = tokenizer.encode([text])[0]
    # Also behind a prompt of nothing but bytes, which is looked at from a whole character on.
    for prompt in ("abcd", "漢字漢字漢字", "漢"):
        check_pieces(tokenizer, tokenizer.begin(prompt), ids, text)


def check_pieces(tokenizer, before, ids, text):
    reply = Detokenizer(tokenizer, before, [])
    pieces = told(reply, ids)
    assert "".join(pieces) == reply.text == " " + text
    assert len(ids) > len(text) and not any("\ufffd" in piece for piece in pieces)
    # Cut within a character, it is left out.
    cut = Detokenizer(tokenizer, before, [])
    half = ids[: ids.index(tokenizer.encode(["字"])[0][-1]) - 1]
    assert "".join(told(cut, half)) == cut.text == " ab 漢"


def test_a_long_continuation_is_decoded_in_short_pieces(tiny):
    """Each id costs the same, however many came before; spaces and characters of several ids lie
    across the cuts."""
    tokenizer = open_run(tiny.directory).tokenizer()
    text = " ".join(f"abc 漢{'字' * (n % 4)} de" for n in range(40))
    ids = tokenizer.encode([text])[0]
    decoded, decode = [], tokenizer.decode
    spied = SimpleNamespace(decode=lambda ids: decoded.append(len(ids)) or decode(ids))
    reply = Detokenizer(spied, tokenizer.begin("fgh"), ["de abc 漢字字字 de abc 漢 de abc 漢!"])
    pieces = told(reply, ids)
    assert "".join(pieces) == reply.text == " " + text
    assert len(ids) > 500 and max(decoded) < 100


def test_pieces_of_a_stream_are_the_text(tiny):
    ensemble = open_run(tiny.directory).ensemble("uniform")
    sampling = SamplingParams(max_new_tokens=10, temperature=1.5)
    pieces = {0: [], 1: []}
    found = ensemble.generate_batch(
        ["abcd", "efg hij"], sampling, stream=lambda number, piece: pieces[number].append(piece)
    )
    assert ["".join(pieces[number]) for number in (0, 1)] == [said.text for said in found]
    assert len(pieces[0]) > 3


def test_the_checkpoints_own_settings_are_the_default(tiny):
    ensemble = open_run(tiny.directory).ensemble("uniform")
    wish = replace(ensemble, sampling=SamplingParams(temperature=0.0, max_new_tokens=5))
    assert wish.generate("abcd") == ensemble.generate("abcd", temperature=0, max_new_tokens=5)


def test_a_chat_is_put_into_the_checkpoints_template(tiny):
    ensemble = open_run(tiny.directory).ensemble("uniform")
    messages = [{"role": "user", "content": "abcd"}]
    with pytest.raises(UserError, match="has no chat template; give a plain text"):
        ensemble.generate(messages)
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<answer>"
    ensemble.tokenizer.hub.chat_template = template
    ids = ensemble.tokenizer.chat(messages)[0]
    assert ensemble.tokenizer.decode(ids).strip() == "<user> abcd <answer>"
    said = ensemble.generate(messages, temperature=0, max_new_tokens=4)
    (same,) = continued(ensemble, [ids], SamplingParams(temperature=0, max_new_tokens=4), [None])
    assert said.ids == same.ids
    ensemble.tokenizer.hub.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="refuses these messages: roles must alternate"):
        ensemble.generate(messages)


def test_the_checkpoints_wish_for_more_tokens_than_there_is_room_for_is_cut(tiny):
    ensemble = open_run(tiny.directory).ensemble("uniform")
    wish = replace(ensemble, sampling=SamplingParams(temperature=1.5, max_new_tokens=2048))
    said = wish.generate("abcd")
    room = ensemble.model.max_length - len(ensemble.tokenizer.begin("abcd"))
    assert 0 < len(said.ids) <= room
    with pytest.raises(UserError, match=r"space for \d+ new ones; got max_new_tokens=2048"):
        wish.generate("abcd", max_new_tokens=2048)


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_a_text_grows_beyond_the_rows_of_training_unless_positions_are_learned(name, tmp_path):
    """Rotary angles exist for any position; rows of a table are as training left them."""
    ensemble = alone(saved(CONFIGS[name], tmp_path / "hub").directory, context_length=16)
    learned = ensemble.model.positions == "learned"
    assert learned == (name == "gpt2") and ensemble.model.max_length > 20
    assert ensemble.longest == (16 if learned else ensemble.model.max_length)
    prompt, sampling = (
        random_tokens((10,)).tolist(),
        SamplingParams(max_new_tokens=6, temperature=0.0),
    )
    (within,) = continued(ensemble, [prompt], sampling, [None])
    assert len(within.ids) <= 6
    longer = replace(sampling, max_new_tokens=7)
    if learned:
        with pytest.raises(UserError, match="this model of 16 space for 6 new ones"):
            continued(ensemble, [prompt], longer, [None])
    else:
        (beyond,) = continued(ensemble, [prompt], longer, [None])
        assert beyond.ids[:6] == within.ids


def words(directory, config, *, special=(), before=()):
    """A tokenizer of words that lies beside a config.json; bos is w1, and eos w2."""
    fast = Tokenizer(models.WordLevel({f"w{n}": n for n in range(9)} | {"sea": 9, "old": 10}))
    fast.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A"]), special_tokens=[(name, int(name[1:])) for name in before]
    )
    hub = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="w1",
        eos_token="w2",
        additional_special_tokens=list(special),
    )
    hub.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("config", "start"),
    [
        ({"model_type": "qwen3", "bos_token_id": 7, "eos_token_id": 8}, 7),
        ({"model_type": "bloom", "bos_token_id": 7, "eos_token_id": 8}, 8),
        ({"model_type": "gpt2"}, 1),
    ],
)
def test_a_text_begins_as_a_run_says(config, start, tmp_path):
    """Where the tokenizer puts nothing first: nothing, or what RUNs of old have, or its own."""
    directory = words(tmp_path, config, special=["w7", "w8"])
    found = {
        choice: tokenizers.load(directory, choice)
        for choice in ("tokenizer", "bos", "eos", "config")
    }
    starts = {choice: each.start_id for choice, each in found.items()}
    assert starts == {"tokenizer": None, "bos": 1, "eos": 2, "config": start}
    assert {each.end_id for each in found.values()} == {2}
    for each in found.values():
        assert each.end_ids == {2, config.get("eos_token_id", 2)} and each.ignored == ()
        first = [] if each.start_id is None else [each.start_id]
        assert each.begin("sea") == [*first, 9]
        # Where nothing is read before it, the first token of a text is predicted from bos.
        assert each.begin("") == [each.prefix_id] == [each.start_id or 1]


@pytest.mark.parametrize("choice", ["tokenizer", "config"])
def test_what_the_tokenizer_puts_before_a_text_starts_it(choice, tmp_path):
    config = {"model_type": "qwen3", "bos_token_id": 7, "eos_token_id": 8}
    directory = words(tmp_path, config, special=["w7"], before=["w4"])
    assert tokenizers.load(directory, choice).start_id == 4
    both = words(tmp_path, config, before=["w4", "w5"])
    with pytest.raises(UserError, match="puts 2 tokens before a text; wanted 0 or 1"):
        tokenizers.load(both, choice)


def test_special_tokens_are_those_of_the_tokenizer_where_the_configuration_names_others(tmp_path):
    """As in mGPT, whose config.json has GPT-2's 50256, a piece of a word in its tokenizer."""
    config = {"model_type": "gpt2", "bos_token_id": 7, "eos_token_id": 7}
    found = tokenizers.load(words(tmp_path, config), "config")
    assert (found.start_id, found.end_id, found.end_ids, found.ignored) == (1, 2, {2}, (7,))


def test_every_end_that_a_checkpoint_names_ends_a_text(tiny, tmp_path):
    shutil.copytree(tiny.directory / "seed", tmp_path / "seed")
    path = tmp_path / "seed" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 0, 9]}))
    found = tokenizers.load(tmp_path / "seed")
    assert (found.end_ids, found.ignored) == ({2, 0}, (9,))  # 9 is a byte of text
    assert read_config(tmp_path / "seed").vocabulary_size == 384
