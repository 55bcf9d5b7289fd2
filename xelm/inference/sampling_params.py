"""Sampling parameters as plain values. Imports nothing heavy, so that flags can be made of them."""

from dataclasses import dataclass

from clustering.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a continuation is sampled, and where it ends."""

    max_new_tokens: int = 40
    """Largest number of tokens to generate."""
    temperature: float = 0.8
    """Temperature of sampling, which divides log probabilities; 0 takes the most probable token."""
    top_k: int | None = None
    """Number of most probable tokens to sample from. None: all."""
    top_p: float = 0.95
    """Probability that the most probable tokens to sample from have together; 1 takes all."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that the text contains already: it divides positive logits and multiplies
    negative ones."""
    # Keskar et al. 2019, arXiv 1909.05858, section 4.1
    stop: tuple[str, ...] = ()
    """Text before which the continuation ends."""
    random_seed: int = 0
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            # Beyond these, numbers of 32 bits become infinite.
            "temperature": (0 <= self.temperature <= 1000, "at least 0 and at most 1000"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (
                0.001 <= self.repetition_penalty <= 1000,
                "at least 0.001 and at most 1000",
            ),
            "stop": ("" not in self.stop, "strings that are not empty"),
        }
        faults = [
            f"{name} must be {wanted}; got {getattr(self, name)}"
            for name, (right, wanted) in rules.items()
            if not right
        ]
        if faults:
            raise UserError("; ".join(faults))


GREEDY = SamplingParams(temperature=0.0)
