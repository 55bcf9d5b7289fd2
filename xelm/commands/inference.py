"""The commands that run an ensemble on a text: it continues a prompt, or fills masks."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clustering.errors import UserError
from xelm.commands.options import Command, add_fields, given_fields, run_of, show, whole_number
from xelm.commands.routing import add_language, add_routing, routing_of
from xelm.inference.routing import Routing
from xelm.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble

_SEED_DEFAULTS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="text to continue")
    add_language(parser, "prompt")
    _add_model(parser)
    parser.add_argument(
        "--chat", action="store_true", help="take the prompt as the user's message in a chat"
    )
    add_fields(
        parser,
        SamplingParams,
        *_SEED_DEFAULTS,
        "stop",
        "random_seed",
        title="sampling",
        elsewhere=dict.fromkeys(_SEED_DEFAULTS, "that of the seed's generation_config.json"),
    )
    add_routing(parser, "route_per")


def _generate(options: argparse.Namespace) -> None:
    given = given_fields(options, SamplingParams)
    SamplingParams(**given)  # raises UserError before a router is fitted
    ensemble = _open_ensemble(options)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt

    # Printed with the first piece, so that nothing is shown of a prompt that is refused.
    before = [] if options.chat else [options.prompt]

    def print_piece(piece: str) -> None:
        print(*before, piece, sep="", end="", flush=True)
        before.clear()

    generation = ensemble.generate(
        prompt,
        **given,
        language=options.language,
        stream=(lambda piece: None) if options.json else print_piece,
    )
    weights, routing = generation.weights, generation.routing
    show(options, {"text": generation.text, "weights": weights, "routing": routing}, "")
    _report_routing(options, weights, routing)


GENERATE = Command("continue a prompt with the ensemble", _generate, _generate_options)


def _fill_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text", help="text with the mask token of the seed's tokenizer, such as [MASK]"
    )
    add_language(parser, "text")
    _add_model(parser)
    parser.add_argument(
        "--count",
        type=whole_number,
        default=5,
        metavar="N",
        help="number of predictions shown for each mask (default: %(default)s)",
    )
    add_routing(parser)


def _fill(options: argparse.Namespace) -> None:
    ensemble = _open_ensemble(options)
    filling = ensemble.fill(options.text, count=options.count, language=options.language)
    masks = [[guess._asdict() for guess in guesses] for guesses in filling.masks]
    lines = []
    for number, guesses in enumerate(filling.masks, 1):
        lines.append(f"mask {number}")
        for guess in guesses:
            text = json.dumps(guess.text, ensure_ascii=False)
            lines.append(f"  {guess.probability:<9.3g} {text}")
    facts = {"masks": masks, "weights": filling.weights, "routing": filling.routing}
    show(options, facts, "\n".join(lines))
    _report_routing(options, filling.weights, filling.routing)


FILL = Command("predict the masked tokens of a text (encoders)", _fill, _fill_options)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="run one model alone: an expert (or NAME@vN), seed, dense, or one that was made of "
        "several, such as students/NAME (default: the ensemble)",
    )


def _open_ensemble(options: argparse.Namespace) -> "Ensemble":
    from xelm.runs.ensembles import open_ensemble, open_model

    if options.model is not None:
        if given_fields(options, Routing) or options.language is not None:
            raise UserError(
                "--model runs one model alone, which nothing routes to; leave out the "
                "options of routing, or --model"
            )
        return open_model(run_of(options), options.model, dtype=options.dtype)
    return open_ensemble(run_of(options), routing_of(options), dtype=options.dtype)


def _report_routing(
    options: argparse.Namespace, weights: Mapping[str, float], routing: str
) -> None:
    """Prints on stderr, unless stdout has it as JSON, the experts' weights and what decided them;
    in any case, that no expert serves the language that was given."""
    if options.language is not None and routing != "language":
        why = f"no expert serves {options.language}"
        if (retired := run_of(options).registry().retired_for(options.language)) is not None:
            how = f"xelm restore {options.run} {retired.name}"
            why = f"{retired.name}, the expert for it, is retired (bring it back with: {how})"
        print(f"{why}: routed by {routing} instead", file=sys.stderr)
    if not options.json and options.model is None:
        ordered = sorted(weights.items(), key=lambda item: -item[1])
        shown = [f"{name} {weight:.2f}" for name, weight in ordered if weight >= 0.005]
        print(f"experts: {', '.join(shown)} (routing: {routing})", file=sys.stderr)
