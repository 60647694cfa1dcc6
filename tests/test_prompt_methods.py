"""Prompts against slow references: prefix attention, key matching, L2P, DualPrompt, CODA-Prompt, HiDe-Prompt."""

import copy
import inspect
from typing import Any

import pytest
import torch
import toy
from learning import Fit, build, changed, learn, scores, tensors, test_images
from torch import Tensor, nn

from inflora.interference import InterferenceProbe
from inflora.methods.coda_prompt import CodaPrompt, component_weights, orthonormal_rows, share
from inflora.methods.dualprompt import DualPrompt
from inflora.methods.hide_prompt import HidePrompt, ResidualMlp
from inflora.methods.l2p import L2P
from inflora.parts.centroids import ClassCentroids
from inflora.parts.contrast import contrastive
from inflora.parts.prompts import PrefixAttention, PromptMethod, choose_blocks, cosines, install_prefixes, prefixes
from inflora.schedule import cosine
from inflora.trainer import trainable_groups

METHODS = {
    "l2p": ["method=l2p"],
    "l2p prompt": ["method=l2p", "method.variant=prompt", "method.length=3"],
    "dualprompt": ["method=dualprompt"],
    "dualprompt original": ["method=dualprompt", "method.variant=original"],
    "coda_prompt": ["method=coda_prompt"],
    "coda_prompt penalty": ["method=coda_prompt", "method.orthogonality=0.1"],
    "hide_prompt": ["method=hide_prompt", "method.align_epochs=10", "method.task_align_lr=0.03"],
    "hide_prompt covariance": ["method=hide_prompt", "method.align_epochs=10", "method.task_align_lr=0.03", "method.statistics=covariance"],
}

D = toy.EMBED_DIM


def images(count: int = 7) -> Tensor:
    return torch.rand(count, 3, toy.IMAGE_SIZE, toy.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_method(name: str, **changes: Any) -> Any:
    overrides = [f"method.{key}={value}" for key, value in changes.items()]
    return build([f"method={name}", *overrides])


# ---- prefix attention --------------------------------------------------------------------------------------------------------------


def slow_attention(attn: Any, x: Tensor, prefix: Tensor) -> Tensor:
    """One image, one head, one query after the other."""
    out = torch.zeros_like(x)
    size = D // attn.num_heads
    for b in range(len(x)):
        q, k, v = attn.qkv(x[b]).split(D, dim=1)
        for head in range(attn.num_heads):
            part = slice(head * size, (head + 1) * size)
            keys = torch.cat([prefix[b, 0, :, part], attn.k_norm(k[:, part])])
            values = torch.cat([prefix[b, 1, :, part], v[:, part]])
            for n in range(x.shape[1]):
                weights = (keys @ attn.q_norm(q[n, part]) * attn.scale).softmax(dim=0)
                out[b, n, part] = weights @ values
    return attn.proj(out)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_prefix_attention_is_attention_over_longer_keys_and_values(fused, qk_norm):
    torch.manual_seed(0)
    vit = toy.vit_toy(num_classes=0, qk_norm=qk_norm).eval()
    attn = vit.blocks[1].attn
    attn.fused_attn = fused
    attn.scale *= 0.7  # so that nobody assumes the usual one
    if qk_norm:
        nn.init.normal_(attn.k_norm.weight, 1, 0.3)
    x, prefix = noise(3, 5, D), noise(3, 2, 4, D, seed=1)
    install_prefixes(vit, [1])
    with torch.no_grad(), prefixes(vit, {1: prefix}):
        torch.testing.assert_close(vit.blocks[1].attn(x), slow_attention(attn, x, prefix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_gate_and_inner_norm_of_the_stock_attention_stay(fused):
    """Against the stock module itself: a prefix that repeats the image's own keys and values leaves every attention mean as it is."""
    attention = type(toy.toy_vit().blocks[0].attn)
    torch.manual_seed(0)
    if "gated" not in inspect.signature(attention).parameters:
        pytest.skip("this timm knows no gate")
    stock = attention(D, num_heads=2, qkv_bias=True, gated=True, scale_norm=True, norm_layer=nn.LayerNorm).eval()
    stock.fused_attn = fused
    x = noise(3, 5, D)
    wrapped = PrefixAttention(stock)
    with torch.no_grad():
        expected = stock(x)
        wrapped.prefix = stock.qkv(x).unflatten(2, (3, D))[:, :, 1:].transpose(1, 2)
        torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_of_the_stock_attention_stays(fused):
    vit = toy.vit_toy(num_classes=0, attn_drop_rate=0.5, proj_drop_rate=0.0)
    install_prefixes(vit, [0])
    vit.blocks[0].attn.attn.fused_attn = fused
    x = noise(2, 5, D)
    with torch.no_grad(), prefixes(vit, {0: noise(2, 2, 3, D)}):
        attn = vit.blocks[0].attn
        assert not torch.equal(attn(x), attn(x))
        vit.eval()
        assert torch.equal(attn(x), attn(x))


def test_prefixes_act_only_inside_their_context():
    vit, x = toy.toy_vit().eval(), images()
    expected = vit(x)
    install_prefixes(vit, [0, 1])
    assert torch.equal(vit(x), expected)
    with prefixes(vit, {1: noise(7, 2, 3, D)}):
        assert not torch.allclose(vit(x), expected)
    assert torch.equal(vit(x), expected)
    with pytest.raises(RuntimeError), prefixes(vit, {1: noise(7, 2, 3, D)}):
        vit(x[:, :2])
    assert torch.equal(vit(x), expected), "also after an error"


def test_prefixes_need_plain_attention():
    vit = toy.toy_vit()
    vit.blocks[1].attn = nn.Identity()
    with pytest.raises(
        ValueError, match="prefixes need blocks with timm's plain Attention, not Identity; choose a plain vision transformer"
    ):
        install_prefixes(vit, [1])


@pytest.mark.parametrize("name", METHODS)
def test_interference_still_finds_the_projections(name):
    """The backbone of a prompt method never changes, so the probe must see it and say None; with a weight moved, it must say how much."""
    method = build(METHODS[name])
    tasks = toy.sequence()
    probe = InterferenceProbe()
    probe.before(method.backbone)
    learn(method, tasks.tasks[:2])
    assert probe.after(method.backbone, tasks.tasks[:1]) is None
    before = toy.toy_vit()
    plain = InterferenceProbe()
    plain.before(before)
    for vit in (method.backbone, before):
        qkv = next(module for key, module in vit.named_modules() if key.startswith("blocks.1.") and key.endswith("attn.qkv"))
        with torch.no_grad():
            qkv.weight.add_(0.01 * noise(*qkv.weight.shape))  # type: ignore[operator, union-attr]
    (found,), (expected,) = probe.after(method.backbone, tasks.tasks[:1]) or [], plain.after(before, tasks.tasks[:1]) or []
    assert found == pytest.approx(expected) and found[1] > 1e-3


# ---- choosing ----------------------------------------------------------------------------------------------------------------------


def test_cosines_by_hand():
    query, keys = noise(4, 5), noise(2, 3, 5, seed=1)
    found = cosines(query, keys)
    for k in range(2):
        for b in range(4):
            for m in range(3):
                expected = (query[b] @ keys[k, m]) / (query[b].norm() * keys[k, m].norm())
                assert found[k, b, m].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("choose", [cosines, lambda q, k: component_weights(q, k, k), lambda q, k: contrastive(q, k[0])])
def test_what_is_compared_is_compared_in_full_precision(choose):
    """Under autocast too: cosines of half precision tie, and ties go to the first."""
    query, keys = noise(4, 5), noise(2, 3, 5, seed=1)
    expected = choose(query, keys)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(choose(query, keys), expected)


@pytest.mark.parametrize(
    "depth, general, specific, first",
    [
        (12, [0, 1], [2, 3, 4], [0, 1, 2, 3, 4]),
        (6, [0], [1, 2], [0, 1, 2]),
        (2, [0], [1], [0]),
        (24, [0, 1, 2, 3], [4, 5, 6, 7, 8, 9], None),
    ],
)
def test_the_blocks_are_shares_of_the_depth(depth, general, specific, first):
    vit = toy.vit_toy(num_classes=0, depth=depth)
    assert choose_blocks(vit, None, "method.g_blocks", (0, 2)) == general
    assert choose_blocks(vit, None, "method.e_blocks", (2, 5)) == specific
    assert first is None or choose_blocks(vit, None, "method.blocks", (0, 5)) == first
    assert choose_blocks(vit, [1], "method.blocks", (0, 5)) == [1]


@pytest.mark.parametrize("name", METHODS)
def test_the_query_is_the_feature_of_the_stock_backbone_without_dropout(name):
    vit = toy.vit_toy(num_classes=0, attn_drop_rate=0.5, drop_path_rate=0.5)
    stock = copy.deepcopy(vit).eval()
    method = build(METHODS[name])
    made = type(method)(vit, **arguments_of(METHODS[name]))  # type: ignore[call-arg]
    learn(made, list(toy.sequence())[:1])
    made.train()
    with torch.no_grad():
        assert torch.equal(made.query(images()), stock(images()))  # type: ignore[operator]
    assert all(module.training for module in made.backbone.modules()), "and dropout is back for the rest"


def arguments_of(overrides: list[str]) -> dict[str, Any]:
    from helpers import compose_config
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(compose_config(*overrides).method)
    return {key: value for key, value in found.items() if key != "_target_"}


@pytest.mark.parametrize("name", METHODS)
def test_an_image_has_the_same_prompts_in_any_batch(name):
    method: Any = build(METHODS[name])
    learn(method, toy.sequence(), epochs=3)
    with torch.no_grad():
        query = method.query(test_images(toy.sequence()))
        together = method.prompts(query)
        assert set(together) == set(method.blocks) or name == "l2p prompt"
        for i in range(len(query)):
            for block, alone in method.prompts(query[i : i + 1]).items():
                torch.testing.assert_close(alone[0], together[block][i], rtol=0, atol=1e-6)
        differ = [not torch.allclose(prompt, prompt[:1].expand_as(prompt)) for prompt in together.values()]
    assert any(differ), "and not all images have the same ones"


@pytest.mark.parametrize("name", METHODS)
def test_only_prompts_keys_and_heads_train(name):
    method = build(METHODS[name])
    before = tensors(method)
    learn(method, toy.sequence(), epochs=2)
    after = tensors(method)
    for key, value in before.items():
        if key.startswith("backbone."):
            assert torch.equal(value, after[key]), key


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at .grad of whatever tensor a module has
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_backbone_does_the_same(name):
    method = build(METHODS[name])
    task = toy.sequence(1)[0]
    learn(method, [task])
    x = images()
    expected, (loss, y) = scores(method, x), (None, torch.zeros(7, dtype=torch.long))
    loss = method.loss(x, y)
    torch.compiler.reset()
    method.backbone.compile(backend="eager")
    torch.testing.assert_close(scores(method, x), expected)
    torch.testing.assert_close(method.loss(x, y), loss)
    torch.compiler.reset()


# ---- L2P ---------------------------------------------------------------------------------------------------------------------------


def test_l2p_matches_keys_as_brute_force_does():
    method: L2P = prompt_method("l2p", pool_size=9, top_k=4, blocks="[0,1]")
    query = noise(6, D)
    with torch.no_grad():
        similarity, indices = method.match(query)
    assert indices.shape == (2, 6, 4)
    for block in range(2):
        for b in range(6):
            found = [float(torch.cosine_similarity(query[b], key, dim=0)) for key in method.keys[block].detach()]
            nearest = sorted(range(9), key=lambda m: -found[m])[:4]
            assert indices[block, b].tolist() == nearest
            assert similarity[block, b].tolist() == pytest.approx([found[m] for m in nearest], abs=1e-6)


def test_l2p_gives_each_image_its_own_prompts_keys_before_values():
    """Loops over images and choices: for every image of the batch, the key halves of its prompts stand before the keys only."""
    method: L2P = prompt_method("l2p", pool_size=9, top_k=3, length=4, blocks="[0,1]")
    query = noise(6, D)
    _, indices = method.match(query)
    found = method.prompts(query)
    for block in range(2):
        for b in range(6):
            for part in range(2):
                expected = torch.cat([method.pool[block, m, part] for m in indices[block, b]])
                assert torch.equal(found[block][b, part], expected)


def test_l2p_pulls_the_chosen_keys_towards_their_queries():
    method: L2P = prompt_method("l2p", pool_size=9, top_k=3, key_weight=0.5)
    task = toy.sequence(1)[0]
    Fit(method, task).begin()
    x, y = next(iter(task.batches("test", stream="any")))
    query = method.query(x)
    _, indices = method.match(query)
    pull = torch.stack(
        [
            sum((1 - torch.cosine_similarity(q, method.keys[0, m], dim=0) for m in row), torch.zeros(()))
            for q, row in zip(query, indices[0], strict=True)
        ]
    )
    plain = method.local_cross_entropy(method.features(x), y)
    loss = method.loss(x, y)
    torch.testing.assert_close(loss, plain + 0.5 * pull.mean())
    loss.backward()
    gradient = method.keys.grad[0].norm(dim=1)  # type: ignore[index]
    chosen = set(indices.flatten().tolist())
    assert {m for m in range(9) if gradient[m] > 0} == chosen
    assert len(chosen) < 9


def test_l2p_prompt_tokens_go_before_the_first_block_and_their_outputs_are_averaged():
    method: L2P = prompt_method("l2p", variant="prompt", length=3, top_k=2)
    with torch.no_grad():
        method.pool.mul_(100)  # large enough to matter
    vit, x = toy.toy_vit().eval(), images()
    with torch.no_grad():
        _, indices = method.match(method.query(x))
        h = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
        tokens = torch.stack([torch.cat([method.pool[0, m, 0] for m in row]) for row in indices[0]])
        h = torch.cat([tokens, h], dim=1)  # a transformer does not mind the order
        for block in vit.blocks:
            h = block(h)
        expected = vit.norm(h)[:, :6].mean(dim=1)
        torch.testing.assert_close(method.features(x), expected, rtol=1e-4, atol=1e-5)


def test_l2p_starts_its_prompts_as_published():
    for variant, bound in (("prefix", 1.0), ("prompt", 0.01)):
        method: L2P = prompt_method("l2p", variant=variant)
        for value in (method.pool, method.keys):
            assert 0 <= value.min() < 0.05 * bound and 0.95 * bound < value.max() <= bound


# ---- DualPrompt --------------------------------------------------------------------------------------------------------------------


def dual(variant: str, num_tasks: int = 3) -> DualPrompt:
    """A DualPrompt that has begun some tasks, with keys and prompts all different."""
    torch.manual_seed(0)
    vit = toy.vit_toy(num_classes=0, depth=6).eval()
    method = DualPrompt(vit, **arguments_of(["method=dualprompt", f"method.variant={variant}", "method.e_length=4"]))
    assert method.g_blocks == [0] and method.e_blocks == [1, 2]
    for task in toy.sequence(num_tasks, num_classes=num_tasks):
        Fit(method, task).begin()
    with torch.no_grad():
        for t, (prompt, key) in enumerate(zip(method.e_prompts, method.keys, strict=True)):
            prompt.copy_(noise(*prompt.shape, seed=10 + t))
            key.copy_(noise(*key.shape, seed=20 + t))
    return method


def seen_prefixes(method: PromptMethod, call: Any) -> dict[int, Tensor]:
    """What arrives at the prefix attentions of every block during `call`."""
    seen: dict[int, Tensor] = {}
    handles = []
    for block in method.blocks:

        def look(module: Any, inputs: Any, block: int = block) -> None:
            if module.prefix is not None:
                seen[block] = module.prefix.detach().clone()

        handles.append(method.backbone.blocks[block].attn.register_forward_pre_hook(look))  # type: ignore[index, union-attr, operator]
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("variant", ["coda", "original"])
def test_dualprompt_uses_the_e_prompt_of_the_current_task_in_training(variant):
    method = dual(variant)
    x, y = images(), torch.full((7,), 2)
    seen = seen_prefixes(method, lambda: method.loss(x, y))
    assert seen.keys() == {*method.g_blocks, *method.e_blocks}
    for b in range(7):
        for j, block in enumerate(method.g_blocks):
            assert torch.equal(seen[block][b], method.g_prompt[j])
        for j, block in enumerate(method.e_blocks):
            assert torch.equal(seen[block][b], method.e_prompts[2][j])


@pytest.mark.parametrize("variant", ["coda", "original"])
def test_dualprompt_uses_the_e_prompt_of_the_matched_key_at_test(variant):
    """Image by image: keys before keys, values before values, for every image of the batch (the port's reshape mixes them)."""
    method = dual(variant)
    method.eval()
    x = images(12)
    query = method.query(x)
    with torch.no_grad():
        for t, keys in enumerate(method.keys):
            keys.copy_(query[2 * t : 2 * t + len(keys)])  # some images have their own feature as key
    seen = seen_prefixes(method, lambda: method.predict(x))
    tasks = set()
    for b in range(12):
        for j, block in enumerate(method.e_blocks):
            row = j if variant == "coda" else 0
            near = [float(torch.cosine_similarity(query[b], keys[row], dim=0)) for keys in method.keys.state_dict().values()]
            task = max(range(3), key=lambda t: near[t])
            tasks.add(task)
            for part in range(2):
                assert torch.equal(seen[block][b, part], method.e_prompts[task][j, part])
        for j, block in enumerate(method.g_blocks):
            assert torch.equal(seen[block][b], method.g_prompt[j])
    assert len(tasks) > 1


@pytest.mark.parametrize("variant, num_keys", [("coda", 3), ("original", 1)])
def test_dualprompt_has_its_own_keys_for_every_e_block_or_one(variant, num_keys):
    vit = toy.vit_toy(num_classes=0, depth=12)
    method = DualPrompt(vit, **arguments_of(["method=dualprompt", f"method.variant={variant}"]))
    task = toy.sequence(1)[0]
    Fit(method, task).begin()
    assert method.keys[0].shape == (num_keys, D) and method.e_prompts[0].shape == (3, 2, 10, D) and method.g_prompt.shape == (2, 2, 3, D)
    x, y = next(iter(task.batches("test", stream="any")))
    query = method.query(x)
    pull = sum(((1 - torch.cosine_similarity(query, key[None], dim=1)).mean() for key in method.keys[0]), torch.zeros(()))
    method.key_weight = 0.0
    plain = method.loss(x, y)
    method.key_weight = 2.0
    torch.testing.assert_close(method.loss(x, y), plain + 2 * pull)


def test_dualprompt_original_starts_from_the_prompt_of_the_task_before():
    for variant, same in (("original", True), ("coda", False)):
        method: DualPrompt = prompt_method("dualprompt", variant=variant)
        first, second, _ = toy.sequence()
        learn(method, [first])
        Fit(method, second).begin()
        assert torch.equal(method.e_prompts[0], method.e_prompts[1]) is same
        assert method.e_prompts[0].data_ptr() != method.e_prompts[1].data_ptr()
        assert not torch.equal(method.keys[0], method.keys[1])


# ---- CODA-Prompt -------------------------------------------------------------------------------------------------------------------


def test_coda_weighs_components_as_written():
    query, keys, attentions = noise(4, 5), noise(2, 3, 5, seed=1), noise(2, 3, 5, seed=2)
    found = component_weights(query, keys, attentions)
    for k in range(2):
        for b in range(4):
            for m in range(3):
                expected = torch.cosine_similarity(query[b] * attentions[k, m], keys[k, m], dim=0)
                assert found[k, b, m].item() == pytest.approx(expected.item(), abs=1e-6)
    extreme = component_weights(torch.ones(1, 5), torch.ones(1, 1, 5), torch.ones(1, 1, 5))
    assert extreme.item() == pytest.approx(1) and found.abs().max() <= 1


def test_coda_prompts_are_weighted_sums_of_all_components_so_far():
    method: CodaPrompt = prompt_method("coda_prompt", num_components=6, blocks="[0,1]")
    tasks = toy.sequence()
    learn(method, tasks.tasks[:2])
    query = method.query(images())
    found = method.prompts(query)
    for k in range(2):
        for b in range(7):
            expected = torch.zeros(2, 4, D)
            for components, keys, attentions in zip(*method.pools, strict=True):
                for m in range(2):
                    expected += torch.cosine_similarity(query[b] * attentions[k, m], keys[k, m], dim=0) * components[k, m]
            torch.testing.assert_close(found[k][b], expected, rtol=1e-4, atol=1e-5)


def test_coda_penalty_is_the_mean_square_distance_from_orthonormal_rows():
    method: CodaPrompt = prompt_method("coda_prompt", num_components=6, orthogonality=0.5)
    first, second, _ = toy.sequence()
    learn(method, [first])
    fit = Fit(method, second).begin()
    with torch.no_grad():
        for pool in method.pools:
            pool[-1].add_(noise(*pool[-1].shape, seed=3) / 10)
    expected = 0.0
    for pool in method.pools:
        rows = torch.cat([part[0].detach().flatten(1) for part in pool])
        for i in range(4):
            for j in range(4):
                expected += (float(rows[i] @ rows[j]) - (i == j)) ** 2 / 16
    assert method.penalty().item() == pytest.approx(expected, rel=1e-5)
    x, y = next(iter(second.batches("test", stream="any")))
    with_penalty = method.loss(x, y)
    method.orthogonality = 0.0
    torch.testing.assert_close(with_penalty, method.loss(x, y) + 0.5 * method.penalty())
    method.orthogonality = 1000.0  # it does pull
    fit.train(epochs=20)
    assert method.penalty() < 0.5 * expected


def test_coda_new_rows_are_orthonormal_to_all_old_ones():
    method: CodaPrompt = prompt_method("coda_prompt", num_components=20, blocks="[0,1]")
    first, second, _ = toy.sequence()
    learn(method, [first], epochs=3)
    Fit(method, second).begin()
    for pool in method.pools:
        for old, new in zip(pool[0].flatten(2), pool[1].flatten(2), strict=True):
            torch.testing.assert_close(new @ new.T, torch.eye(7), rtol=0, atol=1e-5)
            assert (new @ old.T).abs().max() < 1e-5 * old.norm(dim=1).max()
            assert (old @ old.T - torch.eye(7)).abs().max() > 1e-4, "training has moved the old ones off orthonormal"


def test_gram_schmidt_subtracts_projections_of_the_same_draw():
    old = noise(3, 8)
    torch.manual_seed(5)
    found = orthonormal_rows(old, 4)
    torch.manual_seed(5)
    basis: list[Tensor] = []
    for row in [*old.double(), *torch.randn(4, 8, dtype=torch.float64)]:
        rest = row - sum(((row @ unit) * unit for unit in basis), torch.zeros(8, dtype=torch.float64))
        basis.append(rest / rest.norm())
    torch.testing.assert_close(found, torch.stack(basis[3:]).float(), rtol=0, atol=1e-6)


def test_gram_schmidt_without_room_gives_unit_rows():
    rows = orthonormal_rows(noise(6, 8), 5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(rows[:2] @ rows[:2].T, torch.eye(2), rtol=0, atol=1e-6)
    assert rows[2:].isfinite().all() and (rows[2] @ rows[3]).abs() < 0.99


@pytest.mark.parametrize("total, tasks", [(100, 10), (100, 7), (100, 20), (3, 5), (1, 1)])
def test_coda_leaves_no_task_without_components(total, tasks):
    shares = [share(total, index, tasks) for index in range(tasks)]
    assert min(shares) >= 1 and max(shares) - min(shares) <= 1
    assert sum(shares) == max(total, tasks)
    assert share(total, tasks, tasks) >= 1, "a task added later"


@pytest.mark.parametrize("name", ["dualprompt", "dualprompt original", "coda_prompt", "coda_prompt penalty", "hide_prompt"])
def test_what_belongs_to_an_old_task_stays_bit_for_bit(name):
    method = build(METHODS[name])
    tasks = list(toy.sequence())
    learn(method, tasks[:2], epochs=2)
    before = tensors(method)
    kinds = ["e_prompts", "keys", "components", "attentions", *([] if name == "hide_prompt" else ["heads"])]  # there heads are aligned
    own = [key for key in before if key.split(".")[0] in kinds]
    assert len(own) >= 2
    learn(method, tasks[2:], epochs=3)
    after = tensors(method)
    assert all(torch.equal(before[key], after[key]) for key in own)


# ---- HiDe-Prompt -------------------------------------------------------------------------------------------------------------------


def test_hide_prompt_trains_a_mixture_with_the_older_prompts_and_keeps_it():
    method: HidePrompt = prompt_method("hide_prompt", momentum=0.25, align_epochs=1)
    tasks = list(toy.sequence())
    learn(method, tasks[:2])
    fit = Fit(method, tasks[2]).begin()
    assert torch.equal(method.e_prompts[2], method.e_prompts[1]), "starts as the one before"
    fit.train()
    old = [method.e_prompts[t].detach().clone() for t in range(2)]
    expected = 0.75 * method.e_prompts[2].detach() + 0.25 * (old[0] + old[1]) / 2
    x, y = images(), torch.full((7,), 4)
    seen = seen_prefixes(method, lambda: method.loss(x, y))
    for j, block in enumerate(method.blocks):
        for b in range(7):
            torch.testing.assert_close(seen[block][b], expected[j])
    fit.end()
    torch.testing.assert_close(method.e_prompts[2].detach(), expected)
    assert all(torch.equal(method.e_prompts[t], old[t]) for t in range(2))


def test_hide_prompt_gives_the_prompt_of_the_task_whose_class_scores_best():
    method: HidePrompt = prompt_method("hide_prompt", align_epochs=10, task_align_lr=0.03)
    tasks = toy.sequence(task_sizes=[1, 3, 2])
    learn(method, tasks, epochs=3)
    with torch.no_grad():
        for t, prompt in enumerate(method.e_prompts):
            prompt.copy_(noise(*prompt.shape, seed=t))
    x = test_images(tasks)
    seen = seen_prefixes(method, lambda: scores(method, x))
    found = method.task_scores(method.query(x)).argmax(dim=1).tolist()
    for b, label in enumerate(found):
        task = [0, 1, 1, 1, 2, 2][label]
        for j, block in enumerate(method.blocks):
            for part in range(2):
                assert torch.equal(seen[block][b, part], method.e_prompts[task][j, part])
    assert len({[0, 1, 1, 1, 2, 2][label] for label in found}) > 1


def test_hide_prompt_s_two_classifiers_do_not_see_each_other():
    """The gradient of each is that of its own loss: training them together is training them one after the other."""
    method: HidePrompt = prompt_method("hide_prompt", contrast=0.3, align_epochs=1)
    first, second, _ = toy.sequence()
    learn(method, [first])
    Fit(method, second).begin()
    method.begin_epoch(0)
    method.zero_grad()
    x, y = next(iter(second.batches("test", stream="any")))
    own = nn.functional.cross_entropy(method.task_heads.current(method.task_mlp(method.query(x))), y - 2)
    gradients = torch.autograd.grad(own, list(method.task_mlp.parameters()))
    method.loss(x, y).backward()
    for gradient, parameter in zip(gradients, method.task_mlp.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    features = method.with_prompt(x, method.current_prompt())
    other = nn.functional.cross_entropy(method.heads.current(features), y - 2)
    other = other + 0.3 * contrastive(features, method.statistics.centers())
    (gradient,) = torch.autograd.grad(other, [method.e_prompts[1]])
    torch.testing.assert_close(method.e_prompts[1].grad, gradient)


def test_hide_prompt_s_classifier_of_tasks_has_epochs_and_a_rate_of_its_own():
    states = []
    for epochs in (1, 3):
        method: HidePrompt = prompt_method("hide_prompt", task_epochs=1, task_lr=0.003)
        fit = Fit(method, toy.sequence()[0]).begin()
        assert [group["lr"] for group in trainable_groups(method, {"branch": 1.0, "head": 2.0})] == [1.0, 0.003, 2.0]
        before = tensors(method)
        fit.train(epochs)
        states.append(tensors(method))
    own = {name for name in before if name.startswith("task_")}
    assert changed(before, states[0]) == own | {"e_prompts.0", "heads.heads.0.weight", "heads.heads.0.bias"}
    assert changed(*states) == {"e_prompts.0", "heads.heads.0.weight", "heads.heads.0.bias"}


def test_contrastive_term_by_hand():
    features, centers = noise(3, 5), noise(2, 5, seed=1)
    rows = [*centers, *features]
    expected = sum((-torch.stack([row @ other / 0.8 for other in rows]).log_softmax(0)[i] for i, row in enumerate(rows)), torch.zeros(()))
    torch.testing.assert_close(contrastive(features, centers), expected / 5)


def test_hide_prompt_contrasts_the_images_of_a_group_as_a_device_does():
    method: HidePrompt = prompt_method("hide_prompt", contrast_images=2)
    method.begin_epoch(0)
    features = noise(5, D)
    of_groups = [contrastive(features[:2], method.statistics.centers()), contrastive(features[2:4], method.statistics.centers())]
    expected = (2 * of_groups[0] + 2 * of_groups[1] + contrastive(features[4:], method.statistics.centers())) / 5
    torch.testing.assert_close(method.contrastive(features), expected)
    method.contrast_images = None
    torch.testing.assert_close(method.contrastive(features), contrastive(features, method.statistics.centers()))


@pytest.mark.parametrize("name", ["hide_prompt", "hide_prompt covariance"])
def test_hide_prompt_takes_statistics_with_and_without_the_prompt_of_the_class(name):
    method: Any = build([*METHODS[name], "method.num_centroids=1"])
    tasks = toy.sequence()
    learn(method, tasks)
    for task in tasks:
        x, y = next(iter(task.batches("test", stream="any")))
        with torch.no_grad():
            plain, prompted = method.query(x), method.with_prompt(x, method.e_prompts[task.index])
        for statistics, features in ((method.plain_statistics, plain), (method.statistics, prompted)):
            means, labels = statistics.centers(), statistics.sources()
            for label in y.unique().tolist():
                torch.testing.assert_close(means[labels == label][0], features[y == label].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hide_prompt", "hide_prompt covariance"])
def test_hide_prompt_aligns_both_classifiers_after_every_task_but_the_first(name, monkeypatch):
    method: Any = build([*METHODS[name], "method.align_epochs=40", "method.align_lr=0.05", "method.task_align_lr=0.04"])
    tasks = list(toy.sequence())
    drawn: list[int] = []
    rates: list[float] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    kind = type(method.statistics)
    sample = kind.sample
    monkeypatch.setattr(kind, "sample", lambda self, chosen: drawn.append(len(chosen)) or sample(self, chosen))
    learn(method, tasks[:1], epochs=3)
    assert drawn == []
    fit = Fit(method, tasks[1]).begin().train(epochs=3)
    before, x = tensors(method), torch.cat([x for task in tasks[:2] for x, _ in task.test_batches()])
    y = torch.cat([y for task in tasks[:2] for _, y in task.test_batches()])
    losses = [nn.functional.cross_entropy(scores(method, x), y), nn.functional.cross_entropy(method.task_scores(method.query(x)), y)]
    fit.end()
    assert drawn == [24] * (40 * 2) + [120] * (40 * 2), "the tasks, then the heads: every epoch a step for every old class"
    assert rates == [rate * cosine(epoch, 40) for rate in (0.04, 0.05) for epoch in range(40) for _ in range(2)]
    moved = {key for key, value in tensors(method).items() if key in before and not torch.equal(value, before[key])}
    aligned = {key for key in before if key.startswith(("heads.", "task_heads.", "task_mlp."))}
    assert aligned <= moved and not any(key.startswith("backbone.") for key in moved)
    assert nn.functional.cross_entropy(scores(method, x), y) < losses[0]
    assert nn.functional.cross_entropy(method.task_scores(method.query(x)), y) < losses[1]


def test_hide_prompt_aligns_by_sgd_with_momentum(monkeypatch):
    method: Any = build([*METHODS["hide_prompt"], "method.align_epochs=3", "method.align_lr=0.05"])
    tasks = list(toy.sequence())
    learn(method, tasks[:1])
    fit = Fit(method, tasks[1]).begin().train()
    monkeypatch.setattr(type(method.statistics), "sample", lambda self, chosen: torch.stack([noise(D, seed=int(row)) for row in chosen]))
    align, heads, order = method._align, [], []

    def recorded(scores: Any, modules: Any, statistics: Any, task: Any, **how: Any) -> None:
        heads[:] = [copy.deepcopy(method.heads)]
        order[:] = [torch.get_rng_state()]
        align(scores, modules, statistics, task, **how)

    monkeypatch.setattr(method, "_align", recorded)
    fit.end()
    by_hand, labels = heads[0].requires_grad_(True), method.statistics.sources()
    torch.set_rng_state(order[0])
    velocity = [torch.zeros_like(parameter) for parameter in by_hand.parameters()]
    for epoch in range(3):
        for chosen in (torch.randperm(120 * len(labels))[: 120 * 2] // 120).split(120):
            loss = nn.functional.cross_entropy(by_hand(torch.stack([noise(D, seed=int(row)) for row in chosen])), labels[chosen])
            gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
            for parameter, gradient, speed in zip(by_hand.parameters(), gradients, velocity, strict=True):
                speed.mul_(0.9).add_(gradient)
                parameter.data -= 0.05 * cosine(epoch, 3) * speed
    for found, expected in zip(method.heads.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_task_classifier_of_hide_prompt_is_the_formula():
    mlp, x = ResidualMlp(D, 2), noise(5, D)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    inside = x @ mlp.up.weight.T + mlp.up.bias
    inside = inside * (1 + torch.erf(inside / 2**0.5)) / 2
    y = x + inside @ mlp.down.weight.T + mlp.down.bias
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(mlp(x), y * mlp.norm.weight + mlp.norm.bias, rtol=1e-4, atol=1e-5)


def test_prompts_start_in_the_published_ranges():
    for name, prompt, low, high in (
        ("hide_prompt", "e_prompts.0", -1, 1),
        ("dualprompt original", "e_prompts.0", 0, 0.01),
        ("dualprompt original", "g_prompt", 0, 0.01),
    ):
        method = build(METHODS[name])
        Fit(method, toy.sequence()[0]).begin()
        value, reach = method.get_parameter(prompt), high - low
        assert low <= value.min() < low + 0.05 * reach and high - 0.05 * reach < value.max() <= high, (name, prompt)


def test_centroids_account_for_every_image():
    centroids = ClassCentroids(D, 3)
    task = toy.sequence(1, num_classes=2, train=20)[0]
    vit = toy.toy_vit().eval()
    torch.manual_seed(0)
    centroids.add(task, vit)
    assert centroids.sizes.sum(dim=1).tolist() == [20, 20]
    x, y = zip(*task.batches("test", stream="any"), strict=True)
    with torch.no_grad():
        features, labels = vit(torch.cat(x)), torch.cat(y)
    for label in range(2):
        own, weights = features[labels == label], centroids.sizes[label] / 20
        mean = (weights[:, None] * centroids.means[label]).sum(0)
        torch.testing.assert_close(mean, own.mean(0), rtol=1e-4, atol=1e-5)
        within = (weights[:, None] * centroids.variances[label]).sum(0)
        between = (weights[:, None] * (centroids.means[label] - mean).square()).sum(0)
        torch.testing.assert_close(within + between, own.var(0, correction=0), rtol=1e-3, atol=1e-5)
        nearest = torch.cdist(own, centroids.means[label]).argmin(dim=1)
        assert nearest.bincount(minlength=3).tolist() == centroids.sizes[label].tolist()


def test_centroids_are_drawn_from_as_gaussians():
    centroids = ClassCentroids(4, 2)
    centroids.sizes, centroids.means, centroids.variances = torch.tensor([[3, 0], [2, 5]]), noise(2, 2, 4), noise(2, 2, 4, seed=1).square()
    centers = centroids.centers()
    assert centroids.sources().tolist() == [0, 1, 1] and torch.equal(centers, torch.stack([centroids.means[0, 0], *centroids.means[1]]))
    torch.manual_seed(0)
    drawn = centroids.sample(torch.arange(3).repeat(20_000)).view(20_000, 3, 4)
    variances = torch.stack([centroids.variances[0, 0], *centroids.variances[1]])
    torch.testing.assert_close(drawn.mean(0), centers, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.var(0), variances + 1e-4, rtol=0.05, atol=1e-3)


def test_a_centroid_of_one_image_is_not_drawn_unless_its_class_has_no_other():
    centroids = ClassCentroids(4, 2)
    images = torch.eye(4, dtype=torch.float64)
    centroids._append(torch.stack([images[0], images[0] + 0.01, 50 * images[1]]))  # a pair and one alone
    centroids._append(images[2:])  # two alone
    assert sorted(centroids.sizes[0].tolist()) == [1, 2] and centroids.sizes[1].tolist() == [1, 1]
    assert len(centroids.centers()) == 4
    assert centroids.sources().tolist() == [0, 1, 1]
    torch.testing.assert_close(centroids.sample(torch.tensor([0]))[0], images[0].float(), rtol=0, atol=0.1)


def test_a_class_has_no_more_centroids_than_different_images():
    centroids = ClassCentroids(4, 3)
    centroids._append(torch.ones(5, 4, dtype=torch.float64))
    centroids._append(noise(2, 4).double())
    centroids._append(torch.zeros(0, 4, dtype=torch.float64))
    assert centroids.sizes.gt(0).sum(dim=1).tolist() == [1, 2, 0]
    assert len(centroids.centers()) == 3 and centroids.sample(torch.tensor([0, 2])).isfinite().all()


# ---- what is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (L2P, {"variant": "deep"}, "method.variant=deep is not known; choose one of prefix, prompt"),
        (L2P, {"pool_size": 0}, "method.pool_size=0 is out of range; choose 1 or more"),
        (L2P, {"top_k": 31}, "method.top_k=31 does not fit method.pool_size=30; choose 1..30"),
        (L2P, {"top_k": 0}, "method.top_k=0 does not fit method.pool_size=30; choose 1..30"),
        (L2P, {"length": 5}, "method.length=5 cannot be halved into tokens for keys and for values; choose an even number from 2 on"),
        (L2P, {"length": 0, "variant": "prompt"}, "method.length=0 is out of range; choose 1 or more"),
        (L2P, {"blocks": [2]}, r"method.blocks=\[2\] does not fit this backbone; choose distinct numbers from 0..1"),
        (L2P, {"blocks": []}, r"method.blocks=\[\] does not fit this backbone"),
        (
            L2P,
            {"blocks": [1], "variant": "prompt"},
            r"method.blocks=\[1\]: method.variant=prompt has its tokens before block 0; choose \[0\]",
        ),
        (L2P, {"key_weight": -1.0}, "method.key_weight=-1.0 is out of range; choose 0 or more"),
        (DualPrompt, {"variant": "jax"}, "method.variant=jax is not known; choose one of coda, original"),
        (DualPrompt, {"g_length": 3}, "method.g_length=3 cannot be halved"),
        (DualPrompt, {"e_length": 0}, "method.e_length=0 cannot be halved"),
        (DualPrompt, {"e_blocks": [0, 0]}, r"method.e_blocks=\[0, 0\] does not fit this backbone; choose distinct numbers from 0..1"),
        (DualPrompt, {"g_blocks": [1]}, r"method.g_blocks=\[1\] and method.e_blocks=\[1\] overlap; choose different blocks"),
        (CodaPrompt, {"num_components": 0}, "method.num_components=0 is out of range; choose 1 or more"),
        (CodaPrompt, {"length": 7}, "method.length=7 cannot be halved"),
        (CodaPrompt, {"orthogonality": -0.1}, "method.orthogonality=-0.1 is out of range; choose 0 or more"),
        (HidePrompt, {"momentum": 1.0}, "method.momentum=1.0 is out of range; choose a number from 0 to below 1"),
        (HidePrompt, {"statistics": "mean"}, "method.statistics=mean is not known; choose one of centroids, covariance"),
        (HidePrompt, {"num_centroids": 0}, "method.num_centroids=0 is out of range; choose 1 or more"),
        (HidePrompt, {"contrast_images": 0}, "method.contrast_images=0 is out of range; choose 1 or more"),
        (HidePrompt, {"task_epochs": 0}, "method.task_epochs=0 is out of range; choose 1 or more"),
        (HidePrompt, {"align_samples": 0}, "method.align_samples=0 is out of range; choose 1 or more"),
        (HidePrompt, {"length": 1}, "method.length=1 cannot be halved"),
        (CodaPrompt, {"blocks": [5]}, r"method.blocks=\[5\] does not fit this backbone"),
    ],
)
def test_wrong_values_are_refused_by_name(kind, changes, message):
    name = {L2P: "l2p", DualPrompt: "dualprompt", CodaPrompt: "coda_prompt", HidePrompt: "hide_prompt"}[kind]
    arguments = arguments_of([f"method={name}"]) | changes
    with pytest.raises(ValueError, match=message):
        kind(toy.toy_vit(), **arguments)


def test_dualprompt_needs_two_blocks():
    with pytest.raises(ValueError, match=r"method.e_blocks=\[1\] does not fit this backbone"):
        DualPrompt(toy.vit_toy(num_classes=0, depth=1), **arguments_of(["method=dualprompt"]))
