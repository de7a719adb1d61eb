"""`python -m genieblue` is the same as the command `genieblue`."""

from genieblue.cli.app import app

if __name__ == "__main__":
    app(prog_name="genieblue")
