"""`python -m azrecipe`: the command line, or, under accelerate launch and torchrun, one worker of a run."""

import sys

from azrecipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
