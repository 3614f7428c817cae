"""The TokenFlow paper's experiments in virtual time, and the page that tells of them."""
