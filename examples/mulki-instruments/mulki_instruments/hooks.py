"""The parts that this package adds to MulKI."""

from importlib.resources import files

from mulki_plugins import hookimpl


@hookimpl
def mulki_register(register):
    register.stream(
        "instruments",
        "mulki_instruments.stream:instruments",
        summary="clocks, compasses, gauges and dice, drawn by code",
        tasks=["clocks", "compasses", "gauges", "dice"],
        options={
            "tasks": "only these tasks, in this order",
            "each": "training images per class; a quarter as many test images",
            "seed": "seed of the drawings",
        },
    )
    register.folder("recipes", files("mulki_instruments") / "recipes")
