import sys

from smidgen.cli.dispatch import main

sys.exit(main())
