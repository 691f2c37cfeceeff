"""`accelerate launch` without its traceback: a worker has told what went wrong, and one message is enough.

Takes accelerate launch's own arguments. Used by `azrecipe run`; a user's own `accelerate launch` works the same.
"""

from __future__ import annotations

import logging
import subprocess
import sys

from azrecipe.errors import FAILED


def main() -> int:
    """Launch, wait, and return the first failing worker's exit code (or 128 + its signal)."""
    logging.disable(logging.ERROR)  # the elastic agent's account of a worker that has told its reason
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args()
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        return code if code > 0 else 128 - code
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else FAILED
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
