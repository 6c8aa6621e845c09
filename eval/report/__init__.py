"""The report of a run, and ablations: tables and figures."""
