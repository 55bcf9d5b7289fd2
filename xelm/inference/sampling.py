"""Which token comes next, given how probable each one is."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustering.errors import UserError
from clustering.files import read_object

# Of generation_config.json: what is honoured, and what says nothing about the text.
HONOURED = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
SILENT = (
    *("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "cache_implementation", "max_length", "output_attentions"),
    *("output_hidden_states", "output_scores", "return_dict_in_generate"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a continuation is drawn, and when it ends."""

    max_new_tokens: int = 40
    """Tokens after which it ends at the latest."""
    temperature: float = 0.8
    """Log probabilities are divided by this; 0 takes the most probable token each time."""
    top_k: int | None = None
    """Draws from so many tokens, the most probable ones; None from all."""
    top_p: float = 0.95
    """Draws from the smallest set of tokens that has this probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the text so far are divided by this if positive, multiplied if negative
    (Keskar et al. 2019, arXiv 1909.05858, section 4.1)."""
    stop: tuple[str, ...] = ()
    """Strings before which it ends."""
    random_seed: int = 0
    """Decides the draws."""

    def __post_init__(self) -> None:
        faults = [
            fault
            for wrong, fault in (
                (self.max_new_tokens < 1, f"max_new_tokens at least 1; got {self.max_new_tokens}"),
                (
                    not 0 <= self.temperature < math.inf,
                    f"temperature at least 0; got {self.temperature}",
                ),
                (
                    self.top_k is not None and self.top_k < 1,
                    f"top_k at least 1; got {self.top_k}",
                ),
                (not 0 < self.top_p <= 1, f"top_p above 0 and at most 1; got {self.top_p}"),
                (
                    not 0 < self.repetition_penalty < math.inf,
                    f"repetition_penalty above 0; got {self.repetition_penalty}",
                ),
                ("" in self.stop, "stop strings that are not empty"),
            )
            if wrong
        ]
        if faults:
            raise UserError(f"generating wants {'; '.join(faults)}")


def sampling_of(directory: str | Path) -> tuple[Sampling, list[str]]:
    """What a checkpoint's generation_config.json asks for, on top of our defaults, and its settings
    that are not honoured."""
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return Sampling(), []
    found = {name: value for name, value in read_object(path).items() if value is not None}
    sampling = Sampling()
    # Nothing said about how to draw is no wish to be greedy, in a base model's file.
    wishes = {name: found[name] for name in HONOURED if name in found and name != "do_sample"}
    if found.get("do_sample") is False:
        wishes["temperature"] = 0.0
    elif found.get("do_sample"):
        # As transformers has them where the file says nothing.
        wishes = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, **wishes}
    if wishes.get("top_k") == 0:
        del wishes["top_k"]
    try:
        sampling = replace(sampling, **wishes)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {error}") from None
    return sampling, sorted(set(found) - set(HONOURED) - set(SILENT))


@jax.jit
def penalised(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Logits, less for tokens seen before."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    log_probabilities: Float[Array, "B V"], sampling: Sampling, step: int
) -> Int[Array, " B"]:
    """The next token of each row. A row's draws are its own: they depend on the random seed, on
    `step` and on the row's number."""
    if sampling.temperature == 0:
        return log_probabilities.argmax(axis=-1)
    vocabulary = log_probabilities.shape[-1]
    return _draw(
        log_probabilities,
        jax.random.fold_in(jax.random.key(sampling.random_seed), step),
        sampling.temperature,
        min(sampling.top_k or vocabulary, vocabulary),
        sampling.top_p,
    )


@jax.jit
def _draw(log_probabilities, key, temperature, top_k, top_p):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(
        jnp.arange(log_probabilities.shape[0])
    )
    scaled = jax.nn.log_softmax(log_probabilities / temperature)
    order = -jnp.sort(-scaled, axis=-1)
    ranks = jnp.arange(order.shape[-1])[None]
    # First by number, then by probability among those, as transformers does.
    kept = jnp.where(ranks < top_k, order, -jnp.inf)
    chances = jax.nn.softmax(kept)
    # A token is kept if those before it have not reached top_p; the first always is.
    kept = jnp.where(jnp.cumsum(chances, axis=-1) - chances < top_p, kept, jnp.inf)
    least = jnp.where(jnp.isfinite(kept), kept, jnp.inf).min(axis=-1, keepdims=True)
    candidates = jnp.where(scaled >= least, scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, candidates)
