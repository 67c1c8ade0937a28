"""The verbs of the command line, a file for each kind; each verb is a thin call into the module that does the work.

Imports of those modules stay inside the verbs, so that `--help` and completion are instant.
"""
