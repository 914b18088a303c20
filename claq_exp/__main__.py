"""`python -m claq_exp` is the same as `claq-exp`."""

import sys

from claq_exp.cli import main

sys.exit(main())
