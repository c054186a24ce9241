"""`python -m dynamo_serve` is `dynamo-serve`."""

import sys

from dynamo_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
