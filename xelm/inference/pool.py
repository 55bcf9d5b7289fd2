"""The models that are run together with the router over them: a plain value, which runs nothing."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.data.vocabulary import Vocabulary
from xelm.inference.route import Router
from xelm.inference.routing import RoutingLimits
from xelm.models.config import ModelConfig
from xelm.models.narrow import compute_dtype
from xelm.models.parameters import inference_bytes


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class OwnVocabulary:
    """A model as it reads text in its own vocabulary, where that is not the one of a pool."""

    model: ModelConfig
    """Its shape, with all its ids."""
    parameters: Callable[[], Any]
    """Returns its parameters, `for_inference`."""
    vocabulary: Vocabulary | None
    """None: the seed's."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Pool:
    """Models of one shape with the tokenizer that they share, and a router over them."""

    names: Sequence[str]
    """Names of the M models: the E experts that the router weighs, and maybe others behind them."""
    model: ModelConfig
    """Shape of every model."""
    parameters: Sequence[Any]
    """Parameters of each model, `for_inference`; indexed when it is read (`ParameterCache`)."""
    router: Router
    """Weighs the experts."""
    limits: RoutingLimits = field(default_factory=RoutingLimits)
    """How many experts are read, and how often the router decides; may be its whole `Routing`."""
    tokenizer: Tokenizer
    """Tokenizer of the seed, or of `vocabulary`."""
    dtype: str = "float32"
    """Dtype of the weights in memory, as in `xelm.models.narrow`."""
    context_length: int | None = None
    """Tokens that are read at once where a text is scored; None is the model's own length."""
    stride: int | None = None
    """Tokens from one window of a longer text to the next, as in `score_documents`."""
    vocabulary: Vocabulary | None = None
    """Vocabulary of the text that is read; None: the seed's."""
    owners: Collection[int] = ()
    """Models that have it, where it is not the seed's."""
    own: Mapping[int, OwnVocabulary] = field(default_factory=dict)
    """Number of each model that has another vocabulary -> how it reads in that one, for routers
    that compare the log-likelihoods of models."""
    further: "Sequence[Pool]" = ()
    """Pools of the same models for text in the other vocabularies that some of them have
    (`inference.vocabularies`)."""

    def __post_init__(self) -> None:
        check_windows(self.model, self.window, self.stride)

    @property
    def compute_dtype(self) -> str:
        """Dtype of matrix products, and of the caches of keys and values."""
        return compute_dtype(self.dtype)

    @property
    def window(self) -> int:
        """Tokens that are read at once where a text is scored."""
        return self.context_length or self.model.max_length

    @property
    def overlapping_stride(self) -> int:
        """Tokens from one window to the next where each token is read after at least half a window:
        behind contexts, and where the tokens of a prompt are scored."""
        half = -(-self.window // 2)
        return min(half, self.stride or half)

    @property
    def reading(self) -> dict[str, Any]:
        """Options of `score_documents`."""
        return {
            "text_format": self.tokenizer.text_format,
            "context_length": self.window,
            "stride": self.stride,
            "dtype": self.compute_dtype,
        }

    @property
    def longest(self) -> int:
        """Tokens that a text may have, generated ones included: the model's own length, or `window`
        for a model with learned positions, of which training has not changed the later ones."""
        return self.window if self.model.positions == "learned" else self.model.max_length


def check_windows(model: ModelConfig, context_length: int, stride: int | None) -> None:
    """Raises UserError for windows that a model cannot read, or that leave tokens out."""
    if not 1 <= context_length <= model.max_length:
        raise UserError(
            f"context_length must be between 1 and the {model.max_length} tokens that this model "
            f"can read; got {context_length}"
        )
    if stride is not None and not 1 <= stride <= context_length:
        raise UserError(
            f"stride must be between 1 and context_length, {context_length}; got {stride}"
        )


def parameter_bytes(pool: Pool) -> int:
    """Size of the parameters of one model of a pool."""
    return inference_bytes(pool.model, pool.dtype)
