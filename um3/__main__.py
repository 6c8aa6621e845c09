"""`python -m um3`: the `um3` command."""

from um3.cli import entry_point

if __name__ == "__main__":
    entry_point()
