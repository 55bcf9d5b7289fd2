"""Who belongs together: languages or documents in, a `Clustering` out.

Knows language tags (`languages`), URIEL typology (`uriel`, `typology`, `pairing`), TF-IDF vectors
of subword ids and balanced k-means (`tfidf`, `vectoriser`, `kmeans`), random and hand-made controls
(`control`), the result as a value and on disk (`clustering`, `files`), and its pictures
(`figures`).

Deliberately does not know models, tokenizers, experts, training or JAX: texts arrive as arrays of
subword ids. Import the submodule that is needed, as in `from clustering import typology`; importing
the package itself loads nothing.
"""
