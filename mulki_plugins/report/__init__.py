"""What a run leaves behind: files, tables, pictures, curves."""
