"""How processes and machines share one run."""
