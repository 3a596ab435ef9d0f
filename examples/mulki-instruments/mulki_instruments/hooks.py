"""The parts that this package adds to MulKI."""

from importlib.resources import files

from mulki_plugins import hookimpl


@hookimpl
def mulki_register(register):
    tasks = ["clocks", "compasses", "gauges", "dice"]
    register.stream("instruments", "mulki_instruments.stream:instruments", tasks=tasks)
    register.folder("recipes", files("mulki_instruments") / "recipes")
