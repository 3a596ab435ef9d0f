import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; set before torch reads it

# The tests start many processes. Each would compile the libraries anew, for 15 seconds, if none may keep what it compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

from mulki_plugins.libraries import import_libraries  # noqa: E402

import_libraries()  # in half the time in which conftest would import them: without what they need only sometimes
