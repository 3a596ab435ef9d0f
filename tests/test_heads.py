"""Heads: rail against an independent regression, heads of other kinds in runs, and how runs save, resume, extend and use them."""

import json

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from mulki_plugins.cli import main
from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.heads import Head, Rail, Scope, TextHead
from mulki_plugins.heads.rail import as_logits, ridge_regression
from mulki_plugins.models import ClipClassifier
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.settings import fingerprint
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.training.checkpointing import Checkpointing
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, small_clip, small_tokenizer
from tests.test_extend import parts as extendable  # noqa: F401  the stream `chosen`

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=4", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "train.optimizer.lr=0.01", "device=cpu", "loggers=[csv]",
)  # fmt: skip
RAIL = "model.head={rail: {width: 40, ridge: 0.1, fusion: 0.8}}"


class Means(Head):
    """The nearest of the learned class means; other classes by their sentences."""

    def __init__(self):
        super().__init__()
        self.register_buffer("means", None)
        self.register_buffer("owners", None)

    def after_task(self, task, images):
        sums = images.sum(lambda z, y: {str(c): z[y == c].sum(0, keepdim=True) for c in range(images.classes)})
        means = torch.cat([sums[str(c)] for c in range(images.classes)])
        owners = torch.tensor([task] * images.classes)
        self.means = means if self.means is None else torch.cat([self.means, means])
        self.owners = owners if self.owners is None else torch.cat([self.owners, owners])

    def forward(self, z, scope):
        logits = scope.text_logits(z)
        for task, places in scope.places.items():
            if self.owners is not None and bool((self.owners == task).any()):
                mine = nn.functional.normalize(self.means[self.owners == task], dim=1)
                logits[:, list(places)] = scope.scale * z @ mine.to(z).T
        return logits


class Linear(Head):
    """A linear layer for each task, trained with it on the frozen features."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict()

    def begin(self, width):
        self.width = width

    def before_task(self, task, classes):
        self.layers.requires_grad_(False)
        self.layers[str(task)] = nn.Linear(self.width, classes)

    def forward(self, z, scope):
        logits = scope.text_logits(z)
        for task, places in scope.places.items():
            if str(task) in self.layers:
                logits = logits.index_copy(1, torch.tensor(list(places)), self.layers[str(task)](z))
        return logits


class Narrow(Head):
    """Leaves out the last candidate."""

    def forward(self, z, scope):
        return scope.text_logits(z)[:, :-1]


class Failing(Head):
    """Cannot learn."""

    def after_task(self, task, images):
        raise KeyError("means")

    def forward(self, z, scope):
        return scope.text_logits(z)


@pytest.fixture(autouse=True)
def registered(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="somebodys-heads", version="0.3"))
    for kind in (Means, Linear, Narrow, Failing):
        register.head(kind.__name__.lower(), kind)
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


def resolved(*settings, strategy="finetune", train="none"):
    return resolve(
        "recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, f"model.train={train}", *settings))
    )


def batches(z, y, sizes):
    return zip(z.split(sizes), y.split(sizes), strict=True)


class Given:
    """Features in the place of a task's images."""

    def __init__(self, z, y, classes, size):
        self.parts, self.classes = [*zip(z.split(size), y.split(size), strict=True)], classes

    def sum(self, term):
        totals = {}
        for z, y in self.parts:
            for name, value in term(z, y).items():
                totals[name] = totals.get(name, 0) + value
        return totals


def drawn(n, d=12, seed=0):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(z, dim=1)


TASKS = {0: 3, 1: 2, 2: 4}


def features_of_tasks():
    return {
        task: (drawn(60, seed=task), torch.arange(60).remainder(classes)) for task, classes in TASKS.items()
    }  # fmt: skip


def learned(order, size, **options):
    torch.manual_seed(5)
    head = Rail(**{"width": 30, "ridge": 0.1, **options})
    head.begin(12)
    for task in order:
        z, y = features_of_tasks()[task]
        head.after_task(task, Given(z, y, TASKS[task], size))
    return head


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("size", [60, 7, 1])
def test_the_regression_task_by_task_is_the_joint_one(order, size):
    head = learned(order, size)
    every = features_of_tasks()
    z = torch.cat([every[task][0] for task in order]).double()
    starts = dict(zip(order, [0, *torch.tensor([TASKS[t] for t in order]).cumsum(0).tolist()][:-1], strict=True))
    y = torch.cat([every[task][1] + starts[task] for task in order])
    phi = torch.relu(z @ head.hidden.double())
    targets = nn.functional.one_hot(y, sum(TASKS.values())).double()
    stacked = torch.cat([phi, 0.1**0.5 * torch.eye(30, dtype=torch.double)])  # ridge as least squares
    expected = torch.linalg.lstsq(stacked, torch.cat([targets, torch.zeros(30, targets.shape[1]).double()])).solution
    assert torch.allclose(head.weights, expected, atol=1e-6)
    assert head.learned.tolist() == [[task, starts[task], TASKS[task]] for task in order]


def test_the_authors_recursion_gives_the_same_weights():
    head = learned((0, 1, 2), 60)
    r, w, done = torch.eye(30).double() / 0.1, torch.zeros(30, 0).double(), 0
    for task, (z, y) in features_of_tasks().items():
        w = torch.cat([w, torch.zeros(30, TASKS[task]).double()], 1)
        for z_part, y_part in batches(z, y, 9):
            phi = torch.relu(z_part.double() @ head.hidden.double())
            targets = nn.functional.one_hot(y_part + done, w.shape[1]).double()
            inner = torch.linalg.inv(torch.eye(len(phi)).double() + phi @ r @ phi.T)
            r = r - r @ phi.T @ inner @ phi @ r
            w = w + r @ phi.T @ (targets - phi @ w)
        done += TASKS[task]
    assert torch.allclose(head.weights, w, atol=1e-6)


def scope_of(tasks, shared=False):
    """Random sentences; with `shared`, the first class of each task is one candidate."""
    places, count = {}, 0
    for task in tasks:
        own = list(range(count, count + TASKS[task]))
        if shared and count:
            own = [0, *range(count, count + TASKS[task] - 1)]
        places[task], count = own, max(own) + 1
    return Scope(drawn(count, seed=9), torch.tensor(20.0), places)


@pytest.mark.parametrize("tasks", [(0,), (0, 1), (2, 0, 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_fusion_where_zero_shot_finds_a_learned_class(tasks, shared):
    head, scope, z = learned((1, 0), 60), scope_of(tasks, shared), drawn(40, seed=4)
    p = (20.0 * z @ scope.text.T).double().softmax(1)
    phi = torch.relu(z.double() @ head.hidden.double())
    starts = {1: 0, 0: 2}
    expected, fused = torch.zeros_like(p), torch.zeros(40, dtype=torch.bool)
    for i in range(40):
        scores, known = [0.0] * p.shape[1], set()
        for task in tasks:
            for c, place in enumerate(scope.places[task] if task in starts else ()):
                scores[place] += float(phi[i] @ head.weights[:, starts[task] + c])
                known.add(place)
        fused[i] = int(p[i].argmax()) in known
        expected[i] = 0.2 * p[i] + 0.8 * torch.tensor(scores) if fused[i] else p[i]
    answer = head(z, scope)
    assert fused.any()
    assert torch.equal(answer.argmax(1), expected.argmax(1))
    assert torch.equal(answer[~fused], scope.text_logits(z)[~fused]), "to the last bit"
    assert torch.allclose(answer[fused].double(), as_logits(expected[fused]), atol=1e-4)
    alone = torch.cat([head(row[None], scope) for row in z])
    assert torch.allclose(answer, alone, atol=1e-4)
    assert torch.equal(answer.argmax(1), alone.argmax(1))


def test_classes_of_no_task_and_of_tasks_not_learned_are_zero_shot():
    head, z = learned((1,), 60), drawn(20, seed=4)
    nowhere = Scope(drawn(5, seed=9), torch.tensor(20.0), {})
    for scope in (nowhere, scope_of((0, 2))):
        assert torch.equal(head(z, scope), TextHead()(z, scope))


def test_logits_keep_the_order_of_values_and_their_shares():
    values = torch.tensor([[-0.5, -0.1, 0.0, 1e-4, 1e-3, 2e-3, 0.3, 0.697]]).double()
    logits = as_logits(values)
    assert (logits.diff() > 0).all()
    assert torch.allclose(logits.softmax(1)[0, -2:], values[0, -2:], atol=5e-3)


def test_ridge_regression_is_the_minimum():
    phi, targets = drawn(50, 8).double(), drawn(50, 3, seed=1).double()
    w = ridge_regression(phi.T @ phi, phi.T @ targets, 0.7).requires_grad_()
    ((phi @ w - targets).square().sum() + 0.7 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-9


def classifier(stream, head):
    return ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train="none", head=head).eval()


def images(n=6):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_text_head_is_the_default_and_moves_no_digit(stream):
    plain, named = classifier(stream, None), classifier(stream, TextHead())
    z = plain.encode_image(images())
    expected = plain.scale * z @ plain.encode_text(1, all_templates=True).T
    assert torch.equal(plain(images(), 1), expected)
    assert torch.equal(named(images(), 1), expected)
    assert {name.split(".")[0] for name in plain.state_dict()} == {"clip"}
    assert "head" not in resolved("model.head=text").recipe.model.options
    assert fingerprint(resolved("model.head=text").recipe) == fingerprint(resolved().recipe)


def test_training_is_by_the_sentences_whatever_the_regression_answers(stream):
    model = classifier(stream, Rail(width=16))
    z, y = model.encode_image(images()).detach(), torch.zeros(len(images()), dtype=torch.long)
    model.head.after_task(1, Given(z, y, len(stream.tasks[1].class_names), 4))
    with torch.no_grad():
        t = model.encode_text(1, all_templates=True)
        by_sentences = TextHead()(z, Scope(t, model.scale, {1: range(len(t))}))
        assert torch.equal(model.train().answer(z, 1, t), by_sentences)
        assert not torch.equal(model.eval().answer(z, 1, t), by_sentences)


def rows(folder):
    return json.loads((folder / "result.json").read_text())["matrix"]


def run_of(out):
    [folder] = out.glob("*/*/seed-0")
    return folder


HEADS = {
    "rail": (RAIL, "none"), "rail on pooled features": (RAIL.replace("{width", "{features: pooled, width"), "text"),
    "means": ("model.head=means", "none"), "linear": ("model.head=linear", "none"),
    "means and fine-tuning": ("model.head=means", "image"),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("classes", ["task", "seen"])
def test_a_killed_run_ends_as_if_it_had_never_been(tmp_path, monkeypatch, head, classes):
    setting, train = HEADS[head]
    recipe = resolved(setting, f"evaluate.classes={classes}", train=train)
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    learned = Checkpointing.learned

    def killed(self, tasks, name):
        learned(self, tasks, name)
        if tasks == 2:
            self.settle()
            monkeypatch.setattr(Checkpointing, "learned", learned)
            raise Killed

    monkeypatch.setattr(Checkpointing, "learned", killed)
    with pytest.raises(
        (Killed, MulkiError)
    ):  # the head's code and this function are in one module, so it gets the blame
        run_experiment(recipe, 0, tmp_path / "killed")
    folder = run_of(tmp_path / "killed")
    assert resume_experiment(recipe, 0, folder).matrix == whole.matrix
    for name in ("head.safetensors", "model.safetensors"):
        one, other = load_file(run_of(tmp_path / "whole") / name), load_file(folder / name)
        assert one.keys() == other.keys()
        assert one
        assert all(torch.equal(one[key], other[key]) for key in one)
    if train == "none" and classes == "task":
        for i, row in enumerate(whole.matrix):
            assert row[i + 1 :] == whole.zero_shot[i + 1 :], "tasks that are not learned are as zero-shot"
    if head in ("rail", "means"):
        assert [row[i] > zero for i, (row, zero) in enumerate(zip(whole.matrix, whole.zero_shot, strict=True))].count(
            True
        ), "it has learned something"


@pytest.mark.parametrize("at", [(2, 2), (2, 3)])
def test_a_trained_head_resumes_within_a_task(tmp_path, kill_at, at):
    recipe = resolved("model.head=linear")
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    assert whole.parameters["trained"] > 0
    kill_at(*at)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path / "killed")
    folder = run_of(tmp_path / "killed")
    assert resume_experiment(recipe, 0, folder).matrix == whole.matrix
    one, other = (load_file(each / "head.safetensors") for each in (run_of(tmp_path / "whole"), folder))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_all_tasks_at_once_give_the_regression_of_one_after_another(tmp_path):
    one = run_experiment(resolved(RAIL), 0, tmp_path / "naive")
    both = run_experiment(resolved(RAIL, "strategy.base=joint"), 0, tmp_path / "joint")
    assert both.matrix == [one.matrix[-1]] * 3


def mulki(*words, status=0):
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == status, done.output
    return done.stdout if not status else done.output


def accuracies(folder, *words):
    found = json.loads(mulki("evaluate", folder, "--json", *words))
    return [each["accuracy"] for each in found["tasks"]]


@pytest.mark.parametrize("head", ["rail", "means", "linear"])
def test_deployed_models_answer_with_their_head(tmp_path, head):
    recipe = resolved(HEADS[head][0], "evaluate.batch_size=5")
    result = run_experiment(recipe, 0, tmp_path)
    folder = run_of(tmp_path)
    assert accuracies(folder) == pytest.approx(result.matrix[-1], abs=0.01)
    assert accuracies(folder / "weights/task-01-first") == pytest.approx(result.matrix[0], abs=0.01)
    seen = run_experiment(resolved(HEADS[head][0], "evaluate.classes=seen"), 0, tmp_path / "seen")
    assert accuracies(folder, "--classes", "seen") == pytest.approx(seen.matrix[-1], abs=0.01)
    assert accuracies(folder / "checkpoints/task-03-third") == pytest.approx(result.matrix[-1], abs=0.01)
    if head != "rail":
        assert "open_clip has no place for a head" in mulki("export", folder, "--to", tmp_path / "exported", status=2)
        assert not (tmp_path / "exported").exists()
    (folder / "head.safetensors").unlink()
    assert "head.safetensors" in mulki("evaluate", folder, status=2)


def test_clean_keeps_what_a_head_has_learned(tmp_path):
    result = run_experiment(resolved(RAIL), 0, tmp_path)
    folder = run_of(tmp_path)
    (folder / "head.safetensors").unlink()
    mulki("clean", folder, "--all")
    assert not (folder / "checkpoints").exists()
    assert accuracies(folder) == pytest.approx(result.matrix[-1], abs=0.01)


@pytest.mark.parametrize("head", ["rail", "linear"])
def test_an_extended_run_is_as_if_its_tasks_had_always_been_there(tmp_path, head):
    from mulki_plugins.training.extend import extend_experiment

    def of(tasks):
        stream = f"stream={{name: chosen, tasks: [{tasks}]}}"
        settings = (stream, *SMALL[1:], "model.train=none", HEADS[head][0])
        return resolve("recipes/mtil.yaml", Changes(strategy="finetune", settings=settings))

    parent = run_experiment(of("first, second"), 0, tmp_path / "parent")
    whole_recipe = of("first, second, third")
    extended = extend_experiment(parent, whole_recipe, tmp_path / "extended")
    whole = run_experiment(whole_recipe, 0, tmp_path / "whole")
    assert extended.matrix == whole.matrix
    assert extended.zero_shot == whole.zero_shot


class AsksAgain(SupervisedPlugin):
    """Asks for other scopes in each evaluation, from the features at hand."""

    seen: list = []  # noqa: RUF012

    def after_eval_forward(self, strategy, **kwargs):
        model = strategy.model
        every = model.classify(model.image_features, range(len(model.prompts)))
        own = model.classify(model.image_features, [int(strategy.experience.task_label)])
        same = every if strategy.scope else own
        self.seen.append((every.shape[1], torch.allclose(same, strategy.mb_output, atol=1e-5)))


@pytest.mark.parametrize("classes", ["task", "all"])
def test_no_image_is_encoded_twice_however_many_scopes_ask(tmp_path, monkeypatch, classes):
    encoded, encode = [], ClipClassifier.encode_directly

    def counted(self, x):
        encoded.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(ClipClassifier, "encode_directly", counted)
    mine = Catalog()
    Register(mine, Provenance(distribution="somebodys-heads", version="0.3")).plugin(
        "asks-again", AsksAgain, summary="asks"
    )
    catalog().parts.update(mine.parts)
    try:
        AsksAgain.seen.clear()
        recipe = resolve(
            "recipes/mtil.yaml",
            Changes(
                strategy="zero-shot",
                with_plugins=("asks-again",),
                settings=(*SMALL, RAIL, f"evaluate.classes={classes}"),
            ),
        )
        run_experiment(recipe, 0, tmp_path)
    finally:
        catalog().parts.pop(("plugin", "asks-again"))
    tests, trained = 4 * (2 + 3 + 2), 8 * (2 + 3 + 2)
    assert sum(encoded) == tests + trained, "each test set once, and each training set once for the head"
    assert len(AsksAgain.seen) == 4 * 3
    assert {width for width, _ in AsksAgain.seen} == {7}
    assert all(same for _, same in AsksAgain.seen)


@pytest.mark.parametrize(
    ("head", "error"),
    [
        ("raill", r"\$\.model\.head\.raill: no head is named 'raill' \(did you mean 'rail'\?\)"),
        ("{rail: {widht: 3}}", r"\$\.model\.head\.rail\.widht: unknown option \(did you mean 'width'\?\)"),
        ("{text: {fusion: 0.5}}", r"\$\.model\.head\.text\.fusion: unknown option; this head has none"),
        ("{rail: {ridge: 0}}", r"\$\.model\.head\.rail\.ridge: expected .*above 0"),
        ("{rail: {fusion: 1.5}}", r"\.fusion: expected"),
        ("[rail]", r"\$\.model\.head: expected a head as"),
        ("{rail: {}, text: {}}", r"\$\.model\.head: expected a head as"),
        ("{rail: 3}", r"\$\.model\.head: expected a head as"),
    ],
)
def test_mistakes_in_a_recipe(head, error):
    with pytest.raises(Mistakes, match=error):
        resolved(f"model.head={head}")


def test_a_head_that_answers_with_too_few_columns(tmp_path):
    with pytest.raises(MulkiError, match=r"the head Narrow returned logits of shape \(8, 1\), expected \(8, 2\)"):
        run_experiment(resolved("model.head=narrow"), 0, tmp_path)


def test_an_error_of_a_head_names_it(tmp_path):
    with pytest.raises(MulkiError, match=r"the head 'failing' of somebodys-heads 0.3 failed: KeyError: 'means'"):
        run_experiment(resolved("model.head=failing"), 0, tmp_path)


def test_a_strategy_chooses_its_head_and_another_one_replaces_it():
    chosen = resolve(
        "recipes/mtil.yaml", Changes(strategy="rail", settings=("model.head.rail.width=64",))
    ).recipe.model.options
    assert chosen["train"] == "none"
    assert chosen["head"]["rail"]["width"] == 64
    other = resolve(
        "recipes/mtil.yaml",
        Changes(strategy="rail", settings=("model={name: ViT-B-32-quickgelu, pretrained: random}",)),
    )
    assert other.recipe.model.options["head"].keys() == {"rail"}
    again = resolve("recipes/mtil.yaml", Changes(strategy="rail", settings=("model.head=text",)))
    assert "head" not in again.recipe.model.options
    listed = mulki("list", "heads")
    assert "rail" in listed
    assert "somebodys-heads" in listed


def test_a_recipe_s_head_replaces_that_of_its_strategy(tmp_path):
    recipe = tmp_path / "mine.yaml"
    text = "name: mine\nstream: small\nmodel: {name: small-clip, head: means}\nstrategy: rail\n"
    recipe.write_text(text + "train: {iterations: 2, optimizer: {lr: 0.1}}\n")
    assert resolve(str(recipe)).recipe.model.options["head"] == {"means": {}}
