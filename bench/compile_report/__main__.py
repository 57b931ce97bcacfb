"""`python -m bench.compile_report`: see `bench.compile_report.kernels`."""

import sys

from bench.compile_report.kernels import main

if __name__ == "__main__":
    sys.exit(main())
