"""mtil-mini: eleven small image domains, drawn on the user's machine from packages installed by pip."""
