"""What people do with a GenieBlue model: make, train, ask, publish and demonstrate one."""

__version__ = "0.1.0.dev0"
