"""Clusters and the jobs that run on them."""
