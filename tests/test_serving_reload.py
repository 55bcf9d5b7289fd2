"""What is published, rolled back or broken while a server runs."""

import os
import re
import shutil

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from serving import served, until

from clustering.files import sha256
from experts.lock import record
from experts.registry import Registry
from xelm import open_run
from xelm.inference.routing import Routing
from xelm.runs.ensembles import published
from xelm.serving import models

PROMPT = "abc de"


def test_models_that_are_opened_are_those_that_are_listed(chatty, monkeypatch):
    """Whatever is published between the two."""
    run = open_run(chatty)
    first, *_ = published(run)
    monkeypatch.setattr(models, "published", lambda _: (first,))
    found = models.open_served_models(run, Routing(name="uniform"))
    assert list(found.versions) == [first.name]
    assert found.ensemble.names == [first.name, "seed", "dense"]


def test_another_expert_under_the_same_name_and_version_is_not_taken_for_the_one_before(
    chatty, tmp_path
):
    """As when an expert is removed and its language grown again while the server is busy."""
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    run, routing = open_run(directory), Routing(name="uniform")
    before = models.open_served_models(run, routing)
    assert models.open_served_models(run, routing, before=before) is before
    said = before.ensemble.score([PROMPT], ["de"]).nats
    file = directory / "experts" / "de-fr" / "v1" / "model.safetensors"
    known, other = sha256(file), load_file(directory / "experts/en-es/v1/model.safetensors")
    save_file(other, file, {"format": "pt"})
    record_file = directory / "registry.json"
    record_file.write_text(record_file.read_text().replace(known, sha256(file)))
    after = models.open_served_models(run, routing, before=before)
    assert after.versions == before.versions and after is not before
    found = after.ensemble.score([PROMPT, PROMPT], ["de", "en"]).nats
    np.testing.assert_array_equal(found[0], found[1])
    assert abs(found[0] - said[0]) > 1e-3
    # What only the models before used does not stay in memory.
    held = len(after.parameters.on_device)
    after.evict_others()
    assert len(after.parameters.on_device) == held - 1


@pytest.mark.slow
def test_what_is_published_is_picked_up_and_nobody_is_dropped(chatty, tmp_path, slow, xelm, capfd):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    registry = directory / "registry.json"
    earlier = registry.read_bytes()
    assert xelm("grow", directory, "--language", "pt").code == 0
    later = registry.read_bytes()
    registry.write_bytes(earlier)
    with served(directory) as found:
        before = found.scheduler.models
        client = found.client()
        client.completions.create(model="xelm:de-fr", prompt=PROMPT, max_tokens=2)  # compiled
        slow["seconds"] = 0.5
        stream = client.completions.create(
            model="xelm:de-fr", prompt=PROMPT, max_tokens=40, temperature=0, stream=True
        )
        pieces = [next(stream).choices[0].text]
        registry.write_bytes(later)
        found.watcher.check()
        assert found.scheduler.models is not before
        names = [model.id for model in client.models.list()]
        assert "xelm:pt" in names
        answer = client.completions.create(
            model="xelm:pt", prompt=PROMPT, max_tokens=2, temperature=0
        )
        assert answer.choices[0].model_extra["xelm"]["weights"] == {"pt": 1.0}
        # The one that began before goes on to its end, by the experts it began with.
        assert found.scheduler.running == 1
        slow["seconds"] = 0
        pieces += [part.choices[0].text for part in stream]
        again = client.completions.create(
            model="xelm:de-fr", prompt=PROMPT, max_tokens=40, temperature=0
        )
        assert "".join(pieces) == again.choices[0].text
        # Parameters that stay are there once, and nothing of the earlier offer is kept.
        until(lambda: len(found.scheduler._batches) == 1)
        held = found.scheduler.models.ensemble.parameters.on_device
        assert len(held) == len(set(held))
        assert "now serving de-fr@v1, en-es@v1, pt@v1" in capfd.readouterr().err


def test_a_broken_expert_is_refused_until_it_is_whole(chatty, tmp_path, xelm, capfd, monkeypatch):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    with served(directory) as found:
        before = found.scheduler.models
        asked = {"model": "xelm:de-fr", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        said = found.post(asked).json()["choices"][0]["text"]
        # A new version whose file is not what the registry says.
        assert xelm("grow", directory, "--language", "pt").code == 0
        file = directory / "experts" / "pt" / "v1" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 0xFF
        file.write_bytes(content)
        found.watcher.check()
        assert found.scheduler.models is before
        assert found.post(asked).json()["choices"][0]["text"] == said
        refusal = capfd.readouterr().err
        # Looked at again after a while, without a word; taken up when it is whole.
        found.watcher.check()
        assert found.scheduler.models is before
        monkeypatch.setattr(found.watcher, "_retry_at", 0.0)
        found.watcher.check()
        assert found.scheduler.models is before and capfd.readouterr().err == ""
        content[-5] ^= 0xFF
        file.write_bytes(content)
        monkeypatch.setattr(found.watcher, "_retry_at", 0.0)
        found.watcher.check()
        assert "pt" in found.scheduler.models.versions
        before = found.scheduler.models
        assert "the changed registry is refused: pt@v1: changed: experts/pt/v1/model" in refusal
        # A registry that cannot be read at all.
        (directory / "registry.json").write_text("{")
        found.watcher.check()
        assert found.scheduler.models is before
        assert found.post(asked).status_code == 200
        text = httpx.get(f"{found.url}/metrics").text
        assert 'xelm_reloads_total{result="refused"} 2.0' in text


def test_that_a_change_is_being_prepared_is_told_and_nobody_waits(chatty, tmp_path, xelm, capfd):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    with served(directory) as found:
        opener, seen = found.watcher._opener, []

        def told():
            metric = re.search(
                r"^xelm_preparing (.*)$", httpx.get(f"{found.url}/metrics").text, re.M
            )
            return httpx.get(f"{found.url}/healthz").json()["preparing"], float(metric[1])

        def open_slowly(**given):
            body = {"model": "xelm", "prompt": PROMPT, "max_tokens": 2}
            seen.append((*told(), found.post(body).status_code))
            return opener(**given)

        found.watcher._opener = open_slowly
        assert xelm("grow", directory, "--language", "pt").code == 0
        found.watcher.check()
        assert seen == [(True, 1.0, 200)] and told() == (False, 0.0)
        said = capfd.readouterr().err.splitlines()
        assert "the registry has changed: preparing its models" in said
        assert re.fullmatch(
            r"now serving de-fr@v1, en-es@v1, pt@v1; prepared in \d+\.\d s", said[-1]
        )


def test_a_new_version_and_rolling_it_back_are_picked_up(chatty, tmp_path, xelm):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    with served(directory) as found:
        asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1, "seed": 1}

        def said(model):
            return found.post(asked | {"model": model}).json()["choices"][0]["text"]

        before, first, other = found.scheduler.models, said("xelm:de-fr"), said("xelm:en-es")
        assert first != other
        os.utime(directory / "registry.json")  # touched, and nothing else
        found.watcher.check()
        assert found.scheduler.models is before
        # A version that is en-es by its weights.
        registry = Registry.load(directory)
        shutil.copytree(directory / "experts/en-es/v1", directory / "experts/de-fr/v2")
        hashes = registry.expert("en-es").sha256
        registry.start("de-fr").publish("de-fr", 2, sha256=hashes, tokens=1).save(directory)
        found.watcher.check()
        assert (
            found.scheduler.models.versions["de-fr"] == "de-fr@v2" and said("xelm:de-fr") == other
        )
        assert xelm("rollback", directory, "de-fr").code == 0
        found.watcher.check()
        assert found.scheduler.models.versions == before.versions and said("xelm:de-fr") == first


@pytest.mark.slow
def test_experts_are_retired_restored_and_renamed_while_the_server_runs(chatty, tmp_path, slow):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    run = open_run(directory)
    with served(directory) as found:
        asked = {"model": "xelm:de-fr", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        client = found.client()

        def said(model):
            return found.post(asked | {"model": model})

        text = said("xelm:de-fr").json()["choices"][0]["text"]
        for change, gone, message, there in (
            (lambda: run.retire("de-fr"), "xelm:de-fr", "xelm:de-fr is retired; there", None),
            (lambda: run.restore("de-fr"), None, "", "xelm:de-fr"),
            (lambda: run.rename({"de-fr": "middle"}), "xelm:de-fr", "there is no", "xelm:middle"),
        ):
            model = "xelm:en-es" if gone is None else gone
            alone = said(model).json()["choices"][0]["text"]
            slow["seconds"] = 0.2
            stream = client.completions.create(**asked | {"model": model}, stream=True)
            pieces = [next(stream).choices[0].text]
            change()
            found.watcher.check()
            if gone:
                refused = said(gone)
                assert refused.status_code == 404 and message in refused.text
                assert gone not in [model.id for model in client.models.list()]
            # The request that began before ends as it would have.
            assert found.scheduler.running == 1
            slow["seconds"] = 0
            assert "".join([*pieces, *(part.choices[0].text for part in stream)]) == alone
            if there:
                assert said(there).json()["choices"][0]["text"] == text
        assert said("xelm").status_code == 200


def test_an_event_that_changes_no_version_in_use_opens_nothing(chatty, tmp_path, monkeypatch):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    with served(directory) as found:
        before, opened = found.scheduler.models, []
        monkeypatch.setattr(models, "open_ensemble", lambda *_, **__: opened.append(1))
        record(directory, "train", ["de-fr@v1"])
        found.watcher.check()
        assert found.scheduler.models is before and not opened
