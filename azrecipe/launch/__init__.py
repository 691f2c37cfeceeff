"""Where a recipe runs: the command lines of launchers, and what a launched process does first."""
