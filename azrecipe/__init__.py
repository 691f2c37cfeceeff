"""azrecipe: teach an existing language model a new language by editing YAML."""

__version__ = "0.1.0"
