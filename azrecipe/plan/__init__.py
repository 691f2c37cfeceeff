"""What a recipe will need before it runs: memory, time and price."""
