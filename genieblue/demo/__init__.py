"""A small but real GenieBlue, made end to end on two cores: text, scans, vision tower, contact sheet."""
