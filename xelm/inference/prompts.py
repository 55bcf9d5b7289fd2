"""How probable each token of given texts is to an ensemble, and which tokens were likelier.

The experts are weighed by the router at each token, as the engine weighs them where texts grow.
Texts are read in the windows of `Ensemble.likelihoods`, so that no model reads positions that its
training had not. What is as wide as the vocabulary exists for a few hundred tokens at a time; of a
whole text there are the states before the output head, D numbers a token and model: less than a
cache has.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.inference.decoding import PIECES, padded
from xelm.inference.routing import Router, among, states_along, weights_along
from xelm.inference.sampling import TokenLikelihood, likeliest
from xelm.inference.scoring import Window, windows
from xelm.models.config import ModelConfig
from xelm.models.head import target_log_probabilities
from xelm.models.parameters import bind, inference_graph

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble

_ROWS = (1, 4, 16)
"""Texts that are read at once; few, since a program is compiled for each number."""
_SHORTEST = 16
"""Tokens that a text is padded to at least."""


class TextLikelihood(NamedTuple):
    """What an ensemble thinks of a text."""

    tokens: list[TokenLikelihood]
    """One for each id; the first id follows nothing, and its log probability is nan."""
    weights: Mapping[str, float]
    """Model -> its mean weight over the tokens."""
    router: str
    """The router that decided most tokens."""


def likelihoods_of_tokens(
    ensemble: "Ensemble",
    texts: Sequence[Sequence[int]],
    routers: Sequence[Router],
    languages: Sequence[str | None],
    alternatives: int,
) -> list[TextLikelihood]:
    """What an ensemble thinks of texts, by their ids, which are taken as they are.

    routers: for each text, of which all are routed token by token. languages: of each text, where
    they are known. alternatives: likeliest tokens that are named at each place.
    """
    ids = [np.asarray(text, np.int64) for text in texts]
    reader = _Reader(ensemble, ids)
    weighed = [
        _weighed(ensemble, reader, number, router, language)
        for number, (router, language) in enumerate(zip(routers, languages))
    ]
    flat = np.concatenate([log_weights for log_weights, _ in weighed])
    found = reader.mixed(flat, alternatives)
    result, first = [], 0
    for text, (log_weights, router) in zip(ids, weighed):
        last = first + len(log_weights)
        nothing = TokenLikelihood(int(text[0]), float("nan"), ())
        mean = np.exp(log_weights).mean(axis=0) if len(log_weights) else np.zeros(flat.shape[1])
        weights = dict(zip(ensemble.names, mean.tolist()))
        result.append(TextLikelihood([nothing, *found[first:last]], weights, router))
        first = last
    return result


def _weighed(
    ensemble: "Ensemble", reader: "_Reader", number: int, router: Router, language: str | None
) -> tuple[Float[np.ndarray, "P M"], str]:
    """Log weights of the models before each token of a text but the first, and the router that
    decided most of them."""
    ids = reader.texts[number]
    if len(ids) < 2:
        return np.zeros((0, len(ensemble.names))), ""
    silent = ensemble.tokenizer.starts(ids)  # 1 where the first id starts texts: it says nothing
    states = states_along(router, router.start(language), ids[silent:])
    positions = np.arange(1, len(ids)) - silent
    scores = np.zeros((router.experts, len(ids) - silent))
    if router.asks(states[positions]).any():
        for expert in range(router.experts):
            scores[expert, 1 - silent :] = reader.scores(expert, number)
    log_weights = weights_along(
        router, states, scores, positions, ensemble.top_m, ensemble.least_weight
    )
    decided = Counter(router.decided_by(states[positions]))
    name = decided.most_common(1)[0][0] if decided else ""
    return among(log_weights, len(ensemble.names)), name


class _Reader:
    """Has models read texts; each model once, and only if it is asked for."""

    def __init__(self, ensemble: "Ensemble", texts: Sequence[Int[np.ndarray, " _"]]):
        self.texts = texts
        self._ensemble = ensemble
        self._states: dict[int, list[Float[np.ndarray, "P D"]]] = {}

    def states(self, expert: int) -> list[Float[np.ndarray, "P D"]]:
        """What the output head of a model reads where each token but the first is predicted."""
        if expert not in self._states:
            self._states[expert] = self._read(expert)
        return self._states[expert]

    def scores(self, expert: int, number: int) -> Float[np.ndarray, " P"]:
        """Log probability of each token of a text but the first by one model."""
        states, wanted = self.states(expert)[number], self.texts[number][1:]
        size = padded(max(len(wanted), _SHORTEST))
        rest = size - len(wanted)
        _, _, scored = _programs(self._ensemble.model, self._ensemble.dtype)
        found = scored(
            self._ensemble.parameters[expert],
            np.pad(states, [(0, rest), (0, 0)]),
            np.pad(wanted, (0, rest)),
        )
        return np.asarray(found)[: len(wanted)]

    def mixed(
        self, log_weights: Float[np.ndarray, "N M"], alternatives: int
    ) -> list[TokenLikelihood]:
        """Every token but the first of each text, by the mixture with these weights."""
        wanted = np.concatenate([text[1:] for text in self.texts])
        asked = np.flatnonzero(np.isfinite(log_weights).any(axis=0)).tolist()
        states = {expert: np.concatenate(self.states(expert)) for expert in asked}
        size = next((size for size in PIECES if size >= len(wanted)), PIECES[-1])
        _, add, _ = _programs(self._ensemble.model, self._ensemble.dtype)
        found: list[TokenLikelihood] = []
        for first in range(0, len(wanted), size):
            part = slice(first, first + size)
            rest = size - len(wanted[part])
            mixture = jnp.full((size, self._ensemble.model.vocabulary_size), -jnp.inf)
            for expert in asked:
                weights = log_weights[part, expert].astype(np.float32)
                if not np.isfinite(weights).any():
                    continue
                mixture = add(
                    self._ensemble.parameters[expert],
                    np.pad(states[expert][part], [(0, rest), (0, 0)]),
                    np.pad(weights, (0, rest), constant_values=-np.inf),
                    mixture,
                )
            some = likeliest(mixture, np.pad(wanted[part], (0, rest)), alternatives)
            found += some[: size - rest]
        return found

    def _read(self, expert: int) -> list[Float[np.ndarray, "P D"]]:
        model = self._ensemble.model
        read, _, _ = _programs(model, self._ensemble.dtype)
        counts = [max(0, len(text) - 1) for text in self.texts]
        found = [np.zeros((count, model.width), np.float32) for count in counts]
        groups: dict[int, list[Window]] = {}
        lengths, longest = [len(text) for text in self.texts], self._ensemble.window
        for window in windows(lengths, longest + 1, self._ensemble.overlapping_stride):
            size = min(padded(max(window.size - 1, _SHORTEST)), longest)
            groups.setdefault(size, []).append(window)
        for size, group in groups.items():
            rows = next((rows for rows in _ROWS if rows >= len(group)), _ROWS[-1])
            for first in range(0, len(group), rows):
                part = group[first : first + rows]
                tokens = np.zeros((rows, size), np.int32)
                for row, one in enumerate(part):
                    tokens[row, : one.size - 1] = self.texts[one.document][one.begin : one.end - 1]
                states = np.asarray(read(self._ensemble.parameters[expert], tokens))
                for row, one in enumerate(part):
                    new = states[row, one.known - 1 - one.begin : one.end - 1 - one.begin]
                    found[one.document][one.known - 1 : one.end - 1] = new
        return found


@functools.lru_cache(maxsize=8)
def _programs(model: ModelConfig, dtype: str) -> tuple[Any, Any, Any]:
    """Compiled: states of texts; a mixture with one more model; log probabilities of tokens."""
    shape = inference_graph(model, dtype)

    def head_of(parameters):
        return bind(shape, parameters).output_head()

    @jax.jit
    def read(parameters, tokens):
        network = bind(shape, parameters)
        hidden = network.hidden(tokens)
        return network.output(hidden)[0].astype(jnp.float32)

    @functools.partial(jax.jit, donate_argnums=3)
    def add(parameters, states, log_weights, mixture):
        logits = head_of(parameters).logits(states.astype(dtype))
        return jnp.logaddexp(mixture, log_weights[:, None] + jax.nn.log_softmax(logits))

    @jax.jit
    def scored(parameters, states, wanted):
        return target_log_probabilities(states.astype(dtype), head_of(parameters), wanted)

    return read, add, scored
