"""Whether a recipe's model reads the sentences of the user's own classes to their end, counted without torch."""

from __future__ import annotations

from mulki_plugins.recipe.schema import Recipe


def check_class_names(recipe: Recipe) -> list[str]:
    """Warnings of sentences that are cut. Mistakes where two classes read the same since they are cut.

    Only of the stream `folders`, whose names nobody has tried yet, and of models with CLIP's own kind of tokenizer; a run
    looks at every stream and model.
    """
    from mulki_plugins.models.text import byte_pairs_of, check_sentences
    from mulki_plugins.streams.folders.tasks import read_texts

    pairs = byte_pairs_of(recipe.model.name) if recipe.stream.name == "folders" else None
    if pairs is None:
        return []
    tasks = read_texts(recipe.stream.options["tasks"])
    return check_sentences(tasks, pairs.read, across=recipe.evaluate.classes != "task")
