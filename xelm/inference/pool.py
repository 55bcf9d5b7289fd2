"""The models that are run together: a plain value, which knows nothing of routing or generating."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xelm.data.tokenizer import Tokenizer
from xelm.inference.scoring import check_windows
from xelm.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Pool:
    """Models of one shape with the tokenizer that they share."""

    names: Sequence[str]
    """Names of the M models: the E experts that a router weighs, and maybe others behind them."""
    model: ModelConfig
    """Shape of every model."""
    parameters: Sequence[Any]
    """Parameters of each model, `for_inference`; indexed only when the model is read, so that they
    can be loaded then (`ParameterCache`)."""
    tokenizer: Tokenizer
    """Tokenizer of the seed."""
    dtype: str = "float32"
    """Dtype of parameters and of matrix products."""
    context_length: int | None = None
    """Tokens that are read at once where a text is scored; None is the model's own length. (A text
    that is generated may go on to `longest`.)"""
    stride: int | None = None
    """Tokens from one window of a longer text to the next, as in `score_documents`."""

    def __post_init__(self) -> None:
        check_windows(self.model, self.window, self.stride)

    @property
    def window(self) -> int:
        """Tokens that are read at once where a text is scored: `context_length`, or the model's own
        length."""
        return self.context_length or self.model.max_length

    @property
    def overlapping_stride(self) -> int:
        """Tokens from one window to the next where each token is read after at least half a window:
        behind contexts, and where the tokens of a prompt are scored."""
        half = -(-self.window // 2)
        return min(half, self.stride or half)

    @property
    def longest(self) -> int:
        """Tokens that a text may have, generated ones included: the model's own length, or `window`
        for a model with learned positions, of which training has not changed the later ones."""
        return self.window if self.model.positions == "learned" else self.model.max_length
