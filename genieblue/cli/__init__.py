"""The command `genieblue`: one file per command; only this room speaks to a terminal."""
