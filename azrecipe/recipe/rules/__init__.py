"""What a schema cannot say of a recipe, by stage."""
