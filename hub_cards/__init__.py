"""Model cards and publishing: what a GenieBlue's repository on the Hub says, and how it gets there."""
