"""The commands beside the run itself: verify, doctor, listings, the matrix of combinations."""
