"""Both packages as other machines get them: their wheels, what is in them, and where they run."""
