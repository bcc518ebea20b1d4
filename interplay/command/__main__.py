"""`python -m interplay.command`: the commands of the client."""

from interplay.command.main import main

main()
