"""The X-ELM experiment on real text: one seed, many ways to divide the languages, equal tokens.

    python benchmarks/reproduce.py --data DATA --out OUT

DATA has corpus/<language>.jsonl.gz and corpus_valid/<language>.jsonl.gz. Every system continues the
same seed for the same total of training tokens, every language being seen equally often in each;
they differ in which model sees which text, and in rate and batch size. Then four languages are
grown on the typological experts, one by one, all tokens being of the new language: from the nearest
expert, from the farthest one and from the seed; and from the nearest with a part of the tokens in
its languages, as `xelm grow` does it. A killed command resumes when it is run again.
OUT/table.json has every figure, OUT/table.md the tables.

Validation documents are dealt out in turns to two halves, of which each gives at most as many as
asked for. On one, peak rate and batch size are chosen for dense and for eight experts, by steps to
a better neighbour until there is none, and so for four; sixteen have those of eight. The tables are
of the other half.
Repetitions have other random seeds of the continuation, and other random clusters; they are
routed by language alone.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
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
    model_of,
    perplexities,
    routings_of,
    train_system,
)
from workers import workers

from clustering import typology
from clustering.files import write_json
from xelm.config import RunConfig
from xelm.data.contents import contents_of
from xelm.evaluation.results import Row
from xelm.presets import tiny
from xelm.process import prepare
from xelm.runs.grow import grow
from xelm.runs.init import init
from xelm.runs.options import GrowOptions, InitOptions
from xelm.runs.run import Run, open_run
from xelm.settings import override
from xelm.training.trainer import DivergedError

# Peak rate and rows a step from which the search for better ones sets out.
START: Setting = (5e-4, 16)
# Of a dense training while it is searched: larger batches leave too few to learn anything from.
LEAST_STEPS = 32
# Number of the repetition whose random seeds and random clusters the settings are chosen with.
TUNING = 99
SYSTEMS = ("typology-k8", "random-k8", "monolingual-k16", "typology-k4", "tfidf-k8", "tfidf-k4")
# What is repeated with other random seeds, beside dense.
REPEATED = ("typology-k8", "random-k8")
# What the settings of each kind of system are chosen with: random clusters (others than those of
# the tables), so that no method is favoured.
TUNED = {"dense": "dense", "k8": "random-k8", "k4": "random-k4"}
# Ways to grow a language: title of the column.
GROWN = {
    "nearest": "from the nearest",
    "farthest": "from the farthest",
    "seed": "from the seed",
    "donors": "from the nearest, with donors",
}
GROWN_ON = "typology-k8-r0"


def main() -> None:
    options = _options()
    prepare()
    data, out = Path(options.data), Path(options.out)
    config = override(tiny(), options.settings)
    parts = halves(data, out, options.max_documents)
    started = time.perf_counter()
    base = init(out / "base", data / "corpus", config, InitOptions(languages=LANGUAGES))
    with workers(options.jobs) as pool:
        tokens = round(config.experts.tokens * options.tuning_share)
        shorter = replace(config, experts=replace(config.experts, tokens=tokens))
        rates: dict[str, Setting] = {}
        tables: dict[str, list[Row]] = {}
        wanted = [
            (system, repetition)
            for repetition in range(options.repetitions)
            for system in ("dense", *(REPEATED if repetition else SYSTEMS))
        ]
        work: dict[Future, str] = {
            pool.submit(_tune, base, shorter, parts["tune"], system): kind
            for kind, system in TUNED.items()
        }
        # Each goes on with what waits for it alone.
        while work:
            done = next(as_completed(work))
            name = work.pop(done)
            if done.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            if name in TUNED:
                rates[name] = done.result()
                for system, repetition in wanted:
                    if kind_of(system) == name:
                        test = (base, config, parts["test"], system, dict(rates), repetition)
                        work[pool.submit(_system, *test)] = f"{system}-r{repetition}"
                continue
            tables[name] = done.result()
            if name == GROWN_ON:
                new = (out, data / "corpus", parts["test-new"])
                work |= {pool.submit(_grown, *new, how): f"grown-{how}" for how in GROWN}
            _write(out, base, config, rates, tables, time.perf_counter() - started)
    print((out / "table.md").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
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
        "--jobs", type=int, default=1, metavar="N", help="systems trained in parallel"
    )
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    return parser.parse_args()


def _tune(base: Run, config: RunConfig, corpus: Path, system: str) -> Setting:
    """Peak rate and batch size (rows): from `START` to the first better neighbour (four times or a
    quarter of the rows, twice or half the rate) until there is none. Better: fewer nats a token,
    in the mean over languages."""
    kind = kind_of(system)
    text = contents_of(corpus).fingerprint()[:8]
    path = base.directory.parent / f"tuning-{kind}-{config.experts.tokens}-{text}.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {"format": 1}

    def nats(setting: Setting) -> float:
        name = f"tuning-{kind}-{config.experts.tokens}-rate{setting[0]:g}-rows{setting[1]}"
        if name not in found:
            try:
                run = train_system(base, config, system, {kind: setting}, TUNING, name)
                rows = evaluated(run, corpus, ("language",))
                found[name] = float(np.mean(np.log(perplexities(rows, system))))
            except DivergedError:
                found[name] = 1e9
            write_json(path, found)
        return found[name]

    most = config.experts.tokens // (config.experts.sequence_length * LEAST_STEPS)
    best = START
    while True:
        rate, rows = best
        neighbours = [(rate, rows * 4), (rate, rows // 4), (rate * 2, rows), (rate / 2, rows)]
        better = (s for s in neighbours if 1 <= s[1] <= most and nats(s) < nats(best))
        following = next(better, None)
        if following is None:
            return best
        best = following


def _system(
    base: Run, config: RunConfig, corpus: Path, system: str, rates: Rates, repetition: int
) -> list[Row]:
    run = train_system(base, config, system, rates, repetition, f"{system}-r{repetition}")
    return evaluated(run, corpus, ("language",) if repetition else routings_of(system))


def _grown(out: Path, corpus: Path, valid: Path, how: str) -> list[Row]:
    """The rows of a copy of the typological RUN, in which the new languages were grown one by one
    in that way. Without donors all are equal in how much they see of the new language; a child of
    the seed has none in any case."""
    target, partial = out / f"grown-{how}", out / f".grown-{how}.partial"
    if not target.exists():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(out / GROWN_ON, partial)
        shutil.rmtree(partial / "results")
        partial.rename(target)
    run = open_run(target)
    if how != "donors":
        config = {**run.record["config"], "donor_share": 0.0}
        run = replace(run, record={**run.record, "config": config})
    for language in NEW_LANGUAGES:
        registry = run.registry()
        if not any(language in expert.languages for expert in registry.published()):
            options = GrowOptions(parent="seed") if how == "seed" else GrowOptions(by="typology")
            if how == "farthest":
                served = [tag for e in registry.published() for tag in e.languages]
                farthest = typology.distances([language, *served]).relatives(language)[-1]
                options = GrowOptions(parent=registry.for_language(farthest.language).name)
            grow(run, language, corpus, options)
    return evaluated(run, valid, routings_of("typology-k8"))


def _write(
    out: Path,
    base: Run,
    config: RunConfig,
    rates: Mapping[str, Setting],
    tables: Mapping[str, list[Row]],
    seconds: float,
) -> None:
    """table.json with every row, table.md for people; replaced after every system."""
    rates = {kind: rates[kind] for kind in TUNED if kind in rates}
    tables = {name: tables[name] for name in sorted(tables, key=_place)}
    facts = {
        "parameters": model_of(config).parameter_count,
        "vocabulary": model_of(config).vocabulary_size,
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
    done = [f"{system}-r0" for system in ("dense", *SYSTEMS) if f"{system}-r0" in tables]
    columns = dict(column for name in done for column in _columns(name, tables[name]))
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()]
    parts = [
        lines,
        _summary(columns),
        _repetitions(tables),
        _by_language(columns, "perplexity", 2),
        _by_language(columns, "bits_per_byte", 3),
        _new_languages(tables, out),
    ]
    (out / "table.md").write_text("\n\n".join("\n".join(part) for part in parts) + "\n")


def _place(table: str) -> tuple[str, int]:
    """Systems by random seed in their order, then what was grown."""
    system, dash, repetition = table.rpartition("-r")
    if dash:
        return repetition, ("dense", *SYSTEMS).index(system)
    return "grown", list(GROWN).index(table.removeprefix("grown-"))


Column = dict[str, Row]
"""The rows of one system by language."""


def _columns(name: str, rows: Sequence[Row]) -> list[tuple[str, Column]]:
    """Title and column of each way to ask a system; of the seed, with that of dense."""
    system = name.rpartition("-r")[0]
    kinds = [("ensemble", routing) for routing in routings_of(system)]
    if system == "dense":
        kinds = [("seed", None), ("dense", None)]
    columns = []
    for kind, routing in kinds:
        title = f"{system}, by {routing}" if len(routings_of(system)) > 1 else system
        title = kind if system == "dense" else title
        columns.append((title, _column(rows, kind, routing)))
    return columns


def _column(rows: Sequence[Row], system: str, routing: str | None) -> Column:
    found = {r.language: r for r in rows if (r.system, r.routing) == (system, routing)}
    return {tag: found[tag] for tag in LANGUAGES}


def _mean(column: Column, figure: str) -> float:
    return float(np.mean([getattr(column[tag], figure) for tag in LANGUAGES]))


def _changes(column: Column, dense: Column) -> tuple[float, float, int]:
    """Change of the mean perplexity against dense, change of the geometric mean, and how many
    languages are better."""
    nats = [column[tag].nll / column[tag].tokens for tag in LANGUAGES]
    others = [dense[tag].nll / dense[tag].tokens for tag in LANGUAGES]
    change = _mean(column, "perplexity") / _mean(dense, "perplexity") - 1
    return change, float(np.expm1(np.mean(nats) - np.mean(others))), sum(np.less(nats, others))


def _summary(columns: Mapping[str, Column]) -> list[str]:
    """One line a system, of the first random seed."""
    lines = [
        "| system | mean perplexity | against dense | geometric mean against dense "
        "| languages better | mean bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for title, column in columns.items():
        against = "| | |"
        if title not in ("seed", "dense") and "dense" in columns:
            change, geometric, better = _changes(column, columns["dense"])
            against = f"| {change:+.1%} | {geometric:+.1%} | {better} of {len(LANGUAGES)}"
        lines.append(
            f"| {title} | {_mean(column, 'perplexity'):.2f} {against} "
            f"| {_mean(column, 'bits_per_byte'):.3f} |"
        )
    return lines


def _repetitions(tables: Mapping[str, Sequence[Row]]) -> list[str]:
    """Change of the mean perplexity against dense by random seed, experts routed by language."""
    found: dict[str, dict[str, Column]] = {}
    for name, rows in tables.items():
        system, dash, repetition = name.rpartition("-r")
        if dash and system in ("dense", *REPEATED):
            kind = ("dense", None) if system == "dense" else ("ensemble", "language")
            found.setdefault(repetition, {})[system] = _column(rows, *kind)
    lines = ["| random seed | " + " | ".join(("dense", *REPEATED)) + " |"]
    lines.append("|---" * (len(REPEATED) + 2) + "|")
    for repetition, columns in sorted(found.items()):
        cells = []
        for system in ("dense", *REPEATED):
            if system not in columns:
                cells.append("")
                continue
            cell = f"{_mean(columns[system], 'perplexity'):.2f}"
            if system != "dense" and "dense" in columns:
                cell += f" ({_changes(columns[system], columns['dense'])[0]:+.1%})"
            cells.append(cell)
        lines.append(f"| {repetition} | {' | '.join(cells)} |")
    return lines


def _by_language(columns: Mapping[str, Column], figure: str, digits: int) -> list[str]:
    """One line a language, of the first random seed, and the mean."""
    title = figure.replace("_", " ")
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for tag in LANGUAGES:
        cells = [f"{getattr(column[tag], figure):.{digits}f}" for column in columns.values()]
        lines.append(f"| {tag} | {' | '.join(cells)} |")
    means = [f"{_mean(column, figure):.{digits}f}" for column in columns.values()]
    return [*lines, f"| mean | {' | '.join(means)} |"]


def _new_languages(tables: Mapping[str, Sequence[Row]], out: Path) -> list[str]:
    """Bits per byte of the grown languages, each by its expert, routed by language, with the
    parent; what every other expert says of them is in table.json."""
    present = [how for how in GROWN if f"grown-{how}" in tables]
    lines = ["| bits per byte | seed | " + " | ".join(GROWN[how] for how in present) + " |"]
    lines.append("|---" * (len(present) + 2) + "|")
    for tag in NEW_LANGUAGES if present else ():
        cells = []
        for how in present:
            rows = [row for row in tables[f"grown-{how}"] if row.language == tag]
            found = {(row.system, row.routing): f"{row.bits_per_byte:.3f}" for row in rows}
            parent = open_run(out / f"grown-{how}").registry().expert(tag).parent
            cells = cells or [found["seed", None]]
            cells.append(f"{found['ensemble', 'language']} ({parent.partition('@')[0]})")
        lines.append(f"| {tag} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
