"""The ensemble is measured, continues a text, and fills its masks."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from xelm.commands.options import (
    Command,
    add_json,
    add_run,
    print_json,
)
from xelm.commands.routing import (
    add_route_per,
    add_router,
    add_routing,
    check_language,
    report_routing,
    router_options,
)

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble


def _generate_options(parser: argparse.ArgumentParser) -> None:
    default = "what the seed asks for"
    add_run(parser)
    parser.add_argument("prompt", help="text to continue")
    add_routing(parser, "prompt")
    parser.add_argument("--chat", action="store_true", help="the prompt is a turn of a chat")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate at most (default: {default})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"sampling temperature; 0 takes the most probable token (default: {default})",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"sample from the K most probable tokens (default: {default})",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most probable tokens that make up this probability (default: "
        f"{default})",
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--random-seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of sampling (default: %(default)s)",
    )
    add_route_per(parser)
    add_router(parser)
    add_json(parser)


def _generate(options: argparse.Namespace) -> None:
    from xelm.inference.sampling import SamplingParams

    wishes = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "stop": options.stop and tuple(options.stop),
        "random_seed": options.random_seed,
    }
    wishes = {name: wish for name, wish in wishes.items() if wish is not None}
    SamplingParams(**wishes)  # a mistake is told before a router is fitted
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
    report_routing(options.language, generation.routing)
    if options.json:
        found = {"text": generation.text, "weights": generation.weights}
        print_json({**found, "routing": generation.routing})
        return
    print()
    _print_weights(generation.weights, generation.routing)


GENERATE = Command("continue a prompt with the ensemble", _generate_options, _generate)


def _fill_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("text", help="text with the mask of the seed's tokenizer, such as [MASK]")
    add_routing(parser, "text")
    parser.add_argument(
        "--count", type=int, default=5, metavar="N", help="guesses shown for each mask"
    )
    add_router(parser)
    add_json(parser)


def _fill(options: argparse.Namespace) -> None:
    ensemble = _ensemble(options)
    filling = ensemble.fill(options.text, count=options.count, language=options.language)
    report_routing(options.language, filling.routing)
    if options.json:
        masks = [[guess._asdict() for guess in guesses] for guesses in filling.masks]
        print_json({"masks": masks, "weights": filling.weights, "routing": filling.routing})
        return
    for number, guesses in enumerate(filling.masks, 1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:<9.3g} {json.dumps(guess.text, ensure_ascii=False)}")
    _print_weights(filling.weights, filling.routing)


FILL = Command("guess the masked tokens of a text (encoders)", _fill_options, _fill)


def _ensemble(
    options: argparse.Namespace, route_per: Literal["token", "prompt"] = "token"
) -> "Ensemble":
    from xelm.inference.routing import Routing
    from xelm.runs.ensembles import open_ensemble
    from xelm.runs.run import open_run

    check_language(options)
    given = {**router_options(options), "weights": options.weights or {}}
    routing = Routing(name=options.routing, route_per=route_per, **given)
    return open_ensemble(open_run(options.run), routing, dtype=options.dtype)


def _print_weights(weights: Mapping[str, float], routing: str) -> None:
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    spoken = [f"{name} {weight:.2f}" for name, weight in ordered if weight >= 0.005]
    print(f"experts: {', '.join(spoken)} (routing: {routing})", file=sys.stderr)
