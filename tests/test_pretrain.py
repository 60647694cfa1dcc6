"""experiments/pretrain/pretrain.py on a handful of synthetic images, and the weights it made for the package."""

import hashlib
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SIZE, CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS = 32, ["n01", "n02"], 8, 2


def import_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "experiments" / "pretrain" / "pretrain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


pretrain = import_tool()


def png(seed: int, size: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/<class>/*.png and val/<class>/*.png."""
    root, seed = tmp_path_factory.mktemp("images"), 0
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.png").write_bytes(png(seed))
                seed += 1
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as one .npz."""
    files = [sorted((folder / split / name).iterdir()) for split in ("train", "val") for name in CLASSES]
    blobs = [path.read_bytes() for paths in files for path in paths]
    labels = [i % len(CLASSES) for i, paths in enumerate(files) for _ in paths]
    path = tmp_path_factory.mktemp("packed") / "images.npz"
    offsets = np.cumsum([0, *map(len, blobs)], dtype=np.int64)
    num_train = TRAIN_PER_CLASS * len(CLASSES)
    np.savez(
        path,
        data=np.frombuffer(b"".join(blobs), np.uint8),
        offsets=offsets,
        labels=np.array(labels, np.int16),
        num_train=num_train,
        classes=np.array(CLASSES),
    )
    return path


def train(data: Path, out: Path, *options: str) -> None:
    fixed = ["--batch-size", "4", "--epochs", "1", "--val-stride", "1", "--no-compile", "--no-bf16", "--log-steps", "1", "--device", "cpu"]
    pretrain.main(["train", "--data", str(data), "--out", str(out), *fixed, *options])


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_folder_and_packed_file_give_the_same_dataset(folder: Path, packed: Path) -> None:
    one, other = pretrain.load(folder), pretrain.load(packed)
    assert one.classes == other.classes == CLASSES
    for split in ("train", "val"):
        assert torch.equal(getattr(one, split).pixels, getattr(other, split).pixels)
        assert torch.equal(getattr(one, split).labels, getattr(other, split).labels)
    assert one.train.labels.tolist() == [0] * TRAIN_PER_CLASS + [1] * TRAIN_PER_CLASS
    expected = np.asarray(Image.open(folder / "train" / "n02" / "3.png")).transpose(2, 0, 1)
    assert np.array_equal(one.train.pixels[TRAIN_PER_CLASS + 3].numpy(), expected)


def test_images_may_lie_deeper_and_beside_other_files(folder: Path, tmp_path: Path) -> None:
    """As in the official Tiny-ImageNet: train/<class>/images/*, beside lists."""
    for split, name in ((split, name) for split in ("train", "val") for name in CLASSES):
        shutil.copytree(folder / split / name, tmp_path / split / name / "images")
        (tmp_path / split / name / f"{name}_boxes.txt").write_text("0.png 0 0 1 1")
        (tmp_path / split / name / ".hidden.png").write_bytes(b"no image")
    found, expected = pretrain.load(tmp_path), pretrain.load(folder)
    assert torch.equal(found.train.pixels, expected.train.pixels) and torch.equal(found.val.labels, expected.val.labels)
    shutil.rmtree(tmp_path / "val" / CLASSES[1])
    with pytest.raises(FileNotFoundError, match=rf"has no images in val/{CLASSES[1]}; each class needs some in train and in val\.$"):
        pretrain.load(tmp_path)


def test_larger_images_are_resized() -> None:
    assert pretrain.decode(io.BytesIO(png(0, size=48))).shape == (3, SIZE, SIZE)


def test_unreadable_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is neither a packed \.npz file nor a folder with train/<class>/\*"):
        pretrain.load(tmp_path / "nothing")


def test_no_budget_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither --epochs nor --minutes is above 0"):
        pretrain.main(["train", "--data", str(packed), "--out", str(tmp_path)])


def test_a_batch_above_the_training_set_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--batch-size=17 exceeds the 16 training images; choose 1\.\.16"):
        train(packed, tmp_path, "--batch-size", "17")


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_fastest_device_there_is(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pretrain.choose_device("auto") == torch.device(expected)


def test_a_missing_device_is_refused(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--device=cuda, but torch finds no such device on this machine; choose auto or cpu\.$"):
        train(packed, tmp_path / "run", "--device", "cuda")
    assert not (tmp_path / "run").exists()


def test_augment_gives_a_shifted_and_possibly_mirrored_view() -> None:
    pixels = torch.arange(SIZE * SIZE).view(1, 1, SIZE, SIZE).expand(64, 3, SIZE, SIZE)
    views = pretrain.augment(pixels, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels[:1].float(), [pretrain.MAX_SHIFT] * 4, mode="reflect")
    windows = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)[0, 0].reshape(-1, SIZE, SIZE).long()
    plain = (views[:, 0, None] == windows).all((2, 3)).any(1)
    mirrored = (views[:, 0, None].flip(3) == windows).all((2, 3)).any(1)
    assert bool((plain ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_zoom_takes_a_part_of_the_image_of_the_allowed_size_and_shape() -> None:
    position = (torch.arange(SIZE) + 0.5) / SIZE
    rows, cols = torch.meshgrid(position, position, indexing="ij")
    x = torch.stack([rows, cols, cols]).expand(256, 3, SIZE, SIZE)
    views = pretrain.zoom(x, 0.5, torch.Generator().manual_seed(0))[:, :, 2:-2, 2:-2]  # away from the border, where nothing lies beyond
    steps = torch.stack([views[:, 0].diff(dim=1).flatten(1), views[:, 1].diff(dim=2).flatten(1)]) * SIZE
    torch.testing.assert_close(steps, steps[:, :, :1].expand_as(steps), rtol=0, atol=1e-4)  # straight, evenly spaced
    height, width = steps[:, :, 0]
    area, ratio = height * width, width / height
    assert 0.499 < area.min() < 0.6 and 0.9 < area.max() <= 1.001
    assert 0.74 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.34
    assert views.min() >= 0 and views.max() <= 1


def test_an_epoch_sees_each_image_once() -> None:
    labels = torch.arange(12)
    images = pretrain.Images(torch.zeros(12, 3, SIZE, SIZE, dtype=torch.uint8), labels)
    seen = torch.cat([pretrain.training_batch(images, step, batch_size=4, seed=0)[1] for step in range(3)])
    second = torch.cat([pretrain.training_batch(images, step, batch_size=4, seed=0)[1] for step in range(3, 6)])
    assert torch.equal(seen.sort().values, labels)
    assert torch.equal(second.sort().values, labels)
    assert not torch.equal(seen, second)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    factors = [pretrain.learning_rate_factor(progress, 0.1) for progress in (0.0, 0.05, 0.1, 0.55, 1.0, 1.2)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0, 0.0])


def test_the_tighter_budget_sets_the_progress() -> None:
    args = pretrain.parse(["train", "--data", "x", "--out", "y", "--epochs", "2", "--minutes", "1"])
    run = pretrain.Run(args, num_classes=2, steps_per_epoch=10)
    run.step, run.elapsed_s = 5, 30.0
    assert run.progress() == 0.5
    run.step = 15
    assert run.progress() == 0.75


@pytest.fixture(scope="module")
def teacher(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small ResNet."""
    out = tmp_path_factory.mktemp("teacher")
    train(packed, out, "--model", "resnet")
    return out


def test_the_loss_is_shared_between_labels_and_teacher(packed: Path, tmp_path: Path) -> None:
    still = ("--lr", "0", "--patch-drop", "0")  # teacher and student stay at the same starting weights: nothing to learn from each other
    train(packed, tmp_path / "alone", *still)
    alone = lines(tmp_path / "alone")[-2]["train_loss"]
    for share in (0.0, 0.25, 1.0):
        out = tmp_path / f"share {share}"
        train(packed, out, *still, "--teacher", str(tmp_path / "alone"), "--distill", str(share))
        assert lines(out)[-2]["train_loss"] == pytest.approx((1 - share) * alone, abs=1e-6)


def test_a_finished_run_that_is_asked_for_again_has_one_last_line(packed: Path, tmp_path: Path) -> None:
    train(packed, tmp_path)
    once = lines(tmp_path)
    assert [line["final"] for line in once] == [False] * (len(once) - 1) + [True]
    assert once[-1]["train_loss"] is None, "no step since the line of the last epoch"
    train(packed, tmp_path)
    assert lines(tmp_path) == once


def test_the_average_follows_slowly_once_it_has_begun() -> None:
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step, share in ((0, 0.1), (8, 0.5), (10_000, 0.99)):
        with torch.no_grad():
            average.weight.fill_(1.0)
            model.weight.fill_(0.0)
        pretrain.update_average(average, model, step, 0.99)
        assert average.weight.item() == pytest.approx(share)


def test_a_teacher_predicts_with_the_averaged_weights_and_running_statistics(packed: Path, teacher: Path) -> None:
    model = pretrain.load_teacher(teacher, len(CLASSES), torch.device("cpu"))
    average = checkpoint(teacher)["average"]
    assert average["bn1.num_batches_tracked"] == TRAIN_PER_CLASS * len(CLASSES) // 4
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    x = pretrain.normalize(pretrain.load(packed).val.pixels)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))  # of no other image of the batch
    assert not model(x).requires_grad


def test_a_teacher_that_is_not_there_is_one_sentence(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^--teacher=nowhere holds no checkpoint\.pt; give the --out folder of a run"):
        train(packed, tmp_path / "run", "--teacher", "nowhere")


def test_a_run_goes_on_with_its_own_model_only(packed: Path, teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run of --model=resnet; continue it with that, or choose another folder\.$"):
        train(packed, teacher, "--epochs", "2")
    assert pretrain.model_of(teacher) == "resnet"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options", ["--mix 0 --smallest-area 1", "--mix 1 --smallest-area 0.5 --hard-until 0.5", "--model resnet", "--teacher TEACHER"]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    packed: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    given = [str(teacher) if option == "TEACHER" else option for option in options.split()]
    train(packed, tmp_path / "whole", *given)
    step = pretrain.Run.train_step

    def interrupted(run, images):
        if run.step == 2:
            raise KeyboardInterrupt
        return step(run, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.Run, "train_step", interrupted)
        train(packed, tmp_path / "resumed", "--save-minutes", "0", *given)
    assert checkpoint(tmp_path / "resumed")["step"] == 2
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:  # an epoch after the last checkpoint, which will be trained again
        file.write('{"step": 3, "final": false}\n{"step"')  # and half of another one
    train(packed, tmp_path / "resumed", *given)

    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "resumed")
    assert whole["step"] == resumed["step"] == 4
    for part in ("model", "average"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    told = [[(line["step"], line["train_loss"]) for line in lines(tmp_path / name)] for name in ("whole", "resumed")]
    assert told[0] == told[1]
    last = lines(tmp_path / "whole")[-1]
    assert last["final"] and last["val_images"] == VAL_PER_CLASS * len(CLASSES)


def test_a_loss_that_is_not_finite_is_named_by_its_step_and_not_saved(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(run, images):
        run.step += 1
        return torch.tensor(1.0 if run.step < 3 else float("nan"))

    monkeypatch.setattr(pretrain.Run, "train_step", diverging)
    with pytest.raises(FloatingPointError, match=r"^the loss is nan at step 2; lower --lr=0\.006 and start in a new --out folder\.$"):
        train(packed, tmp_path, "--save-minutes", "0", "--log-steps", "100")
    assert checkpoint(tmp_path)["step"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_cuda_trains_without_waiting_exports_and_resumes_on_either_device(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "run", tmp_path / "micro.safetensors"
    two_steps_an_epoch = ["--batch-size", "8", "--bf16", "--log-steps", "100"]
    step = pretrain.Run.train_step

    def without_waiting(run, images):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(run, images)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Run, "train_step", without_waiting)
        train(packed, out, *two_steps_an_epoch, "--device", "cuda")
    saved = checkpoint(out)
    assert saved["step"] == 2
    pretrain.main(["export", "--data", str(packed), "--run", str(out), "--to", str(file)])
    exported = load_file(file)
    assert exported and all(torch.equal(value, saved["average"][name].half().cpu()) for name, value in exported.items())

    for epochs, device in ((2, "cpu"), (3, "cuda")):
        train(packed, out, *two_steps_an_epoch, "--epochs", str(epochs), "--device", device)
        saved = checkpoint(out)
        assert saved["step"] == 2 * epochs
        assert {value.device.type for part in ("model", "average") for value in saved[part].values()} == {device}
        state = [(name, value) for values in saved["optimizer"]["state"].values() for name, value in values.items()]
        # The step counts stay on the CPU, where the optimizer reads them without waiting.
        assert {value.device.type for name, value in state if name == "step"} == {"cpu"}
        assert {value.device.type for name, value in state if isinstance(value, torch.Tensor) and name != "step"} == {device}


def test_export_loads_strictly_into_timm(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(packed, tmp_path / "run")
    file = tmp_path / "weights" / "micro.safetensors"
    arguments = ["export", "--data", str(packed), "--run", str(tmp_path / "run"), "--to", str(file)]
    pretrain.main(arguments)
    facts = json.loads(capsys.readouterr().out)
    content = file.read_bytes()
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert facts["bytes"] == len(content) < pretrain.MAX_EXPORT_BYTES

    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["timm"])
    model = timm.create_model(description["architecture"], **description["arguments"])
    model.load_state_dict(load_file(file), strict=True)
    average = checkpoint(tmp_path / "run")["average"]
    assert all(torch.equal(value, average[name].half().float()) for name, value in model.state_dict().items())
    assert all(value.dtype == torch.float16 for value in load_file(file).values())

    pretrain.main(arguments)
    assert file.read_bytes() == content


def test_only_vit_micro_is_exported(packed: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trained --model=resnet; the package ships vit_micro only\.$"):
        pretrain.main(["export", "--data", str(packed), "--run", str(teacher), "--to", str(tmp_path / "file")])
    assert not (tmp_path / "file").exists()


def test_the_model_card_describes_the_shipped_file() -> None:
    weights = ROOT / "inflora" / "weights"
    card = (weights / "vit_micro.md").read_text()
    assert hashlib.sha256((weights / "vit_micro.safetensors").read_bytes()).hexdigest() in card
    model = timm.create_model(pretrain.ARCHITECTURE, num_classes=0, **pretrain.GEOMETRY)
    model.load_state_dict(load_file(weights / "vit_micro.safetensors"), strict=True)
