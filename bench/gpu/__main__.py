"""`python -m bench.gpu`: see `bench.gpu.run`."""

import sys

from bench.gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
