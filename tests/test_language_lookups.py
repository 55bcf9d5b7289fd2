"""Text, requests and RUNs of one language find each other under any of its codes."""

import json
import shutil

import numpy as np
import pytest
from shared import LANGUAGES

from clustering.clustering import Clustering
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.files import read_json, write_json
from xelm import open_run
from xelm.data import conllu, reading
from xelm.data.unusable import UnusableRecords
from xelm.evaluation.options import EvaluationOptions
from xelm.runs.evaluate import evaluate

FLORES = {"en": "eng_Latn", "de": "deu_Latn", "es": "spa_Latn", "fr": "fra_Latn"}


def quickly(run, folder):
    return evaluate(
        open_run(run),
        folder,
        EvaluationOptions(routings=("language",), max_documents=2, calibration_tokens=0),
        save=False,
    )


def under(folder, held_out, names):
    """The text that is held out, with files of other names."""
    folder.mkdir()
    for tag, name in names.items():
        shutil.copy(held_out / f"{tag}.jsonl", folder / f"{name}.jsonl")
    return folder


def renamed(run, old, new):
    """A RUN as earlier versions wrote it, with another spelling of one of its languages."""

    def spelt(value):
        if isinstance(value, dict):
            return {spelt(name): spelt(part) for name, part in value.items()}
        if isinstance(value, list):
            return [spelt(part) for part in value]
        return new if value == old else value

    for name in ("run.json", "registry.json", "clusters.json", "corpus/train/store.json"):
        write_json(run / name, spelt(read_json(run / name, newest_format=3)))
    for path in (run / "corpus" / "train").glob(f"{old}.*"):
        path.rename(path.with_name(path.name.replace(f"{old}.", f"{new}.", 1)))


def test_text_under_codes_of_flores_is_inside_the_mean(tiny, tmp_path):
    plain = quickly(tiny.directory, tiny.held_out)
    found = quickly(tiny.directory, under(tmp_path / "text", tiny.held_out, FLORES))
    assert {row.language for row in found.rows} == set(LANGUAGES)
    assert sorted((r.system, r.language, r.nll) for r in found.rows) == sorted(
        (r.system, r.language, r.nll) for r in plain.rows
    )
    means = {(s.system, s.routing): s.languages for s in found.summaries}
    assert sorted(means["ensemble", "language"]) == sorted(LANGUAGES)


def test_text_of_a_region_is_routed_by_its_language_and_keeps_its_name(tiny, tmp_path):
    names = FLORES | {"es": "es-MX"}
    found = quickly(tiny.directory, under(tmp_path / "text", tiny.held_out, names))
    rows = {(row.system, row.language): row for row in found.rows}
    assert rows["ensemble", "es-MX"].nll == pytest.approx(rows["en-es", "es-MX"].nll, rel=1e-6)
    means = {(s.system, s.routing): s.languages for s in found.summaries}
    assert sorted(means["ensemble", "language"]) == ["de", "en", "fr"]


def test_a_run_with_another_spelling_serves_its_language(copy):
    renamed(copy.directory, "de", "de-Latn")
    run = open_run(copy.directory)
    assert "de-Latn" in run.languages
    assert run.registry().for_language("de").name == "de-fr"
    assert run.clusters().cluster_of("deu_Latn") == "de-fr"
    assert run.store().tags(["deu", "en"]) == ["de-Latn", "en"]


@pytest.mark.parametrize("code", ["deu_Latn", "de-DE", "de-AT"])
def test_a_request_finds_the_expert_of_its_language(tiny, code):
    router = open_run(tiny.directory).ensemble(routing="language").router
    assert router.start(code).tolist() == router.start("de").tolist()


def test_a_request_in_another_script_finds_nobody(tiny):
    router = open_run(tiny.directory).ensemble(routing="language").router
    with pytest.raises(UserError, match="no expert serves 'de-Cyrl'"):
        router.start("de-Cyrl")


def test_a_corpus_is_asked_for_by_any_code(tmp_path):
    (tmp_path / "kor_Hang.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "zho_Hant.jsonl").write_text('{"text": "b"}\n', encoding="utf-8")
    found = list(reading.read(tmp_path, UnusableRecords(), ["ko"]))
    assert [(d.text, d.language) for d in found] == [("a", "ko")]
    with pytest.raises(UserError, match=r"has no file of zh$"):
        list(reading.read(tmp_path, UnusableRecords(), ["zh"]))


def test_records_are_of_the_language_that_their_code_means(tmp_path):
    codes = {"kor_Hang": "ko", "ko-KR": "ko", "bat-smg": "sgs", "zh_TW": "zh-Hant", "simple": None}
    lines = [json.dumps({"text": code, "lang": code}) for code in [*codes, "und", "als", "sla"]]
    (tmp_path / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    faults = UnusableRecords()
    found = {d.text: d.language for d in reading.read(tmp_path / "all.jsonl", faults)}
    assert found == {**codes, "simple": "en-simple"}
    assert faults.counts == {"an unknown language": 3}


def test_tagged_text_of_one_language_under_two_codes_is_all_of_it(tmp_path):
    for name in ("ko", "kor_Hang"):
        (tmp_path / f"{name}.conllu").write_text("")
    found = {tag: [path.stem for path in paths] for tag, paths in conllu.files(tmp_path).items()}
    assert found == {"ko": ["ko", "kor_Hang"]}


def test_distances_and_clusters_take_any_code():
    distances = Distances(
        measure="some",
        languages=("ko-Hang", "en"),
        values=np.array([[0.0, 0.5], [0.5, 0.0]]),
        coverage=np.ones((2, 2)),
    )
    assert distances.between("ko", "eng_Latn") == 0.5
    assert distances.of(["en", "ko"]).languages == ("en", "ko")
    clusters = Clustering(
        method="by-hand", clusters={"a": ("zh",), "b": ("ko",)}, languages=("zh", "ko")
    )
    assert clusters.cluster_of("cmn_Hani") == "a"
    with pytest.raises(UserError, match="zh-Hant is not among the languages"):
        clusters.cluster_of("zh-Hant")
