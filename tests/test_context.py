"""Sentences that are longer than what a model reads: refused where classes collapse, warned of elsewhere."""

import pytest
import torch
from attrs import frozen
from click.testing import CliRunner
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from mulki_plugins.cli import main
from mulki_plugins.errors import Mistakes
from mulki_plugins.models import ClipClassifier, load_clip
from mulki_plugins.models.text import byte_pairs_of, check_sentences, reader_of
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.streams.mini.stream import declared_tasks
from mulki_plugins.training.build import build
from tests.conftest import small_tokenizer

BIRD = "Animalia Chordata Aves Passeriformes Corvidae Corvus"
CROWS = (f"{BIRD} corax", f"{BIRD} corone", f"{BIRD} frugilegus")


@frozen
class Named:
    name: str
    class_names: tuple
    templates: tuple = ("a photo of a {}.",)


@pytest.fixture(scope="module")
def tiny():
    return load_clip("mulki-tiny")


@pytest.fixture(params=["tokenizer", "byte pairs"])
def read(request, tiny):
    return reader_of(tiny.tokenizer) if request.param == "tokenizer" else byte_pairs_of("mulki-tiny").read


def test_classes_that_collapse_are_refused_with_task_names_and_limit(read):
    other = Named("cars", ("Audi S5 Convertible 2012 with a very long name of a car I", "Bentley"))
    with pytest.raises(Mistakes) as error:
        check_sentences([Named("birds", (*CROWS, "dove")), other, Named("more birds", CROWS)], read)
    first, second = error.value.lines()
    assert first.startswith("task birds: 3 classes read the same, since the model reads 16 tokens")
    assert "'Animalia Chordata Aves Passeriformes Corvidae Corvus corax'" in first
    assert "dove" not in first
    assert "shorter class names" in first
    assert second.startswith("task more birds: ")


def test_sentences_that_are_cut_and_still_differ_are_warned_of(read):
    [warning] = check_sentences([Named("birds", (CROWS[0], "a dove", "Pica pica " * 9))], read)
    assert warning.startswith(
        "warning: task birds: 2 of 3 sentences are longer than the 16 tokens that the model reads"
    )
    assert "'a photo of a Animalia Chordata" in warning


def test_a_name_that_stands_first_is_read_although_its_sentence_is_cut(read):
    tail = "{}, which is " + "a very long template " * 8
    [warning] = check_sentences([Named("pets", ("cat", "dog"), (tail,))], read)
    assert "2 of 2" in warning
    with pytest.raises(Mistakes, match="task pets: 2 classes"):
        check_sentences([Named("pets", ("cat", "dog"), ("a very long template " * 8 + "{}",))], read)


def test_short_sentences_and_one_name_in_two_spellings_are_no_news(read):
    assert check_sentences([Named("pets", ("cat", "dog", "Cat"))], read) == []


def test_classes_of_two_tasks_that_collapse_are_refused_where_they_are_told_apart(read):
    tasks = [Named("one", (CROWS[0], "dove")), Named("two", (CROWS[1], "dove"))]
    assert len(check_sentences(tasks, read)) == 2
    with pytest.raises(Mistakes, match="tasks one, two: 2 classes read the same"):
        check_sentences(tasks, read, across=True)


def test_a_union_takes_classes_for_one_only_where_the_model_reads_one(tiny):
    model = ClipClassifier(
        tiny.clip, tiny.tokenizer, [Named("one", (CROWS[0], "dove")), Named("two", ("dove", "crow"))]
    )
    assert model.union([0, 1]).places == [[0, 1], [1, 2]]


def test_a_tokenizer_that_takes_no_length_is_judged_by_its_full_rows():
    def read_ten(texts):  # from the front
        return small_tokenizer([text[:10] for text in texts])

    read = reader_of(read_ten)
    assert check_sentences([Named("few", ("ab", "cd"), ("{}",))], read) == []
    with pytest.raises(Mistakes, match="task long: 2 classes read the same, since the model reads 12 tokens"):
        check_sentences([Named("long", ("abcdefghijk", "abcdefghijl"), ("{}",))], read)


def test_classes_that_read_the_same_without_being_cut_are_warned_of():
    read = reader_of(lambda texts: torch.ones(len(texts), 6, dtype=torch.long) * torch.tensor([1, 1, 1, 0, 0, 0]))
    [warning] = check_sentences([Named("pets", ("cat", "dog"))], read)
    assert warning == "warning: task pets: the model reads the same for the classes 'cat', 'dog'"


@pytest.mark.parametrize("name", ["mulki-tiny", "ViT-B-16-quickgelu"])
def test_byte_pairs_are_counted_as_the_tokenizer_does(name, tiny):
    tokenizer = tiny.tokenizer if name == "mulki-tiny" else SimpleTokenizer()
    pairs = byte_pairs_of(name)
    texts = [f"a photo of a {c}." for task in declared_tasks().values() for c in task["classes"]]
    texts += [
        *CROWS,
        "A+ & B's C++ (1984)",
        "Ørsted's café, naïve",
        "鳥 と 花",
        "aaa aaaa abab",
        "don't__x--y 12.5%",
        "",
    ]
    for text in texts:
        assert [tokenizer.encoder[token] for token in pairs.encode(text)] == tokenizer.encode(text), text
    assert pairs.length == tokenizer.context_length


def test_other_kinds_of_tokenizers_are_left_to_the_run():
    assert byte_pairs_of("ViT-B-16-SigLIP") is None
    assert byte_pairs_of("no-such-model") is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(CROWS):
        at = tmp_path / "birds" / f"0448{i}_{name.replace(' ', '_')}"
        at.mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (8, 8), (i * 40, k * 90, 9)).save(at / f"{k}.png")
    return tmp_path


def test_new_recipe_and_validate_say_it_before_a_run(folder):
    run = CliRunner().invoke
    written = run(main, ["new", "recipe", "--from-folders", "birds", "--out", "r.yaml"])
    assert written.exit_code == 0
    assert "note: task birds: 3 classes read the same" in written.stderr
    done = run(main, ["validate", "r.yaml"])
    assert done.exit_code == 2
    assert "error: task birds: 3 classes read the same, since the model reads 16 tokens" in done.stderr
    large = ["--set", "model={name: ViT-B-32, pretrained: openai}"]
    assert run(main, ["validate", "r.yaml", *large]).exit_code == 0


def test_a_run_refuses_before_it_trains(folder):
    CliRunner().invoke(main, ["new", "recipe", "--from-folders", "birds", "--out", "r.yaml"])
    recipe = resolve("r.yaml").recipe
    with pytest.raises(Mistakes, match="task birds: 3 classes"):
        build(recipe)


def test_a_run_warns_of_what_is_cut(folder):
    CliRunner().invoke(main, ["new", "recipe", "--from-folders", "birds", "--out", "r.yaml"])
    names = "stream.tasks[0].class_names=[raven, carrion crow, rook which builds its nests in large colonies of many many pairs]"
    built = build(resolve("r.yaml", Changes(settings=(names,))).recipe)
    [warning] = built.notices
    assert "1 of 3 sentence" in warning
