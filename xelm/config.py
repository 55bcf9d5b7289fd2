"""Settings of a RUN and of its trainings: immutable values, checked when they are made.

Imports no JAX, so that the command line starts quickly.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from clustering.errors import UserError
from xelm.bounds import NOT_NEGATIVE_OR_NONE, POSITIVE, SHARE, faults_of
from xelm.models.config import ModelConfig
from xelm.settings import vary
from xelm.training_config import LoraConfig, RuntimeConfig, TrainConfig

StartToken = Literal["tokenizer", "bos", "eos", "config"]
TokenizerAlgorithm = Literal["bpe", "unigram"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutConfig:
    """Text of the corpus that no training reads, on which all trainings are measured."""

    share: float = 0.01
    """Share of the documents of each language; 0 holds nothing out, and nothing is measured."""
    least_documents: int = 8
    """Least number of documents of a language, but at most a fifth of them."""
    most_tokens: int = 100_000
    """Most tokens of a language."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """What an expert must hold to be published: bits a byte on held-out text, against its parent
    and against the seed."""

    worse: float | None = 0.01
    """Most that it may be worse on any of its languages, as a share of the other's figure; null
    allows anything."""
    others: float | None = None
    """The same for its parent's figures on all other languages of the RUN; null allows anything."""
    tokens: int = 50_000
    """Most tokens of held-out text of each language that are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of one X-ELM: its seed, its experts and what is grown later."""

    model: ModelConfig | None
    """Shape of a fresh seed; null where the seed is a Hugging Face checkpoint."""
    model_type: Literal["llama", "xglm"] = "llama"
    """Family that a fresh seed is written as."""
    tokenizer_algorithm: TokenizerAlgorithm = "bpe"
    """How a fresh tokenizer divides words, with bytes for unknown characters: "bpe" joins the most
    frequent pairs; "unigram" finds the likeliest division, which llama.cpp does not."""
    tokenizer_exponent: float = 0.3
    """A language's share of the tokenizer's training text is its bytes ** this."""
    start_token: StartToken = "tokenizer"
    """Token before every text, in training and after: "tokenizer" is what the seed's tokenizer
    itself puts there, which may be nothing; "bos" and "eos" are its special tokens of these names;
    "config" is what the tokenizer puts there or else the bos of config.json."""
    seed: TrainConfig
    """Training of a fresh seed; not used where the seed is given."""
    experts: TrainConfig
    """Training of all experts: `tokens` is the total, which is shared out by their languages."""
    dense_learning_rate: float
    """Peak learning rate of the dense baseline, which is otherwise trained as the experts are."""
    dense_batch_size: int
    """Rows in a step of the dense baseline. It has the tokens of all experts for one model, so it
    needs larger batches than they do to be a fair baseline."""
    grow: TrainConfig
    """Training of one grown expert."""
    donor_share: float = 0.25
    """Share of a grown expert's rows that are in its parent's languages."""
    kept_share: float = 0.5
    """Share of an expert's former languages in the rows of its own text in the version with which
    others join it."""
    weights_dtype: Literal["seed", "float32", "bfloat16"] = "seed"
    """Precision of the published weights of experts and dense baseline, which are rounded to it
    from the float32 of training; seed: that of the seed's weights."""
    held_out: HeldOutConfig = HeldOutConfig()
    """Text that no training reads."""
    gate: GateConfig = GateConfig()
    """What an expert must hold to be published."""
    vectoriser_dimensions: int = 100
    """Dimensions of the TF-IDF vectors that clusters of documents and TF-IDF routing use."""

    def __post_init__(self) -> None:
        if not 0 <= self.donor_share < 1:
            raise ValueError(f"donor_share must be in 0..1, below 1; got {self.donor_share}")
        if not 0 < self.kept_share < 1:
            raise ValueError(f"kept_share must be between 0 and 1; got {self.kept_share}")
        if self.seed.data.replay_share:
            raise ValueError("seed.data.replay_share must be 0: a seed has no other languages")
        if self.donor_share + self.grow.data.replay_share >= 1:
            raise ValueError(
                "donor_share and grow.data.replay_share must be below 1 together; got "
                f"{self.donor_share} and {self.grow.data.replay_share}"
            )
        if self.model is not None and self.seed.random_seed == self.experts.random_seed:
            raise ValueError(
                "experts.random_seed must differ from seed.random_seed, or experts and dense see "
                f"the seed's rows again in the same order; both are {self.seed.random_seed}"
            )
        others = {"experts.random_seed": self.experts.random_seed}
        if self.model is not None:
            others["seed.random_seed"] = self.seed.random_seed
        for name, other in others.items():
            if self.grow.random_seed <= other:
                raise ValueError(
                    f"grow.random_seed, from which growing counts up, must be above {name}, or "
                    "grown experts see rows of their parents again in the same order; got "
                    f"{self.grow.random_seed} and {other}"
                )
        if _of_parts(self.seed) != _of_parts(TrainConfig(tokens=1)):
            raise ValueError(
                "a fresh seed has no weights to start from: seed.lora, seed.frozen_layers and "
                "seed.optimizer.pull must be as they are by default"
            )
        for name, one in {"seed": self.seed, "grow": self.grow}.items():
            if one.runtime.mesh_expert != 1:
                raise ValueError(f"{name} is one model; {name}.runtime.mesh_expert must be 1")
        faults = faults_of(self, ("vectoriser_dimensions",), *POSITIVE)
        faults += faults_of(self, ("tokenizer_exponent",), *SHARE)
        counts, share = ("least_documents", "most_tokens"), (lambda x: 0 <= x <= 0.5)
        faults += faults_of(self.held_out, ("share",), share, "between 0 and .5", "held_out.")
        faults += faults_of(self.held_out, counts, *POSITIVE, "held_out.")
        faults += faults_of(self.gate, ("worse", "others"), *NOT_NEGATIVE_OR_NONE, "gate.")
        faults += faults_of(self.gate, ("tokens",), *POSITIVE, "gate.")
        if faults:
            raise ValueError("; ".join(faults))
        try:
            _ = self.dense  # made to be checked
        except ValueError as error:
            raise ValueError(f"dense: {error}") from None

    @property
    def dense(self) -> TrainConfig:
        """Training of the dense baseline: the tokens of all experts together, sampled in the same
        shares, with a learning rate and a batch size of its own. All its weights are trained."""
        changes: dict[str, Any] = {"batch_size": self.dense_batch_size, "runtime.mesh_expert": 1}
        changes |= {"lora": LoraConfig(), "frozen_layers": None, "optimizer.pull": None}
        return vary(self.experts, changes | {"optimizer.learning_rate": self.dense_learning_rate})


def _of_parts(config: TrainConfig) -> tuple[Any, ...]:
    return config.lora, config.frozen_layers, config.optimizer.pull


def check_changeable(settings: Iterable[str], part: str, *, begins: bool = False) -> None:
    """Raises UserError for a setting that cannot change once a RUN is made: all but those of
    `RuntimeConfig` in the part "experts" or "grow", and of the gate. begins: whether the settings
    are of a training that may begin now, which can have any settings of that part."""
    donors = ["donor_share", "kept_share"] if part == "grow" else []
    allowed = [f"{part}.runtime.", "gate."] + [f"{part}.", *donors] * begins
    runtime = ", ".join(field.name for field in dataclasses.fields(RuntimeConfig))
    for name in (setting.partition("=")[0] for setting in settings):
        if not name.startswith(tuple(allowed)):
            wanted = ", ".join([f"{part}.NAME", *donors] if begins else [f"{part}.runtime.NAME"])
            names = "" if begins else f", where NAME is one of {runtime}"
            raise UserError(
                f"{name} cannot change once a RUN is made; here {wanted} and gate.NAME may be set"
                f"{names}"
            )
