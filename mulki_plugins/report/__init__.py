"""The output of a run: its folder, result file, tables, plots and logs."""
