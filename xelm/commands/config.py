"""`xelm config`: lists presets, or shows a complete configuration."""

import argparse
from pathlib import Path

from xelm.commands.options import Command, add_settings, show
from xelm.presets import PRESETS


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="PRESET|RUN",
        help="preset, or directory of a RUN, whose complete configuration is shown (default: the "
        "presets are listed)",
    )
    add_settings(parser, "show it with this setting changed, as in experts.tokens=3e6")


def _config(options: argparse.Namespace) -> None:
    from clustering.errors import UserError
    from xelm.runs.run import open_run
    from xelm.settings import explained, override, to_json

    if options.name is None:
        if options.settings:
            raise UserError("--set changes a configuration; name a preset or a RUN")
        summaries = {name: _summary(name) for name in PRESETS}
        lines = [f"{name:12}{summary}" for name, summary in summaries.items()]
        show(options, summaries, "\n".join(lines))
        return
    if options.name in PRESETS:
        config = PRESETS[options.name]()
    elif Path(options.name).is_dir():
        config = open_run(options.name, finished=False).config
    else:
        raise UserError(
            f"{options.name} is neither a preset ({', '.join(PRESETS)}) nor the directory of a RUN"
        )
    config = override(config, options.settings)
    show(options, to_json(config), "\n".join(explained(config)))


CONFIG = Command(
    "list presets, or show a complete configuration", _config, _config_options, on_run=False
)


def _summary(preset: str) -> str:
    """The first sentence of a preset's docstring."""
    text = " ".join((PRESETS[preset].__doc__ or "").replace("`", "").split())
    return text.partition(". ")[0].removesuffix(".")
