"""Tools for GenieBlue models: make, train, chat with, publish and demonstrate them."""
