"""`xelm-lm-eval`: the command of `xelm.harness`, whose dependencies may not be installed."""

import sys

from xelm.process import prepare


def main() -> int:
    """Runs `xelm.harness.main`; exits with 2 and one line where the harness is not installed."""
    prepare()  # before the harness imports what reads its settings once
    try:
        from xelm import harness
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        message = "lm_eval is not installed; pip install 'xelm[lm-eval]'"
        print(f"xelm-lm-eval: {message}", file=sys.stderr)
        return 2
    return harness.main()
