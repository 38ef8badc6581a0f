"""`python -m serveit` is the command."""

from serveit.cli import main

if __name__ == "__main__":
    main(prog_name="serveit")
