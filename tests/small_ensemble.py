"""Three experts of the tiny RUN's shape with random parameters, their ensemble by every kind of
router, and what tests compare them with."""

import jax
import numpy as np

from xelm.data.text_format import TextFormat
from xelm.inference.ensemble import Ensemble
from xelm.inference.route import Walk
from xelm.inference.routers import Abstaining, ByLanguage, Posterior, Tfidf, uniform
from xelm.inference.routing import RoutingLimits
from xelm.inference.scoring import score_documents
from xelm.models.parameters import bind, for_inference, fresh_parameters, inference_graph

EXPERTS, LENGTH = 3, 32
PRIOR = np.log(np.array([0.2, 0.5, 0.3]))
BAYES = Posterior(prior=PRIOR)
PROMPT = "abcd efg"


def random_experts(model):
    """Parameters of experts that disagree: random, and far from the small values of a beginning."""
    return [
        jax.tree.map(lambda p: np.asarray(4.0 * p), for_inference(fresh_parameters(model, seed)))
        for seed in range(EXPERTS)
    ]


def routers_of(run):
    """Routers over the experts, by name."""
    vectoriser = run.vectoriser()
    centres = np.random.default_rng(0).normal(size=(EXPERTS, vectoriser.dimensions)) / 3
    return {
        "uniform": uniform(EXPERTS),
        "language": ByLanguage(experts=EXPERTS, serving={"en": 1, "de": 0}),
        "tfidf": Tfidf(vectoriser=vectoriser, centres=centres, temperature=0.3),
        "posterior": Posterior(prior=PRIOR),
        "forgetful": Posterior(prior=PRIOR, memory=0.8),
        # Of the positions that TF-IDF is not sure of, which some are.
        "abstaining": Abstaining(
            router=Tfidf(vectoriser=vectoriser, centres=centres, temperature=0.3),
            threshold=0.45,
            instead=Posterior(prior=PRIOR),
        ),
        # Experts that read a text without being scored read it again.
        "hesitant": Hesitant(),
    }


class Hesitant:
    """Needs log-likelihoods at every third token; otherwise one expert has all weight, in turn."""

    memory, experts = 0.9, EXPERTS

    def start(self, language):
        return np.zeros(1)

    def terms(self, before, ids):
        return np.ones((len(ids), 1))

    def needs_log_likelihoods(self, states):
        return states[:, 0] % 3 == 0

    def log_weights(self, states, log_likelihoods):
        with np.errstate(divide="ignore"):
            alone = np.log(np.eye(EXPERTS)[states[:, 0].astype(int) % EXPERTS])
        return np.where(
            self.needs_log_likelihoods(states)[:, None],
            BAYES.log_weights(states, log_likelihoods),
            alone,
        )

    def decided_by(self, states):
        return ["posterior" if asks else "alone" for asks in self.needs_log_likelihoods(states)]


def along(router, language, ids, scores, top_m=None, least=0.0):
    """Log weights before every token of a text."""
    limits = RoutingLimits(top_m=top_m, least_weight=least)
    return Walk(router, language, ids).decide(scores, limits).log_weights


def ensemble_of(run, model, experts):
    """The ensemble of the experts with equal weights."""
    return Ensemble(
        names=["a", "b", "c"],
        model=model,
        parameters=experts,
        router=uniform(EXPERTS),
        tokenizer=run.tokenizer(),
        context_length=LENGTH,
    )


def documents_of(run):
    """Real documents: short, long beyond the window, of no and of one token."""
    found = run.store().languages["de"]
    whole = np.concatenate([found.document(number) for number in range(6)]).astype(np.int64)
    lengths = (0, 1, 2, 7, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 100, 5, 0, 1)
    return [whole[number : number + length] for number, length in enumerate(lengths)]


def forward_of(model):
    """Logits of the plain model, compiled."""

    @jax.jit
    def forward(parameters, tokens):
        network = bind(inference_graph(model), parameters)
        return network.logits(network.hidden(tokens))

    return forward


def plain_scorer(model):
    """A function: log probabilities of a document's tokens and end, by the plain model."""
    forward = forward_of(model)

    def score(parameters, ids, window=10**9):
        framed = np.array([1, *ids, 2])
        scores = []
        for begin in range(0, len(framed) - 1, window):
            part = framed[begin : begin + window + 1]
            # Padded behind, where it changes nothing, so that few shapes are compiled.
            padded = np.pad(part[:-1], (0, -(len(part) - 1) % 64))
            logits = np.asarray(forward(parameters, padded[None])[0], np.float64)
            found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            scores.append(found[np.arange(len(part) - 1), part[1:]])
        return np.concatenate(scores)

    return score


def scored(model, parameters, documents, length=LENGTH):
    return score_documents(
        model,
        parameters,
        documents,
        text_format=TextFormat(start_id=1, end_id=2),
        context_length=length,
    )
