"""Options of `init`, `train`, `grow` and `push`, as plain values. Imports nothing heavy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clustering.errors import UserError

INITIALISE = ("focus", "mean")
"""Methods of `GrowOptions.initialise`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitOptions:
    """What a RUN is made from, besides a corpus and a configuration."""

    seed: str | Path | None = None
    """Directory of a Hugging Face checkpoint to start from. None: a seed is trained on the
    corpus."""
    base_model: str | None = None
    """Name of the seed on the Hub, OWNER/NAME, for the model cards of its experts. None: that of a
    seed in the cache of the Hub's library."""
    languages: Sequence[str] | None = None
    """Languages of the corpus to use. None: all."""
    keep_duplicates: bool = False
    """Whether to keep exact copies of documents, also in growing. False: one of each is kept."""
    workers: int = 1
    """Number of processes that tokenise more than a few thousand documents. They import the calling
    program, whose work must be under `if __name__ == "__main__"`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOptions:
    """Where experts are trained."""

    jobs: int = 1
    """Number of experts trained at the same time on this machine, each on its share of the GPUs."""
    engine: Literal["local", "ray"] = "local"
    """Where to train: on this machine, or on the machines of the Ray cluster at RAY_ADDRESS, which
    must all have access to RUN."""
    devices: int | None = None
    """Number of accelerators for each expert, with `engine` ray. None: 1."""

    def __post_init__(self) -> None:
        for name, value in (("jobs", self.jobs), ("devices", self.devices)):
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1; got {value}")
        if self.devices and self.engine != "ray":
            raise UserError("--devices goes with --engine ray")
        if self.jobs > 1 and self.engine == "ray":
            raise UserError(
                "--jobs goes with --engine local; Ray has as many as it has devices for"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilOptions:
    """How a student learns from the ensemble."""

    top: int = 16
    """Number of the teacher's likeliest tokens at each position whose probabilities the student
    learns; all other tokens are one more outcome."""
    teacher_share: float = 0.5
    """Weight of the divergence from the teacher in the loss, from 0 to 1; the cross-entropy of the
    text has the rest."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"top must be at least 1; got {self.top}")
        if not 0 <= self.teacher_share <= 1:
            raise UserError(f"teacher_share must be between 0 and 1; got {self.teacher_share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixOptions:
    """How experts become one mixture of experts, and how that is trained."""

    top: int = 2
    """Number of the experts' feed-forwards that a token passes in each layer."""
    tokens: int | None = None
    """Tokens of the training. None: a twentieth of those of all experts together."""
    train: Literal["router", "all"] = "all"
    """What is trained: the routers alone, or all weights, as in the paper."""
    balance: float = 0.01
    """Weight of the loss that spreads the tokens over the experts; 0 leaves them to the router."""
    learning_rate: float | None = None
    """Peak learning rate. None: a quarter of the dense baseline's."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"top must be at least 1; got {self.top}")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"tokens must be at least 1; got {self.tokens}")
        if not 0 <= self.balance < math.inf:
            raise UserError(f"balance must be at least 0; got {self.balance}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate must be above 0; got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AgainOptions:
    """How the next version of an expert is trained."""

    start: str | None = None
    """Model whose weights it starts from: seed, parent (that of the version in use), or a version
    NAME@vN. None: the version in use."""
    workers: int = 1
    """Number of processes that tokenise, as in `InitOptions`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowOptions:
    """How an expert is grown."""

    family: str | None = None
    """Language family, or a branch of one, such as Turkic: all languages of it that the corpus has
    and no expert serves, in place of languages by name."""
    clusters: int | None = None
    """Number of experts for several languages, which are clustered. None: so many that they serve
    as many languages on average as those of the RUN."""
    into: str | None = None
    """Expert that the languages join, as its next version; not with `parent`, `by` and
    `clusters`. None: they get experts of their own."""
    parent: str = "auto"
    """Expert to start from; auto is the one that serves the nearest language."""
    by: str | None = None
    """Measure of how near languages are, as in xelm nearest; not with `parent`. None: mixture."""
    extend_vocabulary: int | None = None
    """Number of pieces that are learned on the new text and added to the expert's vocabulary.
    None: it has that of its parent."""
    initialise: str | None = None
    """Method that makes the rows of these pieces, with `extend_vocabulary`. None: focus."""
    workers: int = 1
    """Number of processes that tokenise, as in `InitOptions`."""

    def __post_init__(self) -> None:
        others = {
            "--parent": self.parent != "auto",
            "--by": self.by,
            "--clusters": self.clusters,
            "--extend-vocabulary": self.extend_vocabulary,
        }
        for name, given in others.items() if self.into is not None else ():
            if given:
                raise UserError(
                    f"--into {self.into} trains the next version of that expert, which starts from "
                    f"the one before; {name} goes with experts of their own"
                )
        if self.by is not None and self.parent != "auto":
            raise UserError(
                f"--by {self.by} chooses a parent, and --parent {self.parent} names one; give "
                "one of them"
            )
        if self.clusters is not None and self.clusters < 1:
            raise UserError(f"--clusters must be at least 1; got {self.clusters}")
        if self.extend_vocabulary is not None and self.extend_vocabulary < 1:
            raise UserError(f"--extend-vocabulary must be at least 1; got {self.extend_vocabulary}")
        if self.initialise not in (None, *INITIALISE):
            raise UserError(
                f"initialise must be one of {', '.join(INITIALISE)}; got {self.initialise!r}"
            )
        if self.initialise is not None and self.extend_vocabulary is None:
            raise UserError("--initialise goes with --extend-vocabulary")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptOptions:
    """How a model from elsewhere becomes an expert."""

    name: str | None = None
    """Name of the expert; the name of one that exists makes its next version. None: the languages,
    joined by -."""
    parent: str | None = None
    """Model that it was trained from: an expert NAME or NAME@v1, or seed. None: the one that the
    checkpoint says it was trained from, if that is a model of the RUN, and otherwise the seed."""
    workers: int = 1
    """Number of processes that tokenise, as in `InitOptions`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushOptions:
    """How a repository of the Hugging Face Hub is written."""

    private: bool = False
    """Whether to make the repository private, if it is made now."""
    revision: str = "main"
    """Branch to write to, which is made if it is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressOptions:
    """What is stored of an expert's difference to its parent."""

    rank: int | None = None
    """Largest rank of the difference of each matrix. None: the difference stays as it is."""
    energy: float | None = None
    """In place of a rank: the share of the sum of the squared singular values that is kept of each
    matrix at least, such as .9. None: the difference stays as it is."""
    revert: str | None = None
    """Layers that are set back to those of the parent, counted from 0, such as 4-7 or 2,4-5. None:
    no layer is."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UserError("give a rank or an energy, and not both")
        if self.rank is None and self.energy is None and self.revert is None:
            raise UserError("say how to compress: --rank R, --energy X or --revert LAYERS")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"a rank must be at least 1; got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"an energy must be above 0 and at most 1; got {self.energy}")
