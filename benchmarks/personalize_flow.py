"""``benchmarks.personalize`` on the embedded flow base, at the package's own rates: 8 people x 3 seeds x methods; resumable."""

import sys

from benchmarks.personalize import main

if __name__ == "__main__":
    sys.exit(main(["--base", "embedded-flow", "--rates", "package", *sys.argv[1:]]))
