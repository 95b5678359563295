"""``python -m alignkd``: the command line."""

from alignkd.cli import main

if __name__ == "__main__":
    main(prog_name="alignkd")
