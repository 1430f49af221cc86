import sys

from smidgen.cli import main

sys.exit(main())
