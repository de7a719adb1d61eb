"""What people do with a GenieBlue model: make, train, ask, publish and demonstrate one."""
