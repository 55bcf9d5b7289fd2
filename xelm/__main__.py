"""`python -m xelm`."""

import sys

from xelm.cli import main

if __name__ == "__main__":
    sys.exit(main())
