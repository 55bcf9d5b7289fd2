"""`xelm-lm-eval`, where the harness may not be installed."""

import sys

from xelm.process import prepare


def main() -> int:
    """As `xelm.harness.main`; 2 with a line where there is no harness."""
    prepare()  # before the harness imports what reads its settings once
    try:
        from xelm import harness
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        print("xelm-lm-eval: it needs lm_eval; pip install 'xelm[lm-eval]'", file=sys.stderr)
        return 2
    return harness.main()
