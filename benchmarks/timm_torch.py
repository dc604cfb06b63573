"""Baseline: training a timm model in bfloat16 with a plain PyTorch script.

Prints one JSON line with the duration of the training steps of each epoch in seconds. `make bench-train` runs this
script in a separate virtual environment, created from benchmarks/torch.lock.
"""

import argparse
import json
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import functional

MEAN, STANDARD_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_images(directory: Path, side: int) -> TensorDataset:
    """Read, decode and resize all images once, like `cache()` in the Keras script."""
    images, labels = [], []
    for label, name in enumerate(sorted(path.name for path in directory.iterdir())):
        for path in sorted((directory / name).iterdir()):
            image = functional.resize(functional.pil_to_tensor(Image.open(path).convert("RGB")), [side, side])
            images.append(functional.normalize(image / 255, MEAN, STANDARD_DEVIATION))
            labels.append(float(label))
    return TensorDataset(torch.stack(images), torch.tensor(labels)[:, None])


def main() -> None:
    """Train all layers and print the duration of each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path, help="contains train with one directory per class")
    parser.add_argument("--base", required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(1)
    batches = DataLoader(
        load_images(options.directory / "train", options.side), options.batch, shuffle=True, drop_last=True
    )
    model = timm.create_model(options.base, pretrained=False, num_classes=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    criterion = torch.nn.BCEWithLogitsLoss()
    seconds = []
    model.train()
    for _ in range(options.epochs):
        start = time.monotonic()
        for images, labels in batches:
            flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(flipped.contiguous(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimizer.step()
        seconds.append(time.monotonic() - start)
    print(json.dumps({"epochs": {"all": seconds}}))


if __name__ == "__main__":
    main()
