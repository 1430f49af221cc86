"""Run the recipe from the command line."""

import sys

from smidgen.lab.embedded_base.cli import main

if __name__ == "__main__":
    sys.exit(main())
