"""What a partner costs: pairs of languages in one expert against each language in its own.

    python benchmarks/partners.py --out OUT

OUT is that of reproduce.py. For each language of typological and of random pairs: the nats a token
that it loses to its monolingual expert, beside how much of their subwords the two languages share
(sum over the vocabulary of the smaller of the two relative frequencies).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from systems import LANGUAGES

from xelm.data.store import open_store


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR")
    out = Path(parser.parse_args().out)
    systems = json.loads((out / "table.json").read_text())["systems"]
    store = open_store(out / "base" / "corpus" / "train")
    ids = {tag: np.asarray(store.languages[tag].ids, np.int64) for tag in LANGUAGES}
    vocabulary_size = 1 + max(int(found.max()) for found in ids.values())
    shares = {tag: np.bincount(i, minlength=vocabulary_size) / len(i) for tag, i in ids.items()}
    alone = _nats(systems["monolingual-k16-r0"])
    rows = []
    # Of the random seed that the monolingual experts have.
    for name in ("typology-k8-r0", "random-k8-r0"):
        together = _nats(systems[name])
        for pair in json.loads((out / name / "clusters.json").read_text())["clusters"].values():
            for tag, partner in (pair, pair[::-1]):
                shared = np.minimum(shares[tag], shares[partner]).sum()
                rows.append((shared, together[tag] - alone[tag], name, tag, partner))
    print("| system | language, partner | subwords shared | nats a token lost |\n|---|---|---|---|")
    for shared, lost, name, tag, partner in sorted(rows, reverse=True):
        print(f"| {name} | {tag}, {partner} | {shared:.2f} | {lost:+.4f} |")
    print("\n| system | mean shared | mean lost | without the pair that shares most |")
    print("|---|---|---|---|")
    most = max(rows)[0]
    for name in dict.fromkeys(row[2] for row in rows):
        found = [row[:2] for row in rows if row[2] == name]
        less = np.mean([lost for shared, lost in found if shared < most])
        print("| {} | {:.2f} | {:+.4f} | {:+.4f} |".format(name, *np.mean(found, axis=0), less))
    for title, some in (("all", rows), ("without that pair", [r for r in rows if r[0] < most])):
        correlation = np.corrcoef([row[:2] for row in some], rowvar=False)[0, 1]
        print(f"\ncorrelation, {title}: {correlation:.2f}")


def _nats(rows: list[dict]) -> dict[str, float]:
    """Nats a token by language, of the ensemble routed by language."""
    chosen = [r for r in rows if (r["system"], r["routing"]) == ("ensemble", "language")]
    return {row["language"]: row["nll"] / row["tokens"] for row in chosen}


if __name__ == "__main__":
    main()
