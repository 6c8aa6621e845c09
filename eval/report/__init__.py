"""The report: tables, pictures, ablations."""
