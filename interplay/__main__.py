"""`python -m interplay`: the same as `interplay`."""

from interplay.server import main

main()
