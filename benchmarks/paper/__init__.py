"""The TokenFlow paper's experiments in virtual time, and their page of results."""
