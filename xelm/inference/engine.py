"""Continues sequences in parallel, token by token: in a step every expert is run once, for all the
sequences for which it has weight. Sequences are added and removed at any step."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from xelm.inference.decoder import Decoder, capacity, padded
from xelm.inference.pool import Pool
from xelm.inference.route import IMPOSSIBLE, Router, decide, routing_mask
from xelm.inference.sampling import TokenLikelihood, likeliest, penalised, sample
from xelm.inference.sampling_params import GREEDY, SamplingParams
from xelm.inference.spelling import spell


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
    """A sequence in the own vocabulary of a model, as far as the model has read it."""

    row: int
    """Row of the model's decoder."""
    spelled: int = 0
    """Number of the sequence's ids that are spelled here."""
    ids: list[int] = field(default_factory=list)
    """Their spelling, all of which the model has read."""


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
    log_likelihoods: Float[np.ndarray, " E"] | None = None
    """By each expert, of the ids that it has read and that count; None: not needed so far."""
    log_weights: Float[np.ndarray, " M"] | None = None
    """Weights of the models, once they are decided."""
    decisions: Counter[str] = field(default_factory=Counter)
    """Router -> number of tokens for which it decided."""
    new_tokens: int = 0
    """Number of tokens drawn."""
    likelihood: TokenLikelihood | None = None
    """How probable the last token was before temperature, top_k and top_p, if that is wanted."""
    rows: dict[int, int] = field(default_factory=dict)
    """Expert that has read some of it -> the sequence's row there."""
    scored_by: set[int] = field(default_factory=set)
    """Experts whose log-likelihoods cover all that they have read."""
    spelled: dict[int, SpelledSequence] = field(default_factory=dict)
    """Expert of another vocabulary -> the sequence as it reads it for the router."""

    @property
    def routing(self) -> str:
        """The router that decided most of the new tokens; the first of equals."""
        return self.decisions.most_common(1)[0][0] if self.decisions else ""


class Engine:
    """The sequences that are running, and what the experts have read of them. An expert reads a
    sequence only while it carries weight there, and then all that it has not read yet. A step that
    raises leaves the engine unusable: make another."""

    def __init__(self, pool: Pool):
        self.sequences: list[RunningSequence] = []
        """Those that are running, in the order in which they were added."""
        self._pool = pool
        self._decoders: dict[int, Decoder] = {}
        self._own_decoders: dict[int, Decoder] = {}
        """Decoders of the experts that have other vocabularies, for sequences in these."""
        self._order = list(range(len(pool.names)))
        self._rows = self._slots = 0

    def reserve(self, sequences: int, tokens: int) -> None:
        """Announces sequences and their largest length, so that memory is allocated at once."""
        self._rows, self._slots = max(self._rows, capacity(sequences)), max(self._slots, tokens)

    def add(self, request: GenerationRequest, router: Router | None = None) -> RunningSequence:
        """Adds a sequence, which is continued from the next step on. router: None is the pool's."""
        router = router or self._pool.router
        taken = {sequence.row for sequence in self.sequences}
        row = next(row for row in range(len(taken) + 1) if row not in taken)
        self.reserve(row + 1, 0)
        sequence = RunningSequence(
            request=request,
            ids=list(request.ids),
            row=row,
            router=router,
            state=router.start(request.language),
            mask=routing_mask(self._pool.tokenizer, request.ids, request.user_mask).tolist(),
        )
        self.sequences.append(sequence)
        return sequence

    def remove(self, sequence: RunningSequence) -> None:
        """Ends a sequence and frees its rows."""
        self.sequences.remove(sequence)
        for expert, row in sequence.rows.items():
            self._decoders[expert].free(row)
        for expert, spelled in sequence.spelled.items():
            self._own_decoders[expert].free(spelled.row)
        sequence.rows.clear()
        sequence.spelled.clear()
        sequence.scored_by.clear()
        # Empty rows cost as much as others. Rows are given up only when three quarters are empty.
        needed = capacity(max((sequence.row for sequence in self.sequences), default=-1) + 1)
        if 4 * needed <= self._rows:
            self._rows = needed
        if not self.sequences:
            self._slots = 0

    def step(self) -> list[tuple[RunningSequence, int, Float[np.ndarray, " M"]]]:
        """Draws the next token of every sequence; returns it with the models' weights for it."""
        distribution, weights = self.next_log_probabilities()
        by_row = {sequence.row: sequence for sequence in self.sequences}
        rows = [by_row.get(row) for row in range(self._rows)]
        tokens = np.asarray(
            sample(
                distribution,
                [sequence.request.sampling if sequence else GREEDY for sequence in rows],
                [sequence.new_tokens if sequence else 0 for sequence in rows],
                [sequence.request.number if sequence else 0 for sequence in rows],
            )
        )
        self._set_likelihoods(distribution, tokens)
        steps = []
        for sequence, own in zip(self.sequences, weights):
            self.append(sequence, int(tokens[sequence.row]))
            steps.append((sequence, sequence.ids[-1], own))
        return steps

    def _set_likelihoods(
        self, distribution: Float[Array, "B V"], tokens: Int[np.ndarray, " B"]
    ) -> None:
        """Sets how probable these tokens are, for the sequences for which that is wanted."""
        counts = ((sequence, sequence.request.alternatives) for sequence in self.sequences)
        wanted = {sequence: count for sequence, count in counts if count is not None}
        found = likeliest(distribution, tokens, max(wanted.values())) if wanted else []
        for sequence, count in wanted.items():
            one = found[sequence.row]
            sequence.likelihood = one._replace(top=one.top[:count])

    def append(self, sequence: RunningSequence, token: int) -> None:
        """Adds this token to a sequence."""
        sequence.ids.append(token)
        sequence.mask.append(True)
        sequence.new_tokens += 1

    def next_log_probabilities(
        self,
    ) -> tuple[Float[Array, "B V"], Float[np.ndarray, "sequences M"]]:
        """Log probabilities of the next token, by the `row` of each sequence (other rows mean
        nothing), and the weights of the models for each sequence."""
        # In alternating order: the expert that was run last, which is on the device, is run first.
        self._order.reverse()
        log_weights = self._log_weights()
        mixed = _empty_mixture(self._rows, self._pool.model.vocabulary_size)
        penalties = self._penalties()
        for expert in self._order:
            weighed = np.flatnonzero(np.isfinite(log_weights[:, expert]))
            if not len(weighed):
                continue
            sequences = [self.sequences[number] for number in weighed]
            self._read(expert, sequences)
            decoder = self._decoders[expert]
            # By row of the decoder; rows without weight are written nowhere.
            rows = np.full(len(decoder.lengths), self._rows, np.int32)
            weights = np.zeros(len(decoder.lengths), np.float32)
            for sequence, weight in zip(sequences, log_weights[weighed, expert]):
                rows[sequence.rows[expert]] = sequence.row
                weights[sequence.rows[expert]] = weight
            mixed = _added(mixed, decoder.logits, rows, weights, *penalties)
        return mixed, np.exp(log_weights)

    def _log_weights(self) -> Float[np.ndarray, "sequences M"]:
        by_router: dict[int, list[RunningSequence]] = {}
        for sequence in self.sequences:
            if sequence.log_weights is None:
                by_router.setdefault(id(sequence.router), []).append(sequence)
        for sequences in by_router.values():
            self._decide(sequences[0].router, sequences)
        found = [sequence.log_weights for sequence in self.sequences]
        if self._pool.limits.route_per == "token":
            for sequence in self.sequences:
                sequence.log_weights = None
        return np.asarray(found).reshape(-1, len(self._pool.names))

    def _decide(self, router: Router, sequences: Sequence[RunningSequence]) -> None:
        for sequence in sequences:
            self._update_state(sequence)

        def log_likelihoods(needed: Bool[np.ndarray, " _"]) -> np.ndarray:
            self._score([sequences[number] for number in np.flatnonzero(needed).tolist()])
            nothing = np.zeros(router.experts)
            return np.stack(
                [nothing if s.log_likelihoods is None else s.log_likelihoods for s in sequences]
            )

        states = np.stack([sequence.state for sequence in sequences])
        found = decide(router, states, log_likelihoods, self._pool.limits, len(self._pool.names))
        for sequence, weights, name in zip(sequences, found.log_weights, found.routers):
            sequence.log_weights = weights
            sequence.decisions[name] += 1

    def _update_state(self, sequence: RunningSequence) -> None:
        """Brings the router's state of a sequence up to its end."""
        ids = np.asarray(sequence.ids, np.int64)[np.asarray(sequence.mask, bool)]
        before, new = ids[: sequence.routed_upto], ids[sequence.routed_upto :]
        if len(new):
            sequence.state = sequence.state + sequence.router.terms(before, new).sum(axis=0)
            sequence.routed_upto = len(ids)

    def _score(self, sequences: Sequence[RunningSequence]) -> None:
        """Has every expert read these sequences of one router, and adds to log-likelihoods."""
        for sequence in sequences:
            if sequence.log_likelihoods is None:
                sequence.log_likelihoods = np.zeros(sequence.router.experts)
        for expert in self._order:
            if expert >= sequences[0].router.experts:
                continue
            if expert in self._pool.own:
                self._score_spelled(expert, sequences)
            else:
                self._read(expert, sequences)

    def _score_spelled(self, expert: int, sequences: Sequence[RunningSequence]) -> None:
        """Has an expert read, in its own vocabulary, what it has not read of some sequences, and
        adds to its log-likelihoods."""
        own = self._pool.own[expert]
        if expert not in self._own_decoders:
            self._own_decoders[expert] = Decoder(own.model, own.parameters, self._pool.dtype)
        decoder, unread, places = self._own_decoders[expert], {}, {}
        new = [sequence for sequence in sequences if expert not in sequence.spelled]
        decoder.reserve(len(new), 0)
        for sequence in new:
            sequence.spelled[expert] = SpelledSequence(row=decoder.allocate())
        for sequence in sequences:
            spelled, mask = sequence.spelled[expert], np.asarray(sequence.mask, bool)
            first, known = spelled.spelled, len(sequence.request.ids)
            ids = np.asarray(sequence.ids[first:], np.int64)
            more = spell(
                ids, self._pool.vocabulary, own.vocabulary, max(0, known - first), mask[first:]
            )
            unread[spelled], places[sequence] = more.ids.tolist(), more.places
        scores = _read_spelled(decoder, unread, self._pool.longest)
        for sequence in sequences:
            spelled = sequence.spelled[expert]
            total = np.zeros(len(sequence.ids) - spelled.spelled)
            np.add.at(total, places[sequence], np.nan_to_num(scores[spelled]))
            self._add_scores(expert, sequence, total, spelled.spelled)
            spelled.spelled = len(sequence.ids)

    def _add_scores(
        self, expert: int, sequence: RunningSequence, scores: Float[np.ndarray, " n"], first: int
    ) -> None:
        """Adds to an expert's log-likelihood of a sequence what it gives to ids from `first` on."""
        scores = np.maximum(scores[np.asarray(sequence.mask[first:], bool)], IMPOSSIBLE)
        memory, own = sequence.router.memory, sequence.log_likelihoods
        assert own is not None
        powers = memory ** np.arange(len(scores) - 1, -1, -1)
        own[expert] = memory ** len(scores) * own[expert] + scores @ powers

    def _read(self, expert: int, sequences: Sequence[RunningSequence]) -> None:
        """Has an expert read what it has not read of some sequences."""
        if expert not in self._decoders:
            parameters = functools.partial(self._pool.parameters.__getitem__, expert)
            self._decoders[expert] = Decoder(self._pool.model, parameters, self._pool.dtype)
        decoder = self._decoders[expert]
        new = [sequence for sequence in sequences if expert not in sequence.rows]
        # Only now, and for all at once: most experts never read most sequences.
        decoder.reserve(len(new), self._slots if new else 0)
        for sequence in new:
            sequence.rows[expert] = decoder.allocate()
        scored = [sequence for sequence in sequences if sequence.log_likelihoods is not None]
        if expert in self._pool.own:
            scored = []  # its log-likelihoods are those in its own vocabulary
        for sequence in scored:
            if expert not in sequence.scored_by:
                sequence.scored_by.add(expert)
                decoder.lengths[sequence.rows[expert]] = 0  # read again: its scores were not kept
        lengths = {s.row: int(decoder.lengths[s.rows[expert]]) for s in sequences}
        unread = {s.rows[expert]: np.asarray(s.ids[lengths[s.row] :], np.int32) for s in sequences}
        found = decoder.read(unread, scored=bool(scored))
        for sequence in scored:
            first = max(1, lengths[sequence.row])  # the very first token follows nothing
            scores = found[sequence.rows[expert]]
            scores = scores[len(scores) - (len(sequence.ids) - first) :]
            self._add_scores(expert, sequence, scores, first)

    def _penalties(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The tokens in each row and their repetition penalties; None where there is no penalty."""
        if all(s.request.sampling.repetition_penalty == 1 for s in self.sequences):
            return None, None
        longest = padded(max(len(sequence.ids) for sequence in self.sequences))
        ids = np.full((self._rows, longest), self._pool.model.vocabulary_size, np.int32)
        penalties = np.ones(self._rows, np.float32)
        for sequence in self.sequences:
            ids[sequence.row, : len(sequence.ids)] = sequence.ids
            penalties[sequence.row] = sequence.request.sampling.repetition_penalty
        return ids, penalties


def _read_spelled(
    decoder: Decoder, unread: Mapping[SpelledSequence, Sequence[int]], longest: int
) -> dict[SpelledSequence, Float[np.ndarray, " _"]]:
    """Has a decoder read further ids of some spelled sequences; returns the log probability of
    each. longest: tokens after which reading begins anew, half as many before the next one."""
    found = {one: [np.zeros(0)] for one in unread}
    rest = {one: list(ids) for one, ids in unread.items() if ids}
    while rest:
        pieces, before = {}, {}
        for one, ids in rest.items():
            before[one] = []
            if decoder.lengths[one.row] >= longest:
                decoder.lengths[one.row] = 0
                before[one] = one.ids[-(longest // 2) :]
            size = longest - int(decoder.lengths[one.row]) - len(before[one])
            pieces[one] = ids[:size]
        scores = decoder.read(
            {one.row: np.asarray([*before[one], *ids], np.int32) for one, ids in pieces.items()},
            scored=True,
        )
        for one, ids in pieces.items():
            found[one].append(scores[one.row][len(before[one]) :])
            one.ids += ids
            rest[one] = rest[one][len(ids) :]
        rest = {one: ids for one, ids in rest.items() if ids}
    return {one: np.concatenate(scores) for one, scores in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_mixture(rows: int, vocabulary: int) -> Array:
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
