"""`python -m fastheads`: for launchers (`torchrun -m fastheads train …`), and where the script is not at hand."""

from fastheads.cli import main

raise SystemExit(main())
