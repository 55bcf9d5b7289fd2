"""The command line as a program: help, interruption, faults of the machine, settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from xelm import cli, process
from xelm.commands.options import whole_number
from xelm.presets import PRESETS

ROOT = Path(__file__).parent.parent


def test_names_may_come_after_a_flag(xelm, place, monkeypatch):
    monkeypatch.chdir(place)
    asked = []
    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=asked.append))
    assert xelm("train", "run", "de-fr", "--dense", "en-es").code == 0
    assert asked[0].names == ["de-fr", "en-es"] and asked[0].dense
    assert xelm("train", "run", "--dense", "--unknown").code == 2
    assert xelm("verify", "run", "run").code == 2


def test_help_names_every_command(xelm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    outcome = xelm("--help")
    assert outcome.code == 0
    for command in (
        "quickstart", "cluster", "init", "branch", "train", "grow", "evaluate", "generate",
        "report", "verify", "rollback", "merge",
    ):  # fmt: skip
        assert f"\n    {command}" in outcome.out
        assert xelm(command, "--help").out.startswith(f"usage: xelm {command} ")


def test_the_version_is_shown(xelm):
    from xelm import __version__

    assert xelm("--version").out == f"xelm {__version__}\n"


def test_an_interrupted_command_says_how_to_go_on(xelm, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "verify", cli.COMMANDS["verify"]._replace(run=interrupt))
    outcome = xelm("verify", "RUN")
    assert outcome.code == 130
    assert outcome.err == "xelm: interrupted; run the same command again to go on\n"


def test_a_fault_of_the_disk_is_one_line_with_its_file(xelm, monkeypatch):
    def fail(options):
        raise PermissionError(13, "Permission denied", "/RUN/registry.json")

    monkeypatch.setitem(cli.COMMANDS, "verify", cli.COMMANDS["verify"]._replace(run=fail))
    outcome = xelm("verify", "RUN")
    assert outcome.code == 2
    assert outcome.err == "xelm: /RUN/registry.json: Permission denied\n"


def test_a_full_disk_is_said_with_the_run_where_nothing_else_is_known(xelm, monkeypatch):
    def fail(options):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=fail))
    outcome = xelm("train", "my/RUN", "--all")
    assert (outcome.code, outcome.err) == (2, "xelm: my/RUN: No space left on device\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'tensorboardX'", name="tensorboardX"),
            "runtime.tensorboard=true needs tensorboardX; pip install 'xelm[tensorboard]'",
        ),
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            "runtime.wandb=true needs wandb; pip install 'xelm[wandb]'",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes."),
            "the memory of the device is used up; a training needs less with --set, a higher "
            "runtime.accumulation_steps or runtime.rematerialise=true",
        ),
    ],
    ids=["tensorboard", "wandb", "memory"],
)
def test_what_a_machine_lacks_is_one_line(xelm, monkeypatch, error, message):
    def fail(options):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=fail))
    outcome = xelm("train", "RUN")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"xelm: {message}\n")


def test_an_error_of_ours_is_not_hidden(xelm, monkeypatch):
    def fail(options):
        raise ModuleNotFoundError("No module named 'xelm.nothing'", name="xelm.nothing")

    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=fail))
    with pytest.raises(ModuleNotFoundError):
        xelm("train", "RUN")


def test_a_reader_that_left_is_no_error(tiny):
    """`xelm verify RUN --json | head -0`"""
    command = [sys.executable, "-m", "xelm.cli", "verify", str(tiny.directory)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_change_what_they_name_and_nothing_else(preset):
    from xelm.settings import from_json, override, to_json

    config = PRESETS[preset]()
    changed = override(
        config, ["experts.tokens=3e6", "grow.runtime.dtype=bfloat16", "donor_share=0.5"]
    )
    wanted = to_json(config)
    wanted["experts"]["tokens"] = 3_000_000
    wanted["grow"]["runtime"]["dtype"] = "bfloat16"
    wanted["donor_share"] = 0.5
    assert to_json(changed) == wanted
    assert from_json(type(config), json.loads(json.dumps(wanted))) == changed


def test_a_part_and_its_fields_vary_together():
    from xelm.settings import vary
    from xelm.training_config import OptimizerConfig, TrainConfig

    changes = {"optimizer": OptimizerConfig(beta1=0.8), "optimizer.beta2": 0.9}
    wanted = OptimizerConfig(beta1=0.8, beta2=0.9)
    assert vary(TrainConfig(tokens=1), changes).optimizer == wanted


def test_settings_that_need_each_other_come_in_any_order():
    from xelm.settings import override

    settings = ["model.head_count=3", "model.key_head_count=3", "seed.runtime.tensorboard=true"]
    for order in (settings, settings[::-1]):
        config = override(PRESETS["tiny"](), order)
        assert config.model is not None
        assert (config.model.head_count, config.model.key_head_count) == (3, 3)
        assert config.seed.runtime.tensorboard is True


@pytest.mark.parametrize(
    ("set_up", "wanted"),
    [
        (process.keep_freed_memory, [(-8, 1), (-4, 0), (-1, -1)]),
        # What the other has set is set anew.
        (process.return_freed_memory, [(-8, 1), (-4, 65536), (-3, 2**20), (-1, 2**28)]),
    ],
    ids=["kept", "returned"],
)
@pytest.mark.parametrize(
    ("platform", "library", "environment", "can"),
    [
        ("linux", "glibc", {}, True),
        ("linux", "glibc", {"MALLOC_ARENA_MAX": "2"}, False),
        ("linux", "", {}, False),
        ("darwin", "glibc", {}, False),
    ],
    ids=["glibc", "set by the user", "musl", "macOS"],
)
def test_freed_memory_is_kept_or_returned_where_that_can_be_said(
    monkeypatch, set_up, wanted, platform, library, environment, can
):
    found = []

    class Library:
        def mallopt(self, option, value):
            found.append((option, value))

    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(process.sys, "platform", platform)
    monkeypatch.setattr(process.platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: Library())
    set_up()
    assert found == (wanted if can else [])


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("1e6", 1_000_000), ("2.5e3", 2500), ("-3", -3), ("9007199254740993", 2**53 + 1)],
)
def test_whole_numbers_may_be_written_as_powers_of_ten(text, value):
    assert whole_number(text) == value


@pytest.mark.parametrize("text", ["1.5", "many", "1e-3", "nan", "inf", "", "1e999"])
def test_what_is_no_whole_number_is_said_with_one_that_is(xelm, text):
    outcome = xelm("mix", "RUN", "--name", "a", "--tokens", text)
    wanted = f"argument --tokens: a whole number such as 5 or 1e6 wanted; got {text!r}; see xelm"
    assert (outcome.code, outcome.out) == (2, "") and wanted in outcome.err
