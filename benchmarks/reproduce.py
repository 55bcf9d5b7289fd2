"""The X-ELM experiment on real text: one seed, many ways to divide the languages, equal tokens.

    python benchmarks/reproduce.py --data DATA --out OUT

DATA has corpus/<language>.jsonl.gz and corpus_valid/<language>.jsonl.gz. Every system continues the
same seed for the same total of training tokens, every language being seen equally often in each;
they differ in which model sees which text, and in rate and batch size. Then four languages are
grown, one by one, on the typological experts. The command can be killed and run again: it goes on
where it was.
OUT/table.json has every figure, OUT/table.md the tables.

Peak rate and batch size are chosen for dense and for each number of experts, on one half of the
validation documents, by steps to a better neighbour until there is none; the tables are of the
other half.
Repetitions after the first have another random seed, and are asked by language alone.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
from systems import (
    LANGUAGES,
    NEW_LANGUAGES,
    Rates,
    Setting,
    evaluated,
    halves,
    kind_of,
    perplexities,
    routings_of,
    train_system,
)
from workers import workers

from clustering.files import write_json
from xelm.cli import prepare
from xelm.config import RunConfig, override
from xelm.data.corpus import fingerprint
from xelm.presets import tiny
from xelm.runs import growing
from xelm.runs.evaluation import Row
from xelm.runs.init import init
from xelm.runs.run import Run, open_run
from xelm.training.loop import DivergedError

# Peak rate and rows a step from which the search for better ones sets out.
START: Setting = (1e-3, 16)
SYSTEMS = ("typology-k8", "random-k8", "monolingual-k16", "typology-k4", "tfidf-k8", "tfidf-k4")
# What is repeated with other random seeds, beside dense.
REPEATED = ("typology-k8", "random-k8")


def main() -> None:
    options = _options()
    prepare()
    data, out = Path(options.data), Path(options.out)
    config = override(tiny(), options.settings)
    parts = halves(data, out, options.max_documents)
    started = time.perf_counter()
    base = init(out / "base", data / "corpus", config, languages=LANGUAGES)
    finished: dict[str, list[Row]] = {}
    tables: dict[str, list[Row]] = {}
    with workers(options.jobs) as pool:
        experts = replace(
            config.experts, tokens=round(config.experts.tokens * options.tuning_share)
        )
        tune = (_tune, base, replace(config, experts=experts), parts["tune"])
        # On random clusters (the control's own, if anything to its favour), so that no method is
        # favoured; for each number of experts by itself, as it decides how many steps one has.
        dense = pool.submit(*tune, "dense", START)
        eight = pool.submit(*tune, "random-k8", START).result()
        four = pool.submit(*tune, "random-k4", eight)
        sixteen = pool.submit(*tune, "monolingual-k16", eight)
        rates = {"dense": dense.result(), "k8": eight}
        rates |= {"k4": four.result(), "k16": sixteen.result()}
        print(f"peak rates and rows a step: {rates}")
        work: dict[Future, str] = {}
        for repetition in range(options.repetitions):
            for system in ("dense", *(REPEATED if repetition else SYSTEMS)):
                arguments = (base, config, parts["test"], system, rates, repetition)
                work[pool.submit(_system, *arguments)] = f"{system}-r{repetition}"
        for future in as_completed(work):
            finished[work[future]] = future.result()
            # In the order of the list above, whichever is done first.
            tables = {name: finished[name] for name in work.values() if name in finished}
            _write(out, base, config, rates, tables, time.perf_counter() - started)
    grown = _grow(out, data / "corpus")
    tables["grown"] = evaluated(grown, parts["test-new"], routings_of("typology-k8"))
    _write(out, base, config, rates, tables, time.perf_counter() - started)
    print((out / "table.md").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--repetitions",
        type=int,
        default=1,
        metavar="N",
        help="random seeds of the continuation and of the random clusters",
    )
    parser.add_argument(
        "--tuning-share",
        type=float,
        default=0.5,
        metavar="X",
        help="tokens of each tuning run, as a share of the experiment's",
    )
    parser.add_argument(
        "--max-documents",
        type=int,
        default=40,
        metavar="N",
        help="of each language for the tables, and half as many for tuning",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="systems trained side by side"
    )
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    return parser.parse_args()


def _tune(base: Run, config: RunConfig, corpus: Path, system: str, start: Setting) -> Setting:
    """Peak rate and batch size (rows): from `start` to the first better neighbour (four times or a
    quarter of the rows, twice or half the rate) until there is none. Better: fewer nats a token,
    in the mean over languages."""
    kind = kind_of(system)
    text = fingerprint(corpus)[:8]
    path = base.directory.parent / f"tuning-{kind}-{config.experts.tokens}-{text}.json"
    found = json.loads(path.read_text()) if path.exists() else {"format": 1}

    def nats(setting: Setting) -> float:
        name = f"tuning-{kind}-{config.experts.tokens}-rate{setting[0]:g}-rows{setting[1]}"
        if name not in found:
            try:
                run = train_system(base, config, system, {kind: setting}, 0, name)
                rows = evaluated(run, corpus, ("language",))
                found[name] = float(np.mean(np.log(perplexities(rows, system))))
            except DivergedError:
                found[name] = 1e9
            write_json(path, found)
        return found[name]

    best = start
    while True:
        rate, rows = best
        neighbours = [(rate, rows * 4), (rate, rows // 4), (rate * 2, rows), (rate / 2, rows)]
        better = (s for s in neighbours if s[1] and nats(s) < nats(best))
        following = next(better, None)
        if following is None:
            return best
        best = following


def _system(
    base: Run, config: RunConfig, corpus: Path, system: str, rates: Rates, repetition: int
) -> list[Row]:
    run = train_system(base, config, system, rates, repetition, f"{system}-r{repetition}")
    return evaluated(run, corpus, ("language",) if repetition else routings_of(system))


def _grow(out: Path, corpus: Path) -> Run:
    """A copy of the typological RUN, with the new languages grown one by one."""
    target, partial = out / "grown", out / ".grown.partial"
    if not target.exists():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(out / "typology-k8-r0", partial)
        shutil.rmtree(partial / "results")
        partial.rename(target)
    run = open_run(target)
    for language in NEW_LANGUAGES:
        if not any(language in e.languages for e in run.registry().published()):
            growing.grow(run, language, corpus)
    return run


def _write(
    out: Path,
    base: Run,
    config: RunConfig,
    rates: Rates,
    tables: dict[str, list[Row]],
    seconds: float,
) -> None:
    """table.json with every row, table.md for people; replaced after every system."""
    facts = {
        "parameters": config.model.parameter_count,
        "vocabulary": config.model.vocabulary_size,
        "seed_tokens": config.seed.tokens,
        "system_tokens": config.experts.tokens,
        "grown_tokens": config.grow.tokens,
        "peak_rate_and_rows_a_step": {kind: list(found) for kind, found in rates.items()},
        "seconds_of_this_call": round(seconds),
        "corpus_sha256": base.record["corpus_sha256"],
    }
    write_json(
        out / "table.json",
        {
            "format": 1,
            **facts,
            "systems": {name: [row.to_json() for row in rows] for name, rows in tables.items()},
        },
    )
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()]
    (out / "table.md").write_text(
        "\n".join(
            [
                *lines,
                "",
                *_summary(tables),
                "",
                *_by_language(tables, "perplexity"),
                "",
                *_by_language(tables, "bits_per_byte"),
                "",
                *_grown(tables),
            ]
        )
    )


def _columns(tables: dict[str, list[Row]]) -> dict[str, dict[str, dict[str, Row]]]:
    """System with routing -> repetition -> language -> row."""
    columns: dict[str, dict[str, dict[str, Row]]] = {}
    for name, rows in tables.items():
        system, _, repetition = name.rpartition("-r")
        for row in rows:
            if name == "grown" or row.language not in LANGUAGES:
                continue
            if row.system == "seed":
                title = "seed"
            elif row.system == "dense":
                title = "dense"
            elif row.system == "ensemble":
                routed = f", by {row.routing}" if len(routings_of(system)) > 1 else ""
                title = f"{system}{routed}"
            else:
                continue
            columns.setdefault(title, {}).setdefault(repetition, {})[row.language] = row
    return columns


def _summary(tables: dict[str, list[Row]]) -> list[str]:
    """One line a system: mean perplexity over languages, change against dense, languages better."""
    columns = _columns(tables)
    lines = [
        "| system | mean perplexity | against dense | languages better | mean bits per byte |",
        "|---|---|---|---|---|",
    ]
    for title, repetitions in columns.items():
        means, changes, better, bits = [], [], [], []
        for repetition, rows in repetitions.items():
            means.append(np.mean([rows[tag].perplexity for tag in LANGUAGES]))
            bits.append(np.mean([rows[tag].bits_per_byte for tag in LANGUAGES]))
            dense = columns.get("dense", {}).get(repetition)
            if dense and title not in ("dense", "seed"):
                changes.append(means[-1] / np.mean([dense[t].perplexity for t in LANGUAGES]) - 1)
                better.append(sum(rows[t].nll < dense[t].nll for t in LANGUAGES))
        change = _spread(changes, "{:+.1%}") if changes else ""
        count = ", ".join(f"{b} of {len(LANGUAGES)}" for b in better)
        lines.append(
            f"| {title} | {_spread(means, '{:.2f}')} | {change} | {count} | "
            f"{_spread(bits, '{:.3f}')} |"
        )
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range where there are several repetitions."""
    mean, least, most = (form.format(f(values)) for f in (np.mean, min, max))
    return mean if least == most else f"{mean} ({least} to {most})"


def _by_language(tables: dict[str, list[Row]], figure: str) -> list[str]:
    columns = _columns(tables)
    title = figure.replace("_", " ")
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for tag in LANGUAGES:
        cells = [
            f"{np.mean([getattr(rows[tag], figure) for rows in repetitions.values()]):.3f}"
            for repetitions in columns.values()
        ]
        lines.append(f"| {tag} | {' | '.join(cells)} |")
    return lines


def _grown(tables: dict[str, list[Row]]) -> list[str]:
    """The grown languages: seed, parent's view of them is in table.json; here seed and expert."""
    rows = {(r.system, r.routing, r.language): r for r in tables.get("grown", [])}
    if not rows:
        return []
    lines = ["| grown | seed | its expert | ensemble by tfidf |", "|---|---|---|---|"]
    for tag in NEW_LANGUAGES:
        cells = [
            rows[key].perplexity
            for key in (
                ("seed", None, tag),
                ("ensemble", "language", tag),
                ("ensemble", "tfidf", tag),
            )
        ]
        lines.append(f"| {tag} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return lines


if __name__ == "__main__":
    main()
