"""Routers are fitted by commands that publish experts: whoever opens them later fits nothing."""

import json
import shutil

import pytest

from clustering.errors import UserError
from xelm import open_run
from xelm.inference.routing import Routing
from xelm.runs import fitted
from xelm.runs.make_router import make_router


@pytest.fixture
def copy(tiny, tmp_path):
    shutil.copytree(tiny.directory, tmp_path / "RUN")
    return open_run(tmp_path / "RUN")


def names(run):
    return sorted(path.name.partition("-")[0] for path in (run.directory / "routers").glob("*"))


def opened(run, capsys):
    """What is said when all routers of a RUN are made."""
    capsys.readouterr()
    for routing in ("learned", "detected"):
        make_router(run, run.registry().published(), Routing(name=routing))
    return capsys.readouterr().err


def test_training_all_experts_leaves_their_routers(tiny, copy, capsys):
    assert tiny.outcomes["train"].err.count("once for these experts") == 3
    assert names(copy) == ["languages", "learned", "novelty"]
    assert opened(copy, capsys) == ""


def test_bringing_an_expert_back_fits_the_routers_of_the_set_that_there_is_now(copy, capsys):
    first = sorted((copy.directory / "routers").glob("*"))
    copy.retire("de-fr")
    shutil.rmtree(copy.directory / "routers")
    copy.restore("de-fr")
    assert opened(copy, capsys) == ""
    assert sorted((copy.directory / "routers").glob("*")) == first
    # Whoever needs one that is missing says that it is fitted.
    shutil.rmtree(copy.directory / "routers")
    assert opened(copy, capsys).count("once for these experts") == 3


def test_while_experts_of_clusters_are_trained_nothing_is_fitted(copy):
    shutil.rmtree(copy.directory / "routers", ignore_errors=True)
    path = copy.directory / "registry.json"
    value = json.loads(path.read_text())
    value["experts"][0]["status"] = "training"
    path.write_text(json.dumps(value))
    fitted.fit_published(copy)
    assert names(copy) == []
    value["experts"][0]["status"] = "published"
    path.write_text(json.dumps(value))
    fitted.fit_published(copy)
    assert names(copy) == ["languages", "learned", "novelty"]


def test_what_cannot_be_fitted_now_is_no_fault_of_the_training(copy, capsys, monkeypatch):
    def impossible(*given):
        raise UserError("there is no text")

    monkeypatch.setattr(fitted, "make_router", impossible)
    fitted.fit_published(copy)
    said = capsys.readouterr().err
    assert said == "routers are not fitted now, but when they are needed: there is no text\n"
