"""Parts that a RUN lacks, with the commands that make them."""

import shlex
from typing import NamedTuple

from xelm.evaluation.report.facts import Facts
from xelm.evaluation.report.words import listed, plural
from xelm.evaluation.results import DENSE, System


class Missing(NamedTuple):
    """A part that the page cannot show."""

    sentence: str
    command: str = ""
    """Command that makes the part; empty if none does."""


def missing(facts: Facts) -> list[Missing]:
    """Parts of a complete X-ELM that the RUN lacks; commands are for the folder above the RUN."""
    run = shlex.quote(facts.name)
    waiting = [expert for expert in facts.experts if expert.status == "training"]
    branched = [expert.name for expert in waiting if expert.cluster is not None]
    newer = [expert.name for expert in facts.published if System(expert.name) not in facts.scores]
    newer += [DENSE.name] if facts.has_dense and DENSE not in facts.scores else []
    evaluate = f"evaluate {run} --corpus DIR"
    parts = [
        (
            facts.clusters is None,
            "The languages are in no clusters yet, so there are no experts.",
            f"branch {run} --clusters DIR",
        ),
        (
            branched,
            f"{plural(len(branched), 'expert')} not trained to the end: {listed(branched)}.",
            f"train {run} --all",
        ),
        *(
            (
                expert.cluster is None,
                f"The grown expert {expert.name} is not trained to the end.",
                f"grow {run} --language {shlex.quote(','.join(expert.languages))} --corpus DIR",
            )
            for expert in waiting
        ),
        (
            not facts.has_dense,
            "There is no dense baseline to compare with at equal compute.",
            f"train {run} --dense",
        ),
        (not facts.scores, "There is no evaluation.", evaluate),
        (facts.scores and newer, f"The evaluation is without {listed(newer)}.", evaluate),
    ]
    return [Missing(sentence, f"xelm {command}") for lacks, sentence, command in parts if lacks]
