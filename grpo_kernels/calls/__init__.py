"""One call of a loss: what the user passed is read, routed to kernels, and its result given a gradient."""
