"""The verbs of the command line. A verb loads what it needs, calls one function, and writes:
results to stdout, progress to stderr."""

from xelm.commands import asking, clusters, config, keeping, relatives, serving, training

# In the order of the help.
VERBS = {
    "quickstart": training.QUICKSTART,
    "cluster": clusters.CLUSTER,
    "rename": clusters.RENAME,
    "nearest": relatives.NEAREST,
    "features": relatives.FEATURES,
    "config": config.CONFIG,
    "init": training.INIT,
    "branch": training.BRANCH,
    "train": training.TRAIN,
    "grow": training.GROW,
    "evaluate": asking.EVALUATE,
    "generate": asking.GENERATE,
    "fill": asking.FILL,
    "serve": serving.SERVE,
    "status": keeping.STATUS,
    "report": keeping.REPORT,
    "verify": keeping.VERIFY,
    "rollback": keeping.ROLLBACK,
    "discard": keeping.DISCARD,
    "merge": keeping.MERGE,
}
