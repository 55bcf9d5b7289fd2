"""Texts that grow side by side, token by token, each by the experts that carry weight for it.

A step asks every expert once, for all the texts for which it has weight: requests in many languages
are sorted by expert, not looped over. Texts come and go at any step.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.inference.decoding import Reader, capacity, padded
from xelm.inference.routing import Router, among, keep_largest
from xelm.inference.sampling import Sampling, TokenLikelihood, choose, likeliest, penalised

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble

GREEDY = Sampling(temperature=0.0)
"""Of rows without a text."""


@dataclass(eq=False, kw_only=True, slots=True)
class Text:
    """One that grows."""

    ids: list[int]
    """Of all of it."""
    sampling: Sampling
    """How its tokens are drawn."""
    number: int
    """Among the texts of its request."""
    alternatives: int | None
    """How many of the likeliest tokens each step names; None: not even the token's own log
    probability is wanted."""
    row: int
    """Of the engine's arrays."""
    router: Router
    """Who speaks when."""
    state: Float[np.ndarray, " Z"]
    """The router's, after the first `seen` ids."""
    counts: list[bool]
    """For each id, whether the router goes by it: by all of the text but the token that starts it,
    or by the user's part of a chat's prompt, and by the tokens that were drawn."""
    routed_ids: list[int] = field(default_factory=list)
    """The ids by which `state` was made."""
    seen: int = 0
    """How many ids of the text the router has looked at, whether it goes by them or not."""
    evidence: Float[np.ndarray, " E"] | None = None
    """What each expert thinks of the ids that count of what it has read; None: not asked for
    yet."""
    decided: Float[np.ndarray, " E"] | None = None
    """Log weights, once they do not change any more."""
    decisions: Counter[str] = field(default_factory=Counter)
    """Router that decided -> for how many tokens."""
    drawn: int = 0
    """Tokens that were added."""
    likelihood: TokenLikelihood | None = None
    """How probable the last token was before temperature, top_k and top_p, if that is wanted."""
    rows: dict[int, int] = field(default_factory=dict)
    """Expert that has read some of it -> the row there."""
    judges: set[int] = field(default_factory=set)
    """Experts whose evidence is of all that they have read."""

    @property
    def routing(self) -> str:
        """The name of the router that decided most of its new tokens; the first of equals."""
        return self.decisions.most_common(1)[0][0] if self.decisions else ""


class Step(NamedTuple):
    """One more token of a text."""

    text: Text
    token: int
    weights: Float[np.ndarray, " E"]
    """Of the experts, for this token."""


class Engine:
    """What is in play of an ensemble. An expert reads a text only while it carries weight there,
    and then all that it has not read yet. After an error of a step nothing is left of its texts:
    make another."""

    def __init__(self, ensemble: "Ensemble"):
        self.texts: list[Text] = []
        """In the order in which they came."""
        self._ensemble = ensemble
        self._readers: dict[int, Reader] = {}
        self._order = list(range(len(ensemble.names)))
        self._rows = self._slots = 0

    def reserve(self, texts: int, tokens: int) -> None:
        """Says how many texts there will be and how long they will be at most, so that memory is
        taken at once instead of step by step."""
        self._rows, self._slots = max(self._rows, capacity(texts)), max(self._slots, tokens)

    def add(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        language: str | None = None,
        number: int = 0,
        router: Router | None = None,
        alternatives: int | None = None,
        user_mask: Sequence[bool] | None = None,
    ) -> Text:
        """A text to be continued, from the next step on. router: None is the ensemble's.
        alternatives: as `Text` has them. user_mask: for each id, whether the router goes by it, as
        by what the user says in a chat; so does the evidence of the experts. None: all count."""
        router = router or self._ensemble.router
        taken = {text.row for text in self.texts}
        row = next(row for row in range(len(taken) + 1) if row not in taken)
        self.reserve(row + 1, 0)
        text = Text(
            ids=list(ids),
            sampling=sampling,
            number=number,
            alternatives=alternatives,
            row=row,
            router=router,
            state=router.start(language),
            counts=counting(self._ensemble.tokenizer, ids, user_mask).tolist(),
        )
        self.texts.append(text)
        return text

    def remove(self, text: Text) -> None:
        """Ends a text; its place is free."""
        self.texts.remove(text)
        for expert, row in text.rows.items():
            self._readers[expert].leave(row)
        text.rows.clear()
        text.judges.clear()
        # Rows that nobody uses cost as much as others. Not at once: where three quarters are.
        needed = capacity(max((text.row for text in self.texts), default=-1) + 1)
        if 4 * needed <= self._rows:
            self._rows = needed
        if not self.texts:
            self._slots = 0

    def step(self) -> list[Step]:
        """Adds a token to every text."""
        distribution, weights = self.following()
        by_row = {text.row: text for text in self.texts}
        texts = [by_row.get(row) for row in range(self._rows)]
        tokens = np.asarray(
            choose(
                distribution,
                [text.sampling if text else GREEDY for text in texts],
                [text.drawn if text else 0 for text in texts],
                [text.number if text else 0 for text in texts],
            )
        )
        self._set_likelihoods(distribution, tokens)
        steps = []
        for text, spoken in zip(self.texts, weights):
            self.append(text, int(tokens[text.row]))
            steps.append(Step(text, text.ids[-1], spoken))
        return steps

    def _set_likelihoods(
        self, distribution: Float[Array, "B V"], tokens: Int[np.ndarray, " B"]
    ) -> None:
        """Says how probable these tokens are, of the texts for which that is wanted."""
        wanted = {text: text.alternatives for text in self.texts if text.alternatives is not None}
        found = likeliest(distribution, tokens, max(wanted.values())) if wanted else []
        for text, count in wanted.items():
            one = found[text.row]
            text.likelihood = one._replace(top=one.top[:count])

    def append(self, text: Text, token: int) -> None:
        """Adds this token to a text."""
        text.ids.append(token)
        text.counts.append(True)
        text.drawn += 1

    def following(self) -> tuple[Float[Array, "B V"], Float[np.ndarray, "texts E"]]:
        """Log probabilities of the next token, by the `row` of each text (of rows without one they
        mean nothing), and the weights of the experts for each text."""
        # There and back: whoever was asked last is asked first, while it is on the device still.
        self._order.reverse()
        log_weights = self._log_weights()
        mixed = _nothing(self._rows, self._ensemble.model.vocabulary_size)
        penalties = self._penalties()
        for expert in self._order:
            asked = np.flatnonzero(np.isfinite(log_weights[:, expert]))
            if not len(asked):
                continue
            texts = [self.texts[number] for number in asked]
            self._read(expert, texts)
            reader = self._readers[expert]
            # By row of the reader; a row that is not asked is written nowhere.
            places = np.full(len(reader.begun), self._rows, np.int32)
            weights = np.zeros(len(reader.begun), np.float32)
            for text, weight in zip(texts, log_weights[asked, expert]):
                places[text.rows[expert]] = text.row
                weights[text.rows[expert]] = weight
            mixed = _added(mixed, reader.logits, places, weights, *penalties)
        return mixed, np.exp(log_weights)

    def _log_weights(self) -> Float[np.ndarray, "texts E"]:
        """Of the next token of each text, after its router has heard all of it."""
        by_router: dict[int, list[Text]] = {}
        for text in self.texts:
            if text.decided is None:
                by_router.setdefault(id(text.router), []).append(text)
        for texts in by_router.values():
            self._decide(texts[0].router, texts)
        count = len(self._ensemble.names)
        log_weights = np.asarray([text.decided for text in self.texts]).reshape(-1, count)
        if self._ensemble.route_per == "token":
            for text in self.texts:
                text.decided = None
        return log_weights

    def _decide(self, router: Router, texts: Sequence[Text]) -> None:
        """Has a router weigh the models for these texts."""
        for text in texts:
            self._hear(text)
        states = np.stack([text.state for text in texts])
        asks = router.asks(states)
        self._ask([texts[number] for number in np.flatnonzero(asks).tolist()])
        nothing = np.zeros(router.experts)
        evidence = [nothing if text.evidence is None else text.evidence for text in texts]
        found = router.log_weights(states, np.stack(evidence))
        # Where all were asked for their evidence, leaving some out spares nothing.
        least = np.where(asks, 0.0, self._ensemble.least_weight)
        kept = keep_largest(found, self._ensemble.top_m, least)
        names = router.decided_by(states)
        for text, weights, name in zip(texts, among(kept, len(self._ensemble.names)), names):
            text.decided = weights
            text.decisions[name] += 1

    def _hear(self, text: Text) -> None:
        """Brings the router's state of a text up to its end."""
        new = [id for id, counts in zip(text.ids[text.seen :], text.counts[text.seen :]) if counts]
        text.seen = len(text.ids)
        if new:
            before = np.asarray(text.routed_ids, np.int64)
            terms = text.router.terms(before, np.asarray(new, np.int64))
            text.state = text.state + terms.sum(axis=0)
            text.routed_ids += new

    def _ask(self, texts: Sequence[Text]) -> None:
        """Has every expert say what it thinks of these texts, which share a router."""
        for text in texts:
            if text.evidence is None:
                text.evidence = np.zeros(text.router.experts)
        for expert in self._order if texts else ():
            if expert < texts[0].router.experts:
                self._read(expert, texts)

    def _read(self, expert: int, texts: Sequence[Text]) -> None:
        """Has an expert read what it has not read of some texts."""
        if expert not in self._readers:
            parameters = functools.partial(self._ensemble.parameters.__getitem__, expert)
            reader = Reader(self._ensemble.model, parameters, self._ensemble.dtype)
            self._readers[expert] = reader
        reader = self._readers[expert]
        new = [text for text in texts if expert not in text.rows]
        # Only now, and for all at once: most experts never see most texts.
        reader.reserve(len(new), self._slots if new else 0)
        for text in new:
            text.rows[expert] = reader.enter()
        for text in texts:
            if text.evidence is not None and expert not in text.judges:
                text.judges.add(expert)
                reader.begun[text.rows[expert]] = 0  # what it thought when it read was not kept
        begun = {text.row: int(reader.begun[text.rows[expert]]) for text in texts}
        unread = {
            text.rows[expert]: np.asarray(text.ids[begun[text.row] :], np.int32) for text in texts
        }
        scored = any(text.evidence is not None for text in texts)
        found = reader.read(unread, scored=scored)
        for text in texts:
            if text.evidence is not None:
                scores = found[text.rows[expert]]
                first = max(1, begun[text.row])  # the very first follows nothing
                counts = np.asarray(text.counts[first:], bool)
                scores = scores[-len(counts) :][counts] if len(counts) else scores[:0]
                memory = text.router.memory
                powers = memory ** np.arange(len(scores) - 1, -1, -1)
                kept = memory ** len(scores) * text.evidence[expert]
                text.evidence[expert] = kept + scores @ powers

    def _penalties(self):
        """The tokens that each row's text has, and what they are penalised by; nothing, if none
        is."""
        if all(text.sampling.repetition_penalty == 1 for text in self.texts):
            return None, None
        longest = padded(max(len(text.ids) for text in self.texts))
        ids = np.full((self._rows, longest), self._ensemble.model.vocabulary_size, np.int32)
        penalties = np.ones(self._rows, np.float32)
        for text in self.texts:
            ids[text.row, : len(text.ids)] = text.ids
            penalties[text.row] = text.sampling.repetition_penalty
        return ids, penalties


def counting(
    tokenizer: Tokenizer, ids: Sequence[int], user_mask: Sequence[bool] | None
) -> Bool[np.ndarray, " T"]:
    """By which ids of a prompt a router goes: those in `user_mask` or, where that is None, all but
    the token that starts texts. UserError if the mask is not of as many."""
    if user_mask is None:
        return np.arange(len(ids)) >= tokenizer.starts(ids)
    if len(user_mask) != len(ids):
        raise UserError(f"a mask of {len(user_mask)} for {len(ids)} ids; as many are wanted")
    return np.asarray(user_mask, bool)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nothing(rows: int, vocabulary: int) -> Array:
    return jnp.full((rows, vocabulary), -jnp.inf)


@functools.partial(jax.jit, donate_argnums=0)
def _added(mixed, logits, rows, log_weights, ids, penalties):
    """log(exp(mixed) + w p) in some rows."""
    if ids is not None:
        at = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
        seen = jnp.zeros(logits.shape, bool)
        seen = seen.at[jnp.arange(len(logits))[:, None], at(ids)].set(True, mode="drop")
        logits = penalised(logits, seen, at(penalties))
    weighted = log_weights[:, None] + jax.nn.log_softmax(logits)
    before = mixed.at[rows].get(mode="clip")
    return mixed.at[rows].set(jnp.logaddexp(before, weighted), mode="drop")
