"""The parts that this package adds to MulKI."""

from importlib.resources import files

from mulki_plugins import hookimpl


@hookimpl
def mulki_register(register):
    register.plugin(
        "jigsaw",
        "mulki_jigsaw.stage:Jigsaw",
        summary="distils the pre-trained model on the batch's images, cut into tiles and shuffled",
        requires=["teachers"],
        options={
            "weight": "factor of the loss",
            "tiles": "tiles along each side of an image; it must divide the image's size",
        },
    )
    register.folder("strategies", files("mulki_jigsaw") / "strategies")
