"""Each loss against a slow loop in double precision, and by its properties."""

import math

import pytest
import torch
import torch.nn.functional as F

from mulki_plugins import losses

torch.manual_seed(0)


def unit(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def softmax(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def slow_cross_entropy(row, target):
    return -math.log(softmax(row)[target])


def slow_kl(student, teacher, temperature):
    p, q = softmax([v / temperature for v in teacher]), softmax([v / temperature for v in student])
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_no_smoothing_by_default_and_nothing_for_an_empty_batch():
    logits, targets = torch.randn(3, 5), torch.tensor([0, 1, 2])
    assert torch.equal(
        losses.smoothed_cross_entropy(logits, targets), losses.smoothed_cross_entropy(logits, targets, 0.0)
    )
    assert losses.smoothed_cross_entropy(logits, targets) == pytest.approx(float(F.cross_entropy(logits, targets)))
    assert losses.smoothed_cross_entropy(logits[:1], targets[:1]) == pytest.approx(
        float(F.cross_entropy(logits[:1], targets[:1]))
    )
    assert losses.smoothed_cross_entropy(logits[:0], targets[:0]) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_cross_entropy(smoothing):
    logits, targets = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    assert losses.smoothed_cross_entropy(logits, targets, smoothing).item() == pytest.approx(expected.item())


def test_smoothing_ignores_classes_that_a_sample_has_not():
    logits = torch.randn(4, 3, dtype=torch.float64)
    padded = torch.cat([logits, torch.full((4, 2), -1e4, dtype=torch.float64)], 1)
    targets = torch.tensor([0, 1, 2, 0])
    assert losses.smoothed_cross_entropy(padded, targets, 0.2).item() == pytest.approx(
        losses.smoothed_cross_entropy(logits, targets, 0.2).item()
    )


def test_prototype_alignment_by_loops():
    p, t, s = unit(4, 6, seed=1), unit(4, 6, seed=2), 10.0
    rows = (s * p @ t.T).tolist()
    columns = (s * t @ p.T).tolist()
    expected = sum(slow_cross_entropy(r, c) for c, r in enumerate(rows)) / 4
    expected = (expected + sum(slow_cross_entropy(r, c) for c, r in enumerate(columns)) / 4) / 2
    assert losses.prototype_alignment(p, t, s).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distillation_by_loops(temperature):
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = [slow_kl(a, b, temperature) for a, b in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert losses.distillation(student, teacher, temperature).tolist() == pytest.approx(expected)


def relations(z, t, p, anchors, s=20.0):
    return {r: losses.relation_logits(r, z, t, p, anchors, s) for r in losses.RELATIONS}


def test_relations_by_loops():
    z, t, p, anchors = unit(3, 5, seed=1), unit(4, 5, seed=2), unit(4, 5, seed=3), unit(4, 5, seed=4)
    from_rows = {
        "image_to_text": (z, anchors),
        "image_to_image": (z, p),
        "text_to_text": (t, anchors),
        "text_to_image": (t, p),
    }
    for relation, (rows, columns) in from_rows.items():
        got = losses.relation_logits(relation, z, t, p, anchors, 20.0)
        for i, row in enumerate(rows.tolist()):
            for j, column in enumerate(columns.tolist()):
                assert got[i, j].item() == pytest.approx(20 * sum(a * b for a, b in zip(row, column, strict=True)))


@pytest.mark.parametrize("class_weights", [None, [0.1, 0.0, 0.7, 1.0]])
def test_relation_distillation_by_loops(class_weights):
    student = relations(unit(3, 5, seed=1), unit(4, 5, seed=2), unit(4, 5, seed=3), unit(4, 5, seed=4))
    teacher = relations(unit(3, 5, seed=5), unit(4, 5, seed=4), unit(4, 5, seed=3), unit(4, 5, seed=4))
    w = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    factors = {"image_to_text": 1.0, "image_to_image": 0.5, "text_to_text": 2.0, "text_to_image": 0.25}
    expected = 0.0
    for relation, factor in factors.items():
        rows = zip(student[relation].tolist(), teacher[relation].tolist(), strict=True)
        divergences = [slow_kl(a, b, 2.0) for a, b in rows]
        shares = w.tolist() if relation.startswith("image") else class_weights or [w.mean().item()] * 4
        expected += factor * sum(a * b for a, b in zip(shares, divergences, strict=True)) / len(divergences)
    own = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    assert losses.relation_distillation(student, teacher, factors, w, 2.0, own).item() == pytest.approx(expected)


def test_distillation_is_zero_for_equals_and_never_negative():
    z, t, p = unit(6, 5, seed=1), unit(4, 5, seed=2), unit(4, 5, seed=3)
    same = relations(z, t, p, t, s=100.0)
    ones = torch.ones(6, dtype=torch.float64)
    factors = dict.fromkeys(losses.RELATIONS, 1.0)
    assert losses.relation_distillation(same, same, factors, ones, 2.0).item() == pytest.approx(0, abs=1e-12)
    other = relations(unit(6, 5, seed=9), unit(4, 5, seed=8), p, t, s=100.0)
    for relation in losses.RELATIONS:
        assert (losses.distillation(other[relation], same[relation], 2.0) >= 0).all()


def test_invariant_to_the_order_of_classes():
    z, t, p = unit(6, 5, seed=1), unit(4, 5, seed=2), unit(4, 5, seed=3)
    order = torch.tensor([2, 0, 3, 1])
    assert losses.prototype_alignment(p[order], t[order], 10.0).item() == pytest.approx(
        losses.prototype_alignment(p, t, 10.0).item()
    )
    teacher_z, teacher_t = unit(6, 5, seed=7), unit(4, 5, seed=8)
    ones, factors = torch.ones(6, dtype=torch.float64), dict.fromkeys(losses.RELATIONS, 1.0)

    def loss(o):
        student = relations(z, t[o], p[o], teacher_t[o])
        teacher = relations(teacher_z, teacher_t[o], p[o], teacher_t[o])
        return losses.relation_distillation(student, teacher, factors, ones, 2.0).item()

    assert loss(order) == pytest.approx(loss(torch.arange(4)))


@pytest.mark.parametrize("score", ["likelihood", "entropy", "margin"])
def test_teacher_scores_by_loops(score):
    logits, targets = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    for row, y, got in zip(
        logits.tolist(), targets.tolist(), losses.teacher_scores(logits, targets, score).tolist(), strict=True
    ):
        p = softmax(row)
        expected = {
            "likelihood": -math.log(p[y]),
            "entropy": -sum(v * math.log(v) for v in p),
            "margin": max(v for c, v in enumerate(p) if c != y) - p[y],
        }[score]
        assert got == pytest.approx(expected)


def test_teacher_weights_by_loops():
    scores = [torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0])]
    for b, got in enumerate(losses.teacher_weights(scores, 0.25).T.tolist()):
        assert got == pytest.approx(softmax([-float(score[b]) / 0.25 for score in scores]))


@pytest.mark.parametrize("score", ["likelihood", "entropy", "margin"])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
def test_weights_sum_to_one_and_follow_the_better_teacher(score, temperature):
    targets = torch.zeros(1, dtype=torch.long)
    good, bad = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.0]])
    w = losses.teacher_weights([losses.teacher_scores(x, targets, score) for x in (good, bad)], temperature)
    assert w.sum(0).tolist() == pytest.approx([1.0])
    assert w[0].item() > 0.5
    assert ((w >= 0) & (w <= 1)).all()


def test_mixture_weights_by_loops_and_their_ends():
    a, b = (
        torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64),
        torch.tensor([1.5, 0.0, 1.0, 0.0], dtype=torch.float64),
    )
    for n, (first, second) in enumerate(losses.mixture_weights([a, b], 3.0).T.tolist()):
        total = float(a[n] + b[n])
        relative = float(a[n] - b[n]) / total if total else 0.0
        assert second == pytest.approx(1 / (1 + math.exp(-3.0 * relative)))
        assert first + second == pytest.approx(1.0)
    doubled = losses.mixture_weights([2 * a, 2 * b], 3.0)
    assert torch.allclose(doubled, losses.mixture_weights([a, b], 3.0)), "the scale of the scores does not matter"


def test_movement_along_directions_leaves_orthogonal_movement_free():
    generator = torch.Generator().manual_seed(3)
    directions = F.normalize(torch.randn(3, 8, generator=generator, dtype=torch.float64), dim=1)
    before = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(directions.T)[0]
    step = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    free = step - step @ basis @ basis.T
    assert losses.movement_along(before + free, before, directions).item() == pytest.approx(0.0, abs=1e-20)
    expected = (
        sum(sum(a * b for a, b in zip(m, d, strict=True)) ** 2 for m in step.tolist() for d in directions.tolist()) / 12
    )
    assert losses.movement_along(before + free + step, before, directions).item() == pytest.approx(expected)


def test_feature_distillation_by_loops():
    student, teacher, w = unit(4, 3, seed=1), unit(4, 3, seed=2), [0.2, 0.0, 1.0, 0.7]
    expected = sum(
        share * (1 - sum(x * y for x, y in zip(a, b, strict=True)))
        for share, a, b in zip(w, student.tolist(), teacher.tolist(), strict=True)
    )
    got = losses.feature_distillation(student, teacher, torch.tensor(w, dtype=torch.float64))
    assert got.item() == pytest.approx(expected / 4)
    assert losses.feature_distillation(student, student, torch.ones(4)).item() == pytest.approx(0.0, abs=1e-12)


def test_class_sums_with_a_missing_class():
    features, labels = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]]), torch.tensor([0, 0, 2])
    assert losses.class_sums(features, labels, 4).tolist() == [[4.0, 2.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]
    assert losses.members_of(labels, 4).sum(0).tolist() == [2, 0, 1, 0]


def test_gradients():
    z, t = unit(3, 4, seed=1).requires_grad_(), unit(3, 4, seed=2).requires_grad_()
    p, teacher_z = unit(3, 4, seed=3), unit(3, 4, seed=4)
    assert torch.autograd.gradcheck(lambda a, b: losses.prototype_alignment(a, b, 5.0), (z, t))
    w, factors = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), dict.fromkeys(losses.RELATIONS, 1.0)
    teacher = relations(teacher_z, p, p, p, s=5.0)
    assert torch.autograd.gradcheck(
        lambda a, b: losses.relation_distillation(relations(a, b, p, p, s=5.0), teacher, factors, w, 2.0), (z, t)
    )
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: losses.smoothed_cross_entropy(a, torch.tensor([0, 1, 3]), 0.2), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 4])
def test_finite_at_scale_100_in_any_dtype_and_with_one_class(dtype, classes):
    z, t, p = (unit(n, 5, seed=i).to(dtype) for i, n in enumerate((6, classes, classes)))
    student, teacher = relations(z, t, p, t, s=100.0), relations(-z, p, p, t, s=100.0)
    targets = torch.arange(6) % classes
    values = [
        losses.prototype_alignment(p, t, 100.0),
        losses.relation_distillation(
            student, teacher, dict.fromkeys(losses.RELATIONS, 1.0), torch.ones(6, dtype=dtype), 0.5
        ),
        losses.smoothed_cross_entropy(student["image_to_text"], targets, 0.2),
    ]
    for score in ("likelihood", "entropy", "margin"):
        scores = [losses.teacher_scores(x["image_to_text"], targets, score) for x in (student, teacher)]
        values.append(losses.teacher_weights(scores, 0.01).sum())
    assert all(torch.isfinite(v) for v in values)


def test_contrastive_distillation_by_loops():
    student, teacher = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    over_texts, over_images = losses.contrastive_distillation(student, teacher, 2.0)
    rows = [slow_kl(s, t, 2.0) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    columns = [slow_kl(s, t, 2.0) for s, t in zip(student.T.tolist(), teacher.T.tolist(), strict=True)]
    assert over_texts.item() == pytest.approx(sum(rows) / 4)
    assert over_images.item() == pytest.approx(sum(columns) / 6)
    assert min(over_texts, over_images) > 0
    assert all(
        part.item() == pytest.approx(0, abs=1e-12) for part in losses.contrastive_distillation(student, student, 2.0)
    )


def test_squared_distance_by_loops():
    a = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    b = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    flat_a, flat_b = torch.cat([p.flatten() for p in a]).tolist(), torch.cat([q.flatten() for q in b]).tolist()
    slow = sum((x - y) ** 2 for x, y in zip(flat_a, flat_b, strict=True))
    assert losses.squared_distance(a, b).item() == pytest.approx(slow)
    assert losses.squared_distance(b, a).item() == pytest.approx(slow)
    assert losses.squared_distance(a, a).item() == 0
    assert losses.squared_distance([], []).item() == 0
    f = [torch.rand(3, 2, dtype=torch.float64), torch.rand(4, dtype=torch.float64)]
    flat_f = torch.cat([each.flatten() for each in f]).tolist()
    slow = sum(i * (x - y) ** 2 for i, x, y in zip(flat_f, flat_a, flat_b, strict=True))
    assert losses.squared_distance(a, b, f).item() == pytest.approx(slow)
    together, apart = (losses.sums_of([each.square() for each in a], together=each) for each in (True, False))
    assert together.tolist() == pytest.approx(apart.tolist())
    with pytest.raises(ValueError, match="importances: longer"):
        losses.squared_distance(a, b, [*f, f[0]])
    with pytest.raises(ValueError, match="shorter"):
        losses.squared_distance(a, b[:1])


def test_selection_and_selective_distillation_by_loops():
    z, z0, zp = unit(5, 4, seed=1), unit(5, 4, seed=2), unit(5, 4, seed=3)
    z0[0] = zp[0]
    w = losses.selection(z0, zp, 6.0, 0.2)

    def distance(a, b):
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))

    slow = [1 / (1 + math.exp(-6 * (distance(a, b) - 0.2))) for a, b in zip(z0.tolist(), zp.tolist(), strict=True)]
    assert w.tolist() == pytest.approx(slow)
    assert w[0] == w.min()
    assert w[0] < 0.5, "where the teachers agree, the first is heard"
    to_previous, to_initial = losses.selective_distillation(z, z0, zp, w)
    own = list(zip(z.tolist(), z0.tolist(), zp.tolist(), slow, strict=True))
    assert to_previous.item() == pytest.approx(sum(v * distance(a, p) ** 2 for a, _, p, v in own) / 5)
    assert to_initial.item() == pytest.approx(sum((1 - v) * distance(a, o) ** 2 for a, o, _, v in own) / 5)
    means = w.mean() * (z - zp).square().sum(1).mean()
    assert to_previous.item() != pytest.approx(means.item(), rel=1e-3), "no product of means"


def test_herded_is_greedy_and_its_mean_comes_close():
    features = unit(12, 5, seed=4)
    chosen = losses.herded(features, 4).tolist()
    target, picked = features.mean(0), []
    for _ in range(4):
        left = [i for i in range(12) if i not in picked]
        picked.append(min(left, key=lambda i: (features[[*picked, i]].mean(0) - target).norm().item()))
    assert chosen == picked
    assert losses.herded(features, 99).sort().values.tolist() == list(range(12))
    assert len(losses.herded(features, 0)) == 0
    first = (features[:4].mean(0) - target).norm()
    assert (features[chosen].mean(0) - target).norm() < first


def test_gradients_of_the_peers():
    leaf = lambda *shape, seed: unit(*shape, seed=seed).requires_grad_()  # noqa: E731
    z, z0, zp = leaf(3, 4, seed=1), unit(3, 4, seed=2), unit(3, 4, seed=3)
    w = losses.selection(z0, zp, 6.0, 0.2)
    assert torch.autograd.gradcheck(lambda x: sum(losses.selective_distillation(x, z0, zp, w)), (z,))
    logits, taught = leaf(3, 5, seed=4), unit(3, 5, seed=5)
    assert torch.autograd.gradcheck(lambda x: sum(losses.contrastive_distillation(x, taught, 2.0)), (logits,))
    assert torch.autograd.gradcheck(lambda x: losses.squared_distance([x], [z0]), (z,))
    assert torch.autograd.gradcheck(lambda x: losses.squared_distance([x, 2 * x], [z0, zp], [zp**2, z0**2]), (z,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peers_are_finite_at_scale_100_in_any_dtype_and_with_one_class(dtype):
    for classes in (1, 7):
        student, teacher = (100 * unit(4, classes, seed=s).to(dtype) for s in (1, 2))
        assert all(part.isfinite() for part in losses.contrastive_distillation(student, teacher, 2.0))
    z, z0, zp = (unit(4, 8, seed=s).to(dtype) for s in (1, 2, 3))
    assert all(x.isfinite() for x in losses.selective_distillation(z, z0, zp, losses.selection(z0, zp, 6.0, 0.2)))
    assert losses.squared_distance([z], [zp]).isfinite()
