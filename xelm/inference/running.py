"""A request to continue a prompt, and the sequence that comes of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from xelm.inference.blocks import Text
from xelm.inference.route import CONTEXT, Router
from xelm.inference.sampling import TokenLikelihood
from xelm.inference.sampling_params import SamplingParams


@dataclass(eq=False, kw_only=True, slots=True)
class GenerationRequest:
    """A prompt that is to be continued, and how."""

    ids: Sequence[int]
    """Token ids of the prompt, as the models read them."""
    sampling: SamplingParams
    language: str | None = None
    """Language of the prompt, if it is known."""
    user_mask: Sequence[bool] | None = None
    """Whether the router goes by each id of the prompt, as by what the user says in a chat; None:
    it goes by all but the token that starts texts."""
    number: int = 0
    """Number among the sequences of one request; their random draws differ by it."""
    alternatives: int | None = None
    """Number of likeliest tokens to name with each log probability; None: none are wanted."""


@dataclass(eq=False, kw_only=True, slots=True)
class SpelledSequence:
    """A sequence in the own vocabulary of a model, which reads it in windows."""

    covered: int = 0
    """Number of the sequence's ids that are spelled here."""
    ids: list[int] = field(default_factory=list)
    """Their spelling."""
    places: list[int] = field(default_factory=list)
    """For each of these ids, the number of the sequence's id with which its characters end."""
    scores: list[float] = field(default_factory=list)
    """Log probability of each of these ids that was read; nan for the very first."""
    start: int = 0
    """Number of the id with which the window that is being read begins."""
    window: list[int] = field(default_factory=list)
    """The ids from there on."""

    def add(self, ids: Sequence[int], places: Sequence[int], count: int) -> None:
        """Adds the spelling of `count` further ids of the sequence. places: counted from these."""
        self.ids += ids
        self.window += ids
        self.places += [self.covered + place for place in places]
        self.covered += count

    def slide(self, longest: int) -> None:
        """Begins another window where one of `longest` ids is full: half of them are read again."""
        self.start += longest - longest // 2
        self.window = self.ids[self.start :]

    def take_scores(self, scores: Sequence[float]) -> None:
        """Keeps the log probabilities of ids of the window that are not known yet."""
        self.scores += scores[len(self.scores) - self.start :]


@dataclass(eq=False, kw_only=True, slots=True)
class RunningSequence:
    """A sequence that is being continued."""

    request: GenerationRequest
    ids: list[int]
    """All ids so far, those of the prompt first."""
    row: int
    """Row of the engine's arrays."""
    router: Router
    """Weighs the models."""
    state: Float[np.ndarray, " Z"]
    """The router's state after the first `routed_upto` of the ids that it goes by."""
    mask: list[bool]
    """For each id, whether the router goes by it: by all but the token that starts texts, or by the
    user's part of a chat's prompt, and by the tokens that were drawn."""
    routed_upto: int = 0
    """Number of ids by which `state` was made."""
    context: list[int] = field(default_factory=list)
    """The last ids by which `state` was made, as many as routers look at."""
    log_likelihoods: Float[np.ndarray, " E"] | None = None
    """By each expert, of the ids that it has read and that count; None: not needed so far."""
    log_weights: Float[np.ndarray, " M"] | None = None
    """Weights of the models, once they are decided."""
    required: list[int] = field(default_factory=list)
    """Readings that have to be complete before its next token is drawn: by experts with weight or,
    while `scoring`, by all of the router's. A reading has the number of its expert or, where that
    reads the sequence in its own vocabulary, -1 minus this number."""
    scoring: bool = False
    """Whether its weights are decided by log-likelihoods, once `required` have read it."""
    decisions: Counter[str] = field(default_factory=Counter)
    """Router -> number of tokens for which it decided."""
    new_tokens: int = 0
    """Number of tokens drawn."""
    likelihood: TokenLikelihood | None = None
    """How probable the last token was before temperature, top_k and top_p, if that is wanted."""
    texts: dict[int, Text] = field(default_factory=dict)
    """Reading -> the sequence in its cache, if some of it was read."""
    spelled: dict[int, SpelledSequence] = field(default_factory=dict)
    """Reading in an expert's own vocabulary -> the sequence in that."""
    counted: dict[int, int] = field(default_factory=dict)
    """Expert -> number of ids that its log-likelihood covers."""

    @property
    def routing(self) -> str:
        """The router that decided most of the new tokens; the first of equals."""
        return self.decisions.most_common(1)[0][0] if self.decisions else ""

    def target(self, reading: int) -> list[int]:
        """The ids that are read in a reading."""
        return self.spelled[reading].window if reading < 0 else self.ids

    def unread(self, reading: int) -> int:
        """Number of ids that are not read yet in a reading."""
        text = self.texts.get(reading)
        return len(self.target(reading)) - (len(text.ids) if text else 0)

    @property
    def ready(self) -> bool:
        """Whether all required readings are complete."""
        return all(self.unread(reading) == 0 for reading in self.required)

    def update_state(self) -> None:
        """Brings the router's state up to the end of the ids."""
        new = zip(self.ids[self.routed_upto :], self.mask[self.routed_upto :])
        counted = [id for id, counts in new if counts]
        self.routed_upto = len(self.ids)
        if counted:
            before, ids = np.asarray(self.context, np.int64), np.asarray(counted, np.int64)
            self.state = self.state + self.router.terms(before, ids).sum(axis=0)
            self.context = [*self.context, *counted][-CONTEXT:]

    def count(self, expert: int, log_likelihoods: Float[np.ndarray, " T"]) -> None:
        """Adds to an expert's log-likelihood that of further ids that count, in order."""
        memory, own = self.router.memory, self.log_likelihoods
        assert own is not None
        powers = memory ** np.arange(len(log_likelihoods) - 1, -1, -1)
        own[expert] = memory ** len(log_likelihoods) * own[expert] + log_likelihoods @ powers
