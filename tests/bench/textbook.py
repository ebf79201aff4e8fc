"""The textbook's way of training, to measure against: torchvision transforms of every image, every epoch."""

import time

import torch
import torch.nn.functional as F
from torchvision import datasets, transforms

from net import simpleconv3

END = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
TRAIN = transforms.Compose([transforms.RandomResizedCrop(48), transforms.RandomHorizontalFlip(), *END])
VAL = transforms.Compose([transforms.Resize(48), transforms.CenterCrop(48), *END])


def train_textbook(train, val, nclass, epochs, step_size=100, workers=4):
    """Train on two data sets whose items are (float 3 x 48 x 48, label).

    Yields
    ------
    (float, float, simpleconv3)
        After every epoch: seconds since the start, validation accuracy, and the network, in eval mode.
    """
    loaders = [
        torch.utils.data.DataLoader(part, 64, shuffle=i == 0, num_workers=workers)
        for i, part in enumerate((train, val))
    ]
    net = simpleconv3(nclass)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size, 0.1)
    start = time.perf_counter()
    for _ in range(epochs):
        hits = 0
        for part, loader in enumerate(loaders):
            net.train(part == 0)
            for images, labels in loader:
                optimizer.zero_grad()
                logits = net(images)
                loss = F.cross_entropy(logits, labels)
                if part == 0:
                    loss.backward()
                    optimizer.step()
                else:
                    hits += (logits.argmax(1) == labels).sum().item()
        scheduler.step()
        yield time.perf_counter() - start, hits / len(val), net


def folders(data):
    """Train and validation ImageFolder of a folder, with the textbook's transforms."""
    return datasets.ImageFolder(data / "train", TRAIN), datasets.ImageFolder(data / "val", VAL)
