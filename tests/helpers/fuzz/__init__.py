"""Random requests of random engines, and the oracle of each."""
