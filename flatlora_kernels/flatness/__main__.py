"""See command.py."""

from .command import main

main()
