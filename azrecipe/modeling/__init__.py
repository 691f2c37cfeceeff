"""A transformers model: opened, given a vocabulary, adapted, given kernels."""
