"""Training and evaluation of a recipe through Avalanche."""

from mulki_plugins.libraries import import_libraries

import_libraries()
