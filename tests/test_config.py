"""Every yaml composes and builds; what users type is checked with their own words."""

import inspect
import re
from typing import Any, Literal

import pytest
import torch
import yaml
from helpers import METHODS, ROOT, compose_config
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from inflora import config
from inflora.backbone import _check_name
from inflora.config import RESULT_FREE, ConfigurationError, check
from inflora.data.tasks import parse_class_order, split_task_sizes
from inflora.data.transforms import build_transforms

CONF = ROOT / "conf"


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def compose_valid(*overrides: str) -> DictConfig:
    """Composed, complete but for paths only a user can give, and valid."""
    cfg = compose_config("output_dir=somewhere", *overrides)
    for key in OmegaConf.missing_keys(cfg):
        assert key in ("dataset.root", "backbone.checkpoint"), f"{key} has no default"
        OmegaConf.update(cfg, key, "somewhere")
    check(cfg)
    return cfg


# ---- every yaml --------------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_embedded_one():
    cfg = compose_valid()
    assert cfg.dataset._target_ == "inflora.data.datasets.digits"
    assert cfg.method._target_ == "inflora.methods.inflora.InfLoRA"
    assert (cfg.backbone.name, cfg.backbone.pretrained, cfg.backbone.checkpoint) == ("vit_micro.tiny_imagenet", True, None)
    assert (cfg.seed, cfg.resume, cfg.trainer.device, cfg.trainer.num_devices, cfg.dataset.root) == (0, "auto", "auto", 1, "data")


@pytest.mark.parametrize("name", names("dataset"))
def test_data_sets(name):
    cfg = compose_valid(f"dataset={name}")
    data = OmegaConf.to_container(cfg.dataset)
    assert isinstance(data, dict)
    fixed = {
        "_target_", "root", "num_tasks", "task_sizes", "class_order", "split", "transform", "normalize", "validation_fraction",
        "max_train_per_class", "max_test_per_class", "image_size", "options",
    }  # fmt: skip
    assert data.keys() == fixed
    function = get_method(data["_target_"])
    assert list(inspect.signature(function).parameters) == ["root", "split"]
    for transform in build_transforms(data["transform"], 32, None, None):
        images = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
        assert transform(images, None, torch.zeros(1, transform.num_draws)).shape == (1, 3, 32, 32)
    num_classes = 200
    assert sorted(parse_class_order(data["class_order"], num_classes, seed=0)) == list(range(num_classes))
    assert len(split_task_sizes(num_classes, data["num_tasks"], data["task_sizes"])) == data["num_tasks"]
    assert (CONF / "dataset" / f"{name}.yaml").read_text().startswith("# @package _global_\n# ")


@pytest.mark.parametrize("name", [name for name in names("dataset") if name.startswith(("cifar100", "imagenet_r", "domainnet"))])
def test_published_data_sets_bring_the_published_backbone(name):
    assert compose_valid(f"dataset={name}").backbone.name == "vit_base_patch16_224.augreg_in21k"
    assert compose_valid(f"dataset={name}").dataset.normalize == "none", "as published: inputs stay in [0, 1]"


@pytest.mark.parametrize("name", names("backbone"))
def test_backbones(name):
    cfg = compose_valid(f"backbone={name}")
    _check_name(cfg.backbone.name)
    assert cfg.backbone.keys() == {"name", "pretrained", "checkpoint"}


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_exactly_the_arguments_of_their_class(name):
    cfg = compose_valid(f"method={name}", "~recipe", "~tuning").method
    config.check_arguments("method", OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    parameters = inspect.signature(get_class(cfg._target_)).parameters
    keyword_only = {key for key, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert cfg.keys() == keyword_only | {"_target_"}
    assert all(parameters[key].default is inspect.Parameter.empty for key in keyword_only), "defaults live in yaml, once"


@pytest.mark.parametrize("name", names("optimizer"))
def test_optimizers(name):
    cfg = compose_valid(f"optimizer={name}", "optimizer.lr=0.25", "~tuning").optimizer
    assert cfg.head_lr == 0.25, "one rate for all unless said otherwise"
    settings: dict[str, Any] = {str(key): value for key, value in cfg.items() if key != "head_lr"}
    config.check_arguments("optimizer", settings)
    optimizer = instantiate(settings)([{"params": [torch.nn.Parameter(torch.ones(2))], "role": "branch"}])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name", names("tracker"))
def test_trackers(name):
    cfg = compose_valid(f"tracker={name}").tracker
    config.check_arguments("tracker", OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    parameters = inspect.signature(get_class(cfg._target_)).parameters
    assert cfg.keys() - {"_target_"} == parameters.keys() - {"folder"}


@pytest.mark.parametrize("group", ["experiment", "debug"])
def test_studies_and_modes(group):
    for name in names(group):
        assert compose_valid(f"{group}={name}") != compose_valid()


def pairs(first: str, second: str) -> set[str]:
    return {f"{a}_{b}" for a in names(first) for b in names(second)}


@pytest.mark.parametrize(
    "group, first, second", [("recipe", "dataset", "method"), ("inputs", "backbone", "dataset"), ("tuning", "backbone", "method")]
)
def test_files_for_pairs_are_named_after_pairs_and_applied(group, first, second):
    later = {"recipe": ["~inputs", "~tuning"], "inputs": ["~tuning"], "tuning": []}[group]  # files that may change a value again
    for name in names(group):
        assert name in pairs(first, second), f"conf/{group}/{name}.yaml would never be read"
        a, b = next((a, b) for a in names(first) for b in names(second) if f"{a}_{b}" == name)
        cfg = compose_valid(f"{first}={a}", f"{second}={b}", *later)
        content = OmegaConf.load(CONF / group / f"{name}.yaml")
        settings = OmegaConf.merge(cfg, content)
        assert settings == cfg, "every value of the file has arrived"
        assert len(content) > 0
        assert (CONF / group / f"{name}.yaml").read_text().startswith("# @package _global_\n")


def test_the_published_recipe_is_applied_and_the_command_line_wins():
    cfg = compose_valid("dataset=cifar100_10task", "method=inflora")
    assert (cfg.trainer.epochs, cfg.trainer.batch_size, cfg.optimizer.lr, cfg.method.threshold, cfg.method.rank) == (
        20,
        128,
        5e-4,
        0.95,
        10,
    )
    assert cfg.optimizer._target_ == "torch.optim.Adam"
    mine = compose_valid("dataset=cifar100_10task", "method=inflora", "trainer.epochs=3", "method.rank=4", "optimizer.lr=0.1")
    assert (mine.trainer.epochs, mine.method.rank, mine.optimizer.lr, mine.trainer.batch_size) == (3, 4, 0.1, 128)
    assert compose_valid("dataset=imagenet_r_10task").method.threshold == 0.98
    assert compose_valid("dataset=imagenet_r_10task").trainer.epochs == 50


def test_debug_shrinks_everything_but_what_is_typed():
    cfg = compose_valid("debug=default", "dataset=cifar100_10task")
    assert (cfg.trainer.epochs, cfg.dataset.max_train_per_class) == (1, 8)
    assert compose_valid("debug=default", "trainer.epochs=2").trainer.epochs == 2
    experiment = compose_valid("debug=default", "experiment=cifar100_methods")
    assert (experiment.trainer.epochs, experiment.dataset.max_train_per_class) == (1, 8)


def test_every_key_the_core_reads_has_a_type():
    cfg = compose_config("output_dir=somewhere")
    assert cfg.keys() == config.RunConfig.__dataclass_fields__.keys()


# ---- what users type ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["trainer.epoch=3", "method.rnk=4", "backbone.nme=x", "sed=1", "optimizer.learning_rate=1", "dataset.roots=x"]
)
def test_a_misspelt_key_is_refused(override):
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{re.escape(override.split('=')[0])}'"):
        compose_config(override)


@pytest.mark.parametrize(
    "override", ["trainer.epochs=ten", "seed=1.5", "backbone.pretrained=maybe", "dataset.task_sizes=[a,b]", "trainer.compile=[1]"]
)
def test_a_value_of_the_wrong_type_is_refused(override):
    with pytest.raises(ConfigCompositionException, match="Error merging override"):
        compose_config(override)


def test_precision_may_look_like_a_number():
    assert compose_valid("trainer.precision=16").trainer.precision == "16"


def test_missing_values_are_named_all_at_once():
    cfg = compose_config("dataset=imagefolder", "backbone=vit_b16_ibot", "output_dir=somewhere")
    with pytest.raises(ConfigurationError) as error:
        check(cfg)
    assert str(error.value).splitlines() == [
        "backbone.checkpoint has no value; set backbone.checkpoint=...",
        "dataset.root has no value; set dataset.root=...",
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("resume=always", "resume=always is not known; choose one of auto, never"),
        ("dataset.normalize=imagenet", "dataset.normalize=imagenet is not known; choose one of none, timm"),
        ("trainer.device=gpu", "trainer.device=gpu is not known; choose one of auto, cpu, cuda, mps"),
        ("trainer.precision=64", "trainer.precision=64 is not known; choose one of 32, bf16, 16"),
        ("trainer.epochs=0", "trainer.epochs=0 is too small; choose 1 or more"),
        ("trainer.batch_size=0", "trainer.batch_size=0 is too small; choose 1 or more"),
        ("trainer.eval_batch_size=-1", "trainer.eval_batch_size=-1 is too small; choose 1 or more, or null for what suits the device"),
        ("trainer.num_devices=0", "trainer.num_devices=0 is too small; choose 1 or more"),
        ("trainer.num_workers=-1", "trainer.num_workers=-1 is too small; choose 0 or more"),
        ("seed=-3", "seed=-3 is too small; choose 0 or more"),
        ("trainer.grad_clip=-1", "trainer.grad_clip=-1.0 is too small; choose more than 0, or null for no clipping"),
        ("optimizer.lr=high", "optimizer.lr=high does not fit; it must be a number"),
        ("optimizer.head_lr=-1", "optimizer.head_lr=-1 is too small; choose 0 or more"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_what_is_allowed(override, message):
    cfg = compose_config("output_dir=somewhere")
    OmegaConf.update(cfg, *yaml.safe_load(override.replace("=", ": ")).popitem())
    with pytest.raises(ConfigurationError) as error:
        check(cfg)
    assert message in str(error.value)


def test_one_epoch_and_one_image_a_batch_are_fine():
    compose_valid("trainer.epochs=1", "trainer.batch_size=1", "trainer.eval_batch_size=1", "trainer.num_workers=0", "optimizer.lr=0")


class Plugin:
    """Stands for a plug-in's class."""

    def __init__(
        self, first: Any, *, count: int, share: float, names: list[str] | None, mode: Literal["a", "b"], on: bool = True
    ) -> None: ...


def plugin(hint_of_checkers_only: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


def test_arguments_are_compared_with_their_types():
    fine: dict[str, Any] = {"_target_": "test_config.Plugin", "count": 3, "share": 1, "names": ["x"], "mode": "c", "on": False}
    config.check_arguments("method", fine)
    config.check_arguments("method", fine | {"names": None})
    sentence = r"^method\.other is no setting of test_config\.Plugin; remove it with '~method\.other'$"
    with pytest.raises(ConfigurationError, match=sentence):
        config.check_arguments("method", fine | {"other": 1})
    with pytest.raises(ConfigurationError) as error:
        config.check_arguments("method", fine | {"count": 2.5, "share": "half", "names": [1], "on": 1})
    assert str(error.value).splitlines() == [
        "method.count=2.5 does not fit; it must be a whole number",
        "method.share=half does not fit; it must be a number",
        "method.names=[1] does not fit; it must be a list, each item a text or null",
        "method.on=1 does not fit; it must be true or false",
    ]
    config.check_arguments("scheduler", {"_target_": "test_config.plugin", "hint_of_checkers_only": 3})
    with pytest.raises(ConfigurationError, match=r"method._target_=inflora.methods.infllora.X cannot be imported: "):
        config.check_arguments("method", {"_target_": "inflora.methods.infllora.X"})


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("method=inflora,tracker.mode=offline,tracker.project=p", "method=inflora"),
        ("tracker.mode=offline,seed=1", "seed=1"),
        ("+tracker.tags=[a,b],++tracker.x=1,seed=1", "seed=1"),
        ("dataset.task_sizes=[5,5],seed=1", "dataset.task_sizes=[5,5],seed=1"),
        ("dataset.root=a/b", "dataset.root=a_b"),
        ("tracker.mode=offline", "default"),
        ("", "default"),
    ],
)
def test_a_folder_name_tells_what_changes_results(overrides, name):
    assert config.folder_name(overrides) == name


def test_a_folder_name_is_one_on_windows(monkeypatch):
    monkeypatch.setattr("inflora.config.os.name", "nt")
    assert config.folder_name(r"dataset.class_order=numpy:1993,backbone.checkpoint=C:\w\x.pth") == (
        "dataset.class_order=numpy_1993,backbone.checkpoint=C__w_x.pth"
    )


def test_folders_of_a_sweep_are_named_by_what_changes_results():
    (found,) = re.findall(r"exclude_keys:\n((?: +- .+\n)+)", (CONF / "config.yaml").read_text(encoding="utf-8"))
    assert set(yaml.safe_load(found)) == RESULT_FREE
