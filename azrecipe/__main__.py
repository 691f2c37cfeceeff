"""`python -m azrecipe`: the command line, or one worker of a launched run."""

import sys

from azrecipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
