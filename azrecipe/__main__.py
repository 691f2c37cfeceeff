"""`python -m azrecipe`: the command line, or one worker of a launched run."""

import os
import sys

if __name__ == "__main__":
    # Before any other import: -m puts the working folder first on the path, where files beside a recipe may have the names of modules.
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 (pathlib is not imported yet)
        del sys.path[0]
    from azrecipe.utils.python_command import ensure_importable

    ensure_importable()
    from azrecipe.cli import main

    sys.exit(main())
