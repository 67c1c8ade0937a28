"""Which values are best: a search over some keys of an experiment, each trial an ordinary training run.

``space`` holds the distributions and draws from them, ``trials`` what is tried and what came of it,
``tuning`` is Ray Tune's part, ``results`` the ranking, ``driver`` the search from start to end.
"""
