"""Continuations of a batch of texts by an ensemble, token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.inference.decoding import Reader, padded
from xelm.inference.routing import keep_largest
from xelm.inference.sampling import Sampling, choose, penalised
from xelm.inference.scoring import check_ids

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble

Stream = Callable[[int, str], object]
"""Told the number of a prompt and the next piece of its continuation."""
# Enough for the tokenizer to see that a continuation stands in the middle of a text.
IDS_BEFORE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A continuation."""

    text: str
    """Without the prompt."""
    ids: Sequence[int]
    """Its subword ids."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Expert -> its mean routing weight over the generated tokens."""


def generate(
    ensemble: "Ensemble",
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    languages: Sequence[str | None],
    stream: Stream = lambda number, piece: None,
) -> list[Generation]:
    """Continues each text of ids until an end token, a stop string or `max_new_tokens`. A prompt
    that leaves no room for so many is refused."""
    if not ensemble.model.causal:
        raise UserError("these experts are encoders, which continue no text; use fill")
    if not prompts:
        return []
    _check(ensemble, prompts, sampling.max_new_tokens)
    batch = Batch(ensemble, prompts, languages, sampling)
    replies = [Reply(ensemble.tokenizer, ids, sampling.stop) for ids in prompts]
    # Of the tokens so far, and how many they are.
    weights, counts = np.zeros((len(prompts), len(ensemble.names))), np.zeros((len(prompts), 1))
    for step in range(sampling.max_new_tokens):
        going_on = np.asarray([not reply.finished for reply in replies])
        distribution, log_weights = batch.following(going_on)
        tokens = np.asarray(choose(distribution, sampling, step))
        for number, reply in enumerate(replies):
            if reply.finished:
                continue
            weights[number] += np.exp(log_weights[number])
            counts[number] += 1
            if int(tokens[number]) in ensemble.tokenizer.end_ids:
                reply.finished = True
            else:
                stream(number, reply.add(int(tokens[number])))
        if all(reply.finished for reply in replies):
            break
        if step + 1 < sampling.max_new_tokens:
            batch.observe(tokens)
    for number, reply in enumerate(replies):
        stream(number, reply.rest())
    return [
        Generation(
            text=reply.text,
            ids=reply.ids,
            weights=dict(zip(ensemble.names, map(float, mean))),
        )
        for reply, mean in zip(replies, weights / counts)
    ]


class Batch:
    """Texts that grow, with what every expert has read of them. An expert reads a text only once it
    carries weight there, and goes on with it from then."""

    def __init__(
        self,
        ensemble: "Ensemble",
        prompts: Sequence[Sequence[int]],
        languages: Sequence[str | None],
        sampling: Sampling,
    ):
        self.ensemble = ensemble
        self.texts = [np.asarray(ids, np.int64) for ids in prompts]
        self._router = ensemble.router
        self._routes = [self._router.route(language) for language in languages]
        self._readers: dict[int, list[tuple[np.ndarray, Reader]]] = {}
        self._room = sampling.max_new_tokens
        self._penalty = sampling.repetition_penalty
        self._seen = None
        if self._penalty != 1:
            seen = np.zeros((len(prompts), ensemble.model.vocabulary_size), bool)
            for row, ids in zip(seen, self.texts):
                row[ids] = True
            self._seen = jnp.asarray(seen)
        everyone, rows = range(len(ensemble.names)), np.arange(len(prompts))
        heard = [np.full((len(everyone), len(ids)), np.nan) for ids in self.texts]
        if self._router.needs_scores:
            for expert in everyone:
                for row, scores in zip(rows, self._begin(expert, rows, scored=True)):
                    heard[row][expert] = scores
        for route, ids, scores in zip(self._routes, self.texts, heard):
            # The first token is not predicted by anyone, and starts every text.
            for position in range(1, len(ids)):
                route.observe(int(ids[position]), scores[:, position])

    def following(
        self, asked: Bool[np.ndarray, " B"]
    ) -> tuple[Float[Array, "B V"], Float[np.ndarray, "B E"]]:
        """Log probabilities of the next token of each text that is `asked`, and the log weights of
        the experts."""
        weights = np.stack([route.now() for route in self._routes])
        weights = keep_largest(weights, self.ensemble.top_m)
        mixed = jnp.full((len(self.texts), self.ensemble.model.vocabulary_size), -jnp.inf)
        for expert in range(weights.shape[1]):
            needed = np.flatnonzero(np.isfinite(weights[:, expert]) & asked)
            known = [row for rows, _ in self._readers.get(expert, ()) for row in rows]
            new = np.setdiff1d(needed, known)
            if len(new):
                self._begin(expert, new)
            for rows, reader in self._readers.get(expert, ()):
                mixed = _mixed(mixed, rows, weights[rows, expert], self._scores(rows, reader))
        return mixed, weights

    def observe(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Appends a token to each text."""
        tokens = np.asarray(tokens)
        scores = np.full((len(self.texts), len(self.ensemble.names)), np.nan)
        for expert, readers in self._readers.items():
            for rows, reader in readers:
                found = reader.read(
                    [tokens[row : row + 1] for row in rows], scored=self._router.needs_scores
                )
                scores[rows, expert] = np.ravel(found) if found else np.nan
        for row, token in enumerate(tokens):
            self._routes[row].observe(int(token), scores[row])
            self.texts[row] = np.append(self.texts[row], token)
        if self._seen is not None:
            self._seen = self._seen.at[jnp.arange(len(tokens)), tokens].set(True)

    def _begin(self, expert: int, rows: np.ndarray, *, scored: bool = False) -> list[np.ndarray]:
        """Lets an expert read these texts so far."""
        texts = [self.texts[row] for row in rows]
        slots = padded(padded(max(map(len, texts))) + self._room)
        reader = Reader(self.ensemble.model, self.ensemble.parameters[expert], len(rows), slots)
        self._readers.setdefault(expert, []).append((rows, reader))
        return reader.read(texts, scored=scored)

    def _scores(self, rows: np.ndarray, reader: Reader) -> Array:
        if self._seen is None:
            return reader.logits
        return penalised(reader.logits, self._seen[rows], jnp.float32(self._penalty))


@jax.jit
def _mixed(mixed, rows, log_weights, logits):
    """log(exp(mixed) + w p) in some rows."""
    weighted = jnp.asarray(log_weights, jnp.float32)[:, None] + jax.nn.log_softmax(logits)
    return mixed.at[rows].set(jnp.logaddexp(mixed[rows], weighted))


class Reply:
    """The text of a continuation, which grows by ids and is told in pieces that are final."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self.ids: list[int] = []
        self.text = ""
        """All of it so far, up to a stop string."""
        self.finished = False
        self._tokenizer, self._stop = tokenizer, stop
        # Decoded behind the prompt: a leading space of the continuation would be lost alone.
        self._before = _whole_characters(tokenizer, list(prompt))
        self._skipped = len(tokenizer.decode(self._before))
        self._told = ""

    def add(self, token: int) -> str:
        """One more id; returns what is certain by now and was not told before."""
        self.ids.append(token)
        text = self._tokenizer.decode([*self._before, *self.ids])[self._skipped :]
        # What was told stays, even if more bytes now make nonsense of those before them.
        text = self._told + text[len(self._told) :]
        ends = [place for place in map(text.find, self._stop) if place >= 0]
        if ends:
            self.finished = True
            self.text = text[: min(ends)]
            return self.rest()
        self.text = text
        # A character may lack bytes yet, and the end may be the beginning of a stop string.
        certain = len(text.rstrip("\ufffd"))
        for stop in self._stop:
            for size in range(1, len(stop)):
                if text.endswith(stop[:size]):
                    certain = min(certain, len(text) - size)
        return self._tell(certain)

    def rest(self) -> str:
        """What was not told yet, at the end; a last character that lacks bytes is left out."""
        certain = len(self.text.rstrip("\ufffd"))
        self.text = self.text[: max(certain, len(self._told))]
        return self._tell(len(self.text))

    def _tell(self, end: int) -> str:
        piece = self.text[len(self._told) : end]
        self._told += piece
        return piece


def _whole_characters(tokenizer: Tokenizer, prompt: list[int]) -> list[int]:
    """The last ids of a prompt, from the beginning of a character, which may have four bytes; all
    of them where none is found."""
    for size in range(IDS_BEFORE, IDS_BEFORE + 4):
        if "\ufffd" not in tokenizer.decode(prompt[-size:]):
            return prompt[-size:]
    return prompt


def room(ensemble: "Ensemble", prompts: Sequence[Sequence[int]]) -> int:
    """Tokens by which all of these texts can grow."""
    return ensemble.model.max_length - max(map(len, prompts), default=0)


def _check(ensemble: "Ensemble", prompts: Sequence[Sequence[int]], new: int) -> None:
    for ids in prompts:
        check_ids(np.asarray(ids), ensemble.model)
    longest, limit = max(map(len, prompts)), ensemble.model.max_length
    if longest + new > limit:
        # The token that starts every text is ours, not the user's.
        raise UserError(
            f"the prompt has {longest - 1} tokens, which leaves this model of {limit} room for "
            f"{max(0, limit - longest)} new ones; got max_new_tokens={new}"
        )
