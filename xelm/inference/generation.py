"""Generation: sequences that are continued in parallel until each ends, and their text."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from clustering.errors import UserError
from xelm.inference.blocks import block_bytes, slots_for
from xelm.inference.engine import Engine
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.pool import Pool, parameter_bytes
from xelm.inference.route import Router
from xelm.inference.running import GenerationRequest, RunningSequence
from xelm.inference.sampling import TokenLikelihood
from xelm.inference.scoring import check_ids
from xelm.inference.sequence import Detokenizer

Stream = Callable[[int, str], object]
"""Called with the number of a prompt and the next piece of its continuation, which may be empty."""
MOST_SLOTS = 2**16
"""Number of slots in a cache up to which `generate` continues sequences together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A finished continuation."""

    text: str
    """Text without the prompt."""
    ids: Sequence[int]
    """Subword ids of the text."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Model -> its mean routing weight over the generated tokens."""
    routing: str = ""
    """The router that decided most of these tokens: "language" where an expert serves the given
    one, otherwise one of `routing.ROUTINGS`, "mixture", or the model that a router abstained to."""


@dataclass(eq=False, kw_only=True, slots=True)
class Continuation:
    """A sequence that is being generated, with its text."""

    sequence: RunningSequence
    """The sequence in the engine."""
    detokenizer: Detokenizer
    """Makes text of its new ids."""
    deadline: float
    """Time, by time.monotonic, after which it ends with its next token."""
    weights: Float[np.ndarray, " M"]
    """Weights of the models, summed over its new tokens."""
    likelihoods: list[TokenLikelihood] = field(default_factory=list)
    """How probable the new tokens are that were not taken yet, where that is wanted."""
    finish_reason: Literal["stop", "length"] | None = None
    """An end token or stop string, or the number of tokens or the time; None while running."""

    @property
    def mean_weights(self) -> Float[np.ndarray, " M"]:
        """Mean weights of the models over its new tokens, of which there is at least one."""
        return self.weights / self.sequence.new_tokens

    def take_likelihoods(self) -> list[TokenLikelihood]:
        """How probable the new tokens are since the last call, where that is wanted."""
        taken, self.likelihoods = self.likelihoods, []
        return taken


class Generator:
    """Generates sequences in parallel, step by step; they are added and removed at any time."""

    def __init__(self, pool: Pool, *, prompt_tokens: int | None = None, keep: int = 0):
        """prompt_tokens, keep: as in `Engine`."""
        self._pool = pool
        self.engine = Engine(pool, prompt_tokens=prompt_tokens, keep=keep)
        self.running: dict[RunningSequence, Continuation] = {}
        """Continuations that have not ended, by their sequences."""

    def add(
        self, request: GenerationRequest, router: Router | None = None, deadline: float = math.inf
    ) -> Continuation:
        """Adds a prompt that `check_prompt` accepts. router: as in `Engine.add`. deadline: as in
        `Continuation`."""
        sequence = self.engine.add(request, router)
        continuation = Continuation(
            sequence=sequence,
            detokenizer=Detokenizer(self._pool.tokenizer, request.ids, request.sampling.stop),
            deadline=deadline,
            weights=np.zeros(len(self._pool.names)),
        )
        self.running[sequence] = continuation
        return continuation

    def remove(self, continuation: Continuation) -> None:
        """Gives up a continuation that is running."""
        del self.running[continuation.sequence]
        self.engine.remove(continuation.sequence)

    def step(
        self, tokens_read: float = 0
    ) -> list[tuple[Continuation, str, Float[np.ndarray, " M"]]]:
        """Draws a token of every continuation whose prompt is read, and removes those that end.
        Returns each with the text that is final now, which may be empty, and the models' weights
        for the token. tokens_read: as in `Engine.step`."""
        steps, now = self.engine.step(tokens_read), time.monotonic()
        return [self._added(sequence, token, own, now) for sequence, token, own in steps]

    def take_failed(self) -> list[tuple[Continuation, Exception]]:
        """Gives up the continuations that fail; returns them with errors as in `Engine`."""
        return [(self.running.pop(one), error) for one, error in self.engine.take_failed()]

    def _added(
        self, sequence: RunningSequence, token: int, weights: np.ndarray, now: float
    ) -> tuple[Continuation, str, np.ndarray]:
        one = self.running[sequence]
        one.weights += weights
        if sequence.likelihood is not None:
            one.likelihoods.append(sequence.likelihood)
        ended = token in self._pool.tokenizer.end_ids
        text = "" if ended else one.detokenizer.add(token)
        if ended or one.detokenizer.stopped:
            one.finish_reason = "stop"
        elif sequence.new_tokens == sequence.request.sampling.max_new_tokens or now > one.deadline:
            one.finish_reason = "length"
        if one.finish_reason:
            text += one.detokenizer.rest()
            self.remove(one)
        return one, text, weights


def generate(
    pool: Pool, requests: Sequence[GenerationRequest], stream: Stream = lambda number, piece: None
) -> list[Generation]:
    """Continues each prompt until an end token, a stop string or `max_new_tokens`; each `number` is
    its place among the requests. UserError for a prompt that leaves no space for so many tokens,
    whose cache does not fit into the memory, or for which an expert computes no probabilities."""
    for request in requests:
        check_prompt(pool, request.ids, request.sampling.max_new_tokens)
    slots = [slots_for(len(r.ids) + r.sampling.max_new_tokens) for r in requests]
    generator, found = Generator(pool), list[Continuation]()
    while len(found) < len(requests) or generator.running:
        used = sum(slots[one.request.number] for one in generator.running)
        # All together or, where that would take much memory, in order as memory becomes free.
        while len(found) < len(requests) and (not used or used + slots[len(found)] <= MOST_SLOTS):
            used += slots[len(found)]
            found.append(generator.add(replace(requests[len(found)], number=len(found))))
        for continuation, piece, _ in generator.step():
            stream(continuation.sequence.request.number, piece)
        for continuation, error in generator.take_failed():
            raise UserError(f"prompt {continuation.sequence.request.number + 1}: {error}")
    return [
        Generation(
            text=one.detokenizer.text,
            ids=one.detokenizer.ids,
            weights=dict(zip(pool.names, one.mean_weights.tolist())),
            routing=one.sequence.routing,
        )
        for one in found
    ]


def check_prompt(pool: Pool, ids: Sequence[int], new: int) -> None:
    """Raises UserError for a prompt that cannot be continued by `new` tokens."""
    if not pool.model.causal:
        raise UserError("these experts are encoders, which continue no text; use fill")
    if not len(ids):
        raise UserError("the prompt has no tokens, and nothing can follow it")
    check_ids(np.asarray(ids), pool.model)
    limit = pool.longest
    if len(ids) + new > limit:
        # The token that starts texts is ours, not the user's.
        given = len(ids) - pool.tokenizer.starts(ids)
        raise UserError(
            f"the prompt has {given} tokens, which leaves this model of {limit} space for "
            f"{max(0, limit - len(ids))} new ones; got max_new_tokens={new}"
        )
    _check_memory(pool, len(ids) + new)


def _check_memory(pool: Pool, tokens: int) -> None:
    """Raises UserError for a text of so many tokens whose cache can never be in memory."""
    if not isinstance(pool.parameters, ParameterCache):
        return
    needed = block_bytes(pool.model, 1, slots_for(tokens), pool.compute_dtype)
    free = max(0.0, pool.parameters.device_bytes - parameter_bytes(pool))
    if needed > free:
        raise UserError(
            f"the keys and values of {tokens} tokens take {needed / 1e9:.2f} GB of memory; beside "
            f"the parameters of one model there are {free / 1e9:.2f} GB"
        )
