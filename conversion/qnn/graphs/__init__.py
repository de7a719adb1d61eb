"""Float graphs of both views and of the vision tower."""
