"""One contract, every method: each yaml in conf/method is built on a toy backbone and taken through a few tiny tasks."""

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import toy
from helpers import fingerprint
from learning import (
    CASES,
    GROWING,
    TRAINS,
    Fit,
    build,
    changed,
    heads_apart,
    layer_inputs,
    learn,
    scores,
    sequence_for,
    tensors,
    test_images,
)
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from benchmarks.timing import kept_for_backward
from inflora import checkpoint, lora
from inflora.method import Method
from inflora.methods.inflora import InfLoRA
from inflora.methods.joint import Joint
from inflora.methods.sequential import Sequential
from inflora.methods.sequential_full import SequentialFull
from inflora.results import count_numbers
from inflora.seeding import seed_everything
from inflora.subspace import DualGPM, design_branch, threshold_at
from inflora.trainer import trainable_groups


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> list[str]:
    return CASES[request.param]


# ---- the contract ------------------------------------------------------------------------------------------------------------------


def test_every_yaml_says_what_it_is(case):
    method = build(case)
    assert isinstance(method, Method)
    assert type(method).__module__.startswith("inflora.methods.")
    about = f"{inspect.getmodule(type(method)).__doc__} {type(method).__doc__}"
    assert re.search(r"\b[Tt]rains\b", about) and re.search(r"\b[Ss]tores\b", about), "what trains, and what is stored"
    assert re.search(r"arXiv|Source", about) and re.search(r"[Cc]ode|Source", about), "where it comes from"


def test_the_declared_parameters_train_and_no_other(case):
    method = build(case)
    tasks = list(sequence_for(method))
    learn(method, tasks[:-1])
    fit = Fit(method, tasks[-1]).begin()
    before = tensors(method)
    declared = {id(p) for group in method.param_groups() for p in group["params"]}
    names = {name for name, p in method.named_parameters() if id(p) in declared}
    fit.train(epochs=2)
    assert changed(before, tensors(method)) & dict(method.named_parameters()).keys() == names
    assert {name for name, p in method.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize("name", TRAINS)
def test_exactly_these_train(name):
    method = build(CASES[name])
    tasks = list(sequence_for(method))
    learn(method, tasks[:-1])
    fit = Fit(method, tasks[-1]).begin()
    before = tensors(method)
    fit.train(epochs=2)
    pattern = TRAINS[name].replace("NEW", str(len(tasks) - 1))
    assert changed(before, tensors(method)) == {key for key in before if re.fullmatch(pattern, key)}


def test_heads_train_at_the_rate_of_heads(case):
    method = build(case)
    Fit(method, next(iter(sequence_for(method)))).begin()
    name_of = {id(parameter): name for name, parameter in method.named_parameters()}
    roles = {name_of[id(parameter)]: group["role"] for group in method.param_groups() for parameter in group["params"]}
    heads = {name for name in roles if name.split(".")[0] in ("heads", "classifier", "task_heads", "task_mlp")}
    assert {name for name, role in roles.items() if role == "head"} == heads


COMPUTED_ONCE = {"coda_prompt", "coda_prompt penalty", "dualprompt", "dualprompt original", "hide_prompt", "hide_prompt covariance", "l2p",
                 "l2p prompt"}  # fmt: skip
"""Cases whose forward pass is another one by the time its gradient is asked for: their prompts are there for its duration only."""


@pytest.mark.parametrize("name", [name for name, trains in TRAINS.items() if trains])
def test_blocks_may_be_computed_again_for_the_gradient(name):
    """What `trainer.grad_checkpointing` does: the same gradients, or an error; never others."""
    method = build(CASES[name])
    tasks = list(sequence_for(method))
    learn(method, tasks[:-1])
    Fit(method, tasks[-1]).begin()
    trainable_groups(method, {"branch": 1, "head": 1})
    batches = tasks[-1].batches("train", stream="fit", epoch=0)
    x, y = next(iter(batches))
    method.train()
    method.begin_epoch(0)
    gradients = []
    for is_on in (False, True):
        method.backbone.set_grad_checkpointing(is_on)
        method.sample_ids = batches.sample_ids(0)
        method.zero_grad()
        seed_everything(0, "fit")
        found = method.loss(x, y)
        loss = found if isinstance(found, Tensor) else next(found)
        if is_on and name in COMPUTED_ONCE:
            with pytest.raises(CheckpointError):
                loss.backward()
            return
        loss.backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_scores_cover_the_seen_classes(case):
    method = build(case)
    tasks = sequence_for(method, task_sizes=[1, 3, 2])
    x = test_images(tasks)
    seen = 0
    for task in tasks:
        learn(method, [task])
        seen += task.num_classes
        found = scores(method, x)
        assert found.shape == (len(x), seen)
        assert found.isfinite().all()


def test_a_score_depends_on_its_image_alone(case):
    method = build(case)
    tasks = sequence_for(method)
    learn(method, tasks)
    x = test_images(tasks)
    together = scores(method, x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    tolerance = {"rtol": 0, "atol": 1e-5 * together.abs().max().item()}
    torch.testing.assert_close(torch.cat([scores(method, x[i : i + 1]) for i in range(len(x))]), together, **tolerance)
    torch.testing.assert_close(scores(method, x[order]), together[order], **tolerance)
    torch.testing.assert_close(torch.cat([scores(method, part) for part in x.split(5)]), together, **tolerance)


def test_predicting_changes_nothing(case):
    method = build(case)
    tasks = sequence_for(method)
    learn(method, tasks)
    before = fingerprint(method.state_dict())
    scores(method, test_images(tasks))
    assert fingerprint(method.state_dict()) == before


@pytest.mark.parametrize("moment", ["begun", "trained", "ended"])
def test_a_fresh_instance_takes_over_anywhere(case, moment, tmp_path):
    """Through the file format of the checkpoints; the fresh instance starts from another backbone, so nothing can be left out."""
    method = build(case)
    tasks = sequence_for(method)
    stages = list(tasks)
    learn(method, stages[:1])
    last = stages[min(1, len(stages) - 1)]
    fit = Fit(method, last)
    if method.stream == "tasks" and moment != "ended":
        fit.begin()
    elif method.stream == "tasks":
        learn(method, [last])
    if moment == "trained":
        fit.train()
    file = tmp_path / "state.safetensors"
    checkpoint.save(file, method.state_dict())
    other = build(case, seed=1)
    other.load_state_dict(checkpoint.load(file))

    x = test_images(tasks)
    assert torch.equal(scores(other, x), scores(method, x))
    assert fingerprint(other.state_dict()) == fingerprint(method.state_dict())
    for one in (method, other):  # and goes on in the same way
        one.task = last
        if moment != "ended":
            Fit(one, last).train().end()
        learn(one, stages[2:])
    assert fingerprint(other.state_dict()) == fingerprint(method.state_dict())


def test_a_used_instance_takes_over_an_earlier_state(case):
    method = build(case)
    tasks = list(sequence_for(method))
    learn(method, tasks[:1])
    early = copy.deepcopy(method.state_dict())
    before = fingerprint(early)
    if len(tasks) > 1:
        Fit(method, tasks[1]).begin().train()
    method.load_state_dict(early)
    assert fingerprint(method.state_dict()) == before


def test_one_class_per_task(case):
    method = build(case)
    learn(method, sequence_for(method, 4, num_classes=4))
    assert method.heads.num_classes == 4
    assert all(value.isfinite().all() for value in tensors(method).values() if value.is_floating_point())


def test_a_sixth_task_after_the_planned_five(case):
    method = build(case)
    if method.stream == "joint":
        pytest.skip("one stage holds all tasks")
    learn(method, toy.sequence(5, num_classes=5))
    other = build(case, seed=1)
    other.load_state_dict(method.state_dict())
    longer = toy.sequence(6, num_classes=6)
    learn(other, [longer[5]])
    assert scores(other, test_images(longer)).shape == (len(test_images(longer)), 6)


def test_nothing_grows_but_the_heads(case):
    method = build(case)
    if method.stream == "joint":
        pytest.skip("one stage")
    sizes = []
    for task in toy.sequence(5, num_classes=10):
        learn(method, [task])
        state = heads_apart(method.state_dict())
        for bounded in ("memory", "buffer"):  # bounded by other tests
            state.pop(bounded, None)
        sizes.append(count_numbers(state))
    if set(case) & {"alignment=gaussian", *(f"method={name}" for name in GROWING)}:
        assert sizes == sorted(sizes)
    else:
        assert len(set(sizes)) == 1, sizes


def test_what_a_method_stores_has_a_form_in_json(case):
    from inflora.trackers import to_plain

    method = build(case)
    learn(method, sequence_for(method))
    assert isinstance(to_plain(method.diagnostics()), dict)


def test_every_unknown_choice_is_refused_by_name():
    vit = toy.toy_vit()
    with pytest.raises(ValueError, match=r"method.variant=lora is not known; choose one of seqlora, inclora, inclora_frozen"):
        Sequential(vit, variant="lora", rank=2, blocks=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"method.variant=all is not known; choose peft or full"):
        Joint(vit, variant="all", rank=2, blocks=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"method.softmax=all is not known; choose current or seen"):
        SequentialFull(vit, softmax="all")  # type: ignore[arg-type]
    for wrong, message in (
        ({"decomposition": "CP"}, "method.decomposition=CP is not known; choose PC or PCP"),
        ({"energy": "gramm"}, "method.energy=gramm is unknown; choose gram or input"),
        ({"threshold": 1.5}, "method.threshold=1.5 is not a fraction of energy"),
        ({"rank": 33}, r"method.rank=33 exceeds the layer's 32 inputs; choose 1..32"),
        ({"rank": 0}, r"method.rank=0 is below 1; choose 1..32"),
        ({"blocks": [0, 2]}, r"method.blocks=\[0, 2\] does not fit this backbone; choose distinct numbers from 0..1"),
    ):
        with pytest.raises(ValueError, match=message):
            inflora(**wrong)


# ---- losses ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax, moves", [("current", False), ("seen", True)])
def test_old_heads_train_only_under_the_softmax_over_all_seen_classes(softmax, moves):
    method = build(["method=sequential_full", f"method.softmax={softmax}"])
    first, second, _ = toy.sequence()
    learn(method, [first])
    old = copy.deepcopy(method.heads.heads[0].state_dict())
    learn(method, [second])
    same = all(torch.equal(old[name], value) for name, value in method.heads.heads[0].state_dict().items())
    assert same is not moves


SEES_OLD_HEADS = {
    "derpp",
    "derpp full balanced",
    "er",
    "er full reservoir",
    "icarl",
    "icarl peft sigmoid",
    "lwf",
    "lwf full",
    "sequential_full seen",
}
"""Cases whose loss compares a new image with old classes too."""


@pytest.mark.parametrize("name", [name for name, trains in TRAINS.items() if "heads" in trains and not name.startswith("joint")])
def test_the_loss_of_a_later_task_reaches_old_heads_only_where_it_should(name):
    """The published methods leave old classes out of the softmax; one over all seen classes is another, much weaker method."""
    method = build(CASES[name])
    first, second, _ = sequence_for(method)
    learn(method, [first])
    Fit(method, second).begin()
    with torch.no_grad():  # where nothing has moved yet, distillation has no gradient
        for group in trainable_groups(method, {"branch": 1, "head": 1}):
            for parameter in group["params"]:
                parameter += 0.01 * torch.randn(parameter.shape)
    method.heads.requires_grad_(True)  # the trainer freezes the old ones, which would hide what the loss does
    method.zero_grad()
    batches = second.batches("train", stream="fit", epoch=1)
    x, y = next(iter(batches))
    method.train()
    method.begin_epoch(1)  # the head alone may train in the first
    method.sample_ids = batches.sample_ids(0)
    found = method.loss(x, y)
    for loss in [found] if isinstance(found, Tensor) else found:
        loss.backward()
    reached = any(parameter.grad is not None and parameter.grad.any() for parameter in method.heads.heads[0].parameters())
    assert reached is (name in SEES_OLD_HEADS)


def test_local_cross_entropy_is_that_of_the_newest_head():
    method = build(["method=linear_probe"])
    first, second, _ = toy.sequence()
    learn(method, [first])
    Fit(method, second).begin()
    x, y = next(iter(second.batches("test", stream="any")))
    features = method.features(x)
    expected = nn.functional.cross_entropy(method.heads.current(features), y - 2)
    torch.testing.assert_close(method.local_cross_entropy(features, y), expected)
    everything = nn.functional.cross_entropy(method.heads(features), y)
    torch.testing.assert_close(method.global_cross_entropy(features, y), everything)


def test_a_later_task_of_one_class_trains_against_the_seen_ones():
    method = build(["method=linear_probe"])
    first, second = toy.sequence(task_sizes=[3, 1], num_classes=4)
    learn(method, [first])
    old = method.heads.heads[0].weight.clone()
    fit = Fit(method, second).begin()
    start = method.heads.current.weight.clone()
    fit.train(epochs=30).end()
    assert not torch.equal(method.heads.current.weight, start)
    assert torch.equal(method.heads.heads[0].weight, old)
    x, y = next(iter(second.batches("test", stream="any")))
    assert (scores(method, x).argmax(1) == y).float().mean() > 0.8, "the softmax over its one class alone would have taught it nothing"


def test_training_answers_are_counted():
    method = build(["method=linear_probe"])
    task = toy.sequence()[0]
    Fit(method, task).begin()
    x, y = next(iter(task.batches("test", stream="any")))
    method.loss(x, y)
    method.loss(x, y)
    right = int((method.heads(method.features(x)).argmax(1) == y).sum())
    assert method.take_training_hits() == (2 * right, 2 * len(x))
    assert method.take_training_hits() == (0, 0)


# ---- relations between methods -----------------------------------------------------------------------------------------------------


def qkv_weights(method: Method) -> list[Tensor]:
    return [lora.effective_weight(block.attn.qkv) for block in method.backbone.blocks]  # type: ignore[union-attr]


def test_seqlora_and_inclora_agree_on_the_first_task():
    tasks = toy.sequence()
    found = [learn(build(["method=sequential", f"method.variant={variant}"]), [tasks[0]]) for variant in ("seqlora", "inclora")]
    for a, b in zip(*map(qkv_weights, found), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    start = qkv_weights(build(["method=linear_probe"]))
    assert not torch.equal(start[0], qkv_weights(found[0])[0])


def test_inclora_frozen_keeps_its_random_factor_shared_by_keys_and_values():
    method = build(["method=sequential", "method.variant=inclora_frozen"])
    fit = Fit(method, toy.sequence()[0]).begin()
    (branch, _) = lora.branches(method.backbone).values()
    lora_A = branch.lora_A.clone()
    assert lora_A.shape == (2, toy.EMBED_DIM) and lora_A.abs().max() > 0
    fit.train()
    assert torch.equal(branch.lora_A, lora_A)


def test_joint_full_on_one_task_is_full_fine_tuning():
    joint = learn(build(["method=joint", "method.variant=full"]), toy.sequence(1, stream="joint"), epochs=2)
    full = learn(build(["method=sequential_full", "method.softmax=seen"]), toy.sequence(1), epochs=2)
    assert fingerprint(joint.state_dict()) == fingerprint(full.state_dict())


def test_joint_peft_on_one_task_is_seqlora():
    joint, seqlora = build(["method=joint"]), build(["method=sequential"])
    fits = [Fit(joint, toy.sequence(1, stream="joint")[0]).begin(), Fit(seqlora, toy.sequence(1)[0]).begin()]
    for ours, theirs in zip(lora.branches(joint.backbone).values(), lora.branches(seqlora.backbone).values(), strict=True):
        theirs.set_lora_A(ours.lora_A)  # drawn at different moments
    seqlora.heads.load_state_dict(joint.heads.state_dict())
    for fit in fits:
        fit.train(epochs=2).end()
    assert not changed(tensors(joint), tensors(seqlora))


# ---- InfLoRA -----------------------------------------------------------------------------------------------------------------------


def inflora(backbone: Any = None, **changes: Any) -> InfLoRA:
    arguments: dict[str, Any] = {
        "rank": 4,
        "blocks": None,
        "threshold": 0.9,
        "threshold_end": 1.0,
        "energy": "gram",
        "decomposition": "PC",
        "lora_A_scale": 3**-0.5,
        "dual": True,
    }
    return InfLoRA(toy.toy_vit() if backbone is None else backbone, **arguments | changes)


def key_value(weight: Tensor) -> Tensor:
    return weight[toy.EMBED_DIM :]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_inflora_moves_keys_and_values_within_the_designed_rows_only(optimizer):
    method = inflora()
    for task in toy.sequence():
        before = {name: lora.effective_weight(method.backbone.get_submodule(name)) for name in method.targets}  # type: ignore[arg-type]
        fit = Fit(method, task).begin()
        designed = {name: branch.lora_A.double() for name, branch in lora.branches(method.backbone).items()}
        fit.train(optimizer=optimizer).end()
        for name, A in designed.items():
            delta = (method.backbone.get_submodule(name).weight - before[name]).double().detach()  # type: ignore[operator]
            assert not delta[: toy.EMBED_DIM].any(), "queries stay bit for bit"
            rows = torch.linalg.qr(A.T).Q
            outside = delta - delta @ rows @ rows.T
            assert delta.norm() > 1e-4
            assert outside.norm() < 1e-4 * delta.norm()  # the merged weight is rounded to float32


@pytest.mark.slow
def test_a_hundred_tasks_need_no_more_memory_than_a_few(caplog):
    """What is kept for the backward pass stays; what is stored grows by the heads alone, once the memories cannot."""
    method = build(CASES["inflora"])
    kept, stored, batch = {}, {}, 0
    for task in toy.sequence(100, num_classes=100, train=2):
        fit = Fit(method, task).begin()
        if task.index > 0:  # the first head is the only one whose loss is not that of all classes: tasks of one class
            x, y = next(iter(task.batches("train", stream="fit", epoch=0)))
            batch = len(x)
            trainable_groups(method, {"branch": 1, "head": 1})
            kept[task.index] = kept_for_backward(lambda x=x, y=y: method.loss(x, y), method)  # type: ignore[return-value]
        fit.train().end()
        stored[task.index] = count_numbers(method.state_dict())
        assert not lora.branches(method.backbone)
    scores_of_a_batch = batch * 4
    assert kept[99] - kept[1] <= 8 * 98 * scores_of_a_batch + 98 * toy.EMBED_DIM * 4, "only the scores of the classes seen"
    heads = 98 * (toy.EMBED_DIM + 1)
    bases = 2 * toy.EMBED_DIM * toy.EMBED_DIM // 2  # DualGPM keeps the smaller of two complementary bases
    assert stored[99] - stored[1] <= heads + bases
    assert "task 99: 2 of 2 layers have too little space left for their branch" in caplog.text


def test_inflora_designs_orthogonally_to_what_it_protects():
    method = inflora(threshold=0.99)
    for task in toy.sequence():
        protected = {name: memory.basis.clone() for name, memory in method.memory.items() if memory.kind == "remove"}
        Fit(method, task).begin()
        for name, branch in lora.branches(method.backbone).items():
            A = branch.lora_A.double()
            torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=torch.float64) / 3, rtol=0, atol=1e-6)
            if name in protected and protected[name].shape[1]:
                assert (A @ protected[name]).abs().max() < 1e-5
        Fit(method, task).train().end()
    assert all(memory.dimension > 0 for memory in method.memory.values())


@pytest.mark.parametrize("energy, decomposition", [("gram", "PC"), ("input", "PC"), ("input", "PCP")])
def test_inflora_is_the_algorithm_of_the_paper(energy, decomposition):
    """Algorithm 1 over three tasks: C with the weights before the task designs the branch, C with those after it grows the memory."""
    method = build(["method=inflora", f"method.energy={energy}", f"method.decomposition={decomposition}", "method.threshold=0.7"])
    assert isinstance(method, InfLoRA)
    memories = {name: DualGPM(toy.EMBED_DIM, energy=energy, dual=True) for name in method.targets}

    def moments(stream: str) -> dict[str, Tensor]:
        inputs = layer_inputs(method.backbone, method.targets, task.batches("train", stream=stream))
        return {name: X.T @ X for name, X in inputs.items()}

    for task in toy.sequence():
        fit = Fit(method, task).begin()
        before = moments("moments_before")
        for name, branch in method.branches.items():
            rows = design_branch(before[name], memories[name], 2, decomposition=decomposition, scale=1.0)
            assert (projector(branch.lora_A.double().T) - projector(rows.double().T)).norm() < 1e-3
        fit.train(epochs=3, lr=3e-2)
        after = moments("moments_after")
        for name, memory in memories.items():
            assert (after[name] - before[name]).norm() > 1e-3 * before[name].norm() or name == method.targets[0]
            memory.update(after[name], threshold_at(task.index, 3, 0.7, 1.0))
        fit.end()
        for name, memory in memories.items():
            assert (method.memory[name].kind, method.memory[name].dimension) == (memory.kind, memory.dimension)
            assert (projector(method.memory[name].basis) - projector(memory.basis)).norm() < 1e-3


def projector(columns: Tensor) -> Tensor:
    q = torch.linalg.qr(columns.double()).Q
    return q @ q.T


def test_inflora_leaves_what_it_protects_unchanged():
    """A memory set by hand to a known input subspace: keys and values of inputs inside stay what they were, whatever is learned."""
    method = inflora()
    first, second, _ = toy.sequence()
    learn(method, [first])
    known = torch.linalg.qr(torch.randn(toy.EMBED_DIM, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for memory in method.memory.values():
        memory.basis, memory.kind = known, "remove"
    inputs = (torch.randn(50, 6, dtype=torch.float64) @ known.T).float()
    layers = [method.backbone.get_submodule(name) for name in method.targets]
    before = [layer(inputs) for layer in layers]
    weights = qkv_weights(method)
    learn(method, [second], epochs=3)
    for old, name, weight in zip(before, method.targets, weights, strict=True):
        layer = method.backbone.get_submodule(name)
        assert (layer.weight - weight).norm() > 1e-3  # type: ignore[operator]
        torch.testing.assert_close(layer(inputs), old, rtol=0, atol=2e-5)


@pytest.mark.parametrize("blocks, num_classes, expected", [(None, 10, 192_010), ([0, 1, 2, 3, 4], 10, 84_490), (None, 20, 199_700)])
def test_inflora_trains_the_published_number_of_parameters(blocks, num_classes, expected):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = inflora(vit, rank=10, blocks=blocks)
    method.heads.grow(num_classes, torch.device("meta"))
    method.inject()
    assert sum(p.numel() for group in method.param_groups() for p in group["params"]) == expected


def test_inflora_is_a_plain_vit_after_every_task():
    method = inflora()
    names = toy.toy_vit().state_dict().keys()
    for task in toy.sequence():
        learn(method, [task])
        assert all(type(block.attn.qkv) is nn.Linear for block in method.backbone.blocks)  # type: ignore[union-attr]
        assert method.backbone.state_dict().keys() == names


def test_inflora_predicts_the_same_before_and_after_merging():
    method = inflora()
    tasks = toy.sequence()
    x = test_images(tasks)
    for task in tasks:
        fit = Fit(method, task).begin().train(epochs=3)
        before = scores(method, x)
        fit.end()
        after = scores(method, x)
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        assert torch.equal(after.argmax(1), before.argmax(1))


def test_inflora_leaves_other_blocks_bit_for_bit():
    method = inflora(blocks=[1])
    start = toy.toy_vit().state_dict()
    learn(method, toy.sequence())
    moved = changed({f"backbone.{name}": value for name, value in start.items()}, {k: v for k, v in tensors(method).items() if k[0] == "b"})
    assert moved == {"backbone.blocks.1.attn.qkv.weight"}
    assert method.memory.keys() == {"blocks.1.attn.qkv"}


def test_one_sgd_step_of_inflora_is_the_full_step_projected():
    """delta W = -lr G A^T A, with A^T A = c^2 times the projector on the designed rows, G the full gradient of keys and values."""
    lr, scale = 0.1, 0.5
    task = toy.sequence(1, batch_size=100)[0]
    method = inflora(lora_A_scale=scale, blocks=[0])
    fit = Fit(method, task).begin()
    (branch,) = lora.branches(method.backbone).values()
    branch.weight.requires_grad_(True)
    x, y = next(iter(task.batches("train", stream="fit")))
    method.loss(x, y).backward()
    gradient = key_value(branch.weight.grad.double())  # type: ignore[union-attr]
    branch.weight.grad = None
    start = lora.effective_weight(branch)
    rows = torch.linalg.qr(branch.lora_A.double().T).Q

    fit.train(optimizer=torch.optim.SGD, lr=lr)
    step = key_value((lora.effective_weight(branch) - start).double())
    expected = -lr * scale**2 * gradient @ rows @ rows.T
    assert expected.norm() > 1e-4
    assert (step - expected).norm() < 1e-4 * expected.norm()


def test_inflora_remembers_at_most_half_a_matrix_per_block():
    method = inflora(threshold=0.9)
    d = toy.EMBED_DIM
    for task in toy.sequence(8, num_classes=8):
        learn(method, [task])
        for memory in method.memory.values():
            assert memory.basis.numel() <= d * d // 2
    assert all(memory.kind == "retain" for memory in method.memory.values()), "the protected space has grown beyond half"


def test_inflora_keeps_the_planned_thresholds_for_tasks_added_later(monkeypatch):
    from inflora.methods import inflora as module

    asked = []
    monkeypatch.setattr(module, "threshold_at", lambda *arguments: asked.append(arguments) or 0.5)
    method = inflora()
    asked.clear()
    learn(method, toy.sequence(2, num_classes=2))
    other = inflora()
    asked.pop()  # the constructor's check
    other.load_state_dict(method.state_dict())
    learn(other, [toy.sequence(3, num_classes=3)[2]])
    assert asked == [(0, 2, 0.9, 1.0), (1, 2, 0.9, 1.0), (2, 2, 0.9, 1.0)]


def test_inflora_reports_its_protected_dimensions():
    method = inflora()
    previous = [0, 0]
    for task in toy.sequence():
        learn(method, [task])
        found = method.diagnostics()
        assert found["memory_kinds"] == [memory.kind for memory in method.memory.values()]
        assert all(new >= old for new, old in zip(found["protected_dimensions"], previous, strict=True))
        previous = found["protected_dimensions"]
    assert min(previous) >= 1


# ---- method.py ---------------------------------------------------------------------------------------------------------------------


def test_the_base_class_asks_for_what_it_cannot_know():
    method = Method(toy.toy_vit())
    for call in (method.param_groups, lambda: method.loss(torch.zeros(1), torch.zeros(1))):
        with pytest.raises(NotImplementedError):
            call()


def test_several_losses_per_batch():
    method = toy.TwoSteps(toy.toy_vit())
    fit = Fit(method, toy.sequence()[0]).begin()
    assert isinstance(method.loss(torch.zeros(0), torch.zeros(0)), Iterator)
    before = method.heads.current.weight.clone()
    fit.train()
    assert not torch.equal(method.heads.current.weight, before)
