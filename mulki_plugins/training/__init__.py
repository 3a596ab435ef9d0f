"""Training and evaluation of a recipe with Avalanche."""

from mulki_plugins.libraries import import_libraries

import_libraries()
