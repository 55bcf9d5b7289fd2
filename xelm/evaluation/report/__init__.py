"""The report: one self-contained HTML page about a RUN from its `facts`, and its figures.

`verdict`, `missing`, `tables` and `pictures` say what the facts mean, `page` writes it down. Opens
no model and needs no JAX. What is missing is named, with the command that makes it."""
