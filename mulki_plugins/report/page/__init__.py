"""The report of runs as one HTML page, and its tables for a paper."""
