"""`xelm-lm-eval`: EleutherAI's evaluation harness for an ensemble or one of its models.

    xelm-lm-eval run=RUN,routing=detected --tasks xcopa_sw,belebele_swh_Latn --num_fewshot 0

The first argument is what the harness calls model_args; all others are its own (`xelm-lm-eval
--help`).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import lm_eval.__main__
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from clustering.errors import UserError
from xelm.data.special_tokens import RENDERED
from xelm.inference.blocks import padded
from xelm.inference.ensemble import Ensemble
from xelm.inference.generation import generate
from xelm.inference.routing import DEFAULT, Routing
from xelm.inference.running import GenerationRequest
from xelm.inference.vocabularies import choose
from xelm.runs.ensembles import open_ensemble, open_model
from xelm.runs.run import open_run

TOKENS_AT_ONCE = 16_384
"""Largest number of tokens of the requests that are scored together."""
CONTEXTS_AT_ONCE = 256
"""Number of contexts for which a vocabulary is chosen together."""


@register_model("xelm")
class Harness(TemplateLM):
    """An ensemble as a model of the harness."""

    def __init__(
        self,
        run: str,
        routing: str = "learned",
        model: str | None = None,
        language: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        **router: Any,
    ):
        """run: a RUN. model: one model alone instead of the ensemble, by a name of `find_model`.
        language: language of all texts, as in `Ensemble.score`. router: further options of
        `Routing`. batch_size: number of texts that are generated together. max_batch_size and
        device, which the harness gives, are not used."""
        super().__init__()
        self.ensemble: Ensemble = _opened(run, model, routing, language, router, dtype)
        if not self.ensemble.model.causal:
            raise UserError(f"{run} has encoders, which the harness cannot evaluate")
        self._pool = self.ensemble
        """The ensemble in whose vocabulary texts are read now."""
        self._language = language
        self.tokenizer = self.ensemble.tokenizer.hub
        self._max_gen_toks = max_gen_toks
        self._batch = int(batch_size) if str(batch_size).isdecimal() else 32

    @property
    def eot_token_id(self) -> int:
        return self.ensemble.tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text whose first token is predicted."""
        return self._pool.tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def max_length(self) -> int:
        """Number of tokens that a model reads at once where likelihoods are computed, with the one
        that starts texts; generated text may go on to `Ensemble.longest`."""
        return self.ensemble.window

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, after the one that starts texts if there is one, or of a rendered
        chat, whose template contains all special tokens."""
        tokenizer = self._pool.tokenizer
        if string.startswith(RENDERED):
            return tokenizer.special.encode(string)[0]
        (ids,) = tokenizer.encode([string])
        return ids if add_special_tokens is False else [*tokenizer.text_format.start_ids, *ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A rendered chat, which `tok_encode` recognises by its first character. The user's text is
        marked in it, since the router goes by that alone."""
        special = self.ensemble.tokenizer.special
        return special.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _user_mask(self, string: str | None, count: int) -> list[bool] | None:
        """Whether the router goes by each of the last `count` ids of a context: in a chat by those
        of the user's text; None: by all."""
        if string is None or not string.startswith(RENDERED):
            return None
        mask = self._pool.tokenizer.special.encode(string)[1]
        # If the user's text was cut off, the router goes by the whole context.
        return mask[-count:] if mask and any(mask[-count:]) else None

    def _in_vocabularies(
        self, contexts: Sequence[str], answer: Callable[[list[int]], Sequence[Any]]
    ) -> list[Any]:
        """Answers requests, each in the vocabulary in which the ensemble reads its context, or the
        text that it is. answer: returns the answers to the requests of these numbers."""
        distinct = list(dict.fromkeys(contexts)) if self.ensemble.further else []
        pools: dict[str, Ensemble] = {}
        for first in range(0, len(distinct), CONTEXTS_AT_ONCE):
            part = distinct[first : first + CONTEXTS_AT_ONCE]
            ids = [self.tok_encode(text) or [self.prefix_token_id] for text in part]
            masks = [self._user_mask(text, len(own)) for text, own in zip(part, ids)]
            chosen = choose(self.ensemble, ids, [self._language] * len(part), masks)
            pools |= dict(zip(part, chosen))
        found: list[Any] = [None] * len(contexts)
        for pool in (self.ensemble, *self.ensemble.further):
            numbers = [n for n, text in enumerate(contexts) if pools.get(text, pool) is pool]
            if not numbers:
                continue
            self._pool = pool
            try:
                answers = answer(numbers)
            finally:
                self._pool = self.ensemble
            for number, one in zip(numbers, answers):
                found[number] = one
        return found

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        contexts, in_one = [request.args[0] for request in requests], super().loglikelihood

        def answer(numbers: list[int]) -> list[tuple[float, bool]]:
            return in_one([requests[number] for number in numbers], disable_tqdm)

        return self._in_vocabularies(contexts, answer)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context.startswith(RENDERED):
            continuation = self.ensemble.tokenizer.special.escape(continuation)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        masks = [
            # Spaces at the end of the context were moved to the continuation.
            self._user_mask(strings and strings[0].rstrip(), len(context))
            for (strings, _, _), (context, _) in zip(requests, pairs)
        ]
        found: list[tuple[float, bool] | None] = [None] * len(pairs)
        # Longest first, so that what does not fit is known at once, and lengths differ little.
        order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm) as bar:
            while order:
                longest = sum(map(len, pairs[order[0]]))
                count = max(1, TOKENS_AT_ONCE // padded(max(longest, 16)))
                part, order = order[:count], order[count:]
                likelihoods = self._pool.likelihoods(
                    [pairs[number][0] for number in part],
                    [pairs[number][1] for number in part],
                    [self._language] * len(part),
                    [masks[number] for number in part],
                )
                for number, nats, greedy in zip(part, likelihoods.nats, likelihoods.greedy):
                    found[number] = (-float(nats), bool(greedy))
                bar.update(len(part))
        for (strings, _, _), one in zip(requests, found):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, one)
        return found  # type: ignore[return-value]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A context and its continuation; only the end of a context that is too long for both. (The
        last token is predicted and not read.) A continuation that alone is too long for a window
        keeps one token of context, and is read in several windows."""
        longest = self.ensemble.model.max_length
        if len(continuation) > longest:
            raise UserError(
                f"a continuation has {len(continuation)} tokens; the models read at most {longest}"
            )
        kept = max(1, self.max_length + 1 - len(continuation))
        return context[-kept:], continuation

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args[0] for request in requests]

        def answer(numbers: list[int]) -> list[float]:
            return self._rolling([requests[number] for number in numbers], disable_tqdm)

        return self._in_vocabularies(texts, answer)

    def _rolling(self, requests: Sequence[Instance], disable_tqdm: bool) -> list[float]:
        windows: list[list[Any]] = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            some = get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            )
            windows.append([make_disjoint_window(window) for window in some])
        flat = [(None, context, new) for some in windows for context, new in some]
        answers = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = [sum(next(answers)[0] for _ in some) for some in windows]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        arguments: list[Any] = [request.args for request in requests]  # a text and its options
        groups: dict[str, list[int]] = {}
        for number, (_, options) in enumerate(arguments):
            groups.setdefault(repr(sorted(options.items())), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="continuations", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                # Prompts of about the same length are generated together, longest first.
                numbers.sort(key=lambda number: -len(arguments[number][0]))
                for first in range(0, len(numbers), self._batch):
                    part = numbers[first : first + self._batch]
                    texts = [arguments[number][0] for number in part]
                    for number, text in zip(part, self._generate(texts, arguments[part[0]][1])):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", arguments[number], text)
                    bar.update(len(part))
        return found

    def _generate(self, texts: Sequence[str], options: dict[str, Any]) -> list[str]:
        def answer(numbers: list[int]) -> list[str]:
            return self._continued([texts[number] for number in numbers], options)

        return self._in_vocabularies(texts, answer)

    def _continued(self, texts: Sequence[str], options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        ensemble = self._pool
        most = min(int(options.get("max_gen_toks", self._max_gen_toks)), ensemble.longest - 1)
        sampled = bool(options.get("do_sample", float(options.get("temperature") or 0) > 0))
        sampling = replace(
            ensemble.sampling,
            max_new_tokens=most,
            temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(options.get("top_p") or 1.0),
            top_k=options.get("top_k"),
            repetition_penalty=1.0,
            stop=tuple(stop for stop in until if stop),
        )
        kept = ensemble.longest - most
        prompts = [self.tok_encode(text)[-kept:] or [self.prefix_token_id] for text in texts]
        requests = [
            GenerationRequest(
                ids=ids,
                sampling=sampling,
                language=self._language,
                user_mask=self._user_mask(text, len(ids)),
            )
            for text, ids in zip(texts, prompts)
        ]
        return [one.text for one in generate(ensemble, requests)]


def _opened(
    run: str,
    model: str | None,
    routing: str,
    language: str | None,
    router: dict[str, Any],
    dtype: str,
) -> Ensemble:
    """The ensemble, or one model alone, which neither a router nor a language concerns."""
    known = [field.name for field in fields(Routing) if field.name != "name"]
    if unknown := sorted(router.keys() - {*known}):
        raise UserError(
            f"there is no option {unknown[0]!r} of routing; there are {', '.join(known)}"
        )
    if model is None:
        return open_ensemble(open_run(run), Routing(name=routing, **router), dtype=dtype)
    if router or routing != DEFAULT or language is not None:
        raise UserError(
            f"model={model} runs one model alone, which nothing routes to; leave out routing, its "
            "options and language, or the model"
        )
    return open_model(open_run(run), model, dtype=dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the harness's own command line with a RUN as its model."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-") and "=" in given[0]:
        given = ["--model", "xelm", "--model_args", *given]
    before = sys.argv
    sys.argv = ["xelm-lm-eval", *given]
    try:
        lm_eval.__main__.cli_evaluate()
    except UserError as error:
        print(f"xelm-lm-eval: {error}", file=sys.stderr)
        return 2
    finally:
        sys.argv = before
    return 0
