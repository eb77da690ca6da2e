"""`python -m lorafit` is the command `lorafit`."""

import sys

from lorafit.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
