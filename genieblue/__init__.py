"""Tools for GenieBlue models: make, train, chat with, publish and demonstrate them."""

__version__ = "0.1.0.dev0"
