"""Which values are best: a search over some keys of an experiment, each trial an ordinary training run.

``space`` holds the distributions and draws from them, ``trials`` what is tried and what came of it. ``asha`` decides
which trials go on, ``record`` is the file of all that happened, ``course`` where a search stands by it. ``tuning`` is
Ray Tune's part, ``results`` the ranking, ``earlier`` what is there of this name, ``driver`` the search from start to
end.
"""
