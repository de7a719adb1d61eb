"""A small but real GenieBlue, trained end to end on two cores."""
