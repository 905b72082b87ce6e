"""`python -m tests.bench`. The processes that are started from here import this file again, so it holds nothing."""

import sys

if __name__ == "__main__":
    from tests.bench.measure import main

    sys.exit(main())
