"""Both packages as other machines install them: their wheels, the content of the wheels, and where they run."""
