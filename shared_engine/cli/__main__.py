"""`python -m shared_engine.cli`: the `nemoretriever` command."""

import sys

from shared_engine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
