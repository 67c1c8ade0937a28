"""Which run is better, by how much, and on which images."""
