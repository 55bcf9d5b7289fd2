"""Continues sequences in parallel, token by token: in a step every expert is run once, for all the
sequences for which it has weight. Sequences are added and removed at any step.

Prompts are read between the steps, a limited number of tokens each time, so that sequences that are
being generated never wait for all of a long one (chunked prefill: Agrawal et al. 2023,
arXiv 2308.16369). Where memory is short, the sequences that came last give theirs up and are read
again later."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from xelm.inference.blocks import Block, capacity
from xelm.inference.decoder import Decoder
from xelm.inference.pool import Pool
from xelm.inference.reading import Reader
from xelm.inference.repetition import SeenIds
from xelm.inference.route import Router, decide, routing_mask
from xelm.inference.running import GenerationRequest, RunningSequence
from xelm.inference.sampling import likeliest, penalised, sample
from xelm.inference.sampling_params import GREEDY


class Engine:
    """The sequences that are running, and what the experts have read of them. An expert reads a
    sequence only while it carries weight there, and then all that it has not read yet. A step that
    raises leaves the engine unusable: make another."""

    def __init__(self, pool: Pool, *, prompt_tokens: int | None = None, keep: int = 0):
        """prompt_tokens: largest number of tokens of prompts that are read between two steps in
        which others draw tokens, each counted for each expert that reads it; None: all. keep:
        number of sequences of each expert that stay in memory when they have ended, for those that
        begin as they do, such as the next turn of a chat."""
        self.sequences: list[RunningSequence] = []
        """Those that are running, in the order in which they were added."""
        self.drawing: list[RunningSequence] = []
        """Those of which the last step drew a token: the others are not read completely."""
        self._pool = pool
        self._reader = Reader(pool, prompt_tokens, keep)
        self._order = list(range(len(pool.names)))
        self._rows = 0
        self._seen = SeenIds(pool.model.vocabulary_size)

    @property
    def decoders(self) -> Mapping[int, Decoder]:
        """The caches of experts that have read anything, by `reading`."""
        return self._reader.decoders

    def reserve(self, sequences: int) -> None:
        """Announces a number of sequences, so that arrays are made for all of them at once."""
        self._rows = max(self._rows, capacity(sequences))

    def add(self, request: GenerationRequest, router: Router | None = None) -> RunningSequence:
        """Adds a sequence, which is continued from the next step on. router: None is the pool's."""
        router = router or self._pool.router
        taken = {sequence.row for sequence in self.sequences}
        row = next(row for row in range(len(taken) + 1) if row not in taken)
        self.reserve(row + 1)
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
        """Ends a sequence and frees its memory."""
        self.sequences.remove(sequence)
        self._reader.release(sequence)
        # Empty rows cost as much as others. Rows are given up only when three quarters are empty.
        needed = capacity(max((sequence.row for sequence in self.sequences), default=-1) + 1)
        if 4 * needed <= self._rows:
            self._rows = needed

    def close(self) -> None:
        """Frees all memory; no sequence can be continued any more."""
        self._reader.close()

    def step(
        self, tokens_read: float = 0
    ) -> list[tuple[RunningSequence, int, Float[np.ndarray, " M"]]]:
        """Draws the next token of every sequence that is read completely; returns it with the
        models' weights for it. tokens_read: tokens of prompts that were read elsewhere since the
        last step, within the same budget."""
        distribution, weights = self.next_log_probabilities(tokens_read)
        if not self.drawing:
            return []
        by_row = {sequence.row: sequence for sequence in self.drawing}
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
        for sequence, own in zip(self.drawing, weights):
            if (token := int(tokens[sequence.row])) < 0:
                self._fail(sequence, self._without_numbers(sequence))
                continue
            self.append(sequence, token)
            steps.append((sequence, token, own))
        return steps

    def _without_numbers(self, sequence: RunningSequence) -> list[int]:
        """The experts of which the logits after a sequence are not all numbers."""
        texts = {expert: sequence.texts[expert] for expert in sequence.required}
        last = {expert: np.asarray(text.block.logits[text.index]) for expert, text in texts.items()}
        return [e for e, logits in last.items() if not np.isfinite(logits.max())]

    def _fail(self, sequence: RunningSequence, experts: Sequence[int]) -> None:
        """Gives up a sequence for which experts compute no probabilities."""
        names = ", ".join(self._pool.names[expert] for expert in experts) or "the mixture"
        message = f"{names}: no probabilities (NaN or infinity) after {len(sequence.ids)} tokens"
        self._reader.fail(sequence, FloatingPointError(message))

    def take_failed(self) -> list[tuple[RunningSequence, Exception]]:
        """Removes the sequences that cannot be continued; returns them with a MemoryError where
        there is no memory, and a FloatingPointError where an expert computes no probabilities."""
        failed, self._reader.failed = self._reader.failed, []
        for sequence, _ in failed:
            self.remove(sequence)
        return failed

    def _set_likelihoods(
        self, distribution: Float[Array, "B V"], tokens: Int[np.ndarray, " B"]
    ) -> None:
        """Sets how probable these tokens are, for the sequences for which that is wanted."""
        counts = ((sequence, sequence.request.alternatives) for sequence in self.drawing)
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
        if self._pool.limits.route_per == "token":
            sequence.log_weights = None

    def next_log_probabilities(
        self, tokens_read: float = 0
    ) -> tuple[Float[Array, "B V"], Float[np.ndarray, "drawing M"]]:
        """Log probabilities of the next token, by the `row` of each sequence that is `drawing`
        (other rows mean nothing), and the weights of the models for each of these. tokens_read: as
        in `step`."""
        # In alternating order: the expert that was run last, which is on the device, is run first.
        self._order.reverse()
        failed = [sequence for sequence, _ in self._reader.failed]
        sequences = [sequence for sequence in self.sequences if sequence not in failed]
        self._weigh(sequences)
        self._reader.begin_step(sequences, tokens_read)
        self._reader.read(sequences, self._order)
        decided = self._weigh_by_likelihood(sequences)
        # Experts with vocabularies of their own have read for the router in these alone.
        if any(not one.ready for one in decided):
            self._reader.read(sequences, self._order, decided)
        failed = [sequence for sequence, _ in self._reader.failed]
        self.drawing = [
            one
            for one in sequences
            if one.log_weights is not None and one.ready and one not in failed
        ]
        found = [sequence.log_weights for sequence in self.drawing]
        log_weights = np.asarray(found).reshape(-1, len(self._pool.names))
        return self._mixed(log_weights), np.exp(log_weights)

    def _mixed(self, log_weights: Float[np.ndarray, "drawing M"]) -> Float[Array, "B V"]:
        """Log probabilities of the next token by all experts with weight."""
        mixed = _empty_mixture(self._rows, self._pool.model.vocabulary_size)
        penalties = self._penalties()
        for expert in self._order:
            by_block: dict[Block, list[tuple[RunningSequence, float]]] = {}
            for number in np.flatnonzero(np.isfinite(log_weights[:, expert])).tolist():
                sequence = self.drawing[number]
                some = by_block.setdefault(sequence.texts[expert].block, [])
                some.append((sequence, log_weights[number, expert]))
            for block, some in by_block.items():
                # By row of the block; rows without weight are written nowhere.
                rows = np.full(len(block.texts), self._rows, np.int32)
                weights = np.zeros(len(block.texts), np.float32)
                for sequence, weight in some:
                    index = sequence.texts[expert].index
                    rows[index], weights[index] = sequence.row, weight
                mixed = _added(mixed, block.logits, rows, weights, *penalties)
        return mixed

    def _weigh(self, sequences: Sequence[RunningSequence]) -> None:
        """Decides the weights of sequences for which that needs no log-likelihoods."""
        undecided = [s for s in sequences if s.log_weights is None and not s.scoring]
        for some in _by_router(undecided):
            for sequence in some:
                sequence.update_state()
            router = some[0].router
            needed = router.needs_log_likelihoods(np.stack([one.state for one in some]))
            experts, own = range(router.experts), self._pool.own
            readings = [-1 - expert if expert in own else expert for expert in experts]
            for sequence in (one for one, needs in zip(some, needed) if needs):
                sequence.scoring, sequence.required = True, readings
                if sequence.log_likelihoods is None:
                    sequence.log_likelihoods = np.zeros(router.experts)
            self._decide([one for one, needs in zip(some, needed) if not needs])

    def _weigh_by_likelihood(self, sequences: Sequence[RunningSequence]) -> list[RunningSequence]:
        """Decides the weights of sequences for which that needs log-likelihoods, where these are
        complete; returns these sequences."""
        found = []
        for one in (one for one in sequences if one.scoring and one.ready):
            assert one.log_likelihoods is not None
            if lacking := np.flatnonzero(np.isnan(one.log_likelihoods)).tolist():
                self._fail(one, lacking)
            else:
                found.append(one)
        for some in _by_router(found):
            self._decide(some)
        return found

    def _decide(self, sequences: Sequence[RunningSequence]) -> None:
        """Decides the weights of some sequences of one router."""
        if not sequences:
            return

        def log_likelihoods(_: Bool[np.ndarray, " _"]) -> np.ndarray:
            found = (one.log_likelihoods for one in sequences)
            return np.stack([own for own in found if own is not None])

        router, states = sequences[0].router, np.stack([one.state for one in sequences])
        found = decide(router, states, log_likelihoods, self._pool.limits, len(self._pool.names))
        for sequence, weights, name in zip(sequences, found.log_weights, found.routers):
            sequence.log_weights = weights
            sequence.decisions[name] += 1
            sequence.scoring, sequence.required = False, _weighed(weights)

    def _penalties(self) -> tuple[Array | None, np.ndarray | None]:
        """The ids in each row and their repetition penalties; None where there is no penalty."""
        some = [s for s in self.drawing if s.request.sampling.repetition_penalty != 1]
        if not some:
            return None, None
        penalties = np.ones(self._rows, np.float32)
        for sequence in some:
            penalties[sequence.row] = sequence.request.sampling.repetition_penalty
        seen = self._seen.of(self._rows, {one.row: (one, one.ids) for one in some})
        return seen, penalties


def _weighed(log_weights: Float[np.ndarray, " M"]) -> list[int]:
    return np.flatnonzero(np.isfinite(log_weights)).tolist()


def _by_router(sequences: Sequence[RunningSequence]) -> list[list[RunningSequence]]:
    """Sequences with the same router, together."""
    found: dict[int, list[RunningSequence]] = {}
    for sequence in sequences:
        found.setdefault(id(sequence.router), []).append(sequence)
    return list(found.values())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_mixture(rows: int, vocabulary: int) -> Array:
    return jnp.full((rows, vocabulary), -jnp.inf)


@functools.partial(jax.jit, donate_argnums=0)
def _added(mixed, logits, rows, log_weights, seen, penalties):
    """log(exp(mixed) + w p) in some rows."""
    if seen is not None:
        at = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
        logits = penalised(logits, at(seen), at(penalties))
    weighted = log_weights[:, None] + jax.nn.log_softmax(logits)
    before = mixed.at[rows].get(mode="clip")
    return mixed.at[rows].set(jnp.logaddexp(before, weighted), mode="drop")
