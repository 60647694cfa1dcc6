"""EWC, LwF, ER, DER++ and iCaRL against slow references."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
from helpers import fingerprint
from learning import Fit, build, changed, learn, scores, tensors, test_images
from torch import Tensor, nn

from inflora import checkpoint, lora
from inflora.methods.derpp import DERpp
from inflora.methods.er import ER
from inflora.methods.ewc import EWC
from inflora.methods.icarl import ICaRL, herd
from inflora.methods.lwf import LwF
from inflora.parts.distillation import distillation
from inflora.parts.snapshot import Snapshot
from inflora.results import count_numbers
from inflora.seeding import seed_everything
from inflora.trainer import trainable_groups

# ---- parts -------------------------------------------------------------------------------------------------------------------------


def test_distillation_is_the_cross_entropy_of_softened_scores():
    new, old = torch.randn(5, 4), torch.randn(5, 4)
    for temperature in (1.0, 2.0, 5.0):
        p, q = (old / temperature).exp(), (new / temperature).exp()
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        expected = torch.stack([-sum(p[i, k] * q[i, k].log() for k in range(4)) for i in range(5)])
        torch.testing.assert_close(distillation(new, old, temperature), expected)


def test_distillation_has_no_gradient_where_both_models_agree():
    new = torch.randn(6, 4, requires_grad=True)
    shift = torch.randn(6, 1)  # which a softmax does not see
    for old, agrees in ((new.detach() + shift, True), (new.detach().flip(1), False)):
        (gradient,) = torch.autograd.grad(distillation(new, old, 2.0).mean(), new)
        assert gradient.abs().max() < 1e-7 if agrees else gradient.abs().max() > 1e-2


def test_a_snapshot_stands_in_for_what_it_copied_and_leaves_no_trace():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    x = torch.randn(5, 3)
    before = module.eval()(x)
    old = Snapshot()
    old.take({"0.weight": module[0].weight, "0.bias": module[0].bias})
    module.train()
    with torch.no_grad():
        module[0].weight.add_(1)
        module[0].bias.mul_(2)
    torch.testing.assert_close(old.call(module, x), before)
    assert module.training and module[1].training
    assert not old.call(module, x).requires_grad and not list(old.parameters())
    assert not torch.equal(module.eval()(x), before)
    other = Snapshot()
    other.set_shapes(old.shapes(), torch.device("cpu"))
    other.load_state_dict(old.state_dict())
    assert torch.equal(other.tensors["0.weight"], old.tensors["0.weight"])


# ---- LwF ---------------------------------------------------------------------------------------------------------------------------


def first_batch(task: Any) -> tuple[Tensor, Tensor]:
    return next(iter(task.batches("train", stream="fit")))


@pytest.mark.parametrize("overrides", [["method.variant=peft"], ["method.variant=full"], ["alignment=gaussian"]])
def test_the_teacher_of_lwf_gives_the_scores_from_before_the_task(overrides):
    method = build(["method=lwf", *overrides])
    tasks = toy.sequence()
    x = test_images(tasks)
    assert isinstance(method, LwF)
    learn(method, tasks.tasks[:2])
    before = scores(method, x)
    fit = Fit(method, tasks[2]).begin()
    frozen = tensors(method)
    fit.train(epochs=3)
    torch.testing.assert_close(method.old_scores(x), before)
    assert (scores(method, x)[:, :4] - before).abs().max() > 1e-3, "the student moved"
    now = tensors(method)
    teacher = [name for name in now if name.startswith("old_")]
    assert teacher and all(torch.equal(now[name], frozen[name]) for name in teacher)
    assert not any(name.startswith("old_") for name, _ in method.named_parameters()), "nothing of it can train"


@pytest.mark.parametrize("variant", ["peft", "full"])
def test_lwf_copies_only_what_trains(variant):
    method = build(["method=lwf", f"method.variant={variant}"])
    learn(method, toy.sequence().tasks[:2])
    state = method.state_dict()["tensors"]
    copied = count_numbers({name: value for name, value in state.items() if name.startswith("old_")})
    heads = 4 * (toy.EMBED_DIM + 1)
    body = 4 * 2 * 2 * toy.EMBED_DIM if variant == "peft" else sum(p.numel() for p in method.backbone.parameters())
    assert copied == body + heads


def test_the_loss_of_lwf():
    method = build(["method=lwf", "method.distillation_weight=3", "method.temperature=4"])
    first, second, _ = toy.sequence()
    learn(method, [first])
    teacher = copy.deepcopy(method)
    fit = Fit(method, second).begin().train()
    x, y = first_batch(fit.task)
    z, z_old = method.heads(method.features(x)), teacher.heads(teacher.features(x))
    expected = F.cross_entropy(z[:, 2:], y - 2) - 3 * ((z_old / 4).softmax(1) * (z[:, :2] / 4).log_softmax(1)).sum() / len(x)
    torch.testing.assert_close(method.loss(x, y), expected)


def test_the_first_task_of_lwf_is_plain_training():
    first = toy.sequence()[0]
    lwf, plain = build(["method=lwf", "method.variant=full"]), build(["method=sequential_full"])
    for method in (lwf, plain):
        Fit(method, first).begin().train(epochs=2)
    assert fingerprint(lwf.backbone.state_dict()) == fingerprint(plain.backbone.state_dict())
    assert fingerprint(lwf.heads.state_dict()) == fingerprint(plain.heads.state_dict())


def test_lwf_forgets_less_of_its_old_scores_than_plain_training():
    tasks = toy.sequence()
    x = test_images(tasks)
    drift = {}
    for weight in (0, 10):
        method = build(["method=lwf", "method.variant=full", f"method.distillation_weight={weight}"])
        learn(method, tasks.tasks[:1])
        before = scores(method, x).softmax(1)
        Fit(method, tasks[1]).begin().train(epochs=5, lr=1e-3)
        drift[weight] = (scores(method, x)[:, :2].softmax(1) - before).abs().mean()
    assert drift[10] < drift[0] / 2


@pytest.mark.parametrize("epochs, moves", [(1, False), (2, True)])
def test_only_the_new_head_trains_while_lwf_warms_up(epochs, moves):
    method = build(["method=lwf", "method.warmup_epochs=1"])
    first, second, _ = toy.sequence()
    start = tensors(method)
    learn(method, [first])
    assert any("lora_B" in name for name in start if not torch.equal(start[name], tensors(method)[name])), "the first task has no warm-up"
    fit = Fit(method, second).begin()
    before = tensors(method)
    fit.train(epochs=epochs)
    names = changed(before, tensors(method))
    assert {"heads.heads.1.weight", "heads.heads.1.bias"} <= names
    assert (len(names) > 2) is moves


# ---- EWC ---------------------------------------------------------------------------------------------------------------------------


def ewc(backbone: Any = None, **changes: Any) -> EWC:
    arguments: dict[str, Any] = {
        "variant": "full",
        "rank": 2,
        "blocks": None,
        "penalty_weight": 10.0,
        "decay": 1.0,
        "fisher": "sample",
        "fisher_images": None,
    }
    torch.manual_seed(0)
    return EWC(toy.toy_vit() if backbone is None else backbone, **arguments | changes)


class Linear(nn.Module):
    """A backbone whose features are linear in the mean colour."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.matrix.T


@pytest.mark.parametrize("form", ["sample", "batch"])
@pytest.mark.parametrize("index", [0, 1])
def test_fisher_of_a_linear_softmax_model(form, index):
    """z = V M c + b over the task's own classes: the gradient of log p(y) is V^T (onehot - p) c^T."""
    method = ewc(Linear(), fisher=form)
    tasks = list(toy.sequence())
    task = tasks[index]
    learn(method, tasks[:index])
    Fit(method, task).begin()
    V, b, M = method.heads.current.weight.double(), method.heads.current.bias.double(), method.backbone.matrix.double()
    expected, count = torch.zeros(4, 3, dtype=torch.float64), 0
    for x, y in task.batches("train", stream="fisher"):
        gradients = []
        for image, label in zip(x, y, strict=True):
            c = image.mean((1, 2)).double()
            p = (V @ M @ c + b).softmax(0)
            gradients.append(torch.outer(V.T @ (F.one_hot(label - 2 * index, 2).double() - p), c))
        count += len(x)
        squares = [g.square() for g in gradients] if form == "sample" else [torch.stack(gradients).mean(0).square() * len(x)]
        expected += torch.stack(squares).sum(0)
    found = method.fisher_information(task)
    assert count == 12 and found.keys() == {"matrix"}
    torch.testing.assert_close(found["matrix"].double(), expected.detach() / count, rtol=1e-4, atol=1e-9)


def test_fisher_of_part_of_the_images():
    method = ewc(Linear(), fisher_images=3)  # a batch has 8
    task = toy.sequence()[0]
    Fit(method, task).begin()
    x, y = next(iter(task.batches("train", stream="fisher")))
    squares = []
    for i in range(8):
        loss = F.cross_entropy(method.heads.current(method.features(x[i : i + 1])), y[i : i + 1])
        squares.append(torch.autograd.grad(loss, method.backbone.matrix)[0].square())
    torch.testing.assert_close(method.fisher_information(task)["matrix"], torch.stack(squares).mean(0))


def test_fisher_of_the_product_is_that_of_the_dense_weights():
    method = ewc(variant="product")
    task = toy.sequence()[0]
    Fit(method, task).begin().train().end()
    plain = lora.merged_copy(method.backbone)
    weights = {name: plain.get_submodule(name).weight.requires_grad_(True) for name in method.fisher.tensors}
    totals = {name: torch.zeros(2 * toy.EMBED_DIM, toy.EMBED_DIM) for name in weights}
    for x, y in task.batches("train", stream="fisher"):
        for i in range(len(x)):
            loss = F.cross_entropy(method.heads.current(plain(x[i : i + 1])), y[i : i + 1])
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                totals[name] += gradient[toy.EMBED_DIM :].square()
    assert len(weights) == 2
    for name, total in totals.items():
        torch.testing.assert_close(method.fisher.tensors[name], total / 12, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("variant", ["full", "factors", "product"])
def test_the_penalty_is_zero_at_the_start_of_a_task_and_quadratic_from_there(variant):
    method = ewc(variant=variant)
    first, second, _ = toy.sequence()
    learn(method, [first])
    Fit(method, second).begin()
    assert method.penalty().item() == 0
    generator = torch.Generator().manual_seed(0)
    moved = {name: p for name, p in method.tuned.items() if variant != "product" or name.endswith("lora_B")}
    steps = {name: torch.randn(p.shape, generator=generator) * 1e-2 for name, p in moved.items()}
    found = []
    for _ in range(3):
        with torch.no_grad():
            for name, p in moved.items():
                p.add_(steps[name])
        found.append(method.penalty().item())
    assert found[0] > 0
    assert found[1] == pytest.approx(4 * found[0], rel=1e-3) and found[2] == pytest.approx(9 * found[0], rel=1e-3)


def test_the_penalty_by_hand():
    method = ewc(penalty_weight=3.0)
    first, second, _ = toy.sequence()
    learn(method, [first])
    anchor = {name: p.detach().clone() for name, p in method.backbone.named_parameters()}
    fit = Fit(method, second).begin().train()
    fisher = method.fisher.tensors
    expected = 1.5 * sum((fisher[name] * (p - anchor[name]) ** 2).sum() for name, p in method.backbone.named_parameters())
    torch.testing.assert_close(method.penalty(), expected)
    x, y = first_batch(fit.task)
    torch.testing.assert_close(method.loss(x, y), method.local_cross_entropy(method.features(x), y) + expected)


def test_the_penalty_on_the_product_by_hand_does_not_see_the_scale_of_the_factors():
    method = ewc(variant="product", penalty_weight=1e6)
    first, second, _ = toy.sequence()
    learn(method, [first])
    Fit(method, second).begin().train()
    found = method.penalty()
    expected = torch.zeros(())
    for name, branch in lora.branches(method.backbone).items():
        for part in range(2):
            delta = branch.lora_B[part] @ branch.lora_A[part]
            rows = slice(part * toy.EMBED_DIM, (part + 1) * toy.EMBED_DIM)
            expected = expected + 5e5 * (method.fisher.tensors[name][rows] * delta**2).sum()
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        for branch in lora.branches(method.backbone).values():
            branch.lora_A.mul_(4)
            branch.lora_B.div_(4)
    torch.testing.assert_close(method.penalty(), found)


def test_older_tasks_decay_in_the_fisher_information():
    method = ewc(decay=0.25)
    first, second, _ = toy.sequence()
    learn(method, [first])
    old = {name: value.clone() for name, value in method.fisher.tensors.items()}
    learn(method, [second])
    new = method.fisher_information(second)
    for name, value in method.fisher.tensors.items():
        torch.testing.assert_close(value, 0.25 * old[name] + new[name])


@pytest.mark.parametrize("variant", ["full", "factors", "product"])
def test_a_large_penalty_holds_what_the_old_task_relies_on(variant):
    tasks = toy.sequence()
    x = test_images(tasks)
    drift = {}
    for weight in (0.0, 1e6):
        method = ewc(variant=variant, penalty_weight=weight)
        learn(method, tasks.tasks[:1], epochs=3)
        before = scores(method, x)
        Fit(method, tasks[1]).begin().train(epochs=3, optimizer=torch.optim.Adam, lr=1e-3)
        drift[weight] = (scores(method, x)[:, :2] - before).abs().mean()
    assert drift[1e6] < drift[0.0] / 2


def test_the_product_is_folded_in_without_changing_a_score_and_starts_afresh():
    method = ewc(variant="product")
    tasks = toy.sequence()
    x = test_images(tasks)
    branches = lora.branches(method.backbone).values()
    for task in tasks:
        A = [branch.lora_A.clone() for branch in branches]
        fit = Fit(method, task).begin()
        assert not any(torch.equal(old, branch.lora_A) for old, branch in zip(A, branches, strict=True))
        before = scores(fit.train(epochs=2).method, x)
        fit.end()
        assert (scores(method, x) - before).abs().max() <= 1e-5 * before.abs().max()
        assert not any(branch.lora_B.any() for branch in branches)


def test_ewc_leaves_flags_and_the_training_accuracy_as_they_were():
    method = ewc(variant="product")
    fit = Fit(method, toy.sequence()[0]).begin().train()
    flags = {name: p.requires_grad for name, p in method.named_parameters()}
    method.take_training_hits()
    fit.end()
    assert flags == {name: p.requires_grad for name, p in method.named_parameters()}
    assert method.take_training_hits() == (0, 0)
    found = method.diagnostics()
    values = torch.cat([value.flatten() for value in method.fisher.tensors.values()])
    assert found["fisher_mean"] == pytest.approx(values.mean().item()) and found["fisher_max"] == values.max().item()


# ---- ER and DER++ ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What the methods replay, in the order they draw it."""
    from inflora.parts.replay import ReplayMethod

    draws: list[tuple[Tensor, Tensor]] = []
    original = ReplayMethod.replay

    def record(self: ReplayMethod, count: int) -> tuple[Tensor, Tensor]:
        draws.append(original(self, count))
        return draws[-1]

    monkeypatch.setattr(ReplayMethod, "replay", record)
    return draws


def ready(method: Any, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """The method inside its second task, with a batch to take the loss of."""
    first, second, _ = toy.sequence(**options)
    learn(method, [first])
    Fit(method, second).begin().train()
    batches = second.batches("train", stream="fit")
    method.sample_ids = batches.sample_ids(0)
    x, y = next(iter(batches))
    return method, x, y


@pytest.mark.parametrize("ratio", [1, 3])
def test_er_averages_over_new_and_replayed_images_alike(ratio, replayed):
    method, x, y = ready(build(["method=er", f"method.replay_ratio={ratio}"]))
    assert isinstance(method, ER)
    replayed.clear()
    found = method.loss(x, y)
    ((old_x, rows),) = replayed
    assert old_x.shape == (ratio * len(x), 3, 16, 16)
    losses = [
        F.cross_entropy(method.heads(method.features(a)), b, reduction="none") for a, b in ((x, y), (old_x, method.buffer.labels[rows]))
    ]
    torch.testing.assert_close(found, torch.cat(losses).mean())
    assert method.buffer.labels[rows].min() < 2, "the old task is among them"


def test_er_begins_with_an_empty_buffer():
    method = build(["method=er"])
    fit = Fit(method, toy.sequence()[0]).begin()
    x, y = first_batch(fit.task)
    torch.testing.assert_close(method.loss(x, y), F.cross_entropy(method.heads(method.features(x)), y))


def test_replayed_images_are_augmented_afresh_in_every_step():
    method, _, _ = ready(build(["method=er", "method.per_class=1"]))
    torch.manual_seed(0)
    draws = [method.replay(4) for _ in range(2)]
    label = 0
    views = torch.cat([x[method.buffer.labels[rows] == label] for x, rows in draws])
    assert len(views) > 4 and len(views.unique(dim=0)) > 2, "one image, seen in several ways"


def test_the_loss_of_derpp(replayed):
    method, x, y = ready(build(["method=derpp", "method.alpha=0.7", "method.beta=0.2"]))
    assert isinstance(method, DERpp)
    replayed.clear()
    found = method.loss(x, y)
    (x_1, rows_1), (x_2, rows_2) = replayed
    assert not torch.equal(rows_1, rows_2), "two draws"
    z_1 = method.heads(method.features(x_1))
    distances = []
    for z, row in zip(z_1, rows_1.tolist(), strict=True):
        known = 2 if method.buffer.labels[row] < 2 else 4
        assert method.buffer.num_known[row] == known
        distances.append(((z[:known] - method.buffer.scores[row, :known]) ** 2).mean())
    assert {method.buffer.num_known[row].item() for row in rows_1.tolist()} == {2, 4}
    expected = F.cross_entropy(method.heads(method.features(x)), y) + 0.7 * torch.stack(distances).mean()
    expected = expected + 0.2 * F.cross_entropy(method.heads(method.features(x_2)), method.buffer.labels[rows_2])
    torch.testing.assert_close(found, expected)


def test_classes_unknown_at_insertion_do_not_enter_the_distance():
    method, x, _ = ready(build(["method=derpp"]))
    (rows,) = (method.buffer.num_known == 2).nonzero(as_tuple=True)
    z = method.heads(method.features(x[:1])).expand(len(rows), -1).clone()
    other = z.clone()
    other[:, 2:] += 100
    torch.testing.assert_close(method.distance(other, rows), method.distance(z, rows))
    assert (method.distance(z, rows) - method.distance(z + 1, rows)).abs().max() > 1e-3


def test_derpp_stores_the_scores_its_step_computed():
    """Of the augmented view, before the update."""
    method = build(["method=derpp"])
    task = toy.sequence()[0]
    Fit(method, task).begin()
    method.begin_epoch(0)
    batches = task.batches("train", stream="fit")
    x, y = next(iter(batches))
    method.sample_ids = batches.sample_ids(0)
    method.loss(x, y)
    expected = method.heads(method.features(x)).detach()
    with torch.no_grad():
        method.heads.current.weight.zero_()
    method.after_step()
    by_id = dict(zip(method.sample_ids.tolist(), expected, strict=True))
    assert len(method.buffer) == 8
    for image, stored in zip(method.buffer.ids.tolist(), method.buffer.scores, strict=True):
        torch.testing.assert_close(stored, by_id[image])


def test_the_scores_of_derpp_come_from_every_epoch_alike():
    task = toy.sequence(1, num_classes=2, train=200, batch_size=400)[0]
    method = build(["method=derpp", "method.buffer_size=1000"])
    Fit(method, task).begin()
    for epoch in range(4):
        torch.manual_seed(epoch)
        method.begin_epoch(epoch)
        method.sample_ids = torch.arange(400)
        method._scores = torch.full((400, 2), float(epoch))
        method.after_step()
    counts = method.buffer.scores[:, 0].long().bincount(minlength=4)
    assert counts.sum() == 400 and (counts / 400 - 1 / 4).abs().max() < 0.09, "four standard deviations"


def test_derpp_without_its_terms_is_training_in_sequence():
    derpp = build(["method=derpp", "method.variant=full", "method.alpha=0", "method.beta=0"])
    plain = build(["method=sequential_full", "method.softmax=seen"])
    for method in (derpp, plain):
        learn(method, toy.sequence(), epochs=2)
    assert not changed(tensors(plain), {name: value for name, value in tensors(derpp).items() if name in tensors(plain)})
    assert len(derpp.buffer) == 36


@pytest.mark.parametrize("name", ["er", "derpp"])
def test_replay_keeps_the_old_task_better_than_none(name):
    tasks = toy.sequence(train=12)
    x = torch.cat([x for x, _ in tasks[0].test_batches()])
    y = torch.cat([y for _, y in tasks[0].test_batches()])
    right = {}
    for case in (["method=sequential_full", "method.softmax=seen"], [f"method={name}", "method.variant=full"]):
        method = build(case)
        for task in tasks:
            Fit(method, task).begin().train(epochs=20, lr=1e-3).end()
        right[case[0]] = (scores(method, x).argmax(1) == y).float().mean().item()
    assert right[f"method={name}"] > right["method=sequential_full"] + 0.2


# ---- iCaRL -------------------------------------------------------------------------------------------------------------------------


def test_herding_picks_what_brute_force_picks():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(9, 5, generator=generator))
    picked: list[int] = []
    for _ in range(6):
        rest = [i for i in range(9) if i not in picked]
        picked.append(min(rest, key=lambda i: (features.mean(0) - features[[*picked, i]].mean(0)).norm().item()))
        assert herd(features, len(picked)).tolist() == picked
    assert sorted(herd(features, 20).tolist()) == list(range(9)), "all of a small class"
    first = min(itertools.combinations(range(9), 1), key=lambda i: (features.mean(0) - features[list(i)].mean(0)).norm().item())
    assert herd(features, 1).tolist() == list(first)


def test_a_herded_mean_is_closer_than_a_random_one():
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    distance = (features[herd(features, 10)].mean(0) - features.mean(0)).norm()
    assert distance < min((features[torch.randperm(200)[:10]].mean(0) - features.mean(0)).norm() for _ in range(50))


def icarl(*overrides: str) -> ICaRL:
    method = build(["method=icarl", *overrides])
    assert isinstance(method, ICaRL)
    return method


def test_icarl_keeps_the_herded_images_of_every_class_and_cuts_the_end_off():
    method = icarl("method.buffer_size=12")
    first, second, _ = toy.sequence()
    learn(method, [first])
    x = torch.cat([x for x, _ in first.batches("test", stream="any")])
    features = F.normalize(method.features(x))
    expected = [label * 6 + row for label in range(2) for row in herd(features[label * 6 : label * 6 + 6], 6).tolist()]
    assert method.buffer.ids.tolist() == expected
    learn(method, [second])
    assert method.buffer.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert method.buffer.ids.tolist()[:6] == [*expected[:3], *expected[6:9]]


def test_icarl_answers_the_class_of_the_nearest_mean():
    method = learn(icarl("method.per_class=2"), toy.sequence())
    assert isinstance(method, ICaRL)
    tasks = toy.sequence()
    x = test_images(tasks)
    features = F.normalize(method.features(x))
    means = []
    for label in range(6):
        rows = (method.buffer.labels == label).nonzero().squeeze(1)
        assert len(rows) == 2
        means.append(F.normalize(F.normalize(method.features(method.buffer.prepare(tasks[0], rows))).mean(0), dim=0))
    expected = -torch.cdist(features, torch.stack(means)).square()
    torch.testing.assert_close(scores(method, x), expected.detach(), rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in method.heads.parameters():
            parameter.normal_()
    torch.testing.assert_close(scores(method, x), expected.detach(), rtol=0, atol=1e-5)  # the heads do not answer


def test_every_exemplar_is_seen_once_in_an_epoch():
    """So over an epoch, the loss is that of the union of new images and exemplars."""
    method = icarl()
    first, second, _ = toy.sequence(batch_size=5)
    learn(method, [first])
    Fit(method, second).begin()
    seen: list[int] = []
    prepare = method.buffer.prepare
    method.buffer.prepare = lambda task, rows, **how: (seen.extend(rows.tolist()), prepare(task, rows, **how))[1]  # type: ignore[method-assign]
    hosts = []
    for epoch in range(2):
        torch.manual_seed(epoch)
        method.begin_epoch(epoch)
        hosts.append(method.hosts)
        seen.clear()
        batches = second.batches("train", stream="fit", epoch=epoch)
        for step, (x, y) in enumerate(batches):
            method.sample_ids = batches.sample_ids(step)
            method.loss(x, y)
        assert sorted(seen) == list(range(len(method.buffer))) == list(range(12))
    assert not torch.equal(*hosts), "beside other images"


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_loss_of_icarl(form):
    """With one batch for an epoch, the mean over the union of new images and exemplars."""
    method = icarl(f"method.loss_form={form}", "method.distillation_weight=0.5", "method.temperature=3")
    first, second, _ = toy.sequence(batch_size=100)
    learn(method, [first])
    teacher = copy.deepcopy(method)
    fit = Fit(method, second).begin().train()
    x, y = first_batch(second)
    method.sample_ids = second.batches("train", stream="fit").sample_ids(0)
    views: list[Tensor] = []
    prepare = method.buffer.prepare
    method.buffer.prepare = lambda *args, **how: (views.append(prepare(*args, **how)), views[-1])[1]  # type: ignore[method-assign]
    found = method.loss(x, y)
    x, y = torch.cat([x, *views]), torch.cat([y, method.buffer.labels])
    assert len(x) == 24 and fit.task.num_train == 12
    z, z_old = method.heads(method.features(x)), teacher.heads(teacher.features(x)).detach()
    if form == "softmax":
        expected = F.cross_entropy(z, y) - 0.5 * ((z_old / 3).softmax(1) * (z[:, :2] / 3).log_softmax(1)).sum(1).mean()
    else:
        targets = torch.cat([z_old.sigmoid(), F.one_hot(y, 4)[:, 2:].float()], dim=1)
        expected = -(targets * z.sigmoid().log() + (1 - targets) * (1 - z.sigmoid()).log()).sum(1).mean()
    torch.testing.assert_close(found, expected)


def test_the_first_task_of_icarl_is_plain_training():
    first = toy.sequence()[0]
    ours, plain = icarl(), build(["method=sequential_full"])
    for method in (ours, plain):
        Fit(method, first).begin().train(epochs=2)
    assert fingerprint(ours.backbone.state_dict()) == fingerprint(plain.backbone.state_dict())


# ---- what is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["method=lwf", "method.variant=lora"], "method.variant=lora is not known; choose peft or full"),
        (["method=lwf", "method.temperature=0"], "method.temperature=0 is not above 0"),
        (["method=lwf", "method.distillation_weight=-1"], "method.distillation_weight=-1 is negative"),
        (["method=lwf", "method.warmup_epochs=-1"], "method.warmup_epochs=-1 is negative"),
        (["method=lwf", "method.blocks=[2]"], r"method.blocks=\[2\] does not fit this backbone"),
        (["method=ewc", "method.variant=peft"], "method.variant=peft is not known; choose one of full, factors, product"),
        (["method=ewc", "method.fisher=exact"], "method.fisher=exact is not known; choose sample or batch"),
        (["method=ewc", "method.penalty_weight=-1"], "method.penalty_weight=-1 is negative"),
        (["method=ewc", "method.decay=1.5"], "method.decay=1.5 is out of range"),
        (["method=ewc", "method.fisher_images=0"], "method.fisher_images=0 is below 1"),
        (["method=er", "method.replay_ratio=0"], "method.replay_ratio=0 is below 1"),
        (["method=er", "method.per_class=0"], "method.per_class=0 is below 1"),
        (["method=derpp", "method.alpha=-1"], "method.alpha=-1 is negative"),
        (["method=derpp", "method.selection=ring"], "method.selection=ring is not known"),
        (["method=icarl", "method.loss_form=bce"], "method.loss_form=bce is not known; choose softmax or sigmoid"),
        (["method=icarl", "method.buffer_size=null"], "method.buffer_size and method.per_class are both null"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(overrides, message):
    with pytest.raises(Exception, match=message):  # Hydra wraps the ValueError
        build(overrides)


# ---- stopped and resumed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["derpp", "er", "ewc", "icarl", "lwf"])
def test_a_stop_between_two_steps_leaves_no_trace(name, tmp_path):
    """As the trainer goes on: the state of all that had grown, the seeds of the epoch and the step, and `begin_epoch` again."""
    first, second, _ = toy.sequence(batch_size=4)

    def steps(method: Any, epoch: int, which: range) -> None:
        method.task = second
        groups = trainable_groups(method, {"branch": 1e-2, "head": 1e-2})
        optimizer = torch.optim.SGD(groups)
        seed_everything(0, "fit", second.index, epoch)
        method.train()
        method.begin_epoch(epoch)
        batches = second.batches("train", stream="fit", epoch=epoch)
        for step, (x, y) in enumerate(batches):
            if step in which:
                seed_everything(0, "fit", second.index, epoch, step)
                method.sample_ids = batches.sample_ids(step)
                optimizer.zero_grad()
                method.loss(x, y).backward()
                optimizer.step()
                method.after_step()

    through = build([f"method={name}"])
    learn(through, [first])
    Fit(through, second).begin()
    steps(through, 0, range(3))
    stopped = copy.deepcopy(through)
    steps(through, 1, range(3))
    steps(stopped, 1, range(1))
    checkpoint.save(tmp_path / "state.safetensors", stopped.state_dict())
    resumed = build([f"method={name}"], seed=1)
    resumed.load_state_dict(checkpoint.load(tmp_path / "state.safetensors"))
    steps(resumed, 1, range(1, 3))
    for method in (through, resumed):
        Fit(method, second).end()
    assert fingerprint(resumed.state_dict()) == fingerprint(through.state_dict())
