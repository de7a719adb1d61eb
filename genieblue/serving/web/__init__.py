"""A page to try a GenieBlue in the browser."""
