"""A service over HTTP: jobs in a store, one gang that answers them, and the faces in front. Without torch."""
