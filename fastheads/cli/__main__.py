"""`python -m fastheads.cli`, where the `fastheads` script is not at hand."""

from fastheads.cli import main

raise SystemExit(main())
