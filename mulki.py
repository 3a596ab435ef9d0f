"""`python -m mulki` is the `mulki` command; what can be imported is in `mulki_plugins`."""

from mulki_plugins.cli import main

if __name__ == "__main__":
    main()
