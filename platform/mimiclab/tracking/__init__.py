"""Where users look at runs: MLflow, and the only place that knows it.

``protocol`` is what the rest of the platform writes to and loads nothing heavy; ``runs`` opens and
ends runs, ``writer`` sends their history, ``ui`` shows them.
"""
