"""Documents in parts: samples that no division or engine changes, and the same on many machines."""

import copy
import gzip
import json
import os
import sys
import threading
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.engines import over_ray
from clustering.errors import UserError
from xelm.data import contents, parts, reading
from xelm.data.unusable import UnusableRecords
from xelm.runs.run import open_run

PLAIN = {type(Path()), str, range, type(None)}


def numbered(count):
    """Document n is [n]; every seventh is empty."""
    return [(np.array([n] if n % 7 else [], int), "en") for n in range(count)]


def drawn(documents, size, seed=0):
    return [int(ids[0]) for ids in documents.sample(size, seed)]


def test_a_sample_is_uniform_over_the_documents():
    documents, times = Documents([numbered(20)]), np.zeros(20)
    for seed in range(2000):
        np.add.at(times, drawn(documents, 5, seed), 1)
    filled = np.arange(20) % 7 > 0
    np.testing.assert_allclose(times[filled] / 2000, 5 / 20, atol=0.05)  # five standard deviations
    assert not times[~filled].any()


def test_a_sample_is_the_same_however_documents_are_divided():
    every = numbered(100)
    whole = drawn(Documents([every]), 30)
    assert whole == sorted(set(whole)) and len(whole) <= 30
    assert whole != drawn(Documents([every]), 30, seed=1)
    for ends in ([50], [0, 1, 99, 100], list(range(100))):
        bounds = list(zip([0, *ends], [*ends, 100]))
        parts = [every[first:last] for first, last in bounds]
        assert drawn(Documents(parts), 30) == whole
        sizes = [last - first for first, last in bounds]
        assert drawn(Documents(parts, sizes=sizes), 30) == whole


def test_a_sample_of_all_is_all_that_are_not_empty():
    for size in (100, 1000):
        assert drawn(Documents([numbered(40), numbered(100)[40:]]), size) == [
            n for n in range(100) if n % 7
        ]
    assert Documents([]).sample(3) == []


def test_terms_are_made_only_of_what_is_drawn():
    made = []

    def terms(texts):
        for text in texts:
            made.append(text)
            yield np.array([len(text)])

    texts = [("x" * n, "en") for n in range(1, 51)]
    lengths = drawn(Documents([texts[:20], texts[20:]], terms), 10)
    assert [len(text) for text in made] == lengths and len(lengths) == 10


def test_a_function_reads_terms_and_languages_of_each_part():
    doubled = Documents(
        [[(1, "en"), (2, "de")], [], [(3, "sw")]], lambda found: (2 * x for x in found)
    )
    assert list(doubled.map(list)) == [[(2, "en"), (4, "de")], [], [(6, "sw")]]


def test_what_can_be_read_only_once_is_refused():
    with pytest.raises(ValueError, match="read several times; got an iterator"):
        Documents([numbered(3), iter(numbered(3))])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a size for each of 2 parts; got 1"):
        Documents([numbered(3), numbered(4)], sizes=[7])
    with pytest.raises(UserError, match="fewer documents than were counted before"):
        Documents([numbered(3)], sizes=[4]).sample(10)


class Many:
    """A million documents, held nowhere."""

    def __iter__(self):
        return ((n, "en") for n in range(1_000_000))


def test_drawing_takes_no_memory_for_what_is_not_drawn():
    documents = Documents([Many()], lambda numbers: (np.array([n]) for n in numbers))
    documents.sample(10)
    tracemalloc.start()
    found = drawn(documents, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found)) == 100 and max(found) > 900_000
    assert peak < 200_000


def test_parts_of_a_run_are_its_documents_and_say_where_they_lie(tiny, monkeypatch):
    monkeypatch.setattr("xelm.data.store.PART_DOCUMENTS", 7)
    run = open_run(tiny.directory)
    documents = run.documents(["fr", "en"])
    assert max(map(len, documents.parts)) == 7
    sent = copy.deepcopy(documents.parts)
    # What goes to another machine is a place, and no document.
    assert {type(value) for part in sent for value in asdict(part).values()} <= PLAIN
    found = [document for part in sent for document in part]
    store = run.store().languages
    wanted = [(store[tag].document(n), tag) for tag in ("fr", "en") for n in range(len(store[tag]))]
    for (ids, tag), (same, language) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ids, same)
        assert tag == language


def test_parts_of_a_corpus_are_its_files(tiny_corpus):
    faults = UnusableRecords()
    every = [(d.text, d.language) for d in reading.read(tiny_corpus, faults)]
    parts = contents.contents_of(tiny_corpus).parts
    assert [text for part in copy.deepcopy(parts) for text in part] == every
    plain = PLAIN | {bool, dict}
    assert {type(value) for part in parts for value in asdict(part).values()} <= plain
    assert {type(value) for part in parts for value in asdict(part.source).values()} <= plain
    assert len(parts) == len({language for _, language in every})


def test_surveys_of_files_add_up(tmp_path):
    for name in ("en.1", "en.2", "de"):
        lines = [
            {"text": name},
            {"text": ""},
            {"text": "x", "lang": "xx-nowhere-q"},
            {},
            {"text": ""},
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    faults, whole = UnusableRecords(), UnusableRecords()
    surveys = [parts.Survey.of(part) for part in contents.contents_of(tmp_path).parts]
    for survey in surveys:
        faults.include(survey.unusable)
    assert [survey.documents for survey in surveys] == [{"de": 1}, {"en": 1}, {"en": 1}]
    list(reading.read(tmp_path, whole))
    assert (faults.counts, faults.places) == (whole.counts, whole.places)
    assert faults.counts["empty text"] == 6 and len(faults.places["empty text"]) == 3


def test_a_file_has_the_format_of_its_name_wherever_it_lies(tmp_path):
    """In caches, names are links to files that are called otherwise."""
    (tmp_path / "blob").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "sw.jsonl.gz").symlink_to("../blob")
    (part,) = contents.contents_of(tmp_path / "corpus").parts
    assert list(part) == [("one", "sw"), ("two", "sw")]
    digests = {part.location: parts.Survey.of(part).digest}
    surveyed = replace(contents.contents_of(tmp_path / "corpus"), digests=digests)
    assert surveyed.fingerprint() == contents.contents_of(tmp_path / "corpus").fingerprint()


def test_a_cluster_that_does_not_answer_is_a_users_mistake(xelm, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    outcome = xelm(
        *("cluster", "--method", "tfidf", "--corpus", tiny.corpus, "-k", 2),
        *("--engine", "ray", "--out", tmp_path / "out"),
    )
    assert outcome.code == 2
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: " in outcome.err


def test_without_ray_its_engine_says_what_to_install(xelm, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    outcome = xelm(
        *("cluster", "--method", "tfidf", "--run", tiny.directory, "-k", 2),
        *("--engine", "ray", "--out", out),
    )
    assert outcome.code == 2 and 'pip install "xelm[ray]"' in outcome.err
    assert not out.exists()


@pytest.fixture(scope="module")
def cluster():
    """A local cluster of a head, on which nothing is computed, and two nodes of one core."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_host": "127.0.0.1"}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        found.add_node(num_cpus=1)
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False, logging_level="WARNING")
    yield found
    ray.shutdown()
    found.shutdown()


RAY = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class TestOnTwoNodes:
    pytestmark = RAY

    def test_both_work_and_results_come_in_order(self, cluster):
        import ray

        def where(number, text):
            time.sleep(0.3)
            return number, text, ray.get_runtime_context().get_node_id()

        found = over_ray(where, range(8), "abcdefgh")
        assert [result[:2] for result in found] == list(enumerate("abcdefgh"))
        assert len({node for _, _, node in found}) == 2

    def test_mistakes_are_raised_here_as_they_are(self, cluster):
        def fail(number):
            if number == 2:
                raise UserError("part two is broken")
            return Path("nowhere").read_text() if number == 4 else number

        with pytest.raises(UserError, match=r"^part two is broken$"):
            over_ray(fail, range(4))
        with pytest.raises(FileNotFoundError, match="nowhere"):
            over_ray(fail, [1, 4])

    def test_other_faults_tell_where_they_happened(self, cluster):
        def divide(number):
            return 1 / number

        with pytest.raises(RuntimeError, match=r"(?s)in divide.*ZeroDivisionError"):
            over_ray(divide, [1, 0])

    def test_the_first_fault_ends_it(self, cluster, tmp_path):
        def work(number):
            if number == 0:
                raise UserError("at once")
            time.sleep(1)
            (tmp_path / str(number)).touch()

        with pytest.raises(UserError, match="at once"):
            over_ray(work, range(12))
        assert len(list(tmp_path.iterdir())) < 11

    def test_a_part_that_ends_its_process_is_given_up(self, cluster):
        with pytest.raises(UserError, match=r"^Ray: "):
            over_ray(os._exit, [1])

    def test_a_sample_is_that_of_one_machine(self, cluster):
        parts = [numbered(70), numbered(5), numbered(40)]
        here, there = (Documents(parts, engine=engine) for engine in (map, over_ray))
        assert drawn(here, 30) == drawn(there, 30) and 20 < len(drawn(here, 30)) <= 30

    @pytest.mark.parametrize("text", ["run", "corpus"])
    def test_clusters_are_those_of_one_machine(
        self, cluster, xelm, tiny, tmp_path, monkeypatch, text
    ):
        monkeypatch.setattr("xelm.data.store.PART_DOCUMENTS", 13)
        where = {"run": ("--run", tiny.directory), "corpus": ("--corpus", tiny.corpus)}[text]
        for engine in ("local", "ray"):
            outcome = xelm(
                *("cluster", "--method", "tfidf", *where, "-k", 3),
                *("--engine", engine, "--out", tmp_path / engine),
            )
            assert outcome.code == 0, outcome.err
        local, ray = (Clustering.load(tmp_path / engine) for engine in ("local", "ray"))
        assert local == ray
        names = ("clusters.json", "clusters.npz")
        for one, other in ((tmp_path / "local" / n, tmp_path / "ray" / n) for n in names):
            assert one.read_bytes() == other.read_bytes()

    def test_what_a_lost_node_was_doing_is_done_again(self, cluster, tmp_path):
        import ray

        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        lost = node.node_id
        begun = tmp_path / "begun"

        def work(number):
            if ray.get_runtime_context().get_node_id() == lost:
                with begun.open("a") as file:
                    file.write(f"{number}\n")
                time.sleep(600)  # ends with its node
            return 10 * number

        def lose():
            while not begun.exists():
                time.sleep(0.05)
            cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=lose, daemon=True)
        killer.start()
        found = over_ray(work, range(12))
        killer.join(10)
        assert begun.read_text()
        assert found == [10 * number for number in range(12)]
