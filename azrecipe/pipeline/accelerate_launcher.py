"""`accelerate launch` without its traceback.

The worker that failed has printed why, so a traceback of the launcher adds nothing. Takes the arguments of accelerate launch.
`azrecipe run` uses it; a user's `accelerate launch` works the same.
"""

from __future__ import annotations

import logging
import subprocess
import sys

from azrecipe.errors import EXIT_FAILED


def main() -> int:
    """Launch, wait, and return the first failing worker's exit code.

    A signal gives 128 + its number.
    """
    logging.disable(logging.ERROR)  # the elastic agent repeats the failure of a worker that has printed its reason
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
        return error.returncode if error.returncode > 0 else EXIT_FAILED
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
