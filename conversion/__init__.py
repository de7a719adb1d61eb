"""One artifact in, another out: a new GenieBlue from a base and a SigLIP; proof that a saved one is right."""
