"""The ensemble: many experts, one distribution. p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.inference.engine import counting
from xelm.inference.filling import Filling, fill
from xelm.inference.generation import Generation, Stream, generate, room
from xelm.inference.guessing import guess_documents
from xelm.inference.routing import Router, among, mixture, states_along, weights_along
from xelm.inference.sampling import Sampling
from xelm.inference.scoring import check_ids, check_windows, score_documents, targets, unpredicted
from xelm.models.config import ModelConfig

ROUTE_PER = ("token", "prompt", "sequence")

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or the messages of a chat: {"role": "user", "content": "Habari?"}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the ensemble thinks of some texts."""

    nats: Float[np.ndarray, " texts"]
    """-log p of each text and its end."""
    tokens: Int[np.ndarray, " texts"]
    """Predicted tokens of each text, its end included."""
    weights: Mapping[str, Float[np.ndarray, " texts"]]
    """Expert -> its mean routing weight over each text."""
    routing: Sequence[str]
    """The router that decided most tokens of each text, as in `Generation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihoods:
    """What the ensemble thinks of some continuations."""

    nats: Float[np.ndarray, " texts"]
    """-log p of each, its end not included."""
    greedy: Bool[np.ndarray, " texts"]
    """Whether each of its tokens is the likeliest one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensemble:
    """Experts of one shape, a router, and the tokenizer they share."""

    names: Sequence[str]
    """Of the models: the E experts that the router weighs, and maybe others behind them."""
    model: ModelConfig
    """Their shape."""
    parameters: Sequence[Any]
    """Of each expert, `for_inference`, asked for only when the expert is."""
    router: Router
    """Who speaks when."""
    tokenizer: Tokenizer
    """Of the seed."""
    dtype: str = "float32"
    """Of products; parameters are of this, too."""
    top_m: int | None = None
    """Experts asked at each token; None asks all that the router gives weight."""
    least_weight: float = 0.0
    """Experts with less are not asked; 0 asks all that have any."""
    route_per: Literal["token", "prompt", "sequence"] = "token"
    """When the router decides: before every token; once, after the prompt (or context); or once for
    a text that is scored, by all of it (one that is generated is known no further than its
    prompt)."""
    context_length: int | None = None
    """Tokens that are read at once where a text is scored; None is the model's own length. (A text
    that is generated may go on to `longest`.)"""
    stride: int | None = None
    """From one window of a longer text to the next, as in `score_documents`."""
    sampling: Sampling = field(default_factory=Sampling)
    """How continuations are drawn unless a call says otherwise; a seed's generation_config.json
    says it here."""

    def __post_init__(self) -> None:
        if self.route_per not in ROUTE_PER:
            raise UserError(
                f"route_per must be one of {', '.join(ROUTE_PER)}; got {self.route_per!r}"
            )
        check_windows(self.model, self.window, self.stride)

    @property
    def window(self) -> int:
        """Tokens that are read at once where a text is scored: `context_length`, or the model's own
        length."""
        return self.context_length or self.model.max_length

    @property
    def overlapping_stride(self) -> int:
        """Tokens from one window to the next where each token is read after at least half a window:
        behind contexts, and where the tokens of a prompt are scored."""
        half = -(-self.window // 2)
        return min(half, self.stride or half)

    @property
    def longest(self) -> int:
        """Tokens that a text may have, those that are generated included: the model's own length.
        Learned positions beyond `window` are rows of a table that no training has changed: a model
        with those ends there."""
        return self.window if self.model.positions == "learned" else self.model.max_length

    def score(
        self,
        texts: Sequence[str],
        languages: Sequence[str | None] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> Scores:
        """Nats of each text, with the weights that the router gave. languages: of each text, where
        it is known: if an expert serves it, that expert alone is asked. contexts: what each text
        goes on from, as it stands: both are cut into tokens as one text, of which those with any
        character of the text are counted, each after at least half of `window` where there is as
        much; texts alone are read as `evaluate` reads them."""
        languages = _as_many("languages", languages, texts)
        if contexts is None:
            encoded = [(ids, 0) for ids in self.tokenizer.encode(texts)]
        else:
            _as_many("contexts", contexts, texts)
            encoded = [self.tokenizer.encode_after(c, x) for c, x in zip(contexts, texts)]
        ids = [np.asarray(document, np.int64) for document, _ in encoded]
        # The first token is predicted only if one stands before it.
        first = unpredicted(self.tokenizer.start_id) if self.model.causal else 0
        before = [max(first, context) for _, context in encoded]
        wanted = [targets(self.model, document, self.tokenizer.end_id) for document in ids]
        positions = [
            self._positions(context, len(document), len(target))
            for context, document, target in zip(before, ids, wanted)
        ]
        states = [
            states_along(self.router, self.router.start(language), target)
            for language, target in zip(languages, wanted)
        ]
        reading = self._reading | {"start_id": self.tokenizer.start_id}
        if contexts is not None:
            reading |= {"stride": self.overlapping_stride}
        log_weights, scores, asked, routing = self._weighed(ids, states, positions, reading)
        active = [np.flatnonzero(np.isfinite(w).any(axis=0)) for w in log_weights]
        missing = [np.setdiff1d(a, b) for a, b in zip(active, asked)]
        self._score(ids, scores, missing, reading)
        weights = [np.exp(found).sum(axis=0) / max(1, len(found)) for found in log_weights]
        nats = [
            -mixture(w, found[:, context:]).sum()
            for w, found, context in zip(log_weights, scores, before)
        ]
        return Scores(
            nats=np.asarray(nats),
            tokens=np.asarray([len(at) for at in positions]),
            weights=dict(zip(self.names, np.asarray(weights).reshape(-1, len(self.names)).T)),
            routing=routing,
        )

    def likelihoods(
        self,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        languages: Sequence[str | None] | None = None,
        user_masks: Sequence[Sequence[bool] | None] | None = None,
    ) -> Likelihoods:
        """Of continuations that do not end, by their ids and those of what each goes on from, of
        which there is at least one. Both are read as they are. user_masks: by which ids of each
        context the router goes, as in `Engine.add`; None: by all. For decoders."""
        if not self.model.causal:
            raise UserError("these experts are encoders, which continue no text")
        _as_many("continuations", continuations, contexts)
        if not all(map(len, contexts)):
            raise UserError("a continuation needs at least one id before it, such as the start")
        languages = _as_many("languages", languages, contexts)
        user_masks = _as_many("user_masks", user_masks, contexts)
        ids = [np.asarray([*c, *x], np.int64) for c, x in zip(contexts, continuations)]
        for document in ids:
            check_ids(document, self.model)
        positions = [self._positions(len(c), len(i), len(i)) for c, i in zip(contexts, ids)]
        masks = [
            np.concatenate([counting(self.tokenizer, c, mask), np.ones(len(x), bool)])
            for c, x, mask in zip(contexts, continuations, user_masks)
        ]
        states = [
            states_along(self.router, self.router.start(language), document, mask)
            for language, document, mask in zip(languages, ids, masks)
        ]
        reading = self._reading | {"stride": self.overlapping_stride, "start_id": None}
        log_weights, *_ = self._weighed(ids, states, positions, reading, masks)
        found = guess_documents(
            self.model,
            [partial(self.parameters.__getitem__, number) for number in range(len(self.names))],
            ids,
            [document[len(context) :] for context, document in zip(contexts, ids)],
            np.concatenate([np.zeros((0, len(self.names))), *log_weights])[None],
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

    def _weighed(
        self,
        ids: Sequence[np.ndarray],
        states: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        reading: Mapping[str, Any],
        masks: Sequence[np.ndarray] | None = None,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], list[str]]:
        """Log weights of the models at each document's positions, with the router's states along
        it; the models' scores of it, so far as the router asked for them; whom it asked; and which
        router decided most of the positions. masks: tokens of each document that count as evidence,
        as in `states_along`; None: all."""
        scores = [np.zeros((len(self.names), len(i) + self.model.causal)) for i in ids]
        everyone = np.arange(self.router.experts)
        asked = [
            everyone if self.router.asks(state[at]).any() else everyone[:0]
            for state, at in zip(states, positions)
        ]
        self._score(ids, scores, asked, reading)
        kept = (self.top_m, self.least_weight)
        log_weights = [
            among(
                weights_along(
                    self.router, state, found[everyone, : len(state) - 1], at, *kept, mask
                ),
                len(self.names),
            )
            for state, found, at, mask in zip(
                states, scores, positions, masks or [None] * len(states)
            )
        ]
        names = [self.router.decided_by(state[at]) for state, at in zip(states, positions)]
        routing = [Counter(some).most_common(1)[0][0] if some else "" for some in names]
        return log_weights, scores, asked, routing

    @property
    def _reading(self) -> dict[str, Any]:
        """How documents are read, but for their start."""
        return {
            "end_id": self.tokenizer.end_id,
            "context_length": self.window,
            "stride": self.stride,
            "mask_id": self.tokenizer.mask_id,
            "dtype": self.dtype,
        }

    def _positions(self, context: int, document: int, target: int) -> np.ndarray:
        """Of which states the weights are made, for each token after the context."""
        if self.route_per == "token":
            return np.arange(context, target)
        return np.full(target - context, context if self.route_per == "prompt" else document)

    def _score(
        self,
        ids: Sequence[np.ndarray],
        scores: Sequence[np.ndarray],
        active: Sequence[np.ndarray],
        reading: Mapping[str, Any],
    ) -> None:
        """Fills each document's rows of `scores`, [E, n + 1], for the experts active in it."""
        for expert in range(len(self.names)):
            chosen = [number for number, experts in enumerate(active) if expert in experts]
            if not chosen:
                continue
            found = score_documents(
                self.model,
                self.parameters[expert],
                [ids[number] for number in chosen],
                **reading,
            )
            for number, row in zip(chosen, found):
                scores[number][expert] = row

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
        """Continues a text or a chat. None: as in `sampling`, whose fields say what each option
        does. language: of the text; if an expert serves it, that expert alone is asked. stream:
        told each piece of the continuation as it comes."""
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
        ids, mask = self._encoded(prompt)
        sampling = replace(self._fitting([ids]), **given)
        (generation,) = generate(
            self, [ids], sampling, [language], lambda _, piece: stream(piece), [mask]
        )
        return generation

    def fill(self, text: str, *, count: int = 5, language: str | None = None) -> Filling:
        """The most probable `count` tokens at each mask of a text; of encoders. The router hears
        all that is not masked."""
        return fill(self, text, count, language)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        languages: Sequence[str | None] | None = None,
        stream: Stream = lambda number, piece: None,
    ) -> list[Generation]:
        """Continues several texts or chats side by side. languages: of each, where they are
        known. stream: told the number of a prompt and the next piece of its continuation."""
        encoded = [self._encoded(prompt) for prompt in prompts]
        ids = [ids for ids, _ in encoded]
        languages = _as_many("languages", languages, prompts)
        sampling = sampling or self._fitting(ids)
        return generate(self, ids, sampling, languages, stream, [mask for _, mask in encoded])

    def _encoded(self, prompt: Prompt) -> tuple[list[int], list[bool] | None]:
        """The ids of a prompt and, of a chat, the mask of what the user says."""
        if isinstance(prompt, str):
            return self.tokenizer.begin(prompt), None
        return self.tokenizer.chat_with_user_mask(prompt)

    def _fitting(self, prompts: Sequence[Sequence[int]]) -> Sampling:
        """`sampling`, with no more new tokens than there is room for, and at least one."""
        most = max(1, room(self, prompts))
        return replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, most))


def _as_many(name: str, given: Sequence[Any] | None, texts: Sequence[Any]) -> Sequence[Any]:
    """One for each text; None: none is known."""
    if given is None:
        return [None] * len(texts)
    if len(given) != len(texts):
        raise UserError(f"{len(texts)} texts want as many {name}; got {len(given)}")
    return given
