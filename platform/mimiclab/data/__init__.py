"""From annotation files to batches: what a data set holds, and which images make up a step."""
