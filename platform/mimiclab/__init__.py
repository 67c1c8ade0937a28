"""MimicLab: the life of a detector's training run, from an experiment file to a compared result."""
