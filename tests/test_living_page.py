"""The commands of the year in docs/living.md can be typed one after the other."""

import shlex
from pathlib import Path

import pytest
from conftest import write_corpus

from experts.verify import verify
from xelm.api import open_run
from xelm.runs.gate import evaluate_held_out

PAGE = (Path(__file__).parents[1] / "docs/living.md").read_text(encoding="utf-8")
YEAR = PAGE.partition("\n## Grow, and look")[2].partition("\n## Other ways to an expert")[0]


def commands() -> list[list[str]]:
    """The arguments of each command of the year that reaches no host."""
    blocks = [part.partition("```")[0] for part in YEAR.split("```sh\n")[1:]]
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert all(words[0] == "xelm" for words in lines)
    return [
        words[1:] for words in lines if words[1] not in ("push", "pull") or words[-1] == "--dry-run"
    ]


@pytest.mark.slow
def test_the_year_can_be_walked_in_one_go(xelm, copy, tmp_path, monkeypatch):
    """Here, Portuguese stands for Swedish, and the expert de-fr for that of Polish."""
    texts = {name: tmp_path / name for name in ("few", "more", "valid")}
    for seed, folder in enumerate(texts.values()):
        write_corpus(folder, ["pt"], 25, seed=seed)
    named = {"xelm-quickstart": copy.directory, "sv": "pt", "pl": "de-fr", "sv=swedish": "pt=new"}
    named |= {"swedish": "new", "xelm/sample/valid": texts["valid"], **texts}

    def measure(run, expert, text):
        """Figures by which the third version alone is worse than the one before."""
        found = evaluate_held_out(run, expert, text)
        for figures in found["own"].values():
            best = min(value for model, value in figures.items() if model != "documents")
            figures["expert"] = best * (1.2 if expert.version == 3 else 0.9)
        return found

    monkeypatch.setattr("xelm.runs.publish.evaluate_held_out", measure)
    walked = []
    for words in commands():
        outcome = xelm(*(named.get(word, word) for word in words))
        kept_back = "--from" in words
        assert outcome.code == (2 if kept_back else 0), (words, outcome.err)
        assert not kept_back or "pt@v3 is not published: on held-out text it has" in outcome.err
        walked.append(words[0])
    assert {"grow", "experts", "diff", "train", "evaluate", "discard", "rollback", "retire"} <= {
        *walked
    }
    assert walked[-2:] == ["remove", "remove"] and {"restore", "rename", "history"} <= {*walked}
    states = {e.reference: e.status for e in open_run(copy.directory).registry().experts}
    assert states == {"en-es@v1": "published", "new@v1": "retired", "new@v2": "published"}
    assert verify(copy.directory) == []
