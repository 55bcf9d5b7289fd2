"""Encoders: what is hidden from them, what they are asked, and an X-ELM branched from one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hub_models import CONFIGS, random_tokens, saved
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast, pipeline

from clustering.errors import UserError
from xelm import open_run
from xelm.data.masking import mask_tokens
from xelm.data.text_format import TextFormat
from xelm.inference.scoring import APART, score_documents
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.training_config import DataConfig, TrainConfig

MASKED = TextFormat(start_id=1, end_id=2, mask_id=3, ordinary_ids=np.arange(4, 50))


def batch(rows=64, length=100):
    tokens = random_tokens((rows, length + 1)) % 46 + 4
    tokens[:, 0], tokens[:, 50] = 1, 2
    segments = np.ones_like(tokens)
    segments[:, 90:] = 0
    positions = np.tile(np.arange(length + 1), (rows, 1))
    return {
        "tokens": tokens.astype(np.int32),
        "segments": segments,
        "positions": positions,
        "language": np.zeros(rows, np.int32),
    }


def test_so_many_tokens_are_hidden_and_mostly_behind_the_mask():
    given = batch()
    found = mask_tokens(given, TrainConfig(tokens=1), MASKED, 1)
    assert TrainConfig(tokens=1).data.mask_share == 0.15
    tokens, inputs = found["tokens"], found["inputs"]
    assert tokens.shape == inputs.shape == (64, 100)
    assert found["places"].shape == found["chosen"].shape == (64, 15)
    np.testing.assert_array_equal(tokens, given["tokens"][:, :-1])
    chosen = np.zeros(tokens.shape, bool)
    for row, (places, real) in enumerate(zip(found["places"], found["chosen"])):
        assert len(set(places.tolist())) == 15
        chosen[row, places[real]] = True
    # Neither starts and ends nor padding: 88 of 100 in each row.
    possible = (found["segments"] > 0) & (tokens > 3)
    assert not (chosen & ~possible).any()
    assert (chosen.sum(axis=1) == 14).all() and (possible.sum(axis=1) == 88).all()
    # Anywhere: each of the places about as often.
    often = chosen.sum(axis=0)[possible[0]]
    assert often.std() == pytest.approx((64 * 0.16 * 0.84) ** 0.5, abs=1.2)
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    masked = inputs[chosen] == 3
    other = ~masked & (inputs[chosen] != tokens[chosen])
    assert masked.mean() == pytest.approx(0.8, abs=0.05)
    assert other.mean() == pytest.approx(0.1, abs=0.04)
    assert inputs[chosen][other].min() >= 4 and inputs.max() < 50


def test_what_is_hidden_depends_on_seed_and_step_alone():
    def inputs(seed, step):
        config = TrainConfig(tokens=1, random_seed=seed, data=DataConfig(mask_share=0.3))
        return mask_tokens(batch(), config, MASKED, step)["inputs"]

    np.testing.assert_array_equal(inputs(0, 1), inputs(0, 1))
    assert (inputs(0, 1) != inputs(0, 2)).any() and (inputs(0, 1) != inputs(1, 1)).any()


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "modernbert"])
def test_each_token_is_predicted_from_those_that_are_not_hidden_with_it(name, tmp_path):
    pair = saved(CONFIGS[name], tmp_path / "hub")
    model = read_config(pair.directory)
    # The last two are longer than a window, and read in two that share a token.
    documents = [random_tokens((length,), seed=length) for length in (21, 3, 0, 45, 60)]
    found = score_documents(
        model,
        read_for_inference(pair.directory, model),
        documents,
        text_format=MASKED,
        context_length=40,
    )
    for ids, scores in zip(documents, found):
        assert len(scores) == len(ids)
        framed = [1, *ids, 2]
        for begin in range(0, max(1, len(framed) - 1), 39):
            window = torch.tensor([framed[begin : begin + 40]])
            asked = range(1, min(40, len(ids) + 1 - begin))
            # XLM-R counts positions by the padding's id, which is 1, the start here.
            positions = torch.arange(window.shape[1])[None] + model.position_offset
            for phase in range(APART):
                places = [place for place in asked if place % APART == phase]
                if not places:
                    continue
                given = window.clone()
                given[0, places] = 3
                with torch.no_grad():
                    logits = pair.reference(given, position_ids=positions).logits[0]
                wanted = torch.log_softmax(logits, dim=-1)[places, window[0, places]]
                read = scores[begin + np.array(places) - 1]
                np.testing.assert_allclose(read, wanted, atol=1e-4)


def word_tokenizer(corpus, folder):
    """WordPiece over the words of the tiny corpus, with BERT's special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [
        json.loads(line)["text"]
        for path in sorted(corpus.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    words = dict.fromkeys(word for text in texts for word in text.split())
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    pieces = {piece: number for number, piece in enumerate([*special, *letters, *words])}
    fast = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Whitespace()
    fast.decoder = decoders.WordPiece()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(tokenizer_object=fast, **dict(zip(names, special))).save_pretrained(
        folder
    )
    return len(pieces)


def with_set(settings):
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, xelm, tiny_corpus, tiny_settings, tiny):
    """A RUN whose seed is a tiny BERT, with two experts, and its results."""
    folder = tmp_path_factory.mktemp("encoders")
    size = word_tokenizer(tiny_corpus, folder / "words")
    config = BertConfig(
        vocab_size=size,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    seed = saved(config, folder / "seed").directory
    for path in (folder / "words").iterdir():
        path.rename(seed / path.name)
    run = folder / "RUN"
    changes = tiny_settings(
        experts__tokens=8192,
        experts__optimizer__learning_rate=1e-2,
        experts__runtime__checkpoint_every=1000,
    )
    # Without those of a seed that is made here.
    settings = [p for p in changes if p != "--set" and not p.startswith(("model.", "seed."))]
    options = ("--preset", "hub", "--languages", "en,de,es,fr", *with_set(settings))
    commands = (
        ("init", run, "--seed", seed, "--corpus", tiny_corpus, *options),
        ("branch", run, "--clusters", tiny.clusters),
        ("train", run, "--all", "--dense"),
        ("evaluate", run, "--corpus", tiny.held_out, "--routing", "language,posterior"),
    )
    for command in commands:
        outcome = xelm(*command)
        assert outcome.code == 0, outcome.err
    return run


@pytest.mark.slow
def test_experts_guess_better_than_their_seed(encoders):
    rows = json.loads((encoders / "results" / "results.json").read_text())["rows"]
    nats = {(r["system"], r["routing"], r["language"]): r["nll"] / r["tokens"] for r in rows}
    for language in ("en", "de", "es", "fr"):
        assert nats["ensemble", "language", language] < nats["seed", None, language] - 0.5
        assert nats["ensemble", "posterior", language] < nats["seed", None, language] - 0.5


@pytest.mark.slow
def test_an_expert_of_an_encoder_is_an_ordinary_checkpoint(encoders):
    expert = open_run(encoders).registry().for_language("de").directory(encoders)
    words = (encoders.parent / "seed" / "tokenizer.json").read_text()
    assert (expert / "tokenizer.json").read_text() == words
    guess = pipeline("fill-mask", model=str(expert), tokenizer=str(expert))
    tokenizer = open_run(encoders).tokenizer()
    text = tokenizer.decode(open_run(encoders).store().languages["de"].document(0)[:6])
    masked = " ".join(["[MASK]", *text.split()[1:]])
    theirs = guess(masked, top_k=3)
    ours = open_run(encoders).ensemble("language").fill(masked, count=3, language="de")
    (guesses,) = ours.masks
    assert [guess.id for guess in guesses] == [found["token"] for found in theirs]
    assert [g.text.strip() for g in guesses] == [f["token_str"].strip("# ") for f in theirs]
    np.testing.assert_allclose(
        [guess.probability for guess in guesses], [f["score"] for f in theirs], rtol=1e-3
    )
    name = open_run(encoders).registry().for_language("de").name
    assert ours.weights == {other: float(other == name) for other in ours.weights}
    assert "AutoModelForMaskedLM.from_pretrained" in (expert / "README.md").read_text()
    again = AutoModelForMaskedLM.from_pretrained(expert)
    assert again.config.hidden_size == 24


@pytest.mark.slow
def test_the_mixture_at_a_mask_is_the_sum_of_the_experts(encoders):
    run = open_run(encoders)
    text = "[MASK] and [MASK]"
    uniform = run.ensemble("uniform").fill(text, count=10**6)
    parts = []
    for name in ("en", "de"):
        parts.append(run.ensemble("language").fill(text, count=10**6, language=name))
    for place in range(2):
        both = [{guess.id: guess.probability for guess in part.masks[place]} for part in parts]
        for guess in uniform.masks[place][:20]:
            wanted = sum(found[guess.id] for found in both) / 2
            assert guess.probability == pytest.approx(wanted, rel=1e-4)
    assert set(uniform.weights.values()) == {0.5}


@pytest.mark.slow
def test_a_piece_reads_as_it_does_within_a_text(encoders):
    tokenizer = open_run(encoders).tokenizer()
    words = tokenizer.hub.get_vocab()
    assert tokenizer.piece(words["[SEP]"]) == "[SEP]"
    inner = next(word for word in words if word.startswith("##") and word[2:] in words)
    assert tokenizer.piece(words[inner]) == inner[2:]
    assert tokenizer.piece(words[inner[2:]]) == f" {inner[2:]}"


@pytest.mark.slow
def test_a_text_is_filled_as_far_as_texts_are_scored(encoders):
    """A seed that was trained here reads as many tokens as its rows in training had."""
    ensemble = replace(open_run(encoders).ensemble("uniform"), context_length=12)
    mask = ensemble.tokenizer.hub.mask_token
    word = ensemble.tokenizer.piece(20).strip()
    text = " ".join([word] * 9 + [mask])
    assert len(ensemble.fill(text).masks) == 1
    with pytest.raises(UserError, match=r"has 11 tokens; .* reads 12 at once, has space for 10"):
        ensemble.fill(f"{word} {text}")


@pytest.mark.slow
def test_masks_are_filled_on_the_command_line(encoders, xelm):
    outcome = xelm("fill", encoders, "[MASK] [MASK]", "--count", 2, "--routing", "posterior")
    assert outcome.code == 0 and outcome.err.startswith("experts: ")
    lines = outcome.out.splitlines()
    assert (lines[0], lines[3], len(lines)) == ("mask 1", "mask 2", 6)
    found = json.loads(xelm("fill", encoders, "[MASK] [MASK]", "--count", 2, "--json").out)
    assert [sorted(guess) for guess in found["masks"][1]] == [["id", "probability", "text"]] * 2
    assert sum(found["weights"].values()) == pytest.approx(1)
    assert xelm("fill", encoders, "no mask").err == "xelm: the text has no [MASK] to be filled\n"
    assert "count must be at least 1; got -1" in xelm("fill", encoders, "[MASK]", "--count", -1).err
    long = xelm("fill", encoders, "[MASK] " * 70)
    assert long.code == 2 and "has space for 62" in long.err


@pytest.mark.slow
def test_the_report_of_encoders_says_what_their_perplexity_is(encoders, xelm):
    assert xelm("report", encoders).code == 0
    page = (encoders / "results" / "report.html").read_text()
    assert "This is pseudo-perplexity" in page
    assert "is not recorded here" not in page  # the training of a seed that was given


@pytest.mark.slow
def test_decoders_fill_and_encoders_continue_nothing(encoders, tiny, xelm):
    assert "fill no masks; use generate" in xelm("fill", tiny.directory, "[MASK]").err
    outcome = xelm("generate", encoders, "abc")
    assert outcome.code == 2 and "encoders, which continue no text; use fill" in outcome.err


@pytest.mark.slow
def test_an_encoder_whose_tokenizer_has_no_mask_is_refused(encoders):
    tokenizer = open_run(encoders).tokenizer()
    tokenizer.mask_id = None
    with pytest.raises(UserError, match="has no mask token, which an encoder needs"):
        tokenizer.check_mask()
