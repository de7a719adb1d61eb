"""The exported folder, and running it."""
