"""QNN export: graphs for Snapdragon NPUs, compiled and checked on an ordinary computer."""
