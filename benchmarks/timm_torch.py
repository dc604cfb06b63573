"""The same training as a plain PyTorch script with a model of timm in bfloat16, as its users would write it.

Prints one JSON line: the seconds of the training steps of each epoch. `make bench-train` runs it in an environment
of its own, from benchmarks/torch.lock.
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

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(folder: Path, side: int) -> TensorDataset:
    """Read, decode and resize all images once, as `cache()` does in the Keras script."""
    pictures, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / name).iterdir()):
            picture = functional.resize(functional.pil_to_tensor(Image.open(path).convert("RGB")), [side, side])
            pictures.append(functional.normalize(picture / 255, MEAN, DEVIATION))
            labels.append(float(label))
    return TensorDataset(torch.stack(pictures), torch.tensor(labels)[:, None])


def main() -> None:
    """Train all layers and print what each epoch took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="holds train with class folders")
    parser.add_argument("--base", required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(1)
    batches = DataLoader(images(options.folder / "train", options.side), options.batch, shuffle=True, drop_last=True)
    model = timm.create_model(options.base, pretrained=False, num_classes=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    criterion = torch.nn.BCEWithLogitsLoss()
    seconds = []
    model.train()
    for _ in range(options.epochs):
        began = time.monotonic()
        for pictures, labels in batches:
            flipped = torch.where(torch.rand(len(pictures), 1, 1, 1) < 0.5, pictures.flip(-1), pictures)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(flipped.contiguous(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimizer.step()
        seconds.append(time.monotonic() - began)
    print(json.dumps({"epochs": {"all": seconds}}))


if __name__ == "__main__":
    main()
