"""Both views of a GenieBlue in one vLLM engine, as a plugin that vLLM finds by its entry point."""
