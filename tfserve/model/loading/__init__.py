"""Loading: a checkpoint's files read strictly, and weights filled from them."""
