"""Data sets of the Hub: configurations are languages, and a commit is recorded."""

import pytest
from small_corpora import BOTH, HABARI, MANN, lines, texts, write

from clustering.errors import UserError
from xelm.data.contents import contents_of, languages_of
from xelm.data.corpus import Corpus
from xelm.data.reading import read
from xelm.data.unusable import UnusableRecords

FINEWEB = {"deu_Latn": [MANN], "swh_Latn": [HABARI], "swh_Latn_removed": [{"text": "x"}]}


@pytest.fixture
def fineweb(monkeypatch):
    """The Hub with a data set of three configurations; returns the commit, which may be changed."""
    import datasets
    import huggingface_hub

    state = {"sha": "a" * 40}

    def dataset_info(self, name, *, revision=None):
        return huggingface_hub.DatasetInfo(id=name, sha=state["sha"])

    def load_dataset(name, config, *, split, streaming, revision):
        assert (name, split, streaming, revision) == ("owner/web", "train", True, state["sha"])
        return FINEWEB[config]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = lambda name, revision: sorted(FINEWEB)  # noqa: E731
    monkeypatch.setattr(datasets, "get_dataset_config_names", names)
    return state


def test_configurations_of_a_data_set_are_languages(fineweb):
    assert texts("hf://owner/web") == BOTH
    assert texts("hf://owner/web", ["sw"]) == {"sw": ["Habari"]}
    assert texts("hf://owner/web/swh_Latn_removed") == {"sw": ["x"]}
    assert languages_of("hf://owner/web/swh_Latn") == ["sw"]
    with pytest.raises(UserError, match="name the languages to take from hf://owner/web with"):
        languages_of("hf://owner/web")
    with pytest.raises(UserError, match="hf://owner/web has no file of fr"):
        contents_of("hf://owner/web", ["sw", "fr"])


def test_a_data_set_is_recorded_with_its_commit_and_stays_at_it(fineweb):
    pinned = Corpus.of("hf://owner/web").pinned()
    assert pinned.to_json() == f"hf://owner/web@{'a' * 40}"
    before = contents_of("hf://owner/web", ["sw"]).fingerprint()
    assert contents_of(pinned, ["sw"]).fingerprint() == before
    fineweb["sha"] = "b" * 40
    assert contents_of("hf://owner/web", ["sw"]).fingerprint() != before
    assert contents_of(pinned, ["sw"]).fingerprint() == before


def test_a_folder_of_the_name_of_a_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    write(tmp_path, {"owner/web/de.jsonl": lines(MANN)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="there is a folder owner/web here; give --corpus owner/web"
    ):
        list(read("hf://owner/web", UnusableRecords()))


def test_configurations_that_name_no_language_have_to_be_chosen(fineweb, monkeypatch):
    import datasets

    names = ["sample-10BT", "sample-100BT"]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: names)
    with pytest.raises(UserError, match=r"name one of sample-10BT, sample-100BT, as in hf://owner"):
        contents_of("hf://owner/web")
