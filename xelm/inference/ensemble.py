"""The ensemble: many experts, one distribution. p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.inference.fill import Filling, fill
from xelm.inference.generation import Generation, Stream, generate
from xelm.inference.pool import Pool
from xelm.inference.prompt_scoring import score_ends
from xelm.inference.route import Walk, mixture, routing_mask
from xelm.inference.routing import Routing
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.scoring import check_ids, decide_along, score_models, targets, unpredicted
from xelm.inference.vocabularies import choose
from xelm.inference.work import finish

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
    """A pool of experts that scores, generates and fills text."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Defaults of generation: those of the seed's generation_config.json."""
    further: "Sequence[Ensemble]" = ()
    """As in `Pool`."""

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
        least half of `window` where there is as much. Texts alone are read as by `evaluate`. Where
        experts have vocabularies of their own, `choose` says in which each text is read, by the
        context if there is one."""
        languages = _as_many("languages", languages, texts)
        if contexts is not None:
            _as_many("contexts", contexts, texts)
        pools = self._pools(texts if contexts is None else contexts, languages)
        found: list[tuple[Any, ...]] = [()] * len(texts)
        for pool, numbers in _grouped(pools):
            given = contexts and [contexts[number] for number in numbers]
            parts = pool._scored(
                [texts[number] for number in numbers],
                [languages[number] for number in numbers],
                given,
            )
            for number, one in zip(numbers, parts):
                found[number] = one
        nats, tokens, weights, routing = zip(*found) if found else ((), (), (), ())
        return Scores(
            nats=np.asarray(nats),
            tokens=np.asarray(tokens, int),
            weights=dict(zip(self.names, np.asarray(weights).reshape(-1, len(self.names)).T)),
            routing=list(routing),
        )

    def _pools(self, texts: Sequence[str], languages: Sequence[str | None]) -> "list[Ensemble]":
        """The ensemble in whose vocabulary each text is read."""
        if not self.further:
            return [self] * len(texts)
        start = self.tokenizer.text_format.start_ids
        return choose(self, [[*start, *ids] for ids in self.tokenizer.encode(texts)], languages)

    def _scored(
        self,
        texts: Sequence[str],
        languages: Sequence[str | None],
        contexts: Sequence[str] | None,
    ) -> list[tuple[float, int, np.ndarray, str]]:
        """Nats, tokens, mean weights and router of each text, in this vocabulary."""
        if contexts is None:
            encoded = [(ids, 0) for ids in self.tokenizer.encode(texts)]
        else:
            encoded = [self.tokenizer.encode_after(c, x) for c, x in zip(contexts, texts)]
        ids = [np.asarray(document, np.int64) for document, _ in encoded]
        # The first token is predicted only if one stands before it.
        first = unpredicted(self.model, self.tokenizer.text_format)
        before = [max(first, context) for _, context in encoded]
        walks = []
        for context, document, language in zip(before, ids, languages):
            target = targets(self.model, document, self.tokenizer.text_format)
            at = self._positions(context, len(document), len(target))
            walks.append(Walk(self.router, language, target, at))
        reading = self.reading
        if contexts is not None:
            reading["stride"] = self.overlapping_stride
        decisions, scores, read = finish(decide_along(self, walks, ids, reading))
        weighed = [np.flatnonzero(np.isfinite(d.log_weights).any(axis=0)) for d in decisions]
        missing = [set(some.tolist()) - known for some, known in zip(weighed, read)]
        finish(score_models(self, ids, scores, missing, reading))
        weights = [np.exp(d.log_weights).sum(axis=0) / max(1, len(d.routers)) for d in decisions]
        nats = [
            -mixture(decision.log_weights, found[:, context:]).sum()
            for decision, found, context in zip(decisions, scores, before)
        ]
        tokens = [len(walk.positions) for walk in walks]
        return list(zip(nats, tokens, weights, [decision.router for decision in decisions]))

    def likelihoods(
        self,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        languages: Sequence[str | None] | None = None,
        user_masks: Sequence[Sequence[bool] | None] | None = None,
    ) -> Likelihoods:
        """-log p of continuations that do not end. For decoders.

        contexts, continuations: ids of this ensemble's vocabulary, read as they are; each context
        has at least one. user_masks:
        by which ids of each context the router goes, as in `GenerationRequest`."""
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
            walks.append(Walk(self.router, language, document, at, mask))
        found = finish(score_ends(self, ids, walks, alternatives=1))
        return Likelihoods(
            nats=np.asarray([-sum(t.log_probability for t in one.tokens) for one in found], float),
            greedy=np.asarray([all(t.top[0][0] == t.token for t in one.tokens) for one in found]),
        )

    def _positions(self, context: int, document: int, target: int) -> np.ndarray:
        """Index of the router's state that decides each token after the context."""
        if self.limits.route_per == "token":
            return np.arange(context, target)
        at = context if self.limits.route_per == "prompt" else document
        return np.full(target - context, at)

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
        settings = {name: value for name, value in given.items() if value is not None}
        (generation,) = self._generate(
            [prompt], settings, [language], lambda _, piece: stream(piece)
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
        settings = {} if sampling is None else asdict(sampling)
        languages = _as_many("languages", languages, prompts)
        return self._generate(prompts, settings, languages, stream)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        settings: Mapping[str, Any],
        languages: Sequence[str | None],
        stream: Stream,
    ) -> list[Generation]:
        """Continues prompts. settings: those of `SamplingParams` that differ from `sampling`; the
        number of new tokens otherwise is one for which all prompts leave space, or 1."""
        encoded = [_encoded(self.tokenizer, prompt) for prompt in prompts]
        pools = [self] * len(prompts)
        if self.further:
            ids, masks = zip(*encoded) if encoded else ((), ())
            pools = choose(self, ids, languages, masks)
            encoded = [_encoded(pool.tokenizer, prompt) for pool, prompt in zip(pools, prompts)]
        most = self.longest - max((len(ids) for ids, _ in encoded), default=0)
        most = max(1, min(self.sampling.max_new_tokens, most))
        sampling = replace(self.sampling, **{"max_new_tokens": most, **settings})
        requests = [
            GenerationRequest(ids=ids, sampling=sampling, language=language, user_mask=mask)
            for (ids, mask), language in zip(encoded, languages)
        ]
        found: dict[int, Generation] = {}
        for pool, numbers in _grouped(pools):
            some = generate(
                pool,
                [requests[number] for number in numbers],
                lambda number, piece, numbers=numbers: stream(numbers[number], piece),
            )
            found |= dict(zip(numbers, some))
        return [found[number] for number in range(len(requests))]

    def fill(self, text: str, *, count: int = 5, language: str | None = None) -> Filling:
        """The `count` most probable tokens at each mask of a text, which is routed by the rest of
        it. For encoders."""
        pool = self
        if self.further:
            tokenizer = self.tokenizer
            ids = [id for id in tokenizer.encode_with_masks(text) if id != tokenizer.mask_id]
            (pool,) = choose(self, [[*tokenizer.text_format.start_ids, *ids]], [language])
        return fill(pool, text, count, language)


def _encoded(tokenizer: Tokenizer, prompt: Prompt) -> tuple[list[int], list[bool] | None]:
    """Ids of a prompt, and for a chat the mask of the user's text."""
    if isinstance(prompt, str):
        return tokenizer.begin(prompt), None
    return tokenizer.chat(prompt)


def _grouped(pools: "Sequence[Ensemble]") -> "list[tuple[Ensemble, list[int]]]":
    """Each of some ensembles, with the numbers of the places where it stands."""
    groups: dict[int, list[int]] = {}
    for number, pool in enumerate(pools):
        groups.setdefault(id(pool), []).append(number)
    return [(pools[numbers[0]], numbers) for numbers in groups.values()]


def _as_many(name: str, given: Sequence[Any] | None, texts: Sequence[Any]) -> Sequence[Any]:
    """As many values as texts; None stands for None for each of them."""
    if given is None:
        return [None] * len(texts)
    if len(given) != len(texts):
        raise UserError(f"there must be as many {name} as texts, {len(texts)}; got {len(given)}")
    return given
