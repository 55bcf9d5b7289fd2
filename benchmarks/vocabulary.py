"""What more pieces for a new language are worth, and how their rows are best made.

    python benchmarks/vocabulary.py DATA RUN WORK
        [--languages hy,ta,eu] [--pieces 500,2000] [--kilobytes 600]

DATA has the folders `corpus` and `corpus_valid` with files such as hy.jsonl.gz. RUN has a seed that
was not trained on these languages; it is copied into WORK, and every expert is grown from the seed
in a copy, on the first documents of the language alone. Every training is one line of
WORK/results.jsonl; the same command goes on where it was interrupted, and ends with the tables.

Without more pieces an expert is trained twice: on the whole text, once (equal bytes), and for as
many operations as the experts with the most pieces are (equal compute). With them the whole text is
read once. Figures are bits a byte on the first documents of `corpus_valid`.
"""

import argparse
import gzip
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from trials import add, read

from xelm.api import Run, open_run
from xelm.commands.options import names
from xelm.data.tokenizer import Tokenizer
from xelm.data.vocabulary import Vocabulary
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import load_parameters, read_config, read_for_inference
from xelm.models.parameters import for_inference
from xelm.models.vocabulary_rows import METHODS, with_new_rows
from xelm.runs.options import GrowOptions
from xelm.runs.vocabulary import vocabulary_of, weights_of
from xelm.training.flops import of_a_token

SCORED_BYTES = 60_000
"""Bytes of the validation text that are scored."""
FEW = 0.1
"""Share of the text after which methods are compared for the first time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with `corpus` and `corpus_valid`")
    parser.add_argument("run", type=Path, help="RUN with the seed")
    parser.add_argument("work", type=Path, help="folder for the results")
    parser.add_argument("--languages", type=names, default=names("hy,ta,eu"))
    parser.add_argument("--pieces", type=names, default=names("500,2000"))
    parser.add_argument("--kilobytes", type=int, default=600, help="training text of a language")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.jsonl"
    for language in options.languages:
        corpus = options.work / "corpus" / language
        write_text(options.data / "corpus", language, corpus, 1000 * options.kilobytes)
        held_out = first_texts(options.data / "corpus_valid", language, SCORED_BYTES)
        for trial in trials(language, [int(each) for each in options.pieces]):
            if not any(trial.items() <= line.items() for line in read(results)):
                found = measured(options, trial, corpus, held_out, read(results))
                add(results, trial | found)
    print(tables(read(results)))


def trials(language: str, pieces: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The experts that are grown, those first on which others depend."""
    for count in sorted(pieces, reverse=True):
        for method in METHODS if count == max(pieces) else ("focus",):
            yield {"language": language, "pieces": count, "method": method, "budget": "text"}
    for method in METHODS:
        few = {"pieces": max(pieces), "method": method, "budget": "few"}
        yield {"language": language, **few}
    for budget in ("text", "compute"):
        yield {"language": language, "pieces": 0, "method": None, "budget": budget}


def measured(
    options: argparse.Namespace,
    trial: dict[str, Any],
    corpus: Path,
    held_out: Sequence[str],
    known: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Grows the expert of a trial in a copy of the RUN, and measures it."""
    place = options.work / "RUN"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(options.run, place)
    language, budget = trial["language"], "grow.passes=1"
    if trial["budget"] == "few":
        budget = f"grow.passes={FEW}"
    if trial["budget"] == "compute":
        rest = [one for one in known if one["language"] == language and one["budget"] == "text"]
        most = max(rest, key=lambda one: (one["pieces"], one["operations"]))
        cost = of_a_token(read_config(place / "seed"), 128)
        budget = f"grow.tokens={round(most['operations'] / cost)}"
    run = open_run(place, settings=[budget, "gate.worse=null"])
    grow = GrowOptions(
        parent="seed",
        extend_vocabulary=trial["pieces"] or None,
        initialise=trial["method"],
    )
    (expert,) = run.grow(language, str(corpus), grow)
    directory = expert.directory(place)
    vocabulary, model = vocabulary_of(run, directory), read_config(directory)
    tokenizer = vocabulary.tokenizer if vocabulary else run.tokenizer()
    score = partial(bits_per_byte, run, held_out, tokenizer, model)
    start = score(started(run, vocabulary, trial, corpus, tokenizer))
    tokens = sum(map(len, tokenizer.encode(held_out)))
    return {
        "tokens": expert.tokens,
        "operations": expert.tokens * of_a_token(model, 128),
        "tokens_per_character": tokens / sum(map(len, held_out)),
        "start": start,
        "end": score(read_for_inference(directory, model)),
    }


def started(
    run: Run,
    vocabulary: Vocabulary | None,
    trial: dict[str, Any],
    corpus: Path,
    tokenizer: Tokenizer,
) -> Any:
    """Parameters before the first step."""
    parameters = load_parameters(run.seed, read_config(run.seed))
    if vocabulary is not None:
        texts = [json.loads(line)["text"] for line in next(corpus.iterdir()).open()]
        documents = [np.asarray(ids) for ids in tokenizer.encode(texts)]
        weights = weights_of(trial["method"], vocabulary, documents)
        parameters = with_new_rows(parameters, vocabulary.base_size, weights)
    return for_inference(jax.tree.map(np.asarray, parameters))


def bits_per_byte(
    run: Run, texts: Sequence[str], tokenizer: Tokenizer, model: Any, parameters: Any
) -> float:
    """Bits a byte of some texts."""
    scores = score_documents(
        model,
        jax.device_put(parameters),
        [np.asarray(ids) for ids in tokenizer.encode(texts)],
        text_format=tokenizer.text_format,
        context_length=run.context_length(),
    )
    nats = -math.fsum(float(each.sum(dtype=np.float64)) for each in scores)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def first_texts(folder: Path, language: str, most_bytes: int) -> list[str]:
    """The first documents of a language, of about so many bytes together."""
    found, size = [], 0
    with gzip.open(folder / f"{language}.jsonl.gz", "rt") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if size < most_bytes:
                found.append(text)
                size += len(text.encode())
    return found


def write_text(folder: Path, language: str, target: Path, most_bytes: int) -> None:
    """Writes the first documents of a language as a corpus."""
    target.mkdir(parents=True, exist_ok=True)
    texts = first_texts(folder, language, most_bytes)
    lines = [json.dumps({"text": text, "lang": language}) + "\n" for text in texts]
    (target / f"{language}.jsonl").write_text("".join(lines))


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """What pieces are worth, and then how their rows are best made."""
    shown = [f"{'language':10}{'pieces':>8}{'tokens/char':>13}{'tokens':>10}{'bits/B':>9}  trained"]
    order = sorted(lines, key=lambda one: (one["language"], one["pieces"], one["budget"]))
    for one in order:
        if one["budget"] != "few" and one["method"] in (None, "focus"):
            trained = "one pass" if one["budget"] == "text" else "equal compute"
            shown.append(
                f"{one['language']:10}{one['pieces']:>8,}{one['tokens_per_character']:>13.3f}"
                f"{one['tokens']:>10,}{one['end']:>9.3f}  {trained}"
            )
    shown += [
        "",
        f"{'language':10}{'rows':10}{'step 0':>9}{f'{FEW:.0%} of it':>12}{'one pass':>10}",
    ]
    most = {one["language"]: max(o["pieces"] for o in lines) for one in lines}
    for language in sorted(most):
        for method in METHODS:
            found = {
                one["budget"]: one
                for one in lines
                if (one["language"], one["pieces"], one["method"])
                == (language, most[language], method)
            }
            if {"text", "few"} <= {*found}:
                text, few = found["text"], found["few"]
                shown.append(
                    f"{language:10}{method:10}{text['start']:>9.3f}{few['end']:>12.3f}"
                    f"{text['end']:>10.3f}"
                )
    return "\n".join(shown)


if __name__ == "__main__":
    main()
