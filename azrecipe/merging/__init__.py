"""Several models' weights combined into one, tensor by tensor."""
