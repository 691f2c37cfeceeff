"""What can be done with a recipe, as functions with typed results.

Stages and planning are imported when a function needs them. Nothing is printed here: callers show the results.
"""
