"""The commands other than the run itself: verify, doctor, listings, the matrix of combinations."""
