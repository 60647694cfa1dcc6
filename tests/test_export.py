"""A finished run as a plain timm model, an ONNX file and a PEFT adapter, and files classified with it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import toy
import yaml
from helpers import METHODS, ROOT, run_toy
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.torch_version import TorchVersion

from inflora import evaluate, export, predict, report
from inflora.backbone import build_backbone
from inflora.checkpoint import load
from inflora.data import transforms
from inflora.export import export_run, model_config
from inflora.methods.linear_probe import LinearProbe
from inflora.results import read_summary
from inflora.run import run

EXPORTED = {
    "c_lora", "derpp", "er", "ewc", "inclora", "inclora_frozen", "inflora", "inflora_b5", "inflora_ca", "joint", "linear_probe", "lwf",
    "o_lora", "sd_lora", "seqlora", "sequential", "sequential_full", "splitlora",
}  # fmt: skip
"""Methods whose answers are those of one vision transformer with a linear head.

`slca` is another where the features are larger than the toy's: its fresh final norm has another epsilon than timm's.
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that makes a toy run begin with weights from a file."""
    file = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    state = toy.toy_vit(seed=5).state_dict()
    save_file(state | {"norm.weight": 2 * state["norm.weight"]}, file)  # no fresh norm
    return f"backbone.checkpoint={file}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Path:
    """A finished InfLoRA run."""
    folder = tmp_path_factory.mktemp("runs") / "inflora"
    options = ["dataset.class_order=[5,3,0,1,4,2]", "seed=1", "trainer.epochs=20", "optimizer.head_lr=1e-2"]
    run_toy(folder, "method=inflora", weights, *options)
    return folder


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    export_run(finished, out)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's test images as files, a folder for each class."""
    folder = tmp_path_factory.mktemp("images")
    test = toy.tiny(Path()).test
    for path, image in zip(test.paths, test.images.fetch(torch.arange(len(test.paths)))[0], strict=True):
        file = folder / f"{path.removeprefix('test/')}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return folder


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr, after what a run has said."""
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    return said.partition("error: ")[2].strip()


# ---- the timm model ----------------------------------------------------------------------------------------------------------------


def test_files_classified_by_the_exported_model_have_the_runs_accuracy(finished: Path, exported: Path, images: Path):
    files = list(predict.image_files([images]))
    classifier = predict.Classifier(exported)
    answers = classifier.probabilities(torch.stack([classifier.read(file) for file in files]))
    assert torch.allclose(answers.sum(1), torch.ones(24))
    right = [classifier.class_names[row.argmax()] == file.parent.name for file, row in zip(files, answers, strict=True)]
    found = read_summary(finished)
    assert found is not None and found["last_accuracy"] > 25
    assert 100 * sum(right) / len(right) == pytest.approx(found["last_accuracy"])


def test_the_configuration_says_where_the_model_comes_from(exported: Path):
    config = json.loads((exported / "config.json").read_text())
    assert config["label_names"] == [f"class_{number:02d}" for number in (5, 3, 0, 1, 4, 2)]
    assert config["architecture"] == "vit_toy" and config["model_args"] == {"img_size": 16}
    assert (config["inflora"]["method"], config["inflora"]["seed"]) == ("inflora", 1)
    assert {path.name for path in exported.iterdir()} == {"config.json", "model.safetensors"}


def test_timm_alone_loads_it(tmp_path: Path):
    """`vit_micro` is registered here and not in timm."""
    run_toy(
        tmp_path / "run", "method=linear_probe", "backbone.name=vit_micro.tiny_imagenet", "backbone.pretrained=true", "trainer.epochs=1"
    )
    model = export_run(tmp_path / "run", tmp_path / "out")
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys, timm, torch
model = timm.create_model("local-dir:out", pretrained=True).eval()
assert not any(name.startswith("inflora") for name in sys.modules)
torch.save((model(torch.load("x.pt")), timm.data.resolve_model_data_config(model)), "scores.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    scores, data = torch.load(tmp_path / "scores.pt")
    torch.testing.assert_close(scores, model(x))
    assert tuple(data["input_size"]) == (3, 32, 32) and tuple(data["mean"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_exported_or_refused(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_toy(tmp_path / "run", f"method={method}", "trainer.epochs=1")
    code = export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    if method in EXPORTED:
        assert code == 0
        assert isinstance(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), torch.nn.Module)
    else:
        assert code == 1 and not (tmp_path / "out").exists()
        assert error_of(capsys).startswith(f"method={method} does not answer with one of timm's vision transformers and a linear head")


@pytest.mark.parametrize("normalize", ["none", "timm"])
@pytest.mark.parametrize("name", [*transforms._RECIPES, "shift"])
@pytest.mark.parametrize("size, height, width", [(224, 500, 333), (32, 32, 32), (32, 57, 91), (224, 32, 32), (160, 300, 100)])
def test_timms_preprocessing_is_that_of_the_test_images(name: str, normalize: str, size: int, height: int, width: int):
    mean, std = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]) if normalize == "timm" else (None, None)
    _, ours = transforms.build_transforms(name, size, mean, std)
    found = dict.fromkeys(export.PROVENANCE, "some")
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=2)
    model.pretrained_cfg = model_config(model, ours, ["a", "b"], found)["pretrained_cfg"]
    theirs = create_transform(**resolve_model_data_config(model))
    pixels = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = ours(pixels[None], None, None)[0]
    given: Tensor = theirs(Image.fromarray(pixels.permute(1, 2, 0).numpy()))  # type: ignore[operator,assignment]
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6)


# ---- other formats -----------------------------------------------------------------------------------------------------------------


def test_the_adapter_holds_what_training_added(finished: Path, tmp_path: Path):
    model = export_run(finished, tmp_path, peft=True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base = load(finished / "checkpoints" / "base.safetensors")["method"]["tensors"]
    assert config["target_modules"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert config["rank_pattern"] == config["alpha_pattern"] == dict.fromkeys(config["target_modules"], 6)  # three tasks of rank 2
    for name in config["target_modules"]:
        lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(base[f"backbone.{name}.weight"] + lora_B @ lora_A, model.get_submodule(name).weight)
    assert torch.equal(tensors["base_model.model.head.weight"], model.head.weight)  # type: ignore[union-attr,arg-type]


def test_peft_loads_the_adapter(finished: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = export_run(finished, tmp_path, peft=True)
    pretrained = timm.create_model("vit_toy", num_classes=6)
    base = load(finished / "checkpoints" / "base.safetensors")["method"]["tensors"]
    missing = pretrained.load_state_dict({key.removeprefix("backbone."): value for key, value in base.items()}, strict=False)
    assert missing.missing_keys == ["head.weight", "head.bias"]
    adapted = peft.PeftModel.from_pretrained(pretrained, tmp_path / "adapter").eval()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(adapted(x), model(x))


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="torch exports no free axis yet")
def test_onnx_computes_the_same(finished: Path, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = export_run(finished, tmp_path, onnx=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (name,) = (given.name for given in session.get_inputs())
    for count in (1, 5):
        x = torch.randn(count, 3, 16, 16)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model(x), rtol=1e-4, atol=1e-5)


def test_another_export_leaves_nothing_of_the_one_before(finished: Path, tmp_path: Path):
    export_run(finished, tmp_path, peft=True)
    (tmp_path / "model.onnx").write_bytes(b"of another run")
    export_run(finished, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["config.json", "model.safetensors"]


def test_formats_that_cannot_be_written(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    faults = {
        ("linear_probe", weights): "training changed nothing in the backbone",
        ("sequential_full", weights): "training changed cls_token",
        ("inflora_ca", weights, "alignment.fresh_norm=true"): "the method began by changing the pretrained weights",
        ("inflora", "backbone.pretrained=false"): "the run began with random weights",
    }
    for (method, *options), sentence in faults.items():
        run_toy(tmp_path / method, f"method={method}", "trainer.epochs=1", *options)
        monkeypatch.setattr(export, "TOLERANCE", 0.1)  # a fresh norm's other epsilon shows in the toy's small features
        assert export.main([str(tmp_path / method), "--out", str(tmp_path / "out"), "--peft"]) == 1
        assert error_of(capsys).startswith(f"--peft: {sentence}")
    assert not (tmp_path / "out").exists()
    onnx = [str(tmp_path / "linear_probe"), "--out", str(tmp_path / "out"), "--onnx"]
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1+cu126"))
    assert export.main(onnx) == 1
    assert error_of(capsys) == "--onnx needs torch 2.8 or newer, and this is 2.7.1+cu126; install that, or leave --onnx out"
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert export.main(onnx) == 1
    assert error_of(capsys) == "--onnx needs packages that are not installed; run `pip install onnx onnxscript`"


def test_a_folder_without_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert export.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert error_of(capsys).startswith(f"{tmp_path} holds no finished run")


@pytest.mark.parametrize("method", ["linear_probe", "simplecil"])  # the latter has no epochs, whose checkpoints come in between
def test_a_damaged_last_checkpoint_is_not_replaced_by_an_older_one(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_toy(tmp_path / "run", f"method={method}", "trainer.epochs=1")
    max((tmp_path / "run" / "checkpoints").glob("0*.safetensors")).write_bytes(b"damaged")
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 1
    assert error_of(capsys).startswith(f"the last checkpoint of {tmp_path / 'run'} is damaged")
    assert evaluate.main([str(tmp_path / "run")]) == 1
    assert "is damaged" in error_of(capsys)
    assert evaluate.main([str(tmp_path / "run"), "--batch-size", "0"]) == 1
    assert error_of(capsys) == "trainer.eval_batch_size=0 is too small; choose 1 or more, or null for what suits the device"


def test_a_run_in_float16_is_tested_on_a_cpu(tmp_path: Path):
    run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1")
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("precision: '32'", "precision: '16'"))
    assert "precision: '16'" in (tmp_path / "config.yaml").read_text()
    now, recorded = evaluate.evaluate_run(tmp_path)
    assert now == pytest.approx(recorded)


def test_a_run_of_a_version_without_published_recipes_is_tested_exported_and_reported(tmp_path: Path):
    run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1")
    for file, text in (("config.yaml", yaml.safe_dump), ("summary.json", json.dumps)):
        content = yaml.safe_load((tmp_path / file).read_text())
        del content["published"]
        (tmp_path / file).write_text(text(content))
    assert evaluate.main([str(tmp_path)]) == 0
    assert export.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    report.write([tmp_path], tmp_path / "report")
    assert run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1")["method"] == "linear_probe", "and looked up"
    (tmp_path / "summary.json").unlink()
    assert run(OmegaConf.load(tmp_path / "config.yaml"))["published"] is None, "and gone on with"  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["sequential", "lae", "l2p", "aper", "hide_prompt", "slca"])
def test_a_finished_run_needs_no_pretrained_weights(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "weights.pth"
    torch.save(toy.toy_vit(seed=5).state_dict(), file)
    run_toy(tmp_path / "run", f"method={method}", f"backbone.checkpoint={file}", "trainer.epochs=1")
    file.unlink()
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run")]) == 0
    if method == "sequential":
        export_run(tmp_path / "run", tmp_path / "out", peft=True)
        adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "weights.pth"


def test_a_run_of_several_processes_in_half_precision_is_exported(finished: Path, tmp_path: Path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    changed = config.replace("precision: '32'", "precision: '16'").replace("num_devices: 1", "num_devices: 2")
    assert len(changed) == len(config) and changed != config
    (folder / "config.yaml").write_text(changed)
    model = export_run(folder, tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision, allowed", [("32", 0.05), ("bf16", 0.5)])
def test_near_ties_are_allowed_for(precision: str, allowed: float, tmp_path: Path):
    """In percent of a task with many images; half precision has more of them."""
    run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1", f"trainer.precision={precision}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"test_counts": [100_000] * 3}))
    *lines, last = (tmp_path / "accuracy_matrix.csv").read_text().splitlines()
    first, *others = map(float, last.split(","))
    for difference, code in ((0.9 * allowed, 0), (1.1 * allowed, 1)):
        row = ",".join(map(str, [first + difference, *others]))
        (tmp_path / "accuracy_matrix.csv").write_text("\n".join([*lines, row]) + "\n")
        assert evaluate.main([str(tmp_path)]) == code


def test_what_is_not_as_recorded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1")
    assert evaluate.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("Same as recorded.\n")
    *lines, last = (tmp_path / "accuracy_matrix.csv").read_text().splitlines()
    first, *others = map(float, last.split(","))
    one_image = 100 / json.loads((tmp_path / "summary.json").read_text())["test_counts"][0]
    for images, code, words in ((1, 0, "Same as recorded.\n"), (2, 1, "or another precision than then.\n")):
        changed = first + images * one_image
        (tmp_path / "accuracy_matrix.csv").write_text("\n".join([*lines, ",".join(map(str, [changed, *others]))]) + "\n")
        assert evaluate.main([str(tmp_path)]) == code
        assert capsys.readouterr().out.endswith(words)


@pytest.mark.parametrize("sizes", ["dataset.num_tasks=2", "dataset.task_sizes=[2,2]"])
def test_images_of_other_classes_are_no_test(sizes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = tmp_path / "images"
    root.mkdir()
    (root / "num_classes").write_text("4")
    options = ["dataset._target_=toy.growing", f"dataset.root={root}", sizes, "trainer.epochs=1"]
    run_toy(tmp_path / "run", "method=linear_probe", *options)
    (root / "num_classes").write_text("6")
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run")]) == 1
    assert error_of(capsys) == f"dataset.root={root} has other classes than {tmp_path / 'run'} was trained on; test on the same ones"


def test_images_may_lie_elsewhere_and_be_tested_on_another_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, num_classes in (("here", 4), ("there", 4), ("others", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "num_classes").write_text(str(num_classes))
    options = ["dataset._target_=toy.growing", f"dataset.root={tmp_path / 'here'}", "dataset.num_tasks=2", "trainer.epochs=1"]
    run_toy(tmp_path / "run", "method=linear_probe", *options)
    (tmp_path / "here" / "num_classes").unlink()
    assert evaluate.main([str(tmp_path / "run"), "--root", str(tmp_path / "there")]) == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run"), "--root", str(tmp_path / "others")]) == 1
    assert "has other classes than" in error_of(capsys)
    assert evaluate.main([str(tmp_path / "run"), "--root", str(tmp_path / "there"), "--device", "mps"]) == 1
    assert error_of(capsys).startswith("trainer.device=mps, but torch finds no such device")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("device: cpu", "device: mps"))
    assert evaluate.main([str(tmp_path / "run"), "--root", str(tmp_path / "there")]) == 1
    assert error_of(capsys).endswith("was trained with trainer.device=mps, which this machine does not have; add --device cpu")


class Strange(LinearProbe):
    """Answers that no comparison should take for a model's."""

    answer: float

    def predict(self, x: Tensor) -> Tensor:
        return torch.full_like(super().predict(x), self.answer)


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), float("-inf"), 0.0, 1e30])
def test_scores_that_differ_are_refused_whatever_they_are(answer: float):
    method, backbone = Strange(toy.toy_vit()), build_backbone("vit_toy.test", pretrained=False, checkpoint=None)
    method.answer = answer
    method.heads.grow(2, torch.device("cpu"))
    with pytest.raises(ValueError, match="method=strange does not answer with one of timm's"):
        export.plain_model(method.eval(), backbone, "strange")
    method.heads.heads = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(ValueError, match="method=strange does not answer with one of timm's"):
        export.plain_model(method.eval(), backbone, "strange")


# ---- classifying files -------------------------------------------------------------------------------------------------------------


def test_predict_prints_a_line_for_every_image(exported: Path, images: Path, capsys: pytest.CaptureFixture[str]):
    one = images / "class_03" / "0.png"
    assert predict.main([str(exported), str(one), str(images / "class_04"), "--top", "2"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(one), *(str(images / "class_04" / f"{row}.png") for row in range(4))]
    for _, first, second in lines:
        (_, *p), (_, *q) = (re.fullmatch(r"class_0(\d) (\d+\.\d) %", answer).groups() for answer in (first, second))  # type: ignore[union-attr]
        assert float(p[0]) >= float(q[0]) and float(p[0]) + float(q[0]) <= 100.1


def test_a_broken_image_does_not_cost_the_others_their_turn(
    exported: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "no image.png").write_bytes(b"no image")
    png = (images / "class_03" / "0.png").read_bytes()
    (tmp_path / "broken[x].png").write_bytes(png[:40] + bytes(20) + png[60:])
    (tmp_path / "notes.pdf").write_bytes(b"not to be opened")
    (tmp_path / "whole.png").write_bytes(png)
    assert predict.main([str(exported), str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and said.out.startswith(str(tmp_path / "whole.png"))
    assert [line.partition(" cannot be read as an image")[0] for line in said.err.splitlines()] == [
        f"error: {tmp_path / name}" for name in ("broken[x].png", "no image.png")
    ]


def test_what_predict_cannot_do(exported: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    for name, text in {"hub": '{"architecture": "vit_tiny_patch16_224"}', "list": "[]", "half": "{"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "without weights").mkdir()
    (tmp_path / "without weights" / "config.json").write_text((exported / "config.json").read_text())
    one = str(images / "class_03" / "0.png")
    cases = [
        ([str(tmp_path / "nowhere"), one], f"{tmp_path / 'nowhere'} holds no exported model"),
        *(([str(tmp_path / name), one], f"{tmp_path / name} holds no exported model") for name in ("hub", "list", "half")),
        ([str(tmp_path / "without weights"), one], f"the model in {tmp_path / 'without weights'} cannot be loaded"),
        ([str(exported), str(tmp_path / "missing.png")], f"{tmp_path / 'missing.png'} does not exist"),
        ([str(exported), str(tmp_path / "empty")], f"{tmp_path / 'empty'} holds no image"),
        ([str(exported), one, "--top", "0"], "--top=0 names no class"),
    ]
    if not torch.cuda.is_available():
        cases.append(([str(exported), one, "--device", "cuda"], "--device=cuda, but torch finds no such device"))
    for arguments, sentence in cases:
        assert predict.main(arguments) == 1
        assert error_of(capsys).startswith(sentence)


def test_somebody_elses_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its module is imported again, in processes that know nothing of it."""
    (tmp_path / "elsewhere.py").write_text((ROOT / "examples" / "my_method" / "my_method" / "backbone.py").read_text())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def python(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = [
        "debug=default",
        "dataset.num_tasks=2",
        "trainer.progress=false",
        "trainer.device=cpu",
        "method=linear_probe",
        "~tuning",
        "~inputs",
    ]
    python(str(ROOT / "train.py"), "backbone.name=elsewhere:my_vit.first", "backbone.pretrained=false", *options, "output_dir=run")
    said = python("-m", "inflora.export", "run", "--out", "out")
    assert "In timm after `import elsewhere`: timm.create_model" in said
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    assert predict.main([str(tmp_path / "out"), str(tmp_path / "black.png")]) == 1
    assert capsys.readouterr().err.endswith("where that code is to be trusted, add --import elsewhere\n")
    assert python("-m", "inflora.predict", "out", "black.png", "--import", "elsewhere").startswith("black.png\t")


def test_the_commands_say_how_they_are_used(capsys: pytest.CaptureFixture[str]):
    for command in (evaluate, export, predict):
        with pytest.raises(SystemExit) as left:
            command.main(["--help"])
        assert not left.value.code
        assert f"python -m {command.__name__}" in capsys.readouterr().out
