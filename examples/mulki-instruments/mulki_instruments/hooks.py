"""What this package brings to MulKI."""

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
            "tasks": "only these, in the order given here",
            "each": "training images of each class; a quarter as many to test",
            "seed": "of the drawings",
        },
    )
    register.folder("recipes", files("mulki_instruments") / "recipes")
