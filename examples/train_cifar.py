"""Trains an AdderNet, or its convolutional twin, on images by the recipe of the paper.

    python3 examples/train_cifar.py                             # CIFAR-10 if it is there, else handwritten digits
    python3 examples/train_cifar.py --data cifar10 --download --amp float16 --compile
    python3 examples/train_cifar.py --output runs/resnet20 --resume

SGD with momentum and weight decay, a cosine schedule over the epochs, random crops and flips, and the adaptive learning
rate of each adder layer. That is applied by `scale_gradients` just before the step, which equals the published code's
scaling inside backward() and stays right with --amp and --accumulate.

CIFAR comes from torchvision's datasets, from the folder --root. Without torchvision or without the files the default is
scikit-learn's 1,797 handwritten digits, enlarged to the network's input, for which nothing is downloaded; two CPU cores
take a few seconds for an epoch of them.

In the folder --output, after each epoch: last.pt (everything that --resume needs; the resumed run goes on exactly as if
it had not been interrupted), best.pt (the state_dict of the most accurate epoch), history.json and history.png (needs
matplotlib). None is ever half a file, and none is replaced after a loss or a parameter became infinite or NaN: the run
ends there, with exit code 1.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from torch2trt_adder import checkpoints, files, scale_gradients, set_eta
from torch2trt_adder.models import addernet_mnist, cnn_twin, resnet20
from torch2trt_adder.training import DivergedError, check_loss, check_parameters

MODELS: dict[str, Callable[[int], nn.Module]] = {"resnet20": resnet20, "addernet_mnist": lambda _: addernet_mnist()}
INPUTS = {"resnet20": (3, 32), "addernet_mnist": (1, 28)}  # channels, height and width
EPOCHS = {"cifar10": 400, "cifar100": 400, "digits": 30}
AMP = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a resumed run must share with its beginning.
RECIPE = (
    *("data", "samples", "model", "layers", "epochs", "batch", "accumulate", "lr", "momentum", "weight_decay", "eta"),
    *("amp", "seed"),
)


# ---- data


@dataclasses.dataclass
class Images:
    """uint8 images [N, C, H, W] and their labels [N], all on the training device."""

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    shift: int  # by how many pixels training images are moved at most
    flip: bool  # whether training images are mirrored at random

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return (self.images[index].float() / 255 - self.mean) / self.std, self.labels[index]

    def training_batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches in random order, moved and mirrored; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        device = self.images.device
        order = torch.randperm(len(self.images), generator=generator)
        for index in order.split(batch)[: len(order) // batch]:
            moves = torch.randint(0, 2 * self.shift + 1, (2, batch), generator=generator).to(device)
            mirrored = (torch.rand(batch, generator=generator) < 0.5).to(device)
            x, labels = self.batch(index.to(device))
            if self.flip:
                x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            yield _crop(x, self.shift, moves), labels


def _crop(x: Tensor, shift: int, moves: Tensor) -> Tensor:
    """Pads each image by `shift` on all sides and cuts its own size out, from moves[:, n] on."""
    N, _, H, W = x.shape
    padded = F.pad(x, (shift,) * 4)
    rows = moves[0, :, None, None] + torch.arange(H, device=x.device)[:, None]
    columns = moves[1, :, None, None] + torch.arange(W, device=x.device)
    cut = padded[torch.arange(N, device=x.device)[:, None, None], :, rows, columns]  # [N, H, W, C]
    return cut.permute(0, 3, 1, 2).contiguous()


def load(args: argparse.Namespace, device: torch.device) -> tuple[Images, Images, int]:
    """Training images, test images, number of classes. Settles args.data."""
    channels, size = INPUTS[args.model]
    reason = None
    if args.data != "digits":
        try:
            (train, train_labels), (test, test_labels), classes = _cifar(args)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:  # torchvision and torch may not fit
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if args.data != "auto":
                sys.exit(f"train_cifar: {args.data} is not available ({reason}); try --download, or --data digits.")
    if args.data == "digits" or reason:
        if reason:
            print(f"CIFAR-10 is not available here ({reason}): training on handwritten digits instead.")
        args.data = "digits"
        (train, train_labels), (test, test_labels), classes = _digits(channels, size)
    elif args.data == "auto":
        args.data = "cifar10"
    if train.shape[1:] != (channels, size, size):
        sys.exit(
            f"train_cifar: {args.model} takes images [{channels}, {size}, {size}], and those of {args.data} are "
            f"{list(train.shape[1:])}; choose another --model."
        )
    if args.samples is not None:
        train, train_labels = train[: args.samples], train_labels[: args.samples]
    pixels = train.double() / 255
    mean, std = (t.float().view(-1, 1, 1).to(device) for t in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    cifar = args.data != "digits"
    return (
        Images(train.to(device), train_labels.to(device), mean, std, 4 if cifar else 2, cifar),
        Images(test.to(device), test_labels.to(device), mean, std, 0, False),
        classes,
    )


def _cifar(args: argparse.Namespace) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    from torchvision import datasets

    kind, classes = (datasets.CIFAR100, 100) if args.data == "cifar100" else (datasets.CIFAR10, 10)
    parts = []
    for train in (True, False):
        data = kind(args.root, train=train, download=args.download)
        parts.append((torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)))
    return parts[0], parts[1], classes


def _digits(channels: int, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """1,437 training images and 360 test images, enlarged from 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(size, size), mode="bilinear").round().byte().expand(-1, channels, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].contiguous(), torch.tensor(digits.target)[order]
    return (images[360:], labels[360:]), (images[:360], labels[:360]), 10


# ---- training


class Trainer:
    """Network, optimizer and the history of their epochs."""

    def __init__(self, args: argparse.Namespace, train: Images, test: Images, classes: int) -> None:
        self.args, self.train, self.test = args, train, test
        self.device = train.images.device
        torch.manual_seed(args.seed)
        self.adder = args.layers == "adder"
        model = MODELS[args.model](classes)
        if self.adder:
            set_eta(model, None)  # backward() leaves the gradients raw, scale_gradients() scales them
        else:
            model = cnn_twin(model)
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)
        self.call = torch.compile(self.model) if args.compile else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        self.amp = AMP[args.amp]
        # float16 ends at 6e-8: small gradients would vanish. bfloat16 has float32's range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.history: list[dict[str, float]] = []

    def epoch(self) -> None:
        """Trains one epoch, tests, and appends to the history.

        Raises:
            DivergedError: a loss or, after the last step, a parameter is not finite.
        """
        number, start = len(self.history), time.perf_counter()
        lr = self.args.lr * 0.5 * (1 + math.cos(math.pi * number / self.args.epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        steps = len(self.train.images) // self.args.batch
        steps -= steps % self.args.accumulate
        total = 0.0
        losses: list[Tensor] = []  # not looked at yet
        every = 1 if self.device.type == "cpu" else 20  # batches; a look waits for the GPU
        correct = torch.zeros((), device=self.device)
        self.model.train()
        batches = self.train.training_batches(self.args.batch, self.args.seed * 1_000_003 + number)
        progress = tqdm(total=steps, desc=f"epoch {number + 1}/{self.args.epochs}", unit="batch", leave=False)
        with progress:
            for step, (x, labels) in zip(range(1, steps + 1), batches, strict=False):
                with self._autocast():
                    scores = self.call(x.contiguous(memory_format=self.layout))
                    loss = F.cross_entropy(scores, labels)
                self.scaler.scale(loss / self.args.accumulate).backward()
                if step % self.args.accumulate == 0:
                    self._step()
                losses.append(loss.detach())
                correct += (scores.detach().argmax(1) == labels).sum()
                if step % every == 0 or step == steps:
                    for batch, value in enumerate(torch.stack(losses).tolist(), step - len(losses) + 1):
                        total += check_loss(value, number + 1, batch)
                    losses.clear()
                    progress.set_postfix(loss=f"{total / step:.3f}", refresh=False)
                progress.update()
        check_parameters(self.model)
        images = steps * self.args.batch
        self.history.append(
            {
                "epoch": number + 1,
                "lr": lr,
                "loss": total / steps,
                "accuracy": correct.item() / images,
                **self._test(),
                "seconds": time.perf_counter() - start,
            }
        )

    def _step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.adder:
            scale_gradients(self.model, self.args.eta)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _test(self) -> dict[str, float]:
        self.model.eval()
        total = correct = 0.0
        for index in torch.arange(len(self.test.images), device=self.device).split(self.args.batch):
            x, labels = self.test.batch(index)
            with self._autocast():
                scores = self.model(x.contiguous(memory_format=self.layout)).float()
            total += F.cross_entropy(scores, labels, reduction="sum").item()
            correct += (scores.argmax(1) == labels).sum().item()
        return {"test_loss": total / len(self.test.images), "test_accuracy": correct / len(self.test.images)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    # ---- files

    def save(self) -> None:
        folder = pathlib.Path(self.args.output)
        state = {
            "recipe": {name: getattr(self.args, name) for name in RECIPE},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }
        files.write(folder / "last.pt", _saved(state))
        accuracies = [entry["test_accuracy"] for entry in self.history]
        if accuracies.index(max(accuracies)) == len(accuracies) - 1:
            files.write(folder / "best.pt", _saved(self.model.state_dict()))
        files.write(folder / "history.json", (json.dumps(self.history, indent=1) + "\n").encode())
        if importlib.util.find_spec("matplotlib") is not None:
            files.write(folder / "history.png", _plot(self.history))

    def resume(self, last: pathlib.Path) -> None:
        """Goes on from what `save` wrote to `last`.

        Raises:
            OSError: it cannot be read.
            RuntimeError: it is damaged or not a file of this program.
        """
        state = checkpoints.read(last)
        if not isinstance(state, dict) or not {"recipe", "model", "optimizer", "scaler", "history"} <= state.keys():
            raise RuntimeError(f"{last} was not written by this program; give another --output.")
        for name in RECIPE:
            then, now = state["recipe"].get(name), getattr(self.args, name)
            if then != now:
                sys.exit(
                    f"train_cifar: this run began with --{name.replace('_', '-')} {then}, and cannot go on with {now}; "
                    "give the same, or another --output."
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]


def _saved(content: object) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def _plot(history: list[dict[str, float]]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    epochs = [entry["epoch"] for entry in history]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training"), (f"test_{name}", "test")):
            axis.plot(epochs, [entry[key] for entry in history], label=label, marker="." if len(epochs) < 40 else None)
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    data = io.BytesIO()
    figure.savefig(data, dpi=120)
    pyplot.close(figure)
    return data.getvalue()


# ---- command line


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("auto", "cifar10", "cifar100", "digits"), default="auto")
    parser.add_argument("--root", default="data", help="folder of torchvision's datasets (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="let torchvision download the data")
    parser.add_argument("--samples", type=_positive, help="train on the first so many images only")
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--layers", choices=("adder", "conv"), default="adder", help="conv trains the twin")
    parser.add_argument("--epochs", type=_positive, help="default: 400 on CIFAR, 30 on the digits")
    parser.add_argument("--stop-after", type=_positive, help="end this run after so many epochs; --resume goes on")
    parser.add_argument("--batch", type=_positive, help="default: 256 on CIFAR, 64 on the digits")
    parser.add_argument("--accumulate", type=_positive, default=1, help="batches to one step (default: %(default)s)")
    parser.add_argument("--lr", type=_number, default=0.1)
    parser.add_argument("--momentum", type=_number, default=0.9)
    parser.add_argument("--weight-decay", type=_number, default=5e-4)
    parser.add_argument("--eta", type=_number, default=0.2, help="of the adaptive learning rate (default: %(default)s)")
    parser.add_argument("--amp", choices=AMP, default="off", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for checkpoints and history (default: runs/MODEL-LAYERS)")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.output = args.output or f"runs/{args.model}-{args.layers}"
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and not below 0, got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    last = pathlib.Path(args.output) / "last.pt"
    if args.resume and not last.is_file():
        sys.exit(f"train_cifar: there is no {last} to resume from; leave --resume away, or give its --output.")
    if not args.resume and last.exists():
        sys.exit(f"train_cifar: {last} is there already; --resume goes on from it, another --output starts anew.")
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"train_cifar: the folder {last.parent} cannot be made ({error.strerror}); give another --output.")
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        sys.exit(f"train_cifar: the device {args.device} cannot be used ({reason}); give another --device.")
    train, test, classes = load(args, device)
    args.epochs = args.epochs or EPOCHS[args.data]
    args.batch = args.batch or (64 if args.data == "digits" else 256)
    if len(train.images) < args.batch * args.accumulate:
        sys.exit(
            f"train_cifar: {len(train.images)} images are less than one step of {args.accumulate} batches of "
            f"{args.batch}; give a smaller --batch or --accumulate."
        )
    trainer = Trainer(args, train, test, classes)
    if args.resume:
        try:
            trainer.resume(last)
        except (OSError, RuntimeError) as error:
            sys.exit(f"train_cifar: {error}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.model} ({args.layers}) on {args.data}: {len(train.images)} training and {len(test.images)} test "
        f"images, epochs {len(trainer.history) + 1} to {args.epochs}, {where}."
    )
    start = len(trainer.history)
    for done in range(start, args.epochs):
        if done - start == args.stop_after:
            print(f"Stopped after {done} epochs; --resume goes on.")
            return
        try:
            trainer.epoch()
        except DivergedError as error:
            other = "" if args.amp == "off" else " or --amp off"
            kept = f"; {last} is still that of epoch {done}" if last.exists() else ""
            sys.exit(f"train_cifar: {error} Begin again with a lower --lr{other}, in another --output{kept}.")
        trainer.save()
        entry = trainer.history[-1]
        print(
            f"epoch {entry['epoch']:3d}  loss {entry['loss']:.4f}  accuracy {entry['accuracy']:.2%}  "
            f"test loss {entry['test_loss']:.4f}  test accuracy {entry['test_accuracy']:.2%}  {entry['seconds']:.1f} s",
            flush=True,
        )
    best = max(entry["test_accuracy"] for entry in trainer.history)
    print(f"Best test accuracy {best:.2%}. Files: {last.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        print("For the plot, history.png, install matplotlib.")


if __name__ == "__main__":
    main()
