"""Model cards, and publishing a GenieBlue on the Hub."""
