"""The numbers of recipes and methods are the published ones, typed here once more from the papers and public codes, not from conf/.

Each row names its source. Rows under "ours" are deliberate choices that nobody published: to change one, change its row too. What a pair of
data set and method composes to is `METHODS[method]`, what its data set brings, and on top its row of `PUBLISHED`.
"""

from typing import Any

import pytest
import yaml
from helpers import ROOT, compose_config
from omegaconf import DictConfig, OmegaConf

from inflora.config import leaves

Settings = dict[str, Any]
CONF = ROOT / "conf"


def under(group: str, **settings: Any) -> Settings:
    return {f"{group}.{key}": value for key, value in leaves(settings).items()}


def own(**settings: Any) -> Settings:
    """A method's own settings."""
    return under("method", **settings)


def method(*parts: Settings, **settings: Any) -> Settings:
    """Optimizer, schedule, alignment (none unless given) and a method's own settings."""
    row: Settings = {"alignment._target_": None}
    for part in (*parts, own(**settings)):
        row |= part
    return row


def train(epochs: int, batch_size: int, lr: float, head_lr: float | None = None, **optimizer: float) -> Settings:
    """How a pair trains; one rate for all unless there is one for the heads."""
    rates = under("optimizer", lr=lr, head_lr=lr if head_lr is None else head_lr, **optimizer)
    return under("trainer", epochs=epochs, batch_size=batch_size) | rates


# ---- parts -------------------------------------------------------------------------------------------------------------------------

# rates for pairs without a recipe: InfLoRA's with Adam, ours with SGD
ADAM = under("optimizer", _target_="torch.optim.Adam", lr=5e-4, head_lr=5e-4, weight_decay=0, betas=[0.9, 0.999], eps=1e-8)
ADAMW = ADAM | under("optimizer", _target_="torch.optim.AdamW", weight_decay=0.01)
SGD = under("optimizer", _target_="torch.optim.SGD", lr=0.01, head_lr=0.01, weight_decay=0, momentum=0.9, nesterov=False)
CONSTANT = under("scheduler", _target_="inflora.schedule.constant")
COSINE = under("scheduler", _target_="inflora.schedule.cosine")
COSINE99 = under("scheduler", _target_="inflora.schedule.cosine99", lag=1)  # as CODA-Prompt's and InfLoRA's codes run it


def step(*milestones: int) -> Settings:
    return under("scheduler", _target_="inflora.schedule.step", milestones=list(milestones), gamma=0.1)


# InfLoRA's code: energies of second moments, P C decomposed, rows of lora_A with the norm of random ones (not the paper's text)
INFLORA = own(rank=10, threshold=0.95, threshold_end=1, energy="gram", decomposition="PC", lora_A_scale=1 / 3**0.5, dual=True)
# SLCA's code, models/slca.py, and InfLoRA's, methods/inflora_ca.py
GAUSSIAN = under("alignment", _target_="inflora.parts.classifier_alignment.gaussian", epochs=5, samples_per_class=256, lr=0.01) | under(
    "alignment", momentum=0.9, weight_decay=5e-4, temperature=0.1, mean_scale=0.9, covariance="full"
)
# MOS's and TUNA's codes: crct_epochs, five batches of samples, ca_lr
OWN_ALIGNMENT = under("method.alignment", epochs=30, lr=5e-3, momentum=0.9, weight_decay=5e-4, covariance="full")
# adapters parallel to the MLP: RevisitingCIL (APER), EASE, RanPAC; narrower in MOS and TUNA
ADAPTER = own(bottleneck=64, adapter_scale=0.1, dropout=0.1)

# ---- methods, whatever the data set ------------------------------------------------------------------------------------------------

METHODS: dict[str, Settings] = {
    # Liang & Li 2024, methods/*.py and configs/*.json
    "inflora": method(ADAM, COSINE99, INFLORA, blocks=None),
    "inflora_b5": method(ADAM, COSINE99, INFLORA, blocks=5),
    "inflora_ca": method(
        SGD, COSINE, INFLORA, GAUSSIAN, under("alignment", restore=False, fresh_norm=False), under("optimizer", lr=1e-3, head_lr=1e-3),
        blocks=None,
    ),
    # Zhang et al. 2023
    "slca": method(
        SGD, step(18), GAUSSIAN, under("alignment", restore=True, fresh_norm=True),
        under("optimizer", lr=1e-4, head_lr=1e-2, weight_decay=5e-4),
    ),
    # the CODA-Prompt code base: experiments/*.sh, models/zoo.py
    "l2p": method(ADAM, COSINE99, variant="prefix", pool_size=30, length=20, top_k=5, blocks=[0], key_weight=1),
    "dualprompt": method(ADAM, COSINE99, variant="coda", g_blocks=None, e_blocks=None, g_length=6, e_length=20, key_weight=1),
    "coda_prompt": method(ADAM, COSINE99, num_components=100, length=8, blocks=None, orthogonality=0),
    "joint": method(ADAM, COSINE99, variant="peft", rank=10, blocks=None),
    "sequential": method(ADAM, COSINE99, variant="seqlora", rank=10, blocks=None),
    "sequential_full": method(ADAM, COSINE99, softmax="current"),
    "linear_probe": method(ADAM, COSINE99),
    # Smith et al. 2024 with the settings of Liang & Li 2024; Wang et al. 2023 (O-LoRA), scripts/order_1.sh: lamda_1, lamda_2
    "c_lora": method(ADAM, COSINE99, rank=64, blocks=None, penalty=0.5),
    "o_lora": method(ADAM, COSINE99, rank=10, blocks=None, penalty=0.5, overlap="l1", normalise=False, norm_penalty=0),
    # Gao et al. 2023, config/vit_lora.yaml: five of twelve blocks
    "lae": method(ADAM, CONSTANT, variant="lora", size=5, first_blocks=0.4167, freeze_epochs=3, ema_decay=0.9999),
    # Wang et al. 2023 (HiDe-Prompt), training_scripts/*_vit.sh, engines/: prefixes for keys and values, crct_epochs, ca_lr (scaled for the
    # classifier of tasks alone), samples of five batches of 24 and of one
    "hide_prompt": method(
        ADAM, COSINE, blocks=None, length=2 * 5, momentum=0.01, contrast=0.1, contrast_images=None, mlp_ratio=2, statistics="centroids",
        num_centroids=10, task_epochs=None, task_lr=None, align_epochs=30, align_samples=5 * 24, task_align_samples=24, align_lr=5e-3,
        task_align_lr=5e-3 * 24 / 256,
    ),
    # Wu et al. 2025, backbone/lora.py and models/sdlora.py: SGD at a constant rate, whatever the configuration says
    "sd_lora": method(SGD, CONSTANT, rank=10, blocks=None, magnitude=0.8, rank_reduction=None),
    # He et al. 2025, models/cllora.py and exps/cifar.json
    "cl_lora": method(SGD, COSINE, rank=8, shared_blocks=0.5, distillation_weight=5, temperature=2, orthogonality=1e-4),
    # Liu & Chang 2025, methods/lorasub_drs.py and configs/cifar100.json
    "lora_drs": method(ADAM, COSINE99, rank=10, blocks=None, threshold=0.99, triplet=0.05, margin=1),
    # Qiu et al. 2026, reproduce.py
    "splitlora": method(ADAMW, step(18), rank=10, blocks=None, alpha=20, temperature=30),
    # Zhou et al. 2024 (APER, SimpleCIL, EASE); Sun et al. 2025 (MOS); Wang et al. 2025 (TUNA): their exps/*.json
    "simplecil": method(ADAM, COSINE99),
    "aper": method(SGD, COSINE, ADAPTER, variant="adapter", num_tokens=5),
    "ease": method(SGD, COSINE, ADAPTER, alpha=0.1),
    "mos": method(
        SGD, COSINE, ADAPTER, OWN_ALIGNMENT, bottleneck=16, momentum=0.1, contrast=0.1, retrieval_steps=4,
        alignment={"samples_per_class": 5 * 48},
    ),
    "tuna": method(
        SGD, COSINE, ADAPTER, OWN_ALIGNMENT, bottleneck=16, scale=20, margin=0, orthogonality=1e-3,
        alignment={"samples_per_class": 5 * 16, "mean_scale": 1},
    ),
    # McDonnell et al. 2023, args/*_publish.csv; Goswami et al. 2023, FeCAM_vit_cifar100.py
    "ranpac": method(SGD, COSINE, ADAPTER, variant="adapter", num_tokens=5, num_projections=10_000),
    "fecam": method(ADAM, COSINE99, covariance="full", alpha1=1, alpha2=0, normalize=True, tukey=None),
    # LAMDA-PILOT, exps/icarl.json, models/icarl.py
    "icarl": method(
        SGD, CONSTANT, variant="full", rank=10, blocks=None, buffer_size=2000, per_class=None, loss_form="softmax", distillation_weight=1,
        temperature=2,
    ),
    # ours, of methods that have no published form on a ViT: DER++ with mammoth's weights for CIFAR-100 and 500 images, LwF with the
    # original's, EWC with Fisher information of single images (the weight of the code of EWC-LoRA belongs to that of batches: its recipes)
    "derpp": method(
        ADAM, COSINE99, variant="peft", rank=10, blocks=None, selection="reservoir", buffer_size=500, per_class=None, alpha=0.3, beta=0.5
    ),
    "er": method(
        ADAM, COSINE99, variant="peft", rank=10, blocks=None, selection="balanced", buffer_size=None, per_class=20, replay_ratio=1
    ),
    "lwf": method(ADAM, COSINE99, variant="peft", rank=10, blocks=None, distillation_weight=1, temperature=2, warmup_epochs=0),
    "ewc": method(
        ADAM, COSINE, variant="product", rank=10, blocks=None, penalty_weight=1e5, decay=1, fisher="sample", fisher_images=None
    ),
}  # fmt: skip

# ---- data sets: InfLoRA's transforms, inputs in [0, 1], natural order, unless a row says otherwise ------------------------------------

TRAINER = {"trainer.epochs": 5, "trainer.batch_size": 64, "trainer.grad_clip": None}
IN21K = {"backbone.name": "vit_base_patch16_224.augreg_in21k"}
CIFAR = {"dataset.transform": "inflora_cifar", "dataset.normalize": "none", "dataset.class_order": "natural", "dataset.split": None}
IMAGENET_R = CIFAR | {"dataset.transform": "inflora", "dataset.split": "inflora"}
DOMAINNET = IMAGENET_R | {"dataset.split": "coda"}
DATASETS: dict[str, Settings] = {
    "digits_5task": CIFAR | {"dataset.transform": "shift", "dataset.normalize": "timm", "backbone.name": "vit_micro.tiny_imagenet"},
    **{f"cifar100_{tasks}task": CIFAR | IN21K for tasks in (10, 20)},
    **{f"imagenet_r_{tasks}task": IMAGENET_R | IN21K for tasks in (5, 10, 20)},
    "domainnet_5task": DOMAINNET | IN21K,
}
PILOT = {"dataset.transform": "pilot", "dataset.class_order": "numpy:1993"}  # LAMDA-PILOT and all that grew out of it
LAE = {"dataset.transform": "lae"}

# ---- recipes: by method, then data sets --------------------------------------------------------------------------------------------

C10, C20, R5, R10, R20 = "cifar100_10task", "cifar100_20task", "imagenet_r_5task", "imagenet_r_10task", "imagenet_r_20task"
R = f"{R5} {R10} {R20}"
D = "domainnet_5task"  # the InfLoRA paper's text, whose code has other values; the CODA-Prompt code base: configs/domainnet_prompt.yaml

TABLE: dict[str, dict[str, Settings]] = {
    # Liang & Li 2024, configs/*.json: lrate, lamb, rank
    "inflora": {C10: train(20, 128, 5e-4), R: train(50, 128, 5e-4) | own(threshold=0.98), D: train(5, 128, 5e-4) | own(rank=20)},
    "inflora_b5": {
        C10: train(20, 128, 1e-3),
        R5: train(50, 128, 5e-4) | own(threshold=0.98),  # 0.99 in the paper's text
        f"{R10} {R20}": train(50, 128, 5e-4) | own(threshold=0.99),
        D: train(5, 128, 5e-4) | own(rank=20),
    },
    "inflora_ca": {
        C10: train(20, 128, 1e-3, 1e-2, weight_decay=1e-3) | step(18) | {"alignment.fresh_norm": True} | own(rank=5),
        R10: train(50, 128, 1e-3),
    },
    # the CODA-Prompt code base: configs/*_prompt*.yaml; the InfLoRA paper's sequential LoRA and C-LoRA follow it at their own rates
    **{
        name: {C10: train(20, 128, 1e-3), R: train(50, 128, 1e-3), D: train(5, 128, 1e-3)}
        for name in ("l2p", "dualprompt", "coda_prompt", "c_lora")
    },
    "sequential": {C10: train(20, 128, 5e-4), R: train(50, 128, 5e-4), D: train(5, 128, 5e-4) | own(rank=20)},
    # its configs/cifar-100_ft.yaml; ours on ImageNet-R
    "joint": {C10: train(20, 128, 5e-5) | own(variant="full"), R: train(50, 128, 5e-5) | own(variant="full")},
    "sequential_full": {C10: train(20, 128, 5e-5), R: train(50, 128, 5e-5)},
    # Gao et al. 2023, config/base/*_order1.yaml; 20 tasks as its README says
    "lae": {
        f"{C10} {C20}": train(5, 24, 0.0028125) | LAE,
        f"{R10} {R20}": train(50, 24, 0.00046875) | LAE | own(freeze_epochs=30),
    },
    # Wang et al. 2023, training_scripts/train_cifar100_vit.sh, train_imr_vit.sh: eight devices of 24 images, rates for 256 images
    "hide_prompt": {
        C10: train(50, 8 * 24, 0.03 * 24 / 256, 0.03 * 24 / 256 * 0.1)
        | step(31)
        | {"trainer.grad_clip": 1, "dataset.transform": "slca_cifar", "dataset.normalize": "timm"}
        | own(length=2 * 5, contrast=0.1, contrast_images=24, task_epochs=20, task_lr=5e-4 * 24 / 256),
        R10: train(150, 8 * 24, 0.03 * 24 / 256, 0.03 * 24 / 256 * 0.1)
        | {"trainer.grad_clip": 1, "dataset.transform": "pilot"}
        | own(length=2 * 20, contrast=0.5, contrast_images=24, task_epochs=20, task_lr=5e-4 * 24 / 256),
    },
    # Zhang et al. 2023, exps/slca/*.json and models/slca.py
    "slca": {
        C10: train(20, 128, 1e-4, 1e-2) | PILOT | {"dataset.transform": "slca_cifar", "dataset.normalize": "timm"},
        R10: train(50, 128, 1e-4, 1e-2) | PILOT | {"dataset.transform": "slca", "dataset.normalize": "timm"} | step(40),
    },
    # Wu et al. 2025, the headers of logs/*.log and the orders they print (two of the logs have each other's names)
    "sd_lora": {
        C10: train(20, 128, 8e-3) | PILOT | {"dataset.class_order": "numpy:1994"},
        R10: train(20, 128, 8e-3) | PILOT | {"dataset.class_order": "numpy:1996"},
        f"{R5} {R20}": train(20, 128, 1e-2) | PILOT | {"dataset.class_order": "numpy:1995"},
    },
    # He et al. 2025, exps/cifar.json (20 tasks), exps/inr.json (40 tasks); their values for other splits
    "cl_lora": {
        f"{C10} {C20}": train(30, 64, 0.03, weight_decay=1e-4) | PILOT,
        f"{R10} {R20}": train(20, 32, 0.05, weight_decay=5e-4) | PILOT | own(rank=10),
    },
    # Liu & Chang 2025, configs/cifar100.json, imagenetr.json
    "lora_drs": {
        f"{C10} {C20}": train(20, 128, 5e-4, 2e-3),
        f"{R10} {R20}": train(50, 128, 5e-4) | own(triplet=0.2, margin=2),
    },
    # Qiu et al. 2026, reproduce.py, train_splitlora.py: ten epochs show an image ten times each; timm's milestones 5, 8 act after 4, 7
    "splitlora": {f"{C10} {R}": train(10 * 10, 256, 1e-3, 1e-2, weight_decay=5e-5) | step(10 * 4, 10 * 7)},
    # Zheng et al. 2026 (EWC-LoRA), configs/ewclora/*.json
    "ewc": {
        C10: train(20, 128, 5e-4, 5e-3) | own(penalty_weight=1e7, fisher="batch"),
        R10: train(50, 128, 5e-4, weight_decay=5e-3) | own(penalty_weight=1e7, fisher="batch"),
    },
    # Zhou et al. 2024: RevisitingCIL (20 tasks) and LAMDA-PILOT (10 tasks)
    "simplecil": {f"{C10} {C20} {R10}": PILOT},
    "aper": {
        f"{C10} {C20}": train(20, 48, 0.01, weight_decay=5e-4) | PILOT,
        R10: train(10, 16, 0.05, weight_decay=5e-3) | PILOT,
    },
    # Zhou et al. 2024 (EASE), exps/ease_cifar_in21k.json, ease_inr_in21k.json; ours: its values for 20 tasks of CIFAR-100 in 10
    "ease": {
        f"{C10} {C20}": train(20, 48, 0.025, weight_decay=5e-4) | PILOT,
        R10: train(20, 16, 0.05, weight_decay=5e-3) | PILOT,
    },
    # Sun et al. 2025, exps/mos_*_in21k.json and models/mos.py (heads at a tenth); ours: its values for 20 tasks of CIFAR-100 in 10
    "mos": {
        f"{C10} {C20}": train(20, 48, 0.03, 0.003, weight_decay=5e-4) | PILOT,
        R10: train(10, 16, 0.05, 0.005, weight_decay=5e-3) | PILOT | own(alignment={"samples_per_class": 5 * 16, "weight_decay": 5e-3}),
    },
    # Wang et al. 2025, logs/tuna/* (the file for CIFAR-100 has no orthogonality); ours: its values for 20 tasks of CIFAR-100 in 10
    "tuna": {
        f"{C10} {C20}": train(15, 16, 0.01, weight_decay=5e-4) | PILOT,
        R10: train(10, 32, 0.02, weight_decay=5e-4) | PILOT | own(alignment={"samples_per_class": 5 * 32, "mean_scale": 0.9}),
    },
    # McDonnell et al. 2023, args/cifar224_publish.csv, imagenetr_publish.csv, utils/data.py
    "ranpac": {
        C10: train(20, 48, 0.01, weight_decay=5e-4) | PILOT | {"dataset.transform": "ranpac_cifar"},
        R10: train(20, 48, 0.01, weight_decay=5e-4) | PILOT | own(variant="ssf"),
    },
    # Goswami et al. 2023, FeCAM_vit_cifar100.py, FeCAM_vit_imagenet-r.py
    "fecam": {C10: {}, R10: own(alpha1=10, alpha2=10)},
    # LAMDA-PILOT, exps/icarl.json, icarl_inr.json; ours on digits, with the rates of its backbone's tuning
    "icarl": {
        C10: train(20, 128, 1e-3, weight_decay=2e-4) | PILOT,
        R10: train(20, 32, 1e-3, weight_decay=2e-4) | PILOT | own(buffer_size=None, per_class=20),
        "digits_5task": train(5, 64, 1e-2) | own(buffer_size=200),
    },
    # ours, not published: epochs, batches and rates of InfLoRA
    **{name: {C10: train(20, 128, 5e-4), R10: train(50, 128, 5e-4)} for name in ("er", "lwf", "o_lora")},
    "linear_probe": {C10: train(20, 128, 5e-4), R: train(50, 128, 5e-4)},
    "derpp": {C10: train(20, 128, 5e-4) | own(buffer_size=2000), R10: train(50, 128, 5e-4) | own(buffer_size=4000)},
}
PUBLISHED = {
    f"{dataset}_{name}": TRAINER | DATASETS[dataset] | METHODS[name] | row
    for name, rows in TABLE.items()
    for datasets, row in rows.items()
    for dataset in datasets.split()
}

# ---- published accuracy with the recipes: last and average, percent; None where only one is known -----------------------------------

Figures = tuple[float | None, float | None]
FIGURES: dict[str, dict[str, Figures]] = {
    # Liang & Li 2024, tables 1 and 2: their own and those they ran beside it
    "inflora": {C10: (86.51, 91.70), R5: (77.52, 82.01), R10: (75.65, 80.82), R20: (71.01, 77.28)},
    "sequential": {R5: (70.96, 79.14), R10: (64.32, 74.78), R20: (56.98, 69.29), D: (71.69, 78.68)},
    "c_lora": {C10: (82.97, 88.81), R5: (75.85, 78.85), R10: (71.89, 75.38), R20: (65.71, 70.63), D: (69.34, 75.25)},
    "l2p": {C10: (82.48, 87.64), R5: (64.13, 68.66), R10: (62.54, 67.98), R20: (57.92, 64.57), D: (70.16, 75.60)},
    "dualprompt": {C10: (84.42, 90.06), R5: (67.88, 71.16), R10: (65.41, 69.39), R20: (61.00, 65.80), D: (72.14, 77.71)},
    "coda_prompt": {C10: (86.62, 91.08), R5: (73.09, 76.91), R10: (71.47, 75.82), R20: (67.28, 72.34), D: (None, 78.72)},
    "hide_prompt": {R10: (75.06, 76.60)},
    # the methods' own papers and logs
    "lae": {C10: (85.59, 89.96), C20: (83.93, None), R10: (72.66, 78.91)},
    "slca": {C10: (91.53, 94.09), R10: (77.00, 81.17)},
    "sd_lora": {C10: (87.26, 92.05), R5: (79.32, 83.00), R10: (78.17, 82.59), R20: (75.13, 79.80)},
    "cl_lora": {C10: (None, 91.85), C20: (85.32, 91.02), R20: (None, 84.77)},
    "ewc": {C10: (88.07, None), R10: (73.03, None)},
    "aper": {C20: (85.14, 90.61)},
    "simplecil": {C20: (81.28, 87.57)},
    "ease": {C20: (85.80, 91.51), R10: (76.17, 81.74)},
    "mos": {C20: (89.25, 93.30), R10: (77.83, 82.75)},
    "tuna": {C20: (91.60, 94.86), R10: (79.30, 84.09)},
    "ranpac": {C10: (92.2, None)},
}

# ---- tests -------------------------------------------------------------------------------------------------------------------------


def names(group: str) -> set[str]:
    return {file.stem for file in (CONF / group).glob("*.yaml")}


def numbers(cfg: DictConfig, *others: str) -> Settings:
    """All that tells how a method learns, and the settings that `others` name."""
    tree = {group: OmegaConf.to_container(cfg[group], resolve=True) for group in ("method", "optimizer", "scheduler", "alignment")}
    learning = {key: value for key, value in leaves(tree).items() if key != "method._target_" and not key.endswith("._partial_")}
    return learning | {key: OmegaConf.select(cfg, key, throw_on_missing=True) for key in others}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_has_the_published_numbers(name):
    row = PUBLISHED[name]
    dataset = next(dataset for dataset in DATASETS if name.startswith(f"{dataset}_"))
    cfg = compose_config(f"dataset={dataset}", f"method={name.removeprefix(f'{dataset}_')}")
    assert numbers(cfg, *(key for key in row if key.startswith(("trainer.", "dataset.", "backbone.")))) == row
    set_there = leaves(yaml.safe_load((CONF / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")))
    learning = {key for key in set_there if not key.startswith("published.")}
    assert learning <= row.keys(), "a recipe sets nothing that its row does not name"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_says_where_it_is_from_and_what_was_reached_with_it(name):
    dataset = next(dataset for dataset in DATASETS if name.startswith(f"{dataset}_"))
    method = name.removeprefix(f"{dataset}_")
    found = compose_config(f"dataset={dataset}", f"method={method}").published
    expected = FIGURES.get(method, {}).get(dataset, (None, None))
    assert (found.last_accuracy, found.average_accuracy) == expected
    assert found.source
    if found.source.startswith("ours"):
        assert expected == (None, None) and not found.differs, "nobody has published anything that could differ"
    if expected == (None, None):
        assert found.figures is None
    assert compose_config(f"dataset={dataset}", f"method={method}", "~recipe").published.source is None


def test_every_recipe_has_a_row():
    assert names("recipe") == PUBLISHED.keys()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_the_published_numbers(name):
    assert numbers(compose_config(f"method={name}", "~recipe", "~inputs", "~tuning")) == METHODS[name]


def test_every_method_has_a_row():
    assert names("method") == METHODS.keys()
