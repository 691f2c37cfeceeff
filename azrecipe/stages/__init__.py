"""The verbs: one file a stage, each `run(recipe, runs_dir, backend)`, reading top to bottom. Stages do not import each other."""
