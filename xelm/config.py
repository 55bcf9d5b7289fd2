"""How a language model is trained and an X-ELM made, as plain values, checked when made.

Imports no JAX, so that the command line stays quick.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clustering.errors import UserError
from xelm.models.config import ModelConfig

FREE = (
    *("mesh_expert", "mesh_data", "mesh_fsdp", "mesh_tensor", "dtype", "moments_dtype"),
    *("accumulation_steps", "rematerialise", "skip_limit", "checkpoint_every", "keep_checkpoints"),
    *("keep_every", "log_every", "tensorboard", "wandb"),
)
"""Settings of where and how a training runs, which may be others each time that it goes on."""
OF_GROWTH = ("tokens", "max_passes")
"""Settings that a growth may begin with in place of the RUN's, since its text may be much less or
more than was thought of; it goes on with what it began with."""


StartToken = Literal["tokenizer", "bos", "eos", "config"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training: budget, batches, optimiser, schedule, precision and checkpoints."""

    tokens: int
    """Budget, in positions of the rows of all steps, to the nearest step; the first token of each
    document and the padding of last rows count although they are not predicted."""
    sequence_length: int = 512
    """T, tokens a row; documents are packed into rows and do not attend to each other."""
    batch_size: int = 32
    """Rows an optimiser step sees, over all accumulation steps."""
    accumulation_steps: int = 1
    """The batch is worked off in this many equal parts; the update is the same."""
    learning_rate: float = 1e-3
    """Peak rate."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after warm-up. wsd (warmup-stable-decay) is flat, then linear to the final rate."""
    warmup_share: float = 0.05
    """Share of the steps in which the rate rises linearly from zero."""
    decay_share: float = 0.2
    """Share of the steps in which wsd decays; the other schedules decay from the warm-up on."""
    final_rate_share: float = 0.1
    """Rate at the last step, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps squared gradients by row and column of each matrix (of 128 of both or more),
    next to nothing, instead of each; for rates such as those of adamw."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the optimiser's averages between steps: two of each parameter, of adafactor one."""
    beta1: float = 0.9
    """Decay of the gradient average; of adafactor, that of updates, and none is kept if it is 0."""
    beta2: float = 0.95
    """adamw's decay of the squared-gradient average; .95 as usual for language models."""
    clip_norm: float = 1.0
    """Gradients are scaled down to at most this global norm."""
    skip_limit: int = 10
    """Steps in a row after which a training is given up. A step is skipped, and counted, if its
    loss or gradient is no number, or its loss far above those before it."""
    sampling_exponent: float = 0.3
    """A language is seen in proportion to (its tokens) ** this: 0 is uniform, 1 proportional."""
    max_passes: float = 0.0
    """Of a language's text at most: what it may not have, the others get (with sampling_exponent 0,
    UniMax); a grown expert is trained on fewer tokens. 0 sets no limit."""
    mask_share: float = 0.15
    """Share of the tokens that an encoder has to guess (.15 in BERT, .3 in ModernBERT)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and, with bfloat16, of the matrices that a step reads and the gradients
    that it finds, also where these are summed over devices; their masters, norms, softmax,
    losses and sums over accumulated parts stay float32."""
    rematerialise: bool = False
    """Of each layer keep its input and what attention gave, and compute all else again on the way
    back, instead of only what is cheap: half the memory for activations, a fifth more time."""
    random_seed: int = 0
    """Orders rows, and initialises a fresh model. A training that goes on from another on the same
    text needs another, or it sees the same rows in the same order."""
    checkpoint_every: int = 200
    """Steps between checkpoints of the unfinished training."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Steps between further ones that are kept until the training is done; 0 keeps none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    mesh_expert: int = 1
    """Experts that are trained at a time in one program, each on devices of its own."""
    mesh_data: int = 0
    """Devices over which rows are spread; 0 takes all that the other mesh axes leave."""
    mesh_fsdp: int = 1
    """Devices over which rows and each parameter are spread."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward and vocabulary are spread."""
    tensorboard: bool = False
    """Also write TensorBoard events, in RUN/logs (needs xelm[tensorboard])."""
    wandb: bool = False
    """Also keep a run of Weights & Biases, in project WANDB_PROJECT or xelm (needs xelm[wandb])."""

    def __post_init__(self) -> None:
        faults = []
        for name in (
            "tokens",
            "sequence_length",
            "batch_size",
            "accumulation_steps",
            "skip_limit",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "mesh_expert",
            "mesh_fsdp",
            "mesh_tensor",
        ):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("warmup_share", "decay_share", "final_rate_share", "sampling_exponent"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must be between 0 and 1; got {getattr(self, name)}")
        if not 0 <= self.max_passes < math.inf:
            faults.append(f"max_passes must be at least 0; got {self.max_passes}")
        if not 0 < self.mask_share < 1:
            faults.append(f"mask_share must be between 0 and 1; got {self.mask_share}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                faults.append(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        # What changes by less than 1/256 is rounded to what it was: longer averages would stick.
        averages = {"beta1": self.beta1}
        if self.optimizer == "adamw":
            averages["beta2"] = self.beta2
        for name, value in averages.items() if self.moments_dtype == "bfloat16" else ():
            if value > 0.95:
                faults.append(f"{name} must be at most .95 for averages in bfloat16; got {value}")
        for name in ("weight_decay", "keep_every", "mesh_data", "random_seed"):
            if not 0 <= getattr(self, name) < 2**31:
                faults.append(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.accumulation_steps > 0 and self.batch_size % self.accumulation_steps:
            faults.append(
                f"batch_size must be a multiple of accumulation_steps; got {self.batch_size} and "
                f"{self.accumulation_steps}"
            )
        if self.checkpoint_every > 0 and self.keep_every % self.checkpoint_every:
            faults.append(
                f"keep_every must be a multiple of checkpoint_every; got {self.keep_every} and "
                f"{self.checkpoint_every}"
            )
        if faults:
            raise ValueError("; ".join(faults[:5]))

    @property
    def tokens_per_step(self) -> int:
        """Positions an optimiser step sees (padding and first tokens of documents included)."""
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimiser steps that fill the budget, at least one."""
        return max(1, round(self.tokens / self.tokens_per_step))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One X-ELM: its seed, its experts and what is grown later."""

    model: ModelConfig | None
    """Shape of a fresh seed; None where the seed is a Hugging Face checkpoint."""
    model_type: Literal["llama", "xglm"] = "llama"
    """Family that a fresh seed is written as."""
    tokenizer_exponent: float = 0.3
    """A language's share of the tokenizer's training text is its bytes ** this."""
    start_token: StartToken = "config"
    """What stands before every text, in training and after: "tokenizer" is what the seed's
    tokenizer itself puts there, which may be nothing; "bos" and "eos" are its special tokens of
    these names; "config" is what the tokenizer puts there or else the bos of config.json, which
    RUNs have that were made before this setting."""
    seed: TrainConfig
    """Training of a fresh seed; not used where the seed is given."""
    experts: TrainConfig
    """Training of all experts together: `tokens` is the total, of which each expert gets the share
    of its languages."""
    dense_learning_rate: float
    """Peak rate of the dense baseline, which is otherwise trained as the experts are."""
    dense_batch_size: int
    """Rows a step of the dense baseline. It has the tokens of all experts for one model, so it
    bears larger batches than they do; with theirs it would be no fair baseline."""
    grow: TrainConfig
    """Training of one grown expert."""
    donor_share: float = 0.25
    """Share of a grown expert's rows that are of its parent's languages."""
    weights_dtype: Literal["seed", "float32", "bfloat16"] = "seed"
    """Of the published weights of experts and dense baseline, which are rounded to it from the
    float32 that training keeps; seed: that of the seed's weights."""
    vectoriser_dimensions: int = 100
    """Of the TF-IDF vectors that clusters of documents and TF-IDF routing use."""

    def __post_init__(self) -> None:
        if not 0 <= self.donor_share < 1:
            raise ValueError(f"donor_share must be in 0..1, below 1; got {self.donor_share}")
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
        for name, one in {"seed": self.seed, "grow": self.grow}.items():
            if one.mesh_expert != 1:
                raise ValueError(f"{name} is one model; its mesh_expert must be 1")
        if self.vectoriser_dimensions < 1:
            raise ValueError(
                f"vectoriser_dimensions must be at least 1; got {self.vectoriser_dimensions}"
            )
        if not 0 <= self.tokenizer_exponent <= 1:
            raise ValueError(
                f"tokenizer_exponent must be between 0 and 1; got {self.tokenizer_exponent}"
            )
        try:
            _ = self.dense  # made to be checked
        except ValueError as error:
            raise ValueError(f"dense: {error}") from None

    @property
    def dense(self) -> TrainConfig:
        """Training of the dense baseline: the tokens of all experts together, seen in the same
        shares, with a rate and a batch of its own."""
        return dataclasses.replace(
            self.experts,
            learning_rate=self.dense_learning_rate,
            batch_size=self.dense_batch_size,
            mesh_expert=1,
        )


def explained(config: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML with every value of a configuration below what it means."""
    import yaml  # by which 1e-06 is text, and 1.0e-06 a number

    notes = _notes(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from (f"{indent}# {line}" for line in textwrap.wrap(notes[field.name], 92))
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from explained(value, f"{indent}  ")
        else:
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
            yield f"{indent}{field.name}: {text.strip()}"


def _notes(kind: type) -> dict[str, str]:
    """Field -> the string below it, which Python does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, note in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
            found[field.target.id] = " ".join(str(note.value.value).split())
    return found


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values, as they come back from a file."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def with_defaults(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values of a configuration of that type, with the defaults of those fields that its
    version did not have yet: a default means what was done before there was a choice."""
    hints, found = typing.get_type_hints(kind), dict(value)
    for field in dataclasses.fields(kind):
        nested, item = _dataclass_of(hints[field.name]), found.get(field.name)
        if nested and isinstance(item, Mapping):
            found[field.name] = with_defaults(nested, item)
        elif field.name not in found and field.default is not dataclasses.MISSING:
            found[field.name] = json.loads(json.dumps(field.default, default=dataclasses.asdict))
    return found


def from_json(kind: type, value: Mapping[str, Any]) -> Any:
    """A configuration of that type from JSON values; unknown and missing fields are refused."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    unknown = [name for name in value if name not in fields]
    if unknown:
        raise UserError(f"{kind.__name__} has no field {', '.join(unknown[:5])}")
    arguments = {}
    for name, item in value.items():
        nested = _dataclass_of(hints[name])
        if nested and item is not None:
            item = from_json(nested, item)
        arguments[name] = tuple(item) if isinstance(item, list) else item
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind.__name__}: {error}") from error


def override(config: RunConfig, settings: Iterable[str]) -> RunConfig:
    """The configuration with settings such as "experts.tokens=3e6" or "seed.dtype=bfloat16", in
    any order: it is checked once all are made."""
    values = to_json(config)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"a setting is NAME=VALUE, such as experts.tokens=3e6; got {setting!r}")
        _set(values, RunConfig, path.split("."), text, setting)
    return from_json(RunConfig, values)


def check_free(settings: Iterable[str], part: str) -> None:
    """Raises UserError for a setting that is no `FREE` one of "experts" or "grow", and of "grow"
    none `OF_GROWTH` either."""
    allowed = (*OF_GROWTH, *FREE) if part == "grow" else FREE
    for setting in settings:
        name = setting.partition("=")[0]
        if name not in [f"{part}.{free}" for free in allowed]:
            raise UserError(
                f"{name} is not to be changed once a RUN is made; here {part}.NAME=VALUE may be "
                f"set for {', '.join(allowed)}"
            )


def _set(values: dict[str, Any], kind: type, path: list[str], text: str, setting: str) -> None:
    name, *rest = path
    hints = typing.get_type_hints(kind)
    if name not in hints:
        raise UserError(f"{setting!r}: there is no {name!r}; there are {', '.join(hints)}")
    if not rest:
        values[name] = _parsed(hints[name], text, setting)
    elif isinstance(values[name], dict):
        _set(values[name], _dataclass_of(hints[name]), rest, text, setting)
    else:
        raise UserError(f"{setting!r}: {name} has no parts here")


def _parsed(hint: Any, text: str, setting: str) -> Any:
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        if text not in known:
            raise UserError(f"{setting!r}: wanted {' or '.join(known)}")
        return text
    if hint is bool:
        if text not in ("true", "false"):
            raise UserError(f"{setting!r}: wanted true or false")
        return text == "true"
    try:
        number = float(text)
        if hint is int and number != int(number):
            raise ValueError
        return hint(number)
    except (ValueError, OverflowError, TypeError):
        raise UserError(f"{setting!r}: wanted {getattr(hint, '__name__', hint)}") from None


def _dataclass_of(hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)
