"""`python -m pynas`: the same as the command `pynas`."""

import sys

from pynas.cli import main

sys.exit(main())
