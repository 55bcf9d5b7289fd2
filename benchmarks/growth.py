"""Growing a new language in several ways at equal tokens: what it learns, and what it forgets.

    python benchmarks/growth.py DATA OUT
        [--languages az,he,...] [--tokens 50000,500000] [--seeds 3] [--arms nearest,...]

DATA has the folders `corpus` and `corpus_valid` with files such as az.jsonl.gz, OUT a RUN of other
languages, OUT/RUN, with its dense baseline. Every training is one line of OUT/results.jsonl; the
same command goes on where it was interrupted, and ends with the table of all that is there.

    lapt       the dense baseline continued on the new language alone
    seed       an expert from the seed, on the new language alone
    nearest    an expert from that of the nearest language, as `xelm grow` makes it
    farthest   the same from the expert of the farthest language
    replay     as nearest, and a quarter of the rows replays all other languages in equal parts
    by-size    the same, the other languages by their numbers of tokens

Each reads the same number of positions, and the weights with the lowest loss on held-out text, of
five measurements, are its result. Figures are bits a byte on the first tokens of each language of
`corpus_valid`. The random seed of an arm draws the order of its rows; the RUN is the same.
"""

import argparse
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import jax
import numpy as np
from trials import add, interval, read

from experts.expert import SEED, Expert
from xelm.api import Run, open_run
from xelm.commands.options import names
from xelm.data.contents import contents_in
from xelm.data.store import Store
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import load_parameters, read_config, read_for_inference
from xelm.models.parameters import for_inference
from xelm.runs.jobs import Job, expert_job
from xelm.runs.text import tokenise
from xelm.training.loop import train
from xelm.training.trainer import TrainingSpec

LANGUAGES = "az,he,pl,sv,hy,eu,kk"
ARMS = ("lapt", "seed", "nearest", "farthest", "replay", "by-size")
REPLAY_SHARE = 0.25
OLD_TOKENS, NEW_TOKENS = 2_000, 8_000
"""Number of tokens of each old language, and of the new one, that are scored."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with `corpus` and `corpus_valid`")
    parser.add_argument("out", type=Path, help="folder with the RUN, for the results")
    parser.add_argument("--languages", type=names, default=names(LANGUAGES))
    parser.add_argument("--tokens", type=names, default=("50000", "500000"))
    parser.add_argument("--seeds", type=int, default=3, help="number of random seeds")
    parser.add_argument("--arms", type=names, default=ARMS)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    results = options.out / "results.jsonl"
    if not options.table:
        run = open_run(options.out / "RUN")
        for trial in trials(options.languages, options.tokens, options.seeds, options.arms):
            done = {key_of(line) for line in read(results)}
            if key_of(trial) not in done:
                found = measured(run, options.data, options.out / "work", trial)
                add(results, trial | found)
    print(table(read(results)))


def trials(
    languages: Sequence[str], tokens: Sequence[str], seeds: int, arms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Everything that is to be measured: models as they are, then few tokens before many."""
    for language in languages:
        for model in ("seed as it is", "dense as it is"):
            yield {"language": language, "arm": model, "tokens": 0, "random_seed": 0}
    for count in sorted(int(float(each)) for each in tokens):
        for random_seed in range(seeds):
            for language in languages:
                for arm in arms:
                    facts = {"language": language, "arm": arm, "tokens": count}
                    yield facts | {"random_seed": random_seed}


def key_of(line: Mapping[str, Any]) -> tuple:
    return tuple(line[name] for name in ("language", "arm", "tokens", "random_seed"))


def measured(run: Run, data: Path, work: Path, trial: Mapping[str, Any]) -> dict[str, Any]:
    """Trains as a trial says, and scores the result."""
    language, arm = trial["language"], trial["arm"]
    shape, began, parent = read_config(run.seed), monotonic(), None
    if trial["tokens"] == 0:
        parameters = read_for_inference(run.seed if arm.startswith("seed") else run.dense, shape)
    else:
        tokenise(run, contents_in(data / "corpus", [language]), language)
        job, parent = job_of(run, trial)
        directory = work / "-".join(map(str, key_of(trial)))
        spec = TrainingSpec(
            label=directory.name,
            start=partial(load_parameters, job.parent, shape),
            sources=job.text.sources,
            held_out=job.text.held_out,
            config=job.config,
            directory=directory,
        )
        parameters = train(spec, shape, run.tokenizer().text_format).parameters
        parameters = for_inference(jax.tree.map(np.asarray, parameters))
        shutil.rmtree(directory)
    trained = monotonic() - began
    valid = contents_in(data / "corpus_valid", [*run.languages, language])
    store = tokenise(run, valid, f"valid-{language}", training=False)
    bits = scores(run, store, jax.device_put(parameters), language)
    new = bits.pop(language)
    return {"parent": parent, "seconds": round(trained, 1), "new": new, "old": bits}


def job_of(run: Run, trial: Mapping[str, Any]) -> tuple[Job, str]:
    """The training of an arm, and what it starts from."""
    language, arm = trial["language"], trial["arm"]
    alone = arm in ("lapt", "seed")
    settings = [
        f"grow.tokens={trial['tokens']}",
        f"grow.random_seed={run.config.grow.random_seed + 100 * trial['random_seed']}",
        "grow.evaluation.patience=null",
        f"grow.evaluation.every={max(1, trial['tokens'] // run.config.grow.tokens_per_step // 5)}",
        f"grow.data.sampling_exponent={int(arm == 'by-size')}",
        f"grow.data.replay_share={REPLAY_SHARE if arm in ('replay', 'by-size') else 0}",
        f"donor_share={0 if alone else run.config.donor_share}",
    ]
    parent = SEED if alone else relative(run, language, -1 if arm == "farthest" else 0)
    registry = run.registry()
    expert = Expert(
        name=language,
        languages=(language,),
        parent=parent,
        round=registry.round_after(parent, language),
        corpora=(language,),
    )
    job = expert_job(replace(run, settings=settings), expert)
    if arm == "lapt":
        return replace(job, parent=run.dense), "dense"
    return job, parent


def relative(run: Run, language: str, place: int) -> str:
    """The expert of the nearest (place 0) or the farthest (-1) language that is served."""
    return run.registry().for_language(run.nearest(language)[place].language).reference


def scores(run: Run, store: Store, parameters: Any, language: str) -> dict[str, float]:
    """Bits a byte of each language of a corpus."""
    shape, found = read_config(run.seed), {}
    for tag, ids in store.languages.items():
        most = NEW_TOKENS if tag == language else OLD_TOKENS
        numbers = ids.order[: max(1, int((np.cumsum(ids.lengths[ids.order]) <= most).sum()))]
        each = score_documents(
            shape,
            parameters,
            [ids.document(int(number)) for number in numbers],
            text_format=run.tokenizer().text_format,
            context_length=run.context_length(),
        )
        nats = -math.fsum(float(part.sum(dtype=np.float64)) for part in each)
        found[tag] = nats / math.log(2) / int(ids.bytes[numbers].sum())
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: bits a byte of the new language, and how much the old ones lose against the seed;
    means over languages, and over random seeds with their 95% interval."""
    seeds = {line["language"]: line for line in lines if line["arm"] == "seed as it is"}
    groups = defaultdict(lambda: defaultdict(list))
    for line in lines:
        lost = np.mean(
            [line["old"][tag] - bits for tag, bits in seeds[line["language"]]["old"].items()]
        )
        groups[line["tokens"], line["arm"]][line["random_seed"]].append(
            (line["language"], line["new"], float(lost))
        )
    rows = ["| tokens | arm | languages | seeds | new language | old languages, against the seed |"]
    rows.append("|---|---|---|---|---|---|")
    order = ["seed as it is", "dense as it is", *ARMS]
    for count, arm in sorted(groups, key=lambda key: (key[0], order.index(key[1]))):
        runs = groups[count, arm]
        # Only random seeds with every language are compared.
        whole = max(len(each) for each in runs.values())
        full = [each for each in runs.values() if len(each) == whole]
        shown = [
            interval([float(np.mean([one[part] for one in each])) for each in full])
            for part in (1, 2)
        ]
        tags = " ".join(one[0] for one in full[0])
        rows.append(f"| {count:,} | {arm} | {tags} | {len(full)} | {shown[0]} | {shown[1]} |")
    return "\n".join([*rows, "", *by_language(lines, order)])


def by_language(lines: Sequence[Mapping[str, Any]], order: Sequence[str]) -> Iterator[str]:
    """Markdown: bits a byte of each new language, the mean over random seeds."""
    tags = list(dict.fromkeys(line["language"] for line in lines))
    yield f"| tokens | arm | {' | '.join(tags)} |"
    yield f"|---|---|{'---|' * len(tags)}"
    keys = {(line["tokens"], line["arm"]) for line in lines}
    for count, arm in sorted(keys, key=lambda key: (key[0], order.index(key[1]))):
        cells = []
        for tag in tags:
            found = [
                line["new"]
                for line in lines
                if (line["tokens"], line["arm"], line["language"]) == (count, arm, tag)
            ]
            cells.append(f"{np.mean(found):.3f}" if found else "-")
        yield f"| {count:,} | {arm} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
