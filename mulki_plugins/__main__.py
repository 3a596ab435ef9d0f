"""`python -m mulki_plugins` is the `mulki` command."""

from mulki_plugins.cli import main

if __name__ == "__main__":
    main()
