"""Commands of the command line.

A command loads what it needs, calls one function of the library, and prints: results to stdout,
progress to stderr.
"""

from xelm.commands import (
    adoption,
    clusters,
    combine,
    config,
    evaluation,
    export,
    features,
    hub,
    inference,
    lifecycle,
    maintenance,
    merge,
    nearest,
    serving,
    training,
)

# In the order of the help.
COMMANDS = {
    "quickstart": training.QUICKSTART,
    "cluster": clusters.CLUSTER,
    "rename": clusters.RENAME,
    "nearest": nearest.NEAREST,
    "features": features.FEATURES,
    "config": config.CONFIG,
    "init": training.INIT,
    "branch": training.BRANCH,
    "train": training.TRAIN,
    "grow": training.GROW,
    "adopt": adoption.ADOPT,
    "compress": adoption.COMPRESS,
    "evaluate": evaluation.EVALUATE,
    "generate": inference.GENERATE,
    "fill": inference.FILL,
    "serve": serving.SERVE,
    "status": maintenance.STATUS,
    "report": maintenance.REPORT,
    "verify": maintenance.VERIFY,
    "publish": maintenance.PUBLISH,
    "rollback": maintenance.ROLLBACK,
    "retire": lifecycle.RETIRE,
    "restore": lifecycle.RESTORE,
    "discard": maintenance.DISCARD,
    "experts": lifecycle.EXPERTS,
    "diff": lifecycle.DIFF,
    "history": lifecycle.HISTORY,
    "merge": merge.MERGE,
    "distil": combine.DISTIL,
    "export": export.EXPORT,
    "push": hub.PUSH,
    "pull": hub.PULL,
}
