"""The command `genieblue`, one file per command. Only this package prints."""
