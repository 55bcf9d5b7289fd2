"""The ensemble: many experts, one distribution. p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from clustering.errors import UserError
from xelm.inference.fill import Filling, fill
from xelm.inference.generation import Generation, Stream, generate
from xelm.inference.pool import Pool
from xelm.inference.predictions import predict_documents
from xelm.inference.route import Decision, Router, Walk, mixture, routing_mask
from xelm.inference.routing import Routing, RoutingLimits
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.scoring import check_ids, score_documents, targets, unpredicted

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or the messages of a chat: {"role": "user", "content": "Habari?"}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How probable some texts are to an ensemble."""

    nats: Float[np.ndarray, " texts"]
    """-log p of each text and its end."""
    tokens: Int[np.ndarray, " texts"]
    """Number of predicted tokens of each text, its end included."""
    weights: Mapping[str, Float[np.ndarray, " texts"]]
    """Model -> its mean routing weight over each text."""
    routing: Sequence[str]
    """The router that decided most tokens of each text, as in `Generation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihoods:
    """How probable some continuations are to an ensemble."""

    nats: Float[np.ndarray, " texts"]
    """-log p of each continuation, its end not included."""
    greedy: Bool[np.ndarray, " texts"]
    """Whether each token of the continuation is the likeliest one."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Ensemble(Pool):
    """A pool of experts with a router over them: scores, generates and fills text."""

    router: Router
    """Weighs the experts."""
    limits: RoutingLimits = field(default_factory=RoutingLimits)
    """How many of the weighed experts are read, and how often the router decides; may be the whole
    `Routing` that the router was made by."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How continuations are drawn unless a call says otherwise: those of the seed's
    generation_config.json."""

    def __repr__(self) -> str:
        limits, router = self.limits, type(self.router).__name__
        routing = limits.name if isinstance(limits, Routing) else router
        return f"Ensemble({', '.join(self.names)}; routing={routing!r}, dtype={self.dtype!r})"

    def score(
        self,
        texts: Sequence[str],
        languages: Sequence[str | None] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> Scores:
        """-log p of each text in nats, with the routing weights.

        languages: of each text, where it is known; if an expert serves it, that expert alone reads
        the text. contexts: text that each text continues without a break. Both become tokens as one
        text, of which those with any character of the text are counted, each predicted from at
        least half of `window` where there is as much. Texts alone are read as `evaluate` reads
        them.
        """
        languages = _as_many("languages", languages, texts)
        if contexts is None:
            encoded = [(ids, 0) for ids in self.tokenizer.encode(texts)]
        else:
            _as_many("contexts", contexts, texts)
            encoded = [self.tokenizer.encode_after(c, x) for c, x in zip(contexts, texts)]
        ids = [np.asarray(document, np.int64) for document, _ in encoded]
        # The first token is predicted only if one stands before it.
        first = unpredicted(self.model, self.tokenizer.text_format)
        before = [max(first, context) for _, context in encoded]
        walks = []
        for context, document, language in zip(before, ids, languages):
            target = targets(self.model, document, self.tokenizer.text_format)
            at = self._positions(context, len(document), len(target))
            walks.append(Walk.along(self.router, language, target, at))
        reading = self._reading
        if contexts is not None:
            reading |= {"stride": self.overlapping_stride}
        decisions, scores, read = self._decisions(ids, walks, reading)
        weighed = [np.flatnonzero(np.isfinite(d.log_weights).any(axis=0)) for d in decisions]
        missing = [np.setdiff1d(some, known) for some, known in zip(weighed, read)]
        self._score(ids, scores, missing, reading)
        weights = [np.exp(d.log_weights).sum(axis=0) / max(1, len(d.routers)) for d in decisions]
        nats = [
            -mixture(decision.log_weights, found[:, context:]).sum()
            for decision, found, context in zip(decisions, scores, before)
        ]
        return Scores(
            nats=np.asarray(nats),
            tokens=np.asarray([len(walk.positions) for walk in walks]),
            weights=dict(zip(self.names, np.asarray(weights).reshape(-1, len(self.names)).T)),
            routing=[decision.router for decision in decisions],
        )

    def likelihoods(
        self,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        languages: Sequence[str | None] | None = None,
        user_masks: Sequence[Sequence[bool] | None] | None = None,
    ) -> Likelihoods:
        """-log p of continuations that do not end. For decoders.

        contexts, continuations: ids, read as they are; each context has at least one. user_masks:
        by which ids of each context the router goes, as in `Engine.add`; None: by all.
        """
        if not self.model.causal:
            raise UserError("these experts are encoders, which continue no text")
        _as_many("continuations", continuations, contexts)
        if not all(map(len, contexts)):
            raise UserError("a continuation needs at least one id before it, such as the start")
        languages = _as_many("languages", languages, contexts)
        user_masks = _as_many("user_masks", user_masks, contexts)
        ids = [np.asarray([*c, *x], np.int64) for c, x in zip(contexts, continuations)]
        walks = []
        for context, document, language, user in zip(contexts, ids, languages, user_masks):
            check_ids(document, self.model)
            mask = np.ones(len(document), bool)
            mask[: len(context)] = routing_mask(self.tokenizer, context, user)
            at = self._positions(len(context), len(document), len(document))
            walks.append(Walk.along(self.router, language, document, at, mask))
        as_given = replace(self.tokenizer.text_format, start_id=None)
        reading = self._reading | {"stride": self.overlapping_stride, "text_format": as_given}
        decisions, *_ = self._decisions(ids, walks, reading)
        nothing = np.zeros((0, len(self.names)))
        found = predict_documents(
            self.model,
            [partial(self.parameters.__getitem__, number) for number in range(len(self.names))],
            ids,
            [document[len(context) :] for context, document in zip(contexts, ids)],
            np.concatenate([nothing, *(decision.log_weights for decision in decisions)])[None],
            places=[slice(len(c), len(document)) for c, document in zip(contexts, ids)],
            alone=False,
            **reading,
        )
        ends = np.cumsum([0, *map(len, continuations)])
        parts = [slice(first, last) for first, last in pairwise(ends)]
        return Likelihoods(
            nats=np.asarray([-found.log_probability[0, p].sum(dtype=float) for p in parts]),
            greedy=np.asarray([bool(found.correct[0, p].all()) for p in parts]),
        )

    def _decisions(
        self, ids: Sequence[np.ndarray], walks: Sequence[Walk], reading: Mapping[str, Any]
    ) -> tuple[list[Decision], list[np.ndarray], list[np.ndarray]]:
        """Weights of the models along each document; the models' scores of it, [M, n + 1], as far
        as the router needed them; and the models that it needed."""
        scores = [np.zeros((len(self.names), len(i) + self.model.causal)) for i in ids]
        experts = np.arange(self.router.experts)
        read = [experts if walk.needs_log_likelihoods else experts[:0] for walk in walks]
        self._score(ids, scores, read, reading)
        decisions = [
            walk.decide(found[experts, : len(walk.states) - 1], self.limits, len(self.names))
            for walk, found in zip(walks, scores)
        ]
        return decisions, scores, read

    @property
    def _reading(self) -> dict[str, Any]:
        """Options of `score_documents`."""
        return {
            "text_format": self.tokenizer.text_format,
            "context_length": self.window,
            "stride": self.stride,
            "dtype": self.dtype,
        }

    def _positions(self, context: int, document: int, target: int) -> np.ndarray:
        """Index of the router's state that decides each token after the context."""
        if self.limits.route_per == "token":
            return np.arange(context, target)
        at = context if self.limits.route_per == "prompt" else document
        return np.full(target - context, at)

    def _score(
        self,
        ids: Sequence[np.ndarray],
        scores: Sequence[np.ndarray],
        models: Sequence[np.ndarray],
        reading: Mapping[str, Any],
    ) -> None:
        """Fills the rows of each document's `scores`, [M, n + 1], for these models of it."""
        for model in range(len(self.names)):
            chosen = [number for number, some in enumerate(models) if model in some]
            if not chosen:
                continue
            documents = [ids[number] for number in chosen]
            found = score_documents(self.model, self.parameters[model], documents, **reading)
            for number, row in zip(chosen, found):
                scores[number][model] = row

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] | None = None,
        random_seed: int | None = None,
        language: str | None = None,
        stream: Callable[[str], object] = lambda piece: None,
    ) -> Generation:
        """Continues a text or a chat. `SamplingParams` says what each option does; None is that of
        `sampling`. language: of the text, if it is known; if an expert serves it, that expert alone
        is read. stream: called with each piece of the continuation as it comes."""
        given = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "stop": None if stop is None else tuple(stop),
            "random_seed": random_seed,
        }
        given = {name: value for name, value in given.items() if value is not None}
        (generation,) = self._generate(
            [prompt],
            lambda sampling: replace(sampling, **given),
            [language],
            lambda _, piece: stream(piece),
        )
        return generation

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        languages: Sequence[str | None] | None = None,
        stream: Stream = lambda number, piece: None,
    ) -> list[Generation]:
        """Continues several texts or chats in parallel. languages: of each, where it is known.
        stream: called with the number of a prompt and the next piece of its continuation."""
        languages = _as_many("languages", languages, prompts)
        return self._generate(prompts, lambda default: sampling or default, languages, stream)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        choose: Callable[[SamplingParams], SamplingParams],
        languages: Sequence[str | None],
        stream: Stream,
    ) -> list[Generation]:
        """Continues prompts. choose: makes the parameters out of `sampling`, in which the number of
        new tokens is one for which all prompts leave space, and at least one."""
        encoded = [
            (self.tokenizer.begin(prompt), None)
            if isinstance(prompt, str)
            else self.tokenizer.chat(prompt)
            for prompt in prompts
        ]
        ids, masks = [ids for ids, _ in encoded], [mask for _, mask in encoded]
        most = max(1, self.longest - max(map(len, ids), default=0))
        most = min(self.sampling.max_new_tokens, most)
        sampling = choose(replace(self.sampling, max_new_tokens=most))
        return generate(self, self.router, self.limits, ids, sampling, languages, stream, masks)

    def fill(self, text: str, *, count: int = 5, language: str | None = None) -> Filling:
        """The `count` most probable tokens at each mask of a text. For encoders. The router goes by
        all that is not masked."""
        return fill(self, self.router, self.limits, text, count, language)


def _as_many(name: str, given: Sequence[Any] | None, texts: Sequence[Any]) -> Sequence[Any]:
    """As many values as texts; None stands for None for each of them."""
    if given is None:
        return [None] * len(texts)
    if len(given) != len(texts):
        raise UserError(f"there must be as many {name} as texts, {len(texts)}; got {len(given)}")
    return given
