"""What can be done with a RUN: one module a verb. The only part of xelm, besides inference and the
command line, that knows clusterings and registries as well as models and training."""
