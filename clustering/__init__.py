"""Who belongs together: languages or documents in, a `Clustering` out.

Languages are measured (`typology`, `genealogy`, `geography`, `table`, `lexical`), measures weighed
together (`distances`), and clusters made of distances (`grouping`, with `pairing`, `agglomerative`
and `capacity`; `choice` says how many). Documents become vectors (`tfidf`, `vectoriser`) and
clusters of vectors (`kmeans`). Controls are random or made by hand (`control`). The result is a
value (`clustering`, `tree`), lies on disk (`storage`, `files`) and has pictures (`figures`,
`maps`). `languages` knows codes and names, `uriel` the data, `features` what a distance makes of a
table with gaps.

Deliberately does not know models, tokenizers, experts, training or JAX: texts arrive as strings or
arrays of subword ids. Import the submodule that is needed, as in `from clustering import typology`;
importing the package itself loads nothing.
"""
