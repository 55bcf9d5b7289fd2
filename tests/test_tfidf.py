"""TF-IDF vectors are scikit-learn's, prefixes exact, and clusters of documents follow language."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize

from clustering import kmeans, tfidf, vectoriser
from clustering.documents import Documents
from clustering.errors import UserError

V = 300


def corpus(documents=240, seed=0, skew=(0.25, 0.25, 0.25, 0.25)):
    """Documents of ids below V from four "languages" with a shared part, and their languages."""
    rng = np.random.default_rng(seed)
    languages = rng.choice(4, documents, p=skew)
    texts = []
    for language in languages:
        own = 20 + 70 * language + rng.zipf(1.5, rng.integers(5, 60)) % 70
        shared = rng.integers(0, 20, rng.integers(1, 10))
        texts.append(rng.permutation(np.concatenate([own, shared])))
    return texts, [("en", "sw", "hi", "ja")[language] for language in languages]


def together(documents, languages):
    return Documents([list(zip(documents, languages))])


def counts(documents):
    return sparse.csr_array(np.stack([np.bincount(ids, minlength=V) for ids in documents]))


def test_vectors_are_those_of_scikit_learn():
    documents, _ = corpus()
    # As many as there are topics: singular vectors beyond are of noise, nearly equal in size, and
    # differ with the machine's order of sums.
    fitted = tfidf.fit(documents, V, dimensions=4, random_seed=0)
    weights = TfidfTransformer(smooth_idf=True, norm="l2").fit(counts(documents))
    np.testing.assert_allclose(fitted.idf, weights.idf_, rtol=1e-6)
    svd = TruncatedSVD(4, algorithm="arpack").fit(weights.transform(counts(documents)))
    new, _ = corpus(50, seed=1)
    wanted = normalize(svd.transform(weights.transform(counts(new))))
    found = fitted.transform(new)
    signs = np.sign(np.sum(found * wanted, axis=0))  # of a singular vector, a matter of convention
    np.testing.assert_allclose(found * signs, wanted, atol=1e-5)


def test_the_running_sum_of_terms_gives_the_vector_of_every_prefix():
    documents, _ = corpus()
    fitted = tfidf.fit(documents, V, dimensions=20)
    ids = np.concatenate(documents[:30])
    sums = np.cumsum(fitted.terms(ids), axis=0)
    prefixes = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    wanted = fitted.transform([ids[: t + 1] for t in range(len(ids))])
    np.testing.assert_allclose(prefixes, wanted, atol=1e-6)
    for t in (1, 2, 17, len(ids)):
        s = sum(fitted.idf[u].astype(float) * fitted.projection[u].astype(float) for u in ids[:t])
        np.testing.assert_allclose(prefixes[t - 1], s / np.linalg.norm(s), atol=1e-6)
    assert fitted.terms(ids[:0]).shape == (0, 20)
    with pytest.raises(ValueError, match="subword ids must be in"):
        fitted.terms(np.array([V]))


def test_chunks_do_not_matter_and_empty_documents_are_zero(monkeypatch):
    documents, _ = corpus()
    fitted = tfidf.fit(documents, V, dimensions=8)
    documents[3:5] = [np.zeros(0, np.int32), np.array([])]
    whole = fitted.transform(documents)
    monkeypatch.setattr(vectoriser, "_TOKENS_PER_CHUNK", 40)
    np.testing.assert_allclose(fitted.transform(iter(documents)), whole, atol=1e-7)
    assert not whole[3:5].any()
    np.testing.assert_allclose(np.linalg.norm(np.delete(whole, [3, 4], 0), axis=1), 1, atol=1e-6)
    assert fitted.transform([]).shape == (0, 8)


def test_unseen_terms_say_nothing():
    documents, _ = corpus()
    fitted = tfidf.fit(documents, V + 2, dimensions=8)
    assert not fitted.projection[V:].any()
    assert not fitted.transform([np.array([V, V + 1])]).any()


def test_fitting_repeats_itself():
    documents, _ = corpus()
    assert tfidf.fit(documents, V, 10, random_seed=1) == tfidf.fit(
        iter(documents), V, 10, random_seed=1
    )


def test_dimensions_end_with_the_rank():
    fitted = tfidf.fit([np.array([0, 1]), np.array([2]), np.array([0, 1])], 5, dimensions=100)
    assert fitted.dimensions == 2
    assert fitted.transform([np.array([0, 1])]).shape == (1, 2)


@pytest.mark.parametrize("ids", [np.array([0, V]), np.array([-1]), np.array([0.5])])
def test_ids_outside_the_vocabulary_are_refused(ids):
    fitted = tfidf.fit([np.arange(V)], V, 1)
    for use in (lambda: fitted.transform([ids]), lambda: tfidf.fit([ids], V)):
        with pytest.raises(ValueError, match="subword ids"):
            use()


def test_only_empty_documents_are_refused():
    with pytest.raises(UserError, match="not empty; got none"):
        tfidf.fit([np.zeros(0, np.int64)], V)


def test_documents_of_one_language_come_together():
    documents, languages = corpus()
    clusters = tfidf.cluster(
        together(documents, languages), tfidf.fit(documents, V, 20), k=4, random_seed=0
    )
    assert tuple(clusters.clusters) == ("c0", "c1", "c2", "c3")
    assert clusters.of_documents
    assert max(clusters.parameters["sizes_while_fitting"]) <= 60
    assert sorted(max(shares, key=shares.get) for shares in clusters.shares.values()) == [
        "en",
        "hi",
        "ja",
        "sw",
    ]
    for shares in clusters.shares.values():
        assert sum(shares.values()) == pytest.approx(1)
    assert sum(sum(counts.values()) for counts in clusters.documents.values()) == len(documents)
    for language in ("en", "sw", "hi", "ja"):
        name = clusters.cluster_of(language)
        held = [counts.get(language, 0) for counts in clusters.documents.values()]
        assert clusters.documents[name][language] == max(held)


def test_a_new_document_goes_to_the_nearest_centre():
    documents, languages = corpus()
    clusters = tfidf.cluster(
        together(documents, languages), tfidf.fit(documents, V, 20), k=4, random_seed=0
    )
    new, new_languages = corpus(40, seed=5)
    names = list(clusters.clusters)
    vectors = clusters.vectoriser.transform(new)
    labels = clusters.assign(new)
    right = [clusters.cluster_of(language) for language in new_languages]
    assert np.mean([names[label] == name for label, name in zip(labels, right, strict=True)]) > 0.8
    nearest = ((vectors[:, None] - clusters.centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(labels, nearest)


def test_centres_of_a_sample_and_counts_of_all():
    documents, languages = corpus()
    fitted = tfidf.fit(documents, V, 20)
    every = together(documents, languages)
    clusters, again = (
        tfidf.cluster(every, fitted, k=4, sample=every.sample(100)) for _ in range(2)
    )
    assert clusters == again
    assert clusters.parameters["documents_fitted"] == 100
    labels = kmeans.assign(fitted.transform(documents), clusters.centres)
    held = [sum(counts.values()) for counts in clusters.documents.values()]
    assert held == np.bincount(labels, minlength=4).tolist()
    assert clusters.languages == tuple(dict.fromkeys(languages))


def test_memory_does_not_grow_with_the_documents():
    draw = np.random.default_rng(0)
    few = [(draw.integers(0, V, 200), "en") for _ in range(300)]
    fitted = tfidf.fit([ids for ids, _ in few], V, 5)

    class Many:
        def __init__(self, times):
            self.times = times

        def __iter__(self):
            return (document for _ in range(self.times) for document in few)

    def peak(times):
        tracemalloc.start()
        many = Documents([Many(times)])
        tfidf.cluster(many, fitted, k=2, sample=many.sample(200))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # what is loaded once
    assert peak(100) < 1.1 * peak(20)


def test_a_cluster_without_documents_is_left_out(monkeypatch):
    documents, languages = corpus()
    fitted = tfidf.fit(documents, V, dimensions=8)
    clusters = tfidf.cluster(together(documents, languages), fitted, 4)
    fit = kmeans.fit

    def with_a_far_centre(vectors, k, random_seed):
        found = fit(vectors, k, random_seed)
        return dataclasses.replace(found, centres=np.insert(found.centres, 1, 99.0, axis=0))

    monkeypatch.setattr(kmeans, "fit", with_a_far_centre)
    fewer = tfidf.cluster(together(documents, languages), fitted, 4)
    assert fewer.documents == clusters.documents and list(fewer.clusters) == [
        "c0",
        "c1",
        "c2",
        "c3",
    ]
    np.testing.assert_array_equal(fewer.centres, clusters.centres)
