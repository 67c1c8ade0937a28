"""Which values are best: a search over some keys of an experiment, each trial an ordinary training run.

``space`` holds the distributions and draws from them, ``proposals`` has Optuna do so, ``metric`` is what trials are
compared by, ``trials`` what is tried and what came of it, ``data`` what they are trained on. ``record`` is the file of
all that happened; by it ``rules`` decide which trials go on (``asha``, and ``budget`` for what was spent), and
``course`` is where a search stands. ``tuning`` is Ray Tune's part and ``trial`` (``alone`` with one worker) a trial's
own, ``earlier`` what is there of this name, ``driver`` the search from start to end. ``results`` is the ranking;
``report`` and ``watch`` show what ``story`` makes of the record.
"""
