"""Gates and baselines: their form, their versions and their verdicts."""
