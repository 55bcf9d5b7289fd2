"""Long documents are scored in windows, as by transformers with the same, and it is said how."""

import math
from dataclasses import replace

import pytest
import torch
from hub_models import CONFIGS, random_tokens, saved
from shared import documents_of
from transformers import AutoModelForCausalLM

from clustering.errors import UserError
from xelm import Routing, open_run
from xelm.data.text_format import TextFormat
from xelm.evaluation.options import EvaluationOptions
from xelm.inference import scoring
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.runs.evaluate import evaluate

START, END = 1, 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return saved(CONFIGS["llama3"], tmp_path_factory.mktemp("windows") / "hub")


def by_transformers(model, ids, context_length, stride):
    """Nats of a text by the recipe of transformers for models of fixed length, whose windows count
    the token that is predicted and not read; and the least context of a token after the first
    window."""
    longest, known, total, least = context_length + 1, 0, 0.0, math.inf
    for begin in range(0, len(ids), stride):
        end = min(begin + longest, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, : known - begin] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss
        total += float(loss) * int((labels[:, 1:] != -100).sum())
        if begin:
            least = min(least, known - begin)
        known = end
        if end == len(ids):
            return total, least
    return total, least


@pytest.mark.parametrize("start_id", [START, None])
@pytest.mark.parametrize(("context_length", "stride"), [(40, 40), (40, 17), (33, 1), (64, 32)])
def test_windows_are_those_of_transformers(pair, context_length, stride, start_id):
    model = read_config(pair.directory)
    documents = [random_tokens((length,), seed=length) for length in (150, 3, 41, 100, 40, 39, 0)]
    found = score_documents(
        model,
        read_for_inference(pair.directory, model),
        documents,
        text_format=TextFormat(start_id=start_id, end_id=END),
        context_length=context_length,
        stride=stride,
    )
    for ids, scores in zip(documents, found):
        framed = [*([] if start_id is None else [start_id]), *ids, END]
        assert len(scores) == len(ids) + 1
        if start_id is None:
            assert scores[0] == 0  # given, not predicted
        if len(framed) > 1:
            nats, least = by_transformers(pair.reference, framed, context_length, stride)
            assert -scores.sum() == pytest.approx(nats, rel=1e-4)
            assert least > context_length - stride


def test_rows_are_no_longer_than_what_they_hold_needs(monkeypatch):
    """One long document among short ones does not make the rows of all long."""
    monkeypatch.setattr(scoring, "ROW_TOKENS", 64)
    lengths = [20] * 31 + [600]
    windows = scoring.windows(lengths, longest=1025, step=1024)
    packed = scoring._pack(windows, longest=1025, unit=1)
    assert [size for size, _ in packed] == [65, 1025]
    short, long = (rows for _, rows in packed)
    assert len(long) == 1 and len(short) == -(-31 // 3)
    cells = sum(
        max(1, scoring.ROWS_A_BATCH * 64 // size) * size * -(-len(rows) // 16)
        for size, rows in packed
    )
    assert cells < 3 * 16 * 65


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory):
    """Documents of several windows."""
    folder = tmp_path_factory.mktemp("long")
    for tag in ("de", "en"):
        texts = documents_of(tiny.held_out, tag)
        joined = " ".join(texts).replace('"', "")
        (folder / f"{tag}.jsonl").write_text(f'{{"text": "{joined}"}}\n')
    return folder


@pytest.mark.parametrize("stride", [None, 16])
def test_evaluating_says_what_transformers_says_with_the_same_windows(xelm, copy, long, stride):
    run = open_run(copy.directory)
    command = ["evaluate", copy.directory, "--corpus", long, "--routing", "language"]
    command += ["--calibration-tokens", 50, "--context-length", 48]
    record = xelm(*command, *(["--stride", stride] if stride else []), "--json").json()
    assert (record["context_length"], record["stride"]) == (48, stride or 48)
    reference = AutoModelForCausalLM.from_pretrained(copy.directory / "seed")
    for tag in ("de", "en"):
        (text,) = documents_of(long, tag)
        ids = [1, *run.tokenizer().encode([text])[0], 2]
        assert len(ids) > 4 * 48
        nats, _ = by_transformers(reference, ids, 48, stride or 48)
        (row,) = (r for r in record["rows"] if (r["system"], r["language"]) == ("seed", tag))
        assert row["nll"] == pytest.approx(nats, rel=1e-4)
        assert row["tokens"] == len(ids) - 1


def test_an_evaluation_says_how_it_read(xelm, copy, long):
    said = xelm("evaluate", copy.directory, "--corpus", long, "--routing", "language")
    # Rows of 32 tokens are what this seed was trained on.
    told = "Documents were read 32 tokens at once, longer ones in windows 32 apart."
    assert told in said.out.splitlines()
    page = xelm("report", copy.directory)
    assert page.code == 0
    text = (copy.directory / "results" / "report.html").read_text()
    assert "tokens read at once" in text and "tokens from one window to the next" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--context-length", 65), "between 1 and the 64 tokens that this model can read; got 65"),
        (("--context-length", 0), "between 1 and the 64 tokens that this model can read; got 0"),
        (("--context-length", 20, "--stride", 21), "between 1 and context_length, 20; got 21"),
        (("--stride", 0), "stride must be between 1 and context_length, 32; got 0"),
    ],
)
def test_windows_that_no_model_can_read_are_refused(xelm, tiny, options, said):
    refused = xelm("evaluate", tiny.directory, "--corpus", tiny.held_out, *options)
    assert refused.code == 2 and said in refused.err


def test_a_context_within_the_rows_of_training_is_read_as_a_whole(tiny):
    run = open_run(tiny.directory)
    ensemble = run.ensemble(Routing(name="fixed", weights={"de-fr": 1.0}))
    reference = AutoModelForCausalLM.from_pretrained(tiny.directory / "experts/de-fr/v1")
    text = documents_of(tiny.held_out, "de")[0]
    text = next(t for n in range(len(text), 0, -1) if within(run, t := text[:n]))
    (ids,) = run.tokenizer().encode([text])
    with torch.no_grad():
        logits = reference(torch.tensor([[1, *ids]])).logits[0].log_softmax(-1)
    alone = logits[torch.arange(len(ids) + 1), torch.tensor([*ids, 2])]
    for border in range(0, len(text), 9):
        found = ensemble.score([text[border:]], contexts=[text[:border]])
        _, before = run.tokenizer().encode_after(text[:border], text[border:])
        assert found.tokens[0] == len(ids) + 1 - before
        assert found.nats[0] == pytest.approx(-float(alone[before:].sum()), rel=1e-4)
    assert before > 24


def within(run, text):
    """Whether a text, with its start, is no longer than a row of training."""
    return len(run.tokenizer().encode([text])[0]) < run.context_length()


def test_a_text_has_the_same_score_alone_and_behind_an_empty_context(tiny):
    """No position is read that training had not, with a context or without."""
    run = open_run(tiny.directory)
    ensemble = run.ensemble("posterior")
    whole = documents_of(tiny.held_out, "de")[0]
    short = next(t for n in range(len(whole), 0, -1) if within(run, t := whole[:n]))
    long = " ".join(whole.split()[:12])
    assert 32 == run.context_length() < len(run.tokenizer().encode([long])[0]) < 64
    (nats,) = ensemble.score([short]).nats
    assert ensemble.score([short], contexts=[""]).nats[0] == pytest.approx(nats, rel=1e-5)
    # Beyond, in the same windows: each half of one behind the one before.
    (nats,) = replace(ensemble, stride=16).score([long]).nats
    assert ensemble.score([long], contexts=[""]).nats[0] == pytest.approx(nats, rel=1e-5)


def test_a_context_longer_than_a_row_of_training_leaves_half_of_that(tiny):
    ensemble = open_run(tiny.directory).ensemble(Routing(name="fixed", weights={"de-fr": 1.0}))
    texts = documents_of(tiny.held_out, "de")
    context, text = " ".join(texts[:4]), " " + texts[4][:20]
    ids, before = ensemble.tokenizer.encode_after(context, text)
    reference = AutoModelForCausalLM.from_pretrained(tiny.directory / "experts/de-fr/v1")
    longest = open_run(tiny.directory).context_length()
    framed = [1, *ids, 2]
    assert before > 2 * longest
    nats = 0.0
    for place in range(before + 1, len(framed)):
        # Windows begin at multiples of half the length.
        begin = max(0, -(-(place - longest) // (longest // 2)) * (longest // 2))
        window = torch.tensor([framed[begin:place]])
        assert longest // 2 < window.shape[1] <= longest
        with torch.no_grad():
            nats -= float(reference(window).logits[0, -1].log_softmax(-1)[framed[place]])
    found = ensemble.score([text], contexts=[context])
    assert found.nats[0] == pytest.approx(nats, rel=1e-4)


def test_evaluate_refuses_windows_before_it_reads_a_corpus(tiny):
    with pytest.raises(UserError, match="context_length must be between 1 and the 64 tokens"):
        evaluate(open_run(tiny.directory), "/nowhere", EvaluationOptions(context_length=65))
