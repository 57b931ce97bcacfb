"""`python -m bench.roofline`: see `bench.roofline.costs`."""

import sys

from bench.roofline.costs import main

if __name__ == "__main__":
    sys.exit(main())
