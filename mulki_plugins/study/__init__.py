"""Studies: recipes × strategies × seeds × orders × settings, run where there is room, each run once."""
