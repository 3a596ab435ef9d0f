"""The parts that this package adds to MulKI."""

from importlib.resources import files

from mulki_plugins import hookimpl


@hookimpl
def mulki_register(register):
    register.plugin("jigsaw", "mulki_jigsaw.stage:Jigsaw")
    register.folder("strategies", files("mulki_jigsaw") / "strategies")
