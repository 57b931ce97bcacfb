"""`python -m bench.check`: see `bench.check.compare`."""

import sys

from bench.check.compare import main

if __name__ == "__main__":
    sys.exit(main())
