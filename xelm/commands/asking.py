"""The ensemble is measured, continues a text, and fills its masks."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from xelm.commands.options import (
    Verb,
    add_corpus,
    add_json,
    add_run,
    names,
    print_json,
    required_corpus,
)
from xelm.commands.routing import (
    ROUTINGS,
    add_kept,
    add_route_per,
    add_router,
    add_routing,
    add_temperature,
    check_language,
    router_options,
    tell_routing,
)

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble

EVALUATED = ("language", "detected", "tfidf", "learned", "posterior")
CALIBRATION_TOKENS = 1000


def _evaluate_options(verb: argparse.ArgumentParser) -> None:
    add_run(verb)
    add_corpus(verb, "text to measure on, as for xelm init", required=True)
    verb.add_argument(
        "--routing",
        type=names,
        default=EVALUATED,
        metavar="A,B",
        help=f"routings to measure, of {', '.join(ROUTINGS[:-1])} (default: "
        f"{', '.join(EVALUATED)}); language alone is the quickest",
    )
    verb.add_argument(
        "--languages",
        type=names,
        metavar="A,B,C",
        help="languages of the corpus to measure on (default: all)",
    )
    verb.add_argument(
        "--max-documents",
        type=int,
        metavar="N",
        help="documents of each language to score at most (default: all)",
    )
    verb.add_argument(
        "--calibration-tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="tokens of each language on which calibration is measured (default: %(default)s)",
    )
    verb.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="tokens that a model reads at once (default: the models' own length)",
    )
    verb.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window of a longer document to the next (default: the context "
        "length); fewer give every token more context and take longer",
    )
    add_kept(verb)
    add_temperature(verb)
    add_json(verb)


def _evaluate(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.runs.evaluation import evaluate
    from xelm.runs.results import RESULTS
    from xelm.runs.run import open_run

    run = open_run(options.run)
    results = evaluate(
        run,
        required_corpus(options),
        routings=options.routing,
        top_m=options.top_m,
        **({} if options.least_weight is None else {"least_weight": options.least_weight}),
        temperature=options.router_temperature,
        languages=options.languages,
        max_documents=options.max_documents,
        calibration_tokens=options.calibration_tokens,
        context_length=options.context_length,
        stride=options.stride,
    )
    if options.json:
        print_json(results.record)
    else:
        print(tables.results(results, options.routing, run.languages))
        print(f"\nSaved in {run.results / RESULTS}")


EVALUATE = Verb("perplexity and bits per byte by language", _evaluate_options, _evaluate)


def _generate_options(verb: argparse.ArgumentParser) -> None:
    default = "what the seed asks for"
    add_run(verb)
    verb.add_argument("prompt", help="text to continue")
    add_routing(verb, "prompt")
    verb.add_argument("--chat", action="store_true", help="the prompt is a turn of a chat")
    verb.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate at most (default: {default})",
    )
    verb.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"sampling temperature; 0 takes the most probable token (default: {default})",
    )
    verb.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"sample from the K most probable tokens (default: {default})",
    )
    verb.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most probable tokens that make up this probability (default: "
        f"{default})",
    )
    verb.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    verb.add_argument(
        "--random-seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of sampling (default: %(default)s)",
    )
    add_route_per(verb)
    add_router(verb)
    add_json(verb)


def _generate(options: argparse.Namespace) -> None:
    from xelm.inference.sampling import Sampling

    wishes = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "stop": options.stop and tuple(options.stop),
        "random_seed": options.random_seed,
    }
    wishes = {name: wish for name, wish in wishes.items() if wish is not None}
    Sampling(**wishes)  # a mistake is told before a router is fitted
    ensemble = _ensemble(options, options.route_per)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt

    # With its first piece, so that nothing is shown of a prompt that is refused.
    before = [] if options.chat else [options.prompt]

    def show(piece: str) -> None:
        print(*before, piece, sep="", end="", flush=True)
        before.clear()

    generation = ensemble.generate(
        prompt,
        **wishes,
        language=options.language,
        stream=(lambda piece: None) if options.json else show,
    )
    tell_routing(options.language, generation.routing)
    if options.json:
        found = {"text": generation.text, "weights": generation.weights}
        print_json({**found, "routing": generation.routing})
        return
    print()
    _print_weights(generation.weights, generation.routing)


GENERATE = Verb("continue a prompt with the ensemble", _generate_options, _generate)


def _fill_options(verb: argparse.ArgumentParser) -> None:
    add_run(verb)
    verb.add_argument("text", help="text with the mask of the seed's tokenizer, such as [MASK]")
    add_routing(verb, "text")
    verb.add_argument(
        "--count", type=int, default=5, metavar="N", help="guesses shown for each mask"
    )
    add_router(verb)
    add_json(verb)


def _fill(options: argparse.Namespace) -> None:
    ensemble = _ensemble(options)
    filling = ensemble.fill(options.text, count=options.count, language=options.language)
    tell_routing(options.language, filling.routing)
    if options.json:
        masks = [[guess._asdict() for guess in guesses] for guesses in filling.masks]
        print_json({"masks": masks, "weights": filling.weights, "routing": filling.routing})
        return
    for number, guesses in enumerate(filling.masks, 1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:<9.3g} {json.dumps(guess.text, ensure_ascii=False)}")
    _print_weights(filling.weights, filling.routing)


FILL = Verb("guess the masked tokens of a text (encoders)", _fill_options, _fill)


def _ensemble(
    options: argparse.Namespace, route_per: Literal["token", "prompt"] = "token"
) -> "Ensemble":
    from xelm.runs.run import open_run

    check_language(options)
    return open_run(options.run).ensemble(
        options.routing,
        **router_options(options),
        route_per=route_per,
        dtype=options.dtype,
    )


def _print_weights(weights: Mapping[str, float], routing: str) -> None:
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    spoken = [f"{name} {weight:.2f}" for name, weight in ordered if weight >= 0.005]
    print(f"experts: {', '.join(spoken)} (routing: {routing})", file=sys.stderr)
