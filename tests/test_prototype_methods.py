"""What defines SimpleCIL, APER, RanPAC and EASE, each against a slow computation that is plainly right."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from learning import Fit, build, learn, scores, tensors, test_images
from torch import Tensor

from inflora import checkpoint
from inflora.data.tasks import Loading, Task, TaskSequence, split_task_sizes
from inflora.data.transforms import build_transforms
from inflora.methods import ranpac
from inflora.methods.aper import APER
from inflora.methods.ease import EASE, SubspacePrototypes
from inflora.methods.fecam import correlations
from inflora.methods.ranpac import RIDGES, RanPAC, Ridge, RidgeSums, solve
from inflora.methods.simplecil import SimpleCIL
from inflora.parts import adapters
from inflora.parts.prototypes import CosineClassifier, Prototypes, class_means, cosine
from inflora.seeding import seed_everything

CPU = torch.device("cpu")
DIM = toy.EMBED_DIM
VARIANTS = ("adapter", "ssf", "vpt_shallow", "vpt_deep")


def sequence(class_order: list[int], task_sizes: list[int], eval_batch_size: int = 16) -> TaskSequence:
    """The toy images in any order of classes."""
    return TaskSequence(
        toy.tiny(Path(), num_classes=len(class_order)),
        class_order=class_order,
        task_sizes=split_task_sizes(len(class_order), len(task_sizes), task_sizes),
        transforms=build_transforms("shift_flip", toy.IMAGE_SIZE, [0.5] * 3, [0.5] * 3),
        loading=Loading(CPU, 8, eval_batch_size, 0),
    )


def training_images(task: Task) -> tuple[Tensor, Tensor]:
    """A task's training images as for the test, and their classes."""
    batches = list(task.batches("test", stream="any"))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def train_anew(parameters: Any, seed: int = 0) -> None:
    """Draw every number anew, as if it had learned something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=draw))


# ---- class means and cosines -------------------------------------------------------------------------------------------------------


def pixels(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :7]


def test_class_means_are_means():
    task = sequence([3, 0, 2, 1], [2, 2])[1]
    x, y = training_images(task)
    found = class_means(pixels, task, 7, CPU)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack([pixels(x[y == c]).double().mean(0) for c in (2, 3)]))


def test_class_means_do_not_depend_on_batches_or_company():
    order = [3, 0, 5, 1, 4, 2]
    whole = class_means(pixels, sequence(order, [6])[0], 7, CPU)
    for sizes, batch in (([1, 3, 2], 4), ([2, 2, 2], 100), ([6], 1)):
        parts = [class_means(pixels, task, 7, CPU) for task in sequence(order, sizes, batch)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    other = [2, 4, 1, 5, 0, 3]
    permuted = class_means(pixels, sequence(other, [6])[0], 7, CPU)
    torch.testing.assert_close(permuted, whole[[order.index(c) for c in other]], rtol=1e-12, atol=1e-12)


def test_class_means_are_of_the_images_of_all_processes(monkeypatch):
    """Two processes in this one: each leaves its sums, and gets those of both."""
    found = []
    for rank in range(2):
        task = sequence([0, 1, 2], [3])[0]
        task._loading = Loading(CPU, 8, 5, 0, rank=rank, world_size=2)
        sums: list[Tensor] = []
        monkeypatch.setattr("inflora.parts.prototypes.sum_over_processes", lambda tensor, sums=sums: sums.append(tensor) or tensor)
        class_means(pixels, task, 7, CPU)
        found.append(sums[0])
    torch.testing.assert_close((found[0] + found[1]) / 6, class_means(pixels, sequence([0, 1, 2], [3])[0], 7, CPU))


def test_a_class_without_images_gets_zeros():
    task = sequence([0, 1, 2], [3])[0]
    task.train_labels = torch.tensor([0] * 6 + [1] * 6)
    task.num_classes = 4
    found = class_means(pixels, task, 7, CPU)
    assert found.isfinite().all() and not found[3].any()


def test_cosines():
    features, means = torch.randn(4, 7), torch.randn(3, 7)
    prototypes = Prototypes(7)
    prototypes.add(means[:2].double())
    prototypes.add(means[2:])
    expected = [[float(f @ m / (f.norm() * m.norm())) for m in means] for f in features]
    torch.testing.assert_close(prototypes(features), torch.tensor(expected))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cosine(features, means), torch.tensor(expected))
    assert not cosine(features, torch.zeros(1, 7)).any()


def test_prototypes_take_the_shape_of_what_is_loaded():
    trained, other = Prototypes(7), Prototypes(7)
    trained.add(torch.randn(3, 7))
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.means, trained.means)
    trained.load_state_dict(Prototypes(7).state_dict())
    assert trained.means.shape == (0, 7)


def test_the_cosine_classifier_scales_cosines_and_trains_its_scale():
    classifier = CosineClassifier(64, 3)
    assert classifier.scale.item() == 1 and 0.9 / 8 < classifier.weight.abs().max() <= 1 / 8
    features = torch.randn(4, 64)
    torch.testing.assert_close(classifier(features), cosine(features, classifier.weight))
    classifier.scale.data.fill_(3.0)
    torch.testing.assert_close(classifier(features), 3 * cosine(features, classifier.weight))
    classifier(features)[:, 0].sum().backward()
    assert classifier.scale.grad is not None and classifier.scale.grad.abs() > 0


# ---- SimpleCIL ---------------------------------------------------------------------------------------------------------------------


def test_simplecil_is_the_cosine_with_the_mean_pretrained_feature():
    method, vit = build(["method=simplecil"]), toy.toy_vit().eval()
    tasks = toy.sequence()
    learn(method, tasks)
    x = test_images(tasks)
    with torch.no_grad():
        features = vit(x)
        images = [training_images(task) for task in tasks]
        means = torch.stack([vit(images[c // 2][0][images[c // 2][1] == c]).mean(0) for c in range(6)])
    expected = torch.nn.functional.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(scores(method, x), expected, rtol=0, atol=1e-5)


def test_simplecil_learns_something():
    method = build(["method=simplecil"])
    tasks = toy.sequence()
    learn(method, tasks)
    y = torch.cat([y for task in tasks.tasks for _, y in task.test_batches()])
    assert (scores(method, test_images(tasks)).argmax(1) == y).float().mean() > 0.9


def test_simplecil_does_not_depend_on_the_order_of_classes_or_the_number_of_tasks():
    def scored(order: list[int], sizes: list[int]) -> Tensor:
        method = build(["method=simplecil"])
        tasks = sequence(order, sizes)
        learn(method, tasks)
        return scores(method, x)[:, [order.index(c) for c in range(6)]]

    x = test_images(toy.sequence())
    expected = scored([0, 1, 2, 3, 4, 5], [2, 2, 2])
    for order, sizes in (([5, 3, 1, 0, 2, 4], [2, 2, 2]), ([0, 1, 2, 3, 4, 5], [6]), ([2, 1, 0, 5, 4, 3], [1, 3, 2])):
        torch.testing.assert_close(scored(order, sizes), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["simplecil", "aper"])
def test_prototypes_never_change_after_their_task(name):
    method: Any = build([f"method={name}"])
    found = []
    for task in toy.sequence():
        learn(method, [task])
        found.append(method.prototypes.means.clone())
    for before, after in itertools.pairwise(found):
        assert torch.equal(after[: len(before)], before)


@pytest.mark.parametrize("name", ["simplecil", "aper", "ranpac", "ease"])
def test_no_linear_heads_are_stored(name):
    method = build([f"method={name}"])
    learn(method, toy.sequence())
    assert not [key for key in tensors(method) if key.startswith(("heads", "classifier"))]
    assert method.heads.sizes == [2, 2, 2]


# ---- APER --------------------------------------------------------------------------------------------------------------------------


def test_aper_with_an_untrained_adapter_predicts_like_simplecil():
    aper, simple = build(["method=aper"]), build(["method=simplecil"])
    tasks = toy.sequence()
    x = test_images(tasks)
    for task in tasks:
        Fit(aper, task).begin().end()
        Fit(simple, task).begin().end()
        torch.testing.assert_close(scores(aper, x), scores(simple, x), rtol=0, atol=1e-5)
        assert torch.equal(scores(aper, x).argmax(1), scores(simple, x).argmax(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_aper_trains_its_module_on_the_first_task_and_nothing_afterwards(variant):
    method = build(["method=aper", f"method.variant={variant}"])
    first, second, _ = toy.sequence()
    fit = Fit(method, first).begin()
    before = tensors(method)
    fit.train(epochs=2)
    moved = {name for name, value in tensors(method).items() if not torch.equal(value, before[name])}
    module = {"adapter": ".adapters.", "ssf": ".scale_shift.", "vpt_shallow": ".prompt.", "vpt_deep": ".prompt."}[variant]
    assert moved == {name for name in before if module in name} | {"classifier.weight", "classifier.scale"}
    fit.end()
    pretrained = {f"backbone.{name}": value for name, value in toy.toy_vit().state_dict().items()}
    frozen = {name: value for name, value in tensors(method).items() if name.startswith("backbone.")}
    assert all(torch.equal(frozen[name], value) for name, value in pretrained.items())
    learn(method, [second], epochs=2)
    assert method.param_groups() == []
    assert all(torch.equal(tensors(method)[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_aper_puts_pretrained_and_adapted_features_side_by_side(variant):
    method: Any = build(["method=aper", f"method.variant={variant}"])
    tasks = toy.sequence()
    learn(method, tasks, epochs=5)
    x = test_images(tasks)
    method.eval()
    with torch.no_grad():
        both = method.both_features(x)
        assert torch.equal(both[:, :DIM], toy.toy_vit().eval()(x))
        assert torch.equal(both[:, DIM:], method.backbone(x))
        assert (both[:, :DIM] - both[:, DIM:]).abs().max() > 1e-3
        own, y = training_images(tasks[1])
        mean = method.both_features(own[y == 3]).mean(0)
    expected = torch.nn.functional.cosine_similarity(both, mean[None])
    torch.testing.assert_close(scores(method, x)[:, 3], expected, rtol=0, atol=1e-5)


def test_the_first_tasks_loss_is_cross_entropy_of_scaled_cosines():
    method: Any = build(["method=aper", "method.dropout=0"])
    task = toy.sequence()[0]
    Fit(method, task).begin()
    method.classifier.scale.data.fill_(4.0)
    x, y = training_images(task)
    logits = 4 * torch.nn.functional.cosine_similarity(method.backbone(x)[:, None], method.classifier.weight[None], dim=2)
    torch.testing.assert_close(method.loss(x, y), torch.nn.functional.cross_entropy(logits, y))
    assert method.take_training_hits() == (int((logits.argmax(1) == y).sum()), len(y))


def test_the_published_numbers_of_parameters():
    """As the logs of the public code print them; SSF: the 86,004,480 there without the 85,798,656 of the plain ViT."""
    import timm

    counts = {"adapter": 1_189_632, "ssf": 86_004_480 - 85_798_656, "vpt_shallow": 3_840, "vpt_deep": 46_080}
    for variant, expected in counts.items():
        with torch.device("meta"):
            method = aper(timm.create_model("vit_base_patch16_224", num_classes=0), variant=variant)
        assert sum(p.numel() for module in method.tuned for p in module.parameters()) == expected


# ---- RanPAC ------------------------------------------------------------------------------------------------------------------------


def projected(method: RanPAC, tasks: Any) -> tuple[Tensor, Tensor]:
    """h of all training images by the definition, and one-hot targets, in float64."""
    method.eval()
    images, labels = zip(*(training_images(task) for task in tasks), strict=True)
    with torch.no_grad():
        h = (method.backbone(torch.cat(images)) @ method.projection).clamp(min=0).double()
    return h, torch.nn.functional.one_hot(torch.cat(labels)).double()


def fixed_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda is chosen on the last task, which differs between compared runs."""
    monkeypatch.setattr(Ridge, "choose", lambda self, fitted, held_out: setattr(self, "strength", 10.0))


@pytest.mark.parametrize("variant", ["adapter", "none"])
def test_ranpac_is_ridge_regression_on_all_images(variant, monkeypatch):
    fixed_strength(monkeypatch)
    method: Any = build(["method=ranpac", f"method.variant={variant}"])
    tasks = toy.sequence()
    learn(method, tasks)
    h, targets = projected(method, tasks)
    expected = torch.linalg.solve(h.T @ h + 10 * torch.eye(20, dtype=torch.float64), h.T @ targets)
    assert expected.norm() > 1e-3
    assert (method.ridge.weight - expected).norm() < 1e-4 * expected.norm()
    x = test_images(tasks)
    with torch.no_grad():
        features = (method.backbone(x) @ method.projection).clamp(min=0)
    torch.testing.assert_close(scores(method, x), (features.double() @ expected).float(), rtol=0, atol=1e-4)


def test_ranpac_task_by_task_is_ranpac_at_once(monkeypatch):
    fixed_strength(monkeypatch)
    found: list[Any] = [learn(build(["method=ranpac", "method.variant=none"]), toy.sequence(n)) for n in (1, 3, 6)]
    for other in found[1:]:
        torch.testing.assert_close(other.ridge.gram, found[0].ridge.gram, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(other.ridge.correlations, found[0].ridge.correlations, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(other.ridge.weight, found[0].ridge.weight, rtol=0, atol=1e-5)


def test_ranpac_does_not_depend_on_the_order_of_the_later_tasks(monkeypatch):
    fixed_strength(monkeypatch)

    def scored(order: list[int]) -> Tensor:
        method = build(["method=ranpac"])
        learn(method, sequence(order, [2, 2, 2]), epochs=2)
        return scores(method, x)[:, [order.index(c) for c in range(6)]]

    x = test_images(toy.sequence())
    torch.testing.assert_close(scored([0, 1, 4, 5, 2, 3]), scored([0, 1, 2, 3, 4, 5]), rtol=0, atol=1e-4)


def test_ridge_scores_in_full_precision():
    method: Any = build(["method=ranpac", "method.variant=none"])
    learn(method, [toy.sequence()[0]])
    h = torch.randn(5, method.ridge.width)
    expected = method.ridge(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.ridge(h), expected)


def test_ranpac_chooses_lambda_on_held_out_images_of_the_current_task():
    method: Any = build(["method=ranpac", "method.variant=none"])
    first, second, _ = toy.sequence(train=20)
    learn(method, [first])
    Fit(method, second).begin().end()
    seed_everything(0, "end", second.index)
    order = torch.randperm(second.num_train)
    kept, held_out = order[: int(0.8 * second.num_train)], order[int(0.8 * second.num_train) :]
    h, targets = projected(method, [second])
    errors = []
    for strength in RIDGES:
        weight = torch.linalg.solve(h[kept].T @ h[kept] + strength * torch.eye(20, dtype=torch.float64), h[kept].T @ targets[kept])
        errors.append((h[held_out] @ weight - targets[held_out]).square().mean())
    assert method.ridge.strength == RIDGES[int(torch.stack(errors).argmin())]
    assert method.diagnostics() == {"ridge": method.ridge.strength}


def test_an_image_that_is_all_of_its_class_chooses_no_lambda():
    """Held out, it would ask for the largest: its class is unknown to the fit."""
    method: Any = build(["method=ranpac", "method.variant=none"])
    learn(method, [toy.sequence(train=20)[0]])
    chosen = method.ridge.strength
    learn(method, [toy.sequence(train=1)[1]])
    assert method.ridge.strength == chosen, "nothing to choose by"
    other: Any = build(["method=ranpac", "method.variant=none"])
    other.load_state_dict(method.state_dict())
    assert other.ridge.strength == chosen
    assert RIDGES[0] < chosen < RIDGES[-1]


def test_ridge_without_projection_or_strength_is_least_squares():
    draw = torch.Generator().manual_seed(0)
    h, targets = torch.randn(40, 8, generator=draw, dtype=torch.float64), torch.randn(40, 3, generator=draw, dtype=torch.float64)
    found = solve(h.T @ h, h.T @ targets, 1e-8)
    torch.testing.assert_close(found, torch.linalg.lstsq(h, targets).solution, rtol=1e-6, atol=1e-6)


def test_ranpac_without_projections_takes_the_features_themselves():
    method: Any = ranpac_method(num_projections=0, variant="none")
    x = test_images(toy.sequence())
    assert torch.equal(method.eval().projected(x), method.backbone(x).float())
    learn(method, toy.sequence())
    assert method.ridge.gram.shape == (DIM, DIM)


def test_every_solution_that_is_given_is_accurate():
    """Near-collinear h of great length, fewer than dimensions: the dual form, exact to rounding, says what W is."""
    draw = torch.Generator().manual_seed(0)
    common, noise = torch.randn(192, generator=draw), torch.randn(16, 192, generator=draw)
    h = (10 * (common + 0.05 * noise) @ torch.randn(192, 600, generator=draw)).relu().double()
    targets = torch.eye(2, dtype=torch.float64)[torch.arange(16) % 2]
    given = 0
    for strength in RIDGES:
        found = solve(h.T @ h, h.T @ targets, strength)
        if found is not None:
            given += 1
            expected = h.T @ torch.linalg.solve(h @ h.T + strength * torch.eye(16, dtype=torch.float64), targets)
            assert (found - expected).norm() < 1e-3 * expected.norm(), strength
    assert 10 <= given < len(RIDGES), "the smallest are refused"


def test_ranpac_keeps_its_sums_in_float64_through_a_checkpoint(tmp_path):
    method: Any = learn(build(["method=ranpac"]), toy.sequence())
    checkpoint.save(tmp_path / "state", method.state_dict())
    other: Any = build(["method=ranpac"], seed=1)
    other.load_state_dict(checkpoint.load(tmp_path / "state"))
    for name in ("gram", "correlations"):
        assert getattr(other.ridge, name).dtype == torch.float64
        assert torch.equal(getattr(other.ridge, name), getattr(method.ridge, name))


def test_a_singular_gram_raises_the_strength(monkeypatch):
    monkeypatch.setattr(ranpac, "RIDGES", [1e-30])
    h = torch.full((3, 20), 1e3)
    ridge, sums = Ridge(20), RidgeSums(20, 2, CPU)
    sums.add(h, torch.eye(2)[[0, 1, 1]])
    assert solve(sums.gram, sums.correlations, 1e-30) is None
    ridge.choose(sums, [(h, torch.eye(2)[[0, 1, 1]])])
    ridge.update(sums.gram, sums.correlations)
    assert ridge.strength is not None and ridge.strength > 1e-30
    torch.testing.assert_close(ridge(h), torch.tensor([[1 / 3, 2 / 3]] * 3), rtol=1e-3, atol=1e-3)


def test_a_strength_that_cannot_be_solved_is_not_chosen():
    sums = RidgeSums(20, 2, CPU)
    h, targets = torch.full((3, 20), 1e6), torch.eye(2)[[0, 1, 1]]
    sums.add(h, targets)
    ridge = Ridge(20)
    assert solve(sums.gram, sums.correlations, RIDGES[0]) is None
    ridge.choose(sums, [(h, targets)])
    assert ridge.strength is not None and solve(sums.gram, sums.correlations, ridge.strength) is not None


def test_lambda_is_that_of_the_errors_of_all_processes(monkeypatch):
    """This process alone would choose another one: what comes back from the sum decides."""
    draw = torch.Generator().manual_seed(0)
    h, targets = torch.randn(30, 8, generator=draw), torch.randn(30, 2, generator=draw)
    sums = RidgeSums(8, 2, CPU)
    sums.add(h, targets)
    monkeypatch.setattr(ranpac, "sum_over_processes", lambda errors: errors.copy_(torch.arange(len(RIDGES), 0, -1)))
    ridge = Ridge(8)
    ridge.choose(sums, [(h, targets)])
    assert ridge.strength == RIDGES[-1]
    ridge.choose(sums, [])  # a process without held-out images


def test_the_projection_is_drawn_once_from_the_runs_seed():
    first, again, other = (build(["method=ranpac"], seed=seed) for seed in (0, 0, 1))
    before: Any = first.projection.clone()  # type: ignore[operator]
    assert torch.equal(before, again.projection) and not torch.equal(before, other.projection)  # type: ignore[arg-type]
    assert abs(before.mean()) < 0.1 and abs(before.std() - 1) < 0.1
    learn(first, toy.sequence())
    assert torch.equal(first.projection, before)  # type: ignore[arg-type]


# ---- EASE --------------------------------------------------------------------------------------------------------------------------


def completed(means: Tensor, sizes: list[int]) -> Tensor:
    """The semantic mapping, class by class."""
    means = means.clone()
    task_of = [task for task, size in enumerate(sizes) for _ in range(size)]
    for o, i in enumerate(task_of):
        for j in range(i + 1, len(sizes)):
            seen = [c for c, task in enumerate(task_of) if task >= j]
            similarities = torch.stack([torch.nn.functional.cosine_similarity(means[o, i], means[c, i], dim=0) for c in seen])
            weights = similarities.exp() / similarities.exp().sum()
            assert abs(weights.sum() - 1) < 1e-6
            means[o, j] = sum(weight * means[c, j] for weight, c in zip(weights, seen, strict=True))
    return means


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 3, 2], [4, 1, 1, 2], [3]])
def test_ease_completes_prototypes_as_a_slow_loop_does(sizes):
    draw = torch.Generator().manual_seed(0)
    prototypes = SubspacePrototypes(5)
    seen = torch.zeros(sum(sizes), len(sizes), dtype=torch.bool)
    observed = torch.zeros(sum(sizes), len(sizes), 5)
    start = 0
    for task, size in enumerate(sizes):
        means = torch.randn(size, task + 1, 5, generator=draw)
        observed[start : start + size, : task + 1] = means
        seen[start : start + size, : task + 1] = True
        start += size
        prototypes.add(means.double())
        prototypes.complete(sizes[: task + 1])
        expected = completed(observed[:start, : task + 1], sizes[: task + 1])
        torch.testing.assert_close(prototypes.means, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(prototypes.means[seen[:start, : task + 1]], observed[:start, : task + 1][seen[:start, : task + 1]])
    once = prototypes.means.clone()
    prototypes.complete(sizes)
    assert torch.equal(prototypes.means, once), "completing again changes nothing: it starts from seen means only"


def test_completing_is_exact_under_mixed_precision():
    draw = torch.Generator().manual_seed(0)
    found = []
    for enabled in (False, True):
        prototypes = SubspacePrototypes(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            draw.manual_seed(0)
            prototypes.add(torch.randn(2, 1, 5, generator=draw))
            prototypes.add(torch.randn(2, 2, 5, generator=draw))
            prototypes.complete([2, 2])
        found.append(prototypes.means)
    assert torch.equal(*found)


def test_ease_scores_as_a_slow_loop_does():
    method: Any = build(["method=ease"])
    tasks = toy.sequence(task_sizes=[1, 3, 2])
    learn(method, tasks, epochs=3)
    x = test_images(tasks)
    method.eval()
    with torch.no_grad():
        features = []
        for index in range(3):
            adapters.activate(method.backbone, index)
            features.append(method.backbone(x))
    expected = torch.zeros(len(x), 6)
    for c, own in enumerate([0, 1, 1, 1, 2, 2]):
        for j in range(3):
            similarity = torch.nn.functional.cosine_similarity(features[j], method.prototypes.means[c, j][None])
            expected[:, c] += similarity if j == own else 0.1 / 2 * similarity
    torch.testing.assert_close(scores(method, x), expected, rtol=0, atol=1e-5)


def test_ease_takes_means_in_every_subspace_so_far():
    method: Any = build(["method=ease"])
    first, second, _ = toy.sequence()
    learn(method, [first, second], epochs=3)
    x, y = training_images(second)
    method.eval()
    for index in range(2):
        with torch.no_grad(), adapters.active(method.backbone, index):
            expected = torch.stack([method.backbone(x[y == c]).mean(0) for c in (2, 3)])
        torch.testing.assert_close(method.prototypes.means[2:, index], expected, rtol=0, atol=1e-5)


def test_ease_on_one_task_is_the_cosine_with_the_mean_adapted_feature():
    method: Any = build(["method=ease"])
    tasks = toy.sequence(1)
    learn(method, tasks, epochs=3)
    x = test_images(tasks)
    own, y = training_images(tasks[0])
    method.eval()
    with torch.no_grad():
        means = torch.stack([method.backbone(own[y == c]).mean(0) for c in range(6)])
        torch.testing.assert_close(scores(method, x), cosine(method.backbone(x), means), rtol=0, atol=1e-5)


def test_ease_starts_every_subspace_at_the_pretrained_features_and_keeps_the_old_ones():
    method = build(["method=ease"])
    tasks = toy.sequence()
    x = test_images(tasks)
    plain = toy.toy_vit().eval()(x)
    sets: list[list[dict[str, Tensor]]] = []
    for task in tasks:
        fit = Fit(method, task).begin()
        method.eval()
        torch.testing.assert_close(method.backbone(x), plain, rtol=0, atol=1e-6)
        fit.train(epochs=2).end()
        for index, states in enumerate(sets):
            for adapter, state in zip(adapters.adapter_set(method.backbone, index), states, strict=True):
                assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())
        sets.append([copy.deepcopy(adapter.state_dict()) for adapter in adapters.adapter_set(method.backbone, task.index)])
        assert all(state["up.weight"].any() for state in sets[-1])


def test_ease_learns_the_current_classes_only():
    method: Any = build(["method=ease", "method.dropout=0"])
    first, second, _ = toy.sequence()
    learn(method, [first])
    Fit(method, second).begin()
    x, y = training_images(second)
    logits = torch.nn.functional.cosine_similarity(method.backbone(x)[:, None], method.classifier.weight[None], dim=2)
    assert logits.shape[1] == 2
    torch.testing.assert_close(method.loss(x, y), torch.nn.functional.cross_entropy(logits, y - 2))


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

MODULE: dict[str, Any] = {"bottleneck": 4, "adapter_scale": 0.1, "dropout": 0.1}


def aper(vit: Any = None, **changes: Any) -> APER:
    return APER(toy.toy_vit() if vit is None else vit, **{"variant": "adapter", "num_tokens": 5, **MODULE, "bottleneck": 64} | changes)


def ranpac_method(**changes: Any) -> RanPAC:
    return RanPAC(toy.toy_vit(), **{"variant": "adapter", "num_tokens": 5, "num_projections": 9, **MODULE} | changes)


def ease(**changes: Any) -> EASE:
    return EASE(toy.toy_vit(), **{"alpha": 0.1, **MODULE} | changes)


@pytest.mark.parametrize(
    "make, wrong, message",
    [
        (aper, {"variant": "none"}, "method.variant=none is not known; choose one of adapter, ssf, vpt_shallow, vpt_deep"),
        (aper, {"bottleneck": 0}, "method.bottleneck=0 is below 1"),
        (aper, {"dropout": -0.1}, "method.dropout=-0.1 is no probability"),
        (aper, {"variant": "vpt_deep", "num_tokens": 0}, "method.num_tokens=0 is below 1"),
        (ranpac_method, {"variant": "lora"}, "method.variant=lora is not known; choose one of adapter, ssf, vpt_shallow, vpt_deep, none"),
        (ranpac_method, {"num_projections": -1}, "method.num_projections=-1 is negative; choose 1 or more, or 0 for the features"),
        (ease, {"bottleneck": 0}, "method.bottleneck=0 is below 1"),
        (ease, {"alpha": -1.0}, "method.alpha=-1.0 is negative"),
    ],
)
def test_wrong_arguments_are_refused(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


def test_simplecil_takes_no_arguments():
    assert SimpleCIL(toy.toy_vit()).param_groups() == []


def test_features_that_are_no_numbers_end_ranpac():
    """Its search for a strength that can be solved with would not end."""
    ridge = Ridge(3)
    ridge.strength = 1.0
    with pytest.raises(ValueError, match="a feature of this task's images is not finite"):
        ridge.update(torch.full((3, 3), float("nan"), dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))


def test_a_variance_just_below_zero_is_none():
    covariance = torch.tensor([[-1e-17, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert torch.equal(correlations(covariance), torch.eye(2, dtype=torch.float64))
