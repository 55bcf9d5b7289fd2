"""The desk: takes texts to be continued, and has an engine continue them side by side, in a thread
of its own. Texts join and leave at any token (continuous batching: Yu et al. 2022, Orca)."""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from clustering.errors import UserError
from xelm.inference.generation import Continuation, Generator, check_prompt
from xelm.inference.prompt_scoring import score_prompts
from xelm.inference.sampling import TokenLikelihood
from xelm.inference.sampling_params import SamplingParams
from xelm.serving.offer import Offer

TOKENS_SCORED = 4096
"""Tokens of prompts that are scored at a time, at most, or one prompt."""
TOKENS_SCORED_BESIDE = 512
"""The same while texts are continued, which wait for their next token meanwhile."""
LATE = "its time was up while it waited"
"""Why a text fails of which nothing was said in its time."""


@dataclass(frozen=True, slots=True)
class Read:
    """The prompt was read, and its tokens are scored."""

    likelihoods: Sequence[TokenLikelihood]
    """One of each token."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of a continuation."""

    text: str
    weights: Mapping[str, float]
    """Model -> how much it spoke for the last token of the piece."""
    router: str
    """The router that decided most tokens so far."""
    likelihoods: Sequence[TokenLikelihood] = ()
    """The tokens since the last piece, where their log probabilities are wanted."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a continuation."""

    reason: Literal["stop", "length"]
    tokens: int
    """That were drawn."""
    weights: Mapping[str, float]
    """Model -> its mean weight over them."""
    router: str
    """The router that decided most of them."""
    likelihoods: Sequence[TokenLikelihood] = ()
    """The tokens since the last piece, where their log probabilities are wanted."""


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no more of a continuation."""

    status: int
    """Of HTTP."""
    message: str


Event = Read | Piece | Ended | Failed


class Busy(Exception):
    """More texts wait than may."""


class Closed(Exception):
    """Nobody serves any more."""


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """A text that is to be continued."""

    model: str
    """A name that is offered."""
    ids: Sequence[int]
    """Of the prompt, as they are read."""
    sampling: SamplingParams
    language: str | None = None
    """That it is told to be in."""
    user_mask: Sequence[bool] | None = None
    """For each id, whether the router goes by it; None: by all."""
    number: int = 0
    """Among the continuations of its request, which differ by it."""
    alternatives: int | None = None
    """Likeliest tokens that are named with the log probability of each token; None: no log
    probabilities are wanted."""
    scores_prompt: bool = False
    """Whether those of the prompt's tokens are wanted, too."""
    draws: bool = True
    """Whether any token is to be drawn."""
    tell: Callable[[Event], None]
    """Called for each event, one after the other."""
    until: float
    """When its time is up, by time.monotonic."""
    cancelled: bool = False

    @property
    def new_tokens(self) -> int:
        """How many may be drawn."""
        return self.sampling.max_new_tokens if self.draws else 0


@dataclass(eq=False, slots=True)
class _Table:
    """Where texts are continued by one offer."""

    offer: Offer
    generator: Generator
    tickets: dict[Continuation, Ticket] = field(default_factory=dict)
    to_score: deque[Ticket] = field(default_factory=deque)
    """Those whose prompts are scored before they are continued; each until it is."""

    @property
    def busy(self) -> int:
        """Texts that are in work."""
        return len(self.tickets) + len(self.to_score)


def _table(offer: Offer) -> _Table:
    ensemble = offer.ensemble
    return _Table(offer, Generator(ensemble, ensemble.router, ensemble.limits))


class Desk:
    """Who waits, who is served, and by whom."""

    def __init__(
        self,
        offer: Offer,
        *,
        most_texts: int,
        most_waiting: int,
        post: Callable[[Callable[[], None]], object],
    ):
        """most_texts: that are continued at once. most_waiting: others that may wait. post: has
        something called in the thread of those who wait for events."""
        self._most_texts, self._most_waiting, self._post = most_texts, most_waiting, post
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._tables = [_table(offer)]
        self._events: list[tuple[Ticket, Event]] = []
        self._closing = False
        self.preparing = False
        """Whether another offer is being prepared: files are checked, routers fitted."""
        self.count: Callable[[str, int], object] = lambda kind, tokens: None
        """Told how many tokens of a kind, "prompt" or "completion", were read or drawn."""
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)

    def start(self) -> None:
        """Begins to serve."""
        self._thread.start()

    @property
    def offer(self) -> Offer:
        """What new texts are continued by."""
        return self._tables[-1].offer

    @property
    def alive(self) -> bool:
        """Whether anybody serves."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are continued now."""
        return sum(table.busy for table in list(self._tables))

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Takes the texts of a request, all or none. Busy if too many wait; Closed at the end;
        UserError for a text that cannot be continued."""
        offer = self.offer
        for ticket in tickets:
            check_prompt(offer.ensemble, ticket.ids, ticket.new_tokens)
            if ticket.model in offer.routers:  # otherwise it has just been withdrawn
                offer.routers[ticket.model].start(ticket.language)
        with self._changed:
            free = self._most_texts - self.running
            dead = self._thread.ident is not None and not self._thread.is_alive()
            if self._closing or dead:
                raise Closed
            if len(self._waiting) + len(tickets) > self._most_waiting + free:
                raise Busy
            self._waiting += tickets
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Gives up what is left of some texts; their places are free."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._changed.notify()

    def exchange(self, offer: Offer) -> None:
        """From now on new texts are continued by this; those under way end as they began."""
        with self._changed:
            self._tables.append(_table(offer))
            self._changed.notify()

    def close(self) -> None:
        """Ends. Whoever is still served is left: to stop in peace, first wait for those who ask."""
        with self._changed:
            self._closing = True
            for ticket in [*self._everyone(), *self._waiting]:
                ticket.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                if not self._admit():
                    return
                for table in list(self._tables):
                    if table.to_score:
                        self._score(table)
                    if table.tickets:
                        self._step(table)
            except Exception as error:
                self._lose(error)
            self._tell()

    def _admit(self) -> bool:
        """Waits until there is something to do, gives seats to those who wait, and takes away those
        who left. False when all is done."""
        with self._changed:
            while not self._waiting and not self.running:
                self._retire()
                if self._closing:
                    return False
                self._changed.wait()
            now = time.monotonic()
            for table in self._tables:
                for continuation, ticket in list(table.tickets.items()):
                    if ticket.cancelled:
                        del table.tickets[continuation]
                        table.generator.remove(continuation)
                late = [t for t in table.to_score if t.until < now and not t.cancelled]
                self._events += [(ticket, Failed(503, LATE)) for ticket in late]
                table.to_score = deque(
                    t for t in table.to_score if t.until >= now and not t.cancelled
                )
            self._retire()
            kept = deque()
            for ticket in self._waiting:
                if ticket.cancelled:
                    continue
                if ticket.until < now:
                    self._events.append((ticket, Failed(503, LATE)))
                elif self.running < self._most_texts:
                    self._seat(ticket)
                else:
                    kept.append(ticket)
            self._waiting = kept
        return True

    def _seat(self, ticket: Ticket) -> None:
        """Takes up a text that waited."""
        table = self._tables[-1]
        self.count("prompt", len(ticket.ids))
        if ticket.scores_prompt and ticket.model in table.offer.routers:
            table.to_score.append(ticket)
        else:
            self._begin(table, ticket)

    def _score(self, table: _Table) -> None:
        """Scores some of the prompts that are to be scored, and begins to continue their texts.
        Not all at once: other texts wait for their next token meanwhile."""
        part, tokens, offer = [], 0, table.offer
        beside = any(table.tickets for table in self._tables)
        most = TOKENS_SCORED_BESIDE if beside else TOKENS_SCORED
        for ticket in table.to_score:
            tokens += len(ticket.ids)
            if part and tokens > most:
                break
            part.append(ticket)
        found = score_prompts(
            offer.ensemble,
            offer.ensemble.limits,
            [ticket.ids for ticket in part],
            [offer.routers[ticket.model] for ticket in part],
            [ticket.language for ticket in part],
            max(ticket.alternatives or 0 for ticket in part),
        )
        for ticket, text in zip(part, found):
            count = ticket.alternatives or 0
            read = Read([token._replace(top=token.top[:count]) for token in text.tokens])
            self._events.append((ticket, read))
            weights = {name: round(weight, 4) for name, weight in text.weights.items()}
            weights = {name: weight for name, weight in weights.items() if weight}
            self._begin(table, ticket, Ended("length", 0, weights, text.router))
            table.to_score.popleft()

    def _begin(self, table: _Table, ticket: Ticket, read: Ended | None = None) -> None:
        """Has the engine continue a text. read: its end, if no token is to be drawn."""
        if not ticket.draws:
            self._events.append((ticket, read or Ended("length", 0, {}, "")))
            return
        router = table.offer.routers.get(ticket.model)
        if router is None:  # withdrawn while the text waited
            gone = Failed(404, f"there is no model {ticket.model!r} any more")
            self._events.append((ticket, gone))
            return
        try:
            continuation = table.generator.add(
                ticket.ids,
                ticket.sampling,
                language=ticket.language,
                number=ticket.number,
                router=router,
                alternatives=ticket.alternatives,
                user_mask=ticket.user_mask,
                deadline=ticket.until,
            )
        except UserError as error:
            self._events.append((ticket, Failed(400, str(error))))
            return
        table.tickets[continuation] = ticket

    def _retire(self) -> None:
        """Clears the tables of earlier offers once nobody sits there."""
        former = [table for table in self._tables[:-1] if not table.busy]
        for table in former:
            self._tables.remove(table)
        if former and len(self._tables) == 1:
            evict = getattr(self.offer.ensemble.parameters, "evict_others", None)
            if evict is not None:
                evict()

    def _step(self, table: _Table) -> None:
        deltas = table.generator.step()
        self.count("completion", len(deltas))
        names = table.offer.ensemble.names
        for one, text, weights in deltas:
            ticket, routing = table.tickets[one], one.sequence.routing
            if text:
                piece = Piece(text, _weights(names, weights), routing, one.take_likelihoods())
                self._events.append((ticket, piece))
            if one.finish_reason:
                mean, tokens = _weights(names, one.mean_weights), one.sequence.new_tokens
                untold = one.take_likelihoods()
                end = Ended(one.finish_reason, tokens, mean, routing, untold)
                self._events.append((ticket, end))
                del table.tickets[one]

    def _lose(self, error: Exception) -> None:
        """Fails all that is under way: nothing of what an error left behind can be relied on."""
        traceback.print_exc(file=sys.stderr)
        tired = "RESOURCE_EXHAUSTED" in str(error)
        why = "the memory of the device is used up" if tired else "continuing failed"
        failed = Failed(503 if tired else 500, f"{why}; try again")
        with self._changed:
            lost = list(dict.fromkeys([*self._everyone(), *self._waiting]))
            self._waiting.clear()
            self._tables = [_table(self.offer)]
        self._events += [(ticket, failed) for ticket in lost]

    def _everyone(self) -> list[Ticket]:
        """Whose texts are in work."""
        return [t for table in self._tables for t in [*table.tickets.values(), *table.to_score]]

    def _tell(self) -> None:
        """Passes on what happened."""
        events, self._events = self._events, []
        if not events:
            return

        def tell() -> None:
            for ticket, event in events:
                if not ticket.cancelled:
                    ticket.tell(event)

        self._post(tell)


def _weights(names: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    """Those that are not nothing."""
    return {names[i]: round(float(weights[i]), 4) for i in np.flatnonzero(weights >= 5e-4).tolist()}
