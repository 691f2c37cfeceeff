"""The nouns that stages are made of. A part never imports a stage."""
