"""EleutherAI's evaluation harness, asked about an ensemble or one of its models: `xelm-lm-eval`.

    xelm-lm-eval run=RUN,routing=detected --tasks xcopa_sw,belebele_swh_Latn --num_fewshot 0

The first argument is what the harness calls model_args; all others are its own (`xelm-lm-eval
--help`).
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lm_eval.__main__
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from clustering.errors import UserError
from xelm.data.special_tokens import RENDERED
from xelm.inference.decoder import padded
from xelm.inference.ensemble import Ensemble
from xelm.inference.generation import generate
from xelm.inference.routing import Routing
from xelm.runs.ensembles import open_ensemble
from xelm.runs.run import open_run

TOKENS_AT_ONCE = 16_384
"""Of the requests that are read together."""


@register_model("xelm")
class Harness(TemplateLM):
    """An ensemble as the harness asks it."""

    def __init__(
        self,
        run: str,
        routing: str = "learned",
        model: str | None = None,
        language: str | None = None,
        top_m: int | None = None,
        route_per: str = "token",
        dtype: str = "auto",
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        **router: Any,
    ):
        """run: a RUN. model: an expert alone, the seed or the dense baseline, instead of all by
        `routing`. language: of all texts, as `Ensemble.score` has it. router: other options of
        `Routing`. batch_size: texts that are continued at once. JAX knows the device."""
        super().__init__()
        if model is None:
            options: dict[str, Any] = {"top_m": top_m, "route_per": route_per}
            chosen = Routing(name=routing, **options, **router)
        elif model in ("seed", "dense"):
            # A router that is never sure enough leaves every text to that model.
            chosen = Routing(name="uniform", abstain=1.0, abstain_to=model)
        else:
            chosen = Routing(name="fixed", weights={model: 1.0})
        self.ensemble: Ensemble = open_ensemble(open_run(run), chosen, dtype=dtype)
        if not self.ensemble.model.causal:
            raise UserError(f"{run} has encoders, which the harness cannot ask")
        self.tokenizer = self.ensemble.tokenizer.hub
        # One model alone is asked in every language.
        self._language = language if model is None else None
        self._max_gen_toks = max_gen_toks
        self._batch = int(batch_size) if str(batch_size).isdecimal() else 32

    @property
    def eot_token_id(self) -> int:
        return self.ensemble.tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which the first token is predicted."""
        return self.ensemble.tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def max_length(self) -> int:
        """Tokens that a model reads at once where likelihoods are asked for, the one that starts
        texts included; a continuation may go on to `Ensemble.longest`."""
        return self.ensemble.window

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, after the one that starts texts if any does, or of a rendered chat, whose
        template has all the special tokens that there are to be."""
        tokenizer = self.ensemble.tokenizer
        if string.startswith(RENDERED):
            return tokenizer.special.encode(string)[0]
        (ids,) = tokenizer.encode([string])
        return ids if add_special_tokens is False else [*tokenizer.start_ids, *ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as a string that `tok_encode` knows from other texts by its first character, in
        which what the user says is marked, since the router goes by that alone."""
        return self.ensemble.tokenizer.render(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def _user_mask(self, string: str | None, count: int) -> list[bool] | None:
        """By which of the last `count` ids of a context's string the router goes: of a chat, those
        of the user's text; None: by all."""
        if string is None or not string.startswith(RENDERED):
            return None
        mask = self.ensemble.tokenizer.special.encode(string)[1]
        # Of a user whose text was cut off nothing is left to go by, but for the whole context.
        return mask[-count:] if mask and any(mask[-count:]) else None

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
            # Spaces at the context's end went to the continuation.
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
                likelihoods = self.ensemble.likelihoods(
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
        """Both, and of a context that is too long, the end: the last token of all is predicted, and
        not read. A continuation that is too long alone is read in windows, after one token."""
        longest = self.ensemble.model.max_length
        if len(continuation) > longest:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, and the models read {longest}"
            )
        room = max(1, self.max_length + 1 - len(continuation))
        return context[-room:], continuation

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        flat = [(None, context, new) for some in windows for context, new in some]
        answers = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = [sum(next(answers)[0] for _ in some) for some in windows]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(_options(request).items())), []).append(number)
        with tqdm(total=len(requests), desc="continuations", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                asked = _options(requests[numbers[0]])
                # Side by side with others about as long, longest first.
                numbers.sort(key=lambda number: -len(requests[number].args[0]))
                for first in range(0, len(numbers), self._batch):
                    part = numbers[first : first + self._batch]
                    texts = [requests[number].args[0] for number in part]
                    for number, text in zip(part, self._continued(texts, asked)):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(part))
        return found  # type: ignore[return-value]

    def _continued(self, texts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        until = asked.get("until") or []
        until = [until] if isinstance(until, str) else until
        most = int(asked.get("max_gen_toks", self._max_gen_toks))
        ensemble = self.ensemble
        longest = ensemble.longest
        most = min(most, longest - 1)
        sampled = bool(asked.get("do_sample", float(asked.get("temperature") or 0) > 0))
        sampling = replace(
            ensemble.sampling,
            max_new_tokens=most,
            temperature=float(asked.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(asked.get("top_p") or 1.0),
            top_k=asked.get("top_k"),
            repetition_penalty=1.0,
            stop=tuple(stop for stop in until if stop),
        )
        room = longest - most
        prompts = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in texts]
        languages = [self._language] * len(prompts)
        masks = [self._user_mask(text, len(ids)) for text, ids in zip(texts, prompts)]
        found = generate(
            ensemble,
            ensemble.router,
            ensemble.limits,
            prompts,
            sampling,
            languages,
            user_masks=masks,
        )
        return [one.text for one in found]


def _options(request: Instance) -> dict[str, Any]:
    """How a continuation is asked for."""
    _, options = request.args  # type: ignore[misc]
    return dict(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """`xelm-lm-eval`: the harness's own command line, about a RUN."""
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
